"""Results kept for later runs: fitted rotations in a file, and a folder that the runs of a comparison share.

A fit is kept because fitting again, with another number of threads, would give slightly other rotations.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from torch import Tensor

from dfrot.models.source import open_safetensors, tensors_in
from dfrot.system.errors import SetupError, UserError
from dfrot.system.files import parse_json, read_json, write_json, write_tensors


def write_fit(path: Path, record: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Write JSON and tensors into one file, atomically. Raises SetupError if it cannot be written."""
    write_tensors(path, tensors, {"record": json.dumps(record)})


def read_fit(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
    """The record and tensors of `write_fit`; None without a file. Raises UserError if the file is something else."""
    if not path.is_file():
        return None
    with open_safetensors(path) as file:
        try:
            record = parse_json((file.metadata() or {})["record"])
        except (KeyError, ValueError) as error:
            raise UserError(f"{path} holds no fitted rotations ({error}). Delete it to fit again.") from error
    parts = [record.get(name) for name in ("transforms", "notes")] if isinstance(record, dict) else [None]
    if not all(isinstance(part, dict) for part in parts):
        raise UserError(f"{path} holds no fitted rotations. Delete it to fit again.")
    return record, {name: tensor.read() for name, tensor in tensors_in(path).items()}


class ReuseDir:
    """A folder of fits, and of the places of finished checkpoints whose blocks can be taken over.

    Both are named by a digest of everything that they depend on. Without a folder (None) nothing is kept or found.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        if folder is not None:
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise SetupError(f"cannot make {folder}: {error}") from error

    def _path(self, name: str, depends_on: dict[str, Any]) -> Path | None:
        key = hashlib.sha256(json.dumps(depends_on, sort_keys=True).encode()).hexdigest()[:16]
        return self._folder and self._folder / name.format(key)

    def fit(self, depends_on: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
        """The fit of `keep_fit`."""
        return read_fit(path) if (path := self._path("fit-{}.safetensors", depends_on)) else None

    def keep_fit(self, depends_on: dict[str, Any], record: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """Raises SetupError if it cannot be written."""
        if path := self._path("fit-{}.safetensors", depends_on):
            write_fit(path, record, tensors)

    def checkpoint(self, depends_on: dict[str, Any]) -> Path | None:
        """The checkpoint of `keep_checkpoint`, if it still exists."""
        if (note := self._path("blocks-{}.json", depends_on)) is None or not note.is_file():
            return None
        path = Path(read_json(note)["checkpoint"])
        return path if (path / "config.json").is_file() else None

    def keep_checkpoint(self, depends_on: dict[str, Any], path: Path) -> None:
        """Raises SetupError if it cannot be written."""
        if note := self._path("blocks-{}.json", depends_on):
            write_json(note, {"checkpoint": str(path.resolve())})
