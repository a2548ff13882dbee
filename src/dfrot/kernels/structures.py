"""The structures and functions of native/, and what every operator needs to fill and call them."""

import ctypes
import functools
from collections.abc import Sequence
from ctypes import POINTER, c_double, c_float, c_int, c_int64, c_void_p
from typing import Any

import torch
from torch import Tensor

from dfrot.kernels import library
from dfrot.kernels.lowering import BUTTERFLIES

DTYPES = {torch.float32: 0, torch.bfloat16: 1}


def _all(kind: Any, names: str) -> list[tuple[str, Any]]:
    """Fields of one type."""
    return [(name, kind) for name in names.split()]


class Grid(ctypes.Structure):
    _fields_ = (*_all(c_int, "bits symmetric"), ("clip", c_float))


class Pass(ctypes.Structure):
    _fields_ = (*_all(c_int64, "kind size after"), ("data", c_void_p))


class Transform(ctypes.Structure):
    _fields_ = (("count", c_int64), ("passes", POINTER(Pass)), ("square", c_float))


class Weights(ctypes.Structure):
    _fields_ = (
        *(*_all(c_int64, "out in_ group groups"), ("bits", c_int), ("codes", c_void_p), ("bytes", c_int64)),
        *(("scale", c_void_p), ("scale_dtype", c_int), *_all(c_void_p, "zero sums bias")),
    )


class Cache(ctypes.Structure):
    _fields_ = (*_all(c_void_p, "codes scale zero"), *_all(c_int64, "heads capacity dim"), ("bits", c_int))


class Norm(ctypes.Structure):
    _fields_ = (("weight", c_void_p), ("eps", c_double))


class Block(ctypes.Structure):
    _fields_ = (
        *_all(c_int64, "heads kv_heads dim rotary"),
        *_all(Norm, "attention_norm mlp_norm query_norm key_norm"),
        *(("readers", POINTER(Weights)), ("num_readers", c_int64)),
        *(*_all(POINTER(Weights), "output gates down"), ("num_gates", c_int64)),
        *_all(Transform, "before_readers keys before_output before_mlp before_down"),
        *_all(Grid, "readers_grid output_grid gates_grid down_grid query_grid"),
        *(("kv_bits", c_int), *_all(c_float, "key_clip value_clip"), ("scaling", c_double)),
    )


class Tokens(ctypes.Structure):
    _fields_ = (("x", c_void_p), *_all(c_int64, "dtype batch tokens"), *_all(c_void_p, "cos sin"))


# What the functions take: those that cannot fail, and those that may find no memory.
_CACHES, _MASK = (POINTER(Cache),) * 2, (c_void_p, c_int64, c_int64)
_BLOCK = (c_int, c_int, POINTER(Block))
_ROWS = (c_int, c_int, c_void_p, c_int, c_int64)  # instruction set, threads, x, its element type, batch or rows
_VOID = {
    "append": (*_ROWS, c_int64, c_int64, POINTER(Transform), c_float, POINTER(Cache)),
    "unpack_cache": (c_int, POINTER(Cache), c_int64, c_int64, c_void_p, c_int),
    "divergence": (c_int, c_int, c_void_p, c_void_p, c_int, c_int64, c_int64, c_int, c_float, c_void_p),
    "code_sums": (c_void_p, c_int64, c_int64, c_int, c_int64, c_void_p),
    "clip_errors": (c_int, c_int, c_void_p, *[c_int64] * 2, *[c_void_p] * 2, c_int64, c_float, c_float, c_void_p),
    "round_columns": (c_int, c_int, *[c_void_p] * 7, c_int64, c_int64, c_float, c_float),
    "scale": (*_ROWS, c_int64, *[c_void_p] * 3, c_int),
    "fake_quantize": (c_int, c_int, c_void_p, c_int64, c_int64, POINTER(Grid), c_int, c_void_p),
    "quantize_backward": (c_int, c_int, c_void_p, c_void_p, c_int64, c_int64, POINTER(Grid), c_void_p, c_void_p),
}
_FALLIBLE = {
    "attend": (*_ROWS, *[c_int64] * 3, POINTER(Transform), c_double, *_MASK, c_void_p, *_CACHES, c_void_p),
    "linear": (*_ROWS, POINTER(Transform), POINTER(Grid), c_int, POINTER(Weights), POINTER(c_void_p)),
    "rotate": (c_int, c_int, c_void_p, c_void_p, c_int, c_int64, c_int64, POINTER(Transform)),
    "block": (*_BLOCK, POINTER(Tokens), *_CACHES, c_int64, *_MASK, c_void_p),
    "block_read": (*_BLOCK, POINTER(Tokens), *_CACHES, c_int64, *[c_void_p] * 3),
    "block_write": (*_BLOCK, c_void_p, c_void_p, c_int, c_int64, c_void_p),
}


