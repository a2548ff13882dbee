"""A browser without a window, and a page that is open in it."""

import shutil
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
in_browser = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium on this machine")


class Visit:
    """A page that is open, and what went on while it was."""

    def __init__(self, browser: Any, path: Path, width: int = 1440) -> None:
        self.context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme="light")
        self.requests: list[str] = []
        self.errors: list[str] = []
        self.page = self.context.new_page()
        self.context.on("request", lambda request: self.requests.append(request.url))
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("console", lambda told: self.errors.append(told.text) if told.type == "error" else None)
        self.page.on("dialog", self._dismiss)
        self.page.goto(path.as_uri())
        self.page.wait_for_selector("html[data-drawn]", timeout=60_000)

    def _dismiss(self, dialog: Any) -> None:
        self.errors.append(dialog.message)
        dialog.dismiss()
