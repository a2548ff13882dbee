"""The manifest of an unfinished checkpoint: the run that its files belong to, and the digest and notes of each."""

import hashlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dfrot.system.errors import UserError
from dfrot.system.files import LOCK_FILE, RUN_FILE, read_json

FIT_FILE = "dfrot-run.safetensors"


def read_manifest(path: Path) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """The run's identity, and digest and notes of its files by name. Raises UserError if the file is no manifest."""
    manifest = read_json(path)
    run, files = manifest.get("run"), manifest.get("files")
    if not isinstance(run, dict) or not isinstance(files, dict):
        raise UserError(f"{path} is not the manifest of an interrupted run. --overwrite it.")
    names = re.compile(rf"model-\d+-of-\d+\.safetensors|{re.escape(FIT_FILE)}", re.ASCII)  # no path leads elsewhere
    for name, entry in files.items():
        known = isinstance(entry, dict) and isinstance(entry.get("sha256"), str)
        if not known or not names.fullmatch(name) or not isinstance(entry.get("notes", {}), dict):
            raise UserError(f"{path} lists a file that no run writes, {name!r}. --overwrite it.")
    return run, files


def is_blank(path: Path) -> bool:
    """Whether a directory is absent, empty, or left by a run that died before its first write."""
    if not path.is_dir():
        return not path.exists()
    return all(file.name in (LOCK_FILE, RUN_FILE + ".tmp") for file in path.iterdir())


def is_ours(path: Path) -> bool:
    """Whether a directory is a dfrot checkpoint or an interrupted run."""
    if (path / RUN_FILE).is_file():
        return True
    try:
        record = read_json(path / "config.json").get("quantization_config")
    except UserError:
        return False
    return isinstance(record, dict) and record.get("quant_method") == "dfrot"


def digest(path: Path) -> str | None:
    """The sha256 of a file; None if there is no such file."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError:
        return None


def differences(before: dict[str, Any], now: dict[str, Any]) -> Iterator[str]:
    """Where two records of the same form differ."""
    for name, was in before.items():
        is_now = now.get(name, was)  # names that only one of them has are not reported
        if isinstance(was, dict) and isinstance(is_now, dict):
            inner = "" if name == "recipe" else f"{name}."
            yield from (inner + difference for difference in differences(was, is_now))
        elif was != is_now:
            yield f"{name}: {was}, not {is_now}"
