"""Where things are kept between runs."""

import os
from pathlib import Path


def cache_dir() -> Path:
    """Converted models and compiled kernels: $DFROT_CACHE, else the user's cache folder."""
    root = os.environ.get("DFROT_CACHE") or Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "dfrot"
    return Path(root).expanduser()
