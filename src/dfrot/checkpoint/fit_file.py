"""Fitted rotations in a file: JSON and tensors, so that a resumed run, or another one, goes on with exactly those."""

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from dfrot.models.source import open_safetensors
from dfrot.system.errors import UserError
from dfrot.system.files import parse_json, write_tensors


def write_fit(path: Path, record: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """JSON and tensors in one file, atomically.

    Raises:
        SetupError: it cannot be written.
    """
    write_tensors(path, tensors, {"record": json.dumps(record)})


def read_fit(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
    """What `write_fit` wrote, if it is there.

    Raises:
        UserError: something else is there.
    """
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
        return record, all_tensors(file)


def all_tensors(file: Any) -> dict[str, Tensor]:
    return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 — safe_open is no mapping
