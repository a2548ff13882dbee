import platform
import subprocess
import sys
from pathlib import Path

import pytest

from dfrot.system.memory import available_memory

_FAULTS = """
import resource, sys, torch
from dfrot.system.memory import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
before = None
for _ in range(20):
    torch.ones(16 << 20)  # 64 MB
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt if before is None else before
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's malloc is told to keep memory")
def test_freed_buffers_are_used_again_without_page_faults() -> None:
    faults = {
        mode: int(subprocess.run([sys.executable, "-c", _FAULTS, mode], check=True, capture_output=True).stdout)
        for mode in ("keep", "give back")
    }
    assert faults["keep"] * 10 < faults["give back"]


_HOLES = """
import re, torch
from dfrot.system.memory import give_freed_memory_back, keep_freed_memory

def resident():
    return int(re.search(r"RssAnon:\\s*(\\d+) kB", open("/proc/self/status").read())[1]) * 1024

keep_freed_memory()
held = [torch.ones(1 << 18) for _ in range(200)]  # a megabyte each
del held[::2]
before = resident()
give_freed_memory_back()
print(before - resident())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's malloc is told to give memory back")
def test_holes_between_what_is_in_use_are_given_back() -> None:
    freed = int(subprocess.run([sys.executable, "-c", _HOLES], check=True, capture_output=True).stdout)
    assert 90 << 20 < freed < 120 << 20  # half of 200 MB, whole pages only


def system(root: Path, groups: str, files: dict[str, str]) -> Path:
    """The files of a system with 8 MB available."""
    for name, text in {"proc/meminfo": "MemAvailable: 8000 kB\n", "proc/self/cgroup": groups, **files}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


@pytest.mark.parametrize(
    ("groups", "files", "available"),
    [
        ("0::/\n", {}, 8000 * 1024),
        ("0::/\n", {"memory.max": "max", "memory.current": "5", "memory.stat": ""}, 8000 * 1024),
        ("0::/a/b\n", {"a/memory.max": "1000", "a/memory.current": "700", "a/memory.stat": "inactive_file 200\n"}, 500),
        ("0::/\n", {"memory.max": "1000", "memory.current": "1200", "memory.stat": ""}, 0),
        (
            "4:cpu:/\n3:memory,hugetlb:/of/the/host\n0::/\n",
            {
                "memory/memory.limit_in_bytes": "4000\n",
                "memory/memory.usage_in_bytes": "1000\n",
                "memory/memory.stat": "inactive_file 7\ntotal_inactive_file 50\n",
            },
            3050,
        ),
    ],
)
def test_what_a_container_leaves_is_what_is_available(
    tmp_path: Path, groups: str, files: dict[str, str], available: int
) -> None:
    files = {f"sys/fs/cgroup/{name}": text for name, text in files.items()}
    assert available_memory(system(tmp_path, groups, files)) == available
