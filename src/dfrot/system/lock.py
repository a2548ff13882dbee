"""One process at a time in a folder.

The kernel holds the lock, on a file in the folder. It ends with the process, however the process dies.
"""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from dfrot.system.errors import SetupError, UserError

LOCK_FILE = ".lock"


@contextlib.contextmanager
def exclusive_lock(folder: Path) -> Iterator[None]:
    """Make the folder and keep other processes out. Afterwards the lock file is removed, and so is an empty folder.

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
