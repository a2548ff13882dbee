"""Compiling the C sources. Imports nothing but the standard library: the build of the package uses it too."""

import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

SOURCES = Path(__file__).parent / "native"
FLAGS = (
    *("-O3", "-std=gnu11", "-fPIC", "-shared", "-fopenmp", "-fvisibility=hidden"),
    *("-fno-math-errno", "-fno-trapping-math"),  # or rintf is a call
    "-ffp-contract=off",  # a product and a sum are rounded as torch rounds them
)


def library_name() -> str:
    """Differs between sources and flags that differ."""
    content = b"".join(file.read_bytes() for file in sorted(SOURCES.glob("*.[ch]")))
    return f"dfrot-{hashlib.sha256(content + ' '.join(FLAGS).encode()).hexdigest()[:16]}.so"


def compile_library(into: Path) -> None:
    """Compile to a shared library with $CC, else the first of cc, gcc and clang that is there.

    Raises:
        OSError: there is no compiler, or the folder cannot be written.
        subprocess.CalledProcessError: the compiler refused; `stderr` says why.
    """
    compiler = os.environ.get("CC") or next(filter(shutil.which, ("cc", "gcc", "clang")), "cc")
    into.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=into.parent) as folder:  # renamed when whole: others may be compiling too
        made = Path(folder) / into.name
        sources = sorted(map(str, SOURCES.glob("*.c")))
        command = [*compiler.split(), *FLAGS, *sources, "-o", str(made)]
        subprocess.run(command, check=True, capture_output=True, text=True)
        made.replace(into)
