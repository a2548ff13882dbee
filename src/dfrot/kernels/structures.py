"""The C structures of native/*.h, filled from tensors, and what every operator needs."""

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from dfrot.kernels.library import library
from dfrot.kernels.lowering import BUTTERFLIES

DTYPES = {torch.float32: 0, torch.bfloat16: 1}
size = ctypes.c_int64


class Grid(ctypes.Structure):
    _fields_ = (("bits", ctypes.c_int), ("symmetric", ctypes.c_int), ("clip", ctypes.c_float))


class Pass(ctypes.Structure):
    _fields_ = (("kind", size), ("size", size), ("after", size), ("data", ctypes.c_void_p))


class Transform(ctypes.Structure):
    _fields_ = (("count", size), ("passes", ctypes.POINTER(Pass)), ("square", ctypes.c_float))


class Weights(ctypes.Structure):
    _fields_ = (
        *((name, size) for name in ("out", "in_", "group", "groups")),
        ("bits", ctypes.c_int),
        ("codes", ctypes.c_void_p),
        ("bytes", size),
        ("scale", ctypes.c_void_p),
        ("scale_dtype", ctypes.c_int),
        ("zero", ctypes.c_void_p),
        ("sums", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
    )


class Cache(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("codes", "scale", "zero")),
        *((name, size) for name in ("heads", "capacity", "dim")),
        ("bits", ctypes.c_int),
    )


class Norm(ctypes.Structure):
    _fields_ = (("weight", ctypes.c_void_p), ("eps", ctypes.c_double))


class Block(ctypes.Structure):
    _fields_ = (
        *((name, size) for name in ("heads", "kv_heads", "dim", "rotary")),
        *((name, Norm) for name in ("attention_norm", "mlp_norm", "query_norm", "key_norm")),
        ("readers", ctypes.POINTER(Weights)),
        ("num_readers", size),
        *((name, ctypes.POINTER(Weights)) for name in ("output", "gates", "down")),
        ("num_gates", size),
        *((name, Transform) for name in ("before_readers", "keys", "before_output", "before_mlp", "before_down")),
        *((name, Grid) for name in ("grid", "query_grid")),
        ("kv_bits", ctypes.c_int),
        *((name, ctypes.c_float) for name in ("key_clip", "value_clip")),
        ("scaling", ctypes.c_double),
    )


class Tokens(ctypes.Structure):
    _fields_ = (
        ("x", ctypes.c_void_p),
        *((name, size) for name in ("dtype", "batch", "tokens")),
        *((name, ctypes.c_void_p) for name in ("cos", "sin")),
    )


def computable(x: Tensor) -> bool:
    """Whether there are kernels for such a tensor: on the CPU, float32 or bfloat16, with nothing to differentiate."""
    return x.device.type == "cpu" and x.dtype in DTYPES and not (x.requires_grad and torch.is_grad_enabled())


def native() -> ctypes.CDLL:
    """The library, which the caller knows to be there."""
    there = library()
    assert there is not None, "there are no kernels here"
    return there


def pointer(tensor: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def transform(passes: Sequence[int], data: Sequence[Tensor], square: float) -> Transform:
    """From what `flatten` made."""
    count, tensors = len(passes) // 3, iter(data)
    made = (Pass * count)()
    for number in range(count):
        kind, width, after = passes[3 * number : 3 * number + 3]
        made[number] = Pass(kind, width, after, None if kind == BUTTERFLIES else next(tensors).data_ptr())
    return Transform(count, made, square)


def weights_of(
    qweights: Sequence[Tensor],
    scales: Sequence[Tensor],
    zeros: Sequence[Tensor],
    sums: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    bits: int,
    group: int,
) -> ctypes.Array[Weights]:
    """The weights that read one input; group 0 stands for whole rows."""
    made = (Weights * len(qweights))()
    for number, (qweight, scale) in enumerate(zip(qweights, scales, strict=True)):
        out_features, num_bytes = qweight.shape
        in_features = num_bytes * 8 // bits
        made[number] = Weights(
            *(out_features, in_features, group or in_features, scale.shape[1], bits, qweight.data_ptr(), num_bytes),
            *(scale.data_ptr(), DTYPES[scale.dtype], zeros[number].data_ptr() if zeros else None),
            *(sums[number].data_ptr(), None if (bias := biases[number]) is None else bias.data_ptr()),
        )
    return made


def cache(codes: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Cache:
    """Packed keys or values (batch, heads, tokens, …); a view may cut the tokens, no other axis."""
    _, heads, _, num_bytes = codes.shape
    capacity = codes.stride(1) // num_bytes
    for tensor in (codes, scale, zero):
        width = tensor.shape[-1]
        batch_stride = tensor.stride(0) if tensor.shape[0] > 1 else heads * capacity * width
        assert (batch_stride, tensor.stride(2)) == (heads * capacity * width, width), "only the tokens may be cut"
        assert heads == 1 or tensor.stride(1) == capacity * width, "only the tokens may be cut"
    return Cache(codes.data_ptr(), scale.data_ptr(), zero.data_ptr(), heads, capacity, num_bytes * 8 // bits, bits)


def mask_strides(mask: Tensor | None) -> tuple[int, int]:
    """From one sequence to the next and from one query to the next of a contiguous mask (batch, 1, tokens, length)."""
    if mask is None:
        return 0, 0
    return (mask.stride(0) if mask.shape[0] > 1 else 0), mask.stride(2)


def check(failed: int) -> None:
    """Raise MemoryError if a kernel failed; a lack of memory is the only reason it reports."""
    if failed:
        raise MemoryError("there is no memory for the scratch space of a kernel")
