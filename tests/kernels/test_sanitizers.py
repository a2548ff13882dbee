"""The C code on exactly allocated memory, watched by the address and undefined-behaviour sanitizers."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from dfrot.kernels.library import FLAGS, SOURCES, backend, instruction_set

COMPILER = os.environ.get("CC") or "cc"
FLAGS_HERE = [flag for flag in FLAGS if flag not in ("-fPIC", "-shared", "-fvisibility=hidden", "-O3")]


@pytest.mark.skipif(instruction_set() == 0 or shutil.which(COMPILER) is None, reason=f"no compiler, or {backend()}")
def test_no_sanitizer_complains(tmp_path: Path) -> None:
    program = tmp_path / "check"
    sources = [str(Path(__file__).parent / "check.c"), *map(str, sorted(SOURCES.glob("*.c")))]
    sanitizers = ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    compiled = subprocess.run(
        [COMPILER, *FLAGS_HERE, *sanitizers, f"-I{SOURCES}", *sources, "-o", str(program), "-lm"],
        capture_output=True,
        text=True,
        check=False,
    )
    if "cannot find" in compiled.stderr:
        pytest.skip(f"the compiler has no sanitizers: {compiled.stderr.splitlines()[-1]}")
    assert compiled.returncode == 0, compiled.stderr
    environment = os.environ | {"ASAN_OPTIONS": "detect_leaks=0"}  # scratch memory is kept for the next call
    run = subprocess.run([str(program)], capture_output=True, text=True, check=False, env=environment)
    assert (run.stdout, run.stderr, run.returncode) == ("ok\n", "", 0)
