"""Figures as static images, drawn by kaleido in a browser without a window."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from dfrot.report.drawing import Figure
from dfrot.system.errors import SetupError

WIDTH = 760  # pixels; heights are the figures' own
SCALE = 2  # of pixels in a PNG


def save_images(figures: Sequence[Figure], folder: Path, formats: Sequence[Literal["png", "svg"]]) -> None:
    """Write every figure as `folder/<name>.<format>`.

    Raises:
        SetupError: kaleido or a browser is missing, or drawing failed.
    """
    try:
        import kaleido
    except ImportError as error:
        raise SetupError("images need the package kaleido. Install it: pip install 'dfrot[report]'") from error
    from choreographer.errors import BrowserFailedError, ChromeNotFoundError

    orders = [
        {
            "fig": {**figure.plot, "layout": {**figure.plot["layout"], "paper_bgcolor": "white"}},
            "path": folder / f"{figure.name}.{kind}",
            "opts": {"width": WIDTH, "scale": SCALE if kind == "png" else 1},
        }
        for figure in figures
        for kind in formats
    ]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # mathjax would be fetched from the network
        kaleido.write_fig_from_object_sync(orders, kopts={"mathjax": False}, cancel_on_error=True)
    except ChromeNotFoundError as error:
        raise SetupError(
            "images are drawn by Chrome or Chromium, and there is none. Install one or say where it is in BROWSER_PATH."
        ) from error
    except (BrowserFailedError, OSError, TimeoutError) as error:
        reason = error.args[0] if error.args else type(error).__name__  # choreographer's further ones are advice
        raise SetupError(f"the browser that draws images failed: {reason} The page itself is written.") from error
