import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# Without a GPU Triton's kernels run in its interpreter, which must be chosen before torch imports Triton.
if not Path("/dev/nvidiactl").exists():
    os.environ["TRITON_INTERPRET"] = "1"

import pytest
import torch
from transformers.utils import logging as transformers_logging

from tests.browser import CHROMIUM
from tests.shapes import check_shapes_only
from tests.tiny_models import MULTIMODAL, write_multimodal_model, write_tiny_model

check_shapes_only()

# Tests read what commands print; saving a tiny model must not add a bar to it.
transformers_logging.disable_progress_bar()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The directory of a tiny random model, made on first use. Treat it as read-only."""
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            write = write_multimodal_model if name in MULTIMODAL else write_tiny_model
            made[name] = write(name, tmp_path_factory.mktemp(name))
        return made[name]

    return get


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A calibration text of a few thousand characters."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("the quick brown fox jumps over the lazy dog; 0123456789! " * 40)
    return path


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium; tests that take it are `in_browser`."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--enable-unsafe-swiftshader"]
        )
        yield launched
        launched.close()
