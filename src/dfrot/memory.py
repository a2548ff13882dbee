"""How the process treats freed memory."""

import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h of glibc


def keep_freed_memory() -> None:
    """Let malloc keep what is freed; for programs, since it concerns the whole process.

    glibc gives big buffers (always those above 32 MB) back to the system as soon as they are freed. A forward pass on
    the CPU makes and frees hundreds of them, each time paying for fresh pages: elementwise work takes two to four times
    as long. Does nothing where the C library is another.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 1 << 30)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
