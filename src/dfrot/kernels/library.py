"""The compiled C library: found beside the package, or compiled on first use and kept.

Everything works without it, only slower: `backend()` says which is used and why.
"""

import ctypes
import functools
import os
import platform
import subprocess

from dfrot.kernels.compile import SOURCES, compile_library, library_name
from dfrot.system.files import cache_dir

INSTRUCTION_SETS = ("none", "AVX2", "AVX512-VNNI", "AMX-int8")
AVX2 = 1
_SWITCH = "DFROT_KERNELS"  # set to "reference": torch alone


@functools.cache
def _found() -> tuple[ctypes.CDLL | None, str]:
    """The library, and which instruction set it uses; or None, and why not."""
    if os.environ.get(_SWITCH) == "reference":
        return None, f"{_SWITCH}=reference is set"
    if platform.machine() not in ("x86_64", "AMD64"):
        return None, f"there are no kernels for {platform.machine()}"
    path = SOURCES / library_name()
    try:
        if not path.is_file():
            path = cache_dir() / "kernels" / library_name()
        if not path.is_file():
            compile_library(path)
        library = ctypes.CDLL(str(path))
    except subprocess.CalledProcessError as error:
        why = (error.stderr or "").strip().splitlines()
        return None, f"the kernels do not compile: {why[0] if why else f'{error.cmd[0]} fails'}"
    except OSError as error:
        return None, f"the kernels cannot be compiled or loaded: {error}"
    if library.dfrot_isa() == 0:
        return None, "the processor has neither AVX2 nor anything newer"
    return library, f"with {INSTRUCTION_SETS[library.dfrot_isa()]}"


def library() -> ctypes.CDLL | None:
    """The compiled library, or None if it cannot be had here."""
    return _found()[0]


@functools.cache
def instruction_set() -> int:
    """Position in `INSTRUCTION_SETS` of what the kernels use; 0 if there are none."""
    native = library()
    return 0 if native is None else native.dfrot_isa()


def backend() -> str:
    """What computes here, for people."""
    there, why = _found()
    return f"native kernels {why}" if there is not None else f"torch reference: {why}"
