import platform
import subprocess
import sys

import pytest

_FAULTS = """
import resource, sys, torch
from dfrot.memory import keep_freed_memory
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
