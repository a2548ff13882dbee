"""How much memory there is, and how the process treats what it has freed."""

import contextlib
import ctypes
import os
import re
from collections.abc import Iterator
from pathlib import Path

from dfrot.system.errors import UserError

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h of glibc
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


def keep_freed_memory(largest: int = 1 << 30) -> None:
    """Let malloc keep what is freed; for programs, since it concerns the whole process.

    glibc gives big buffers (always those above 32 MB) back to the system as soon as they are freed. A forward pass on
    the CPU makes and frees hundreds of them, each time paying for fresh pages: elementwise work takes two to four times
    as long. Does nothing where the C library is another.

    Args:
        largest: bytes of a buffer that is kept. What is kept can be as much again as is in use.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, largest)
        mallopt(_M_TRIM_THRESHOLD, 2 * largest - 1)


def give_freed_memory_back() -> None:
    """Return to the system what was freed, also from between what is in use; where glibc is, else nothing happens.

    A heap that has held a decoder block is full of holes, and the next block does not fit into them: what is resident
    would be one block and what is left of those before.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def available_memory(root: Path = Path("/")) -> int:
    """Bytes that this process can take: without others being swapped out, and within the limits of its control groups.

    Where the system does not tell, all the memory there is.

    Args:
        root: of the system that is asked.
    """
    meminfo = root / "proc/meminfo"
    if meminfo.is_file() and (found := re.search(r"MemAvailable:\s*(\d+) kB", meminfo.read_text())):
        return max(0, min([int(found[1]) * 1024, *_left_by_control_groups(root)]))
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _left_by_control_groups(root: Path) -> Iterator[int]:
    """The limit of each control group around this process, less what is in use and is no cache that can be dropped."""
    try:
        memberships = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for membership in memberships:
        _, controllers, path = membership.split(":", 2)
        if not controllers:  # version 2
            top, limit, used, cache = root / "sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            top, limit, used = root / "sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
            cache = "total_inactive_file"
        else:
            continue
        group = top / path.strip("/")
        for folder in (group, *group.parents):  # in a container the path is the host's, and only the top is there
            with contextlib.suppress(OSError, ValueError):  # no such file; no limit: "max"
                kept = re.search(rf"^{cache} (\d+)$", (folder / "memory.stat").read_text(), re.MULTILINE)
                dropped = int(kept[1]) if kept else 0
                yield int((folder / limit).read_text()) - int((folder / used).read_text()) + dropped
            if folder == top:
                break


def parse_size(text: str) -> int:
    """Bytes: 8GB, 6GiB, 512MB.

    Raises:
        UserError: it is no size.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?i?)b?", text.strip().lower())
    if found is None or found[2] not in _UNITS or not (size := int(float(found[1]) * _UNITS[found[2]])):
        raise UserError(f"a size of memory is a number with a unit, such as 8GB, 6GiB or 512MB, got '{text}'.")
    return size
