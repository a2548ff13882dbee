"""How much memory is available, and whether the process keeps the memory that it has freed."""

import contextlib
import ctypes
import os
import re
from collections.abc import Iterator
from pathlib import Path

# A control group's files, by version: below /sys/fs/cgroup, its limit, its use, and the droppable cache in memory.stat.
_GROUP_FILES = {
    2: ("", "memory.max", "memory.current", "inactive_file"),
    1: ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}


def keep_freed_memory(largest: int = 1 << 30) -> None:
    """Let malloc keep freed memory. For programs only, since it concerns the whole process; a no-op outside glibc.

    glibc returns big buffers (always those above 32 MB) to the system as soon as they are freed. A forward pass on the
    CPU makes and frees hundreds of them and pays for fresh pages each time: elementwise work takes two to four times as
    long.

    Args:
        largest: bytes of the largest buffer that is kept. Freed memory can then double the process.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        trim_threshold, mmap_threshold = -1, -3  # as glibc's malloc.h numbers them
        mallopt(mmap_threshold, largest)
        mallopt(trim_threshold, 2 * largest - 1)


def give_freed_memory_back() -> None:
    """Return freed memory to the system, also from holes between buffers in use; a no-op outside glibc.

    A heap that has held a decoder block is full of holes that the next block does not fit into. Without this, one block
    and the remains of all earlier ones would stay resident.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def available_memory(root: Path = Path("/")) -> int:
    """Bytes that this process can take without swapping and within the limits of its control groups.

    Where the system does not tell, all of its memory. `root` is that of the file system to read from.
    """
    meminfo = root / "proc/meminfo"
    if meminfo.is_file() and (found := re.search(r"MemAvailable:\s*(\d+) kB", meminfo.read_text())):
        return max(0, min([int(found[1]) * 1024, *_left_by_control_groups(root)]))
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _left_by_control_groups(root: Path) -> Iterator[int]:
    """The limit of each control group around this process, less its use, but for cache that can be dropped."""
    try:
        memberships = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for membership in memberships:
        _, controllers, path = membership.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        subfolder, limit, used, cache = _GROUP_FILES[1 if controllers else 2]  # version 2 lists no controllers
        top = root / "sys/fs/cgroup" / subfolder
        group = top / path.strip("/")
        for folder in (group, *group.parents):  # in a container the path is the host's, and only the top is there
            with contextlib.suppress(OSError, ValueError):  # no such file; no limit: "max"
                droppable = re.search(rf"^{cache} (\d+)$", (folder / "memory.stat").read_text(), re.MULTILINE)
                left = int((folder / limit).read_text()) - int((folder / used).read_text())
                yield left + (int(droppable[1]) if droppable else 0)
            if folder == top:
                break
