"""Files: JSON from others, atomic writes, so that no half-written file has a final name, and locks on folders."""

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from dfrot.system.errors import SetupError, UserError

LOCK_FILE = ".lock"
RUN_FILE = "dfrot-run.json"  # marks a directory as an unfinished run that can be resumed
SCRATCH = "dfrot-run-"  # of temporary files, so that a resumed run knows what a killed one left


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text. Raises ValueError if it is not JSON, or nested too deeply to be walked recursively."""
    try:
        value = json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    level = [value]
    for _ in range(100):  # dfrot's own files have six levels
        inner = [each for each in level if isinstance(each, dict | list)]
        level = [part for each in inner for part in (each.values() if isinstance(each, dict) else each)]
    if level:
        raise ValueError("it is nested too deeply")
    return value


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises UserError if the file holds none."""
    try:
        record = parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not a JSON file: {error}") from error
    if not isinstance(record, dict):
        raise UserError(f"{path} holds no JSON object.")
    return record


def cache_dir() -> Path:
    """The folder of converted models and compiled kernels: $DFROT_CACHE, else dfrot's part of the user's cache."""
    root = os.environ.get("DFROT_CACHE") or Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "dfrot"
    return Path(root).expanduser()


def write_json(path: Path, record: dict[str, Any]) -> None:
    """Write JSON atomically. Raises SetupError if it cannot be written."""
    write_text(path, json.dumps(record, indent=2, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text atomically. Raises SetupError if it cannot be written."""
    with atomically(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="replace")  # lone surrogates are no UTF-8


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    """Write safetensors atomically. Raises SetupError if they cannot be written."""
    ready = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    with atomically(path) as temporary:
        save_file(ready, temporary, metadata=metadata)
        umask = os.umask(0)  # reading the umask means setting it
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # safetensors makes files that only their owner can read


@contextlib.contextmanager
def atomically(path: Path) -> Iterator[Path]:
    """Yield a temporary name beside `path`; the file written there is synced and renamed, or removed on an error.

    Raises SetupError if it cannot be written.
    """
    temporary = path.with_name(path.name + ".tmp")
    with translate_io_errors(path.parent, temporary):
        yield temporary
        publish(temporary, path)


def publish(temporary: Path, final: Path) -> None:
    """Sync a file, rename it, and sync the folder: without the last, the new name might not survive a power cut."""
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, final)
    folder = os.open(final.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


@contextlib.contextmanager
def translate_io_errors(folder: Path, temporary: Path | None = None) -> Iterator[None]:
    """Turn a failed write to `folder` into a SetupError, and remove the temporary file on any error."""
    try:
        yield
    except BaseException as error:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
        # safetensors and tokenizers report a full disk as errors of their own, with the system's number in the text
        if not (isinstance(error, OSError) or "(os error " in str(error)):
            raise
        resumable = (folder / RUN_FILE).is_file()
        hint = " The same command with --resume instead of --overwrite continues." if resumable else ""
        raise SetupError(f"cannot write to {folder}: {error}. Make room or allow writing.{hint}") from error


@contextlib.contextmanager
def exclusive_lock(folder: Path) -> Iterator[None]:
    """Make the folder and keep other processes out. Afterwards the lock file is removed, and so is an empty folder.

    The kernel holds the lock, on that file. It ends with the process, however the process dies.

    Raises:
        UserError: another process holds the lock.
        SetupError: the folder cannot be made or written to.
    """
    path = folder / LOCK_FILE
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = path.open("a")
    except OSError as error:
        raise SetupError(f"cannot write to {folder}: {error}") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # between our open and our lock the previous holder may have removed the file, and another made a new one
            ours = os.path.samestat(os.fstat(lock.fileno()), path.stat())
        except (BlockingIOError, FileNotFoundError):
            ours = False
        except OSError as error:
            raise SetupError(f"{folder} cannot be locked: {error}") from error
        if not ours:
            raise UserError(f"another process works in {folder}. Wait for it, or choose another -o directory.")
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                path.unlink()
                folder.rmdir()  # fails, as it should, unless the folder is empty
