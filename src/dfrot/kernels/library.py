"""The C library: compiled with the package, or on first use and kept, or not at all.

Everything works without it, only slower: `backend()` says which is used and why. The build of the package runs this
file too, without dfrot's dependencies.
"""

import ctypes
import functools
import hashlib
import os
import platform
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
INSTRUCTION_SETS = ("none", "AVX2", "AVX-VNNI", "AVX512-VNNI", "AMX-int8")
AVX2, AVX512 = 1, 3
_SWITCH = "DFROT_KERNELS"  # set to "reference": torch alone
_AT_MOST = "DFROT_ISA"  # set to one of these: no newer instructions than those
_NAMES = {"avx2": AVX2, "avxvnni": 2, "avx512vnni": AVX512, "amx": 4}


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


@functools.cache
def library() -> tuple[ctypes.CDLL | None, str]:
    """The library, and which instruction set it uses; or None, and why it cannot be had here. Raises UserError where
    DFROT_ISA names no instruction set."""
    if os.environ.get(_SWITCH) == "reference":
        return None, f"{_SWITCH}=reference is set"
    if platform.machine() not in ("x86_64", "AMD64"):
        return None, f"there are no kernels for {platform.machine()}"
    from dfrot.system.files import cache_dir

    path = SOURCES / library_name()
    try:
        if not path.is_file():
            path = cache_dir() / "kernels" / library_name()
        if not path.is_file():
            compile_library(path)
        found = ctypes.CDLL(str(path))
    except subprocess.CalledProcessError as error:
        why = (error.stderr or "").strip().splitlines()
        return None, f"the kernels do not compile: {why[0] if why else f'{error.cmd[0]} fails'}"
    except OSError as error:
        return None, f"the kernels cannot be compiled or loaded: {error}"
    if found.dfrot_isa() == 0:
        return None, "the processor has neither AVX2 nor anything newer"
    used, asked = _used(found), os.environ.get(_AT_MOST)
    return found, f"with {INSTRUCTION_SETS[used]}" + (f" ({_AT_MOST}={asked})" if used < found.dfrot_isa() else "")


def _used(found: ctypes.CDLL) -> int:
    """What the library is to use: what the processor has, or less if it was told so. Raises UserError for a word that
    names no instruction set."""
    from dfrot.system.errors import UserError

    asked = os.environ.get(_AT_MOST)
    if asked is not None and asked not in _NAMES:
        raise UserError(f"{_AT_MOST} is one of {', '.join(_NAMES)}, got '{asked}'.")
    most = len(INSTRUCTION_SETS) - 1 if asked is None else _NAMES[asked]
    return max(isa for isa in range(most + 1) if found.dfrot_has(isa))


@functools.cache
def instruction_set() -> int:
    """Position in `INSTRUCTION_SETS` of what the kernels use; 0 if there are none."""
    found, _ = library()
    return 0 if found is None else _used(found)


def backend() -> str:
    """What computes here, for people."""
    found, why = library()
    return f"torch reference: {why}" if found is None else f"native kernels {why}"
