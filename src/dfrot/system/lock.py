"""One process at a time in a folder.

The lock is the kernel's, on a file in the folder: it ends with the process that holds it, however that dies.
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
    """Make the folder and keep other processes out of it; afterwards the lock's file is gone, and an empty folder too.

    Raises:
        UserError: another process is in there.
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
            ours = os.path.samestat(os.fstat(lock.fileno()), path.stat())
        except (BlockingIOError, FileNotFoundError):
            ours = False  # or its holder has just removed it
        except OSError as error:
            raise SetupError(f"{folder} cannot be locked: {error}") from error
        if not ours:
            raise UserError(f"another process works in {folder}. Wait for it, or choose another -o directory.")
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                path.unlink()
                folder.rmdir()  # only if nothing was put into it
