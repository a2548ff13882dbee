"""What the runs of a comparison share: fitted rotations, and the blocks of recipes that differ in the cache alone.

A folder holds both by key, a digest of everything that they depend on. One run leaves them, others take them.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from torch import Tensor

from dfrot.checkpoint.fit_file import read_fit, write_fit
from dfrot.system.errors import SetupError
from dfrot.system.files import read_json, write_json


class Shared:
    """The folder; without one (None) nothing is kept and nothing found."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        if folder is not None:
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise SetupError(f"cannot make {folder}: {error}") from error

    def fit(self, depends_on: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
        """What `keep_fit` kept."""
        return None if self._folder is None else read_fit(self._folder / f"fit-{_key(depends_on)}.safetensors")

    def keep_fit(self, depends_on: dict[str, Any], record: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """Raises SetupError if it cannot be written."""
        if self._folder is not None:
            write_fit(self._folder / f"fit-{_key(depends_on)}.safetensors", record, tensors)

    def checkpoint(self, depends_on: dict[str, Any]) -> Path | None:
        """A finished checkpoint with the blocks that `keep_checkpoint` kept, if it is there still."""
        if self._folder is None or not (note := self._folder / f"blocks-{_key(depends_on)}.json").is_file():
            return None
        path = Path(read_json(note)["checkpoint"])
        return path if (path / "config.json").is_file() else None

    def keep_checkpoint(self, depends_on: dict[str, Any], path: Path) -> None:
        """Raises SetupError if it cannot be written."""
        if self._folder is not None:
            write_json(self._folder / f"blocks-{_key(depends_on)}.json", {"checkpoint": str(path.resolve())})


def _key(depends_on: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(depends_on, sort_keys=True).encode()).hexdigest()[:16]
