"""Files: JSON that somebody else may have written, and writing so that nothing half-written has a final name."""

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from dfrot.system.errors import SetupError, UserError

RUN_FILE = "dfrot-run.json"  # in a directory whose writing can be resumed

_DEPTH = 100  # what dfrot writes has six levels


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: it is none, or nested so deeply that whoever walks it would run out of stack.
    """
    try:
        value = json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    level = [value]
    for _ in range(_DEPTH):
        inner = [each for each in level if isinstance(each, dict | list)]
        level = [part for each in inner for part in (each.values() if isinstance(each, dict) else each)]
    if level:
        raise ValueError("it is nested too deeply")
    return value


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        UserError: there is none.
    """
    try:
        record = parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not a JSON file: {error}") from error
    if not isinstance(record, dict):
        raise UserError(f"{path} holds no JSON object.")
    return record


def cache_dir() -> Path:
    """Converted models and compiled kernels: $DFROT_CACHE, else the user's cache folder."""
    root = os.environ.get("DFROT_CACHE") or Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "dfrot"
    return Path(root).expanduser()


def write_json(path: Path, record: dict[str, Any]) -> None:
    """Write JSON atomically.

    Raises:
        SetupError: it cannot be written.
    """
    write_text(path, json.dumps(record, indent=2, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text atomically; half characters, which UTF-8 does not have, become question marks.

    Raises:
        SetupError: it cannot be written.
    """
    with atomically(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="replace")


@contextlib.contextmanager
def atomically(path: Path) -> Iterator[Path]:
    """A name beside `path` to write to; what is there in the end is synced and gets its name, or is removed.

    Raises:
        SetupError: it cannot be written.
    """
    temporary = path.with_name(path.name + ".tmp")
    with translate_io_errors(path.parent, temporary):
        yield temporary
        publish(temporary, path)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    """Write safetensors atomically.

    Raises:
        SetupError: they cannot be written.
    """
    ready = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    temporary = path.with_suffix(".tmp")
    with translate_io_errors(path.parent, temporary):
        save_file(ready, temporary, metadata=metadata)
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # safetensors leaves files that only their owner can read
        publish(temporary, path)


def publish(temporary: Path, final: Path) -> None:
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, final)
    folder = os.open(final.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


class translate_io_errors:
    """Turns a failed write into a message, and removes what it left."""

    def __init__(self, folder: Path, temporary: Path | None = None) -> None:
        self._folder, self._temporary = folder, temporary

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        if error is None:
            return
        if self._temporary is not None:
            self._temporary.unlink(missing_ok=True)
        # safetensors reports a full disk as its own error type, with the system's text
        if isinstance(error, OSError) or "I/O error" in str(error) or "No space" in str(error):
            resumable = (self._folder / RUN_FILE).is_file()
            hint = " The same command with --resume instead of --overwrite continues." if resumable else ""
            raise SetupError(f"cannot write to {self._folder}: {error}. Make room or allow writing.{hint}") from error