@functools.cache
def native() -> ctypes.CDLL:
    """The library, which the caller knows to be there. Its functions raise MemoryError."""
    found, why = library.library()
    assert found is not None, why
    for name, types in {**_VOID, **_FALLIBLE}.items():
        function = getattr(found, f"dfrot_{name}")
        function.argtypes, function.restype, function.errcheck = types, None if name in _VOID else c_int, _check
    return found


def _check(failed: int | None, *_: Any) -> None:
    if failed:  # a lack of memory is the only reason that a kernel reports
        raise MemoryError("there is no memory for the scratch space of a kernel")


@torch.compiler.assume_constant_result
def instruction_set() -> int:
    """`library.instruction_set()`, which torch.compile need not look into."""
    return library.instruction_set()


def machine() -> tuple[int, int]:
    """What functions take first: the instruction set and the number of threads."""
    return library.instruction_set(), torch.get_num_threads()


def computable(x: Tensor) -> bool:
    """Whether there are kernels for such a tensor: on the CPU, float32 or bfloat16, with nothing to differentiate."""
    known = x.device.type == "cpu" and x.dtype in DTYPES and instruction_set() >= library.AVX2
    return known and not (x.requires_grad and torch.is_grad_enabled())


def pointer(tensor: Tensor | None) -> int | None:
    """Where the numbers lie; C reads them, so anything but this machine's memory is an error of ours."""
    assert tensor is None or tensor.device.type == "cpu", f"C cannot read a tensor on {tensor.device}"
    return None if tensor is None else tensor.data_ptr()


def transform(passes: Sequence[int], data: Sequence[Tensor], square: int) -> Transform:
    """From the parts of a `Lowered`, which must outlive it."""
    tensors, numbers = iter(data), zip(passes[::3], passes[1::3], passes[2::3], strict=True)
    made = [Pass(kind, *sizes, None if kind == BUTTERFLIES else pointer(next(tensors))) for kind, *sizes in numbers]
    return Transform(len(made), (Pass * len(made))(*made), square)


def cache(packed: Sequence[Tensor], bits: int) -> Cache:
    """Packed keys or values (batch, heads, tokens, …); a view may cut the tokens, no other axis."""
    _, heads, _, num_bytes = packed[0].shape
    capacity = packed[0].stride(1) // num_bytes
    for tensor in packed:
        width, strides = tensor.shape[-1], tensor.stride()
        whole = heads * capacity * width, capacity * width, width, 1
        fits = (n == 1 or stride == own for n, stride, own in zip(tensor.shape, strides, whole, strict=True))
        assert strides == whole or all(fits), "only the tokens may be cut"
    return Cache(*map(pointer, packed), heads, capacity, num_bytes * 8 // bits, bits)


def looks(mask: Tensor | None) -> tuple[int | None, int, int]:
    """A contiguous mask (batch, 1, tokens, length), and its strides from one sequence and one query to the next."""
    return pointer(mask), *mask_strides(mask)


def mask_strides(mask: Tensor | None) -> tuple[int, int]:
    """Of `looks`; 0 where all sequences look alike."""
    if mask is None:
        return 0, 0
    return (mask.stride(0) if mask.shape[0] > 1 else 0), mask.stride(2)
