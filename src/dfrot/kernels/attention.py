"""Packed keys and values: writing to the cache, reading from it, and attention of a few new tokens over it.

A cache is three tensors, (batch, heads, capacity, …): codes uint8, scales bfloat16, zero points uint8. The
tensors may be views of the first tokens, as long as no other axis is cut.
"""

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from dfrot.kernels.library import AVX2, instruction_set
from dfrot.kernels.lowering import Lowered, flatten
from dfrot.kernels.structures import DTYPES, cache, check, computable, mask_strides, native, pointer, size, transform
from dfrot.quant.spec import TensorSpec

FEW = 8  # most new tokens that the attention kernel takes; for more, unpacking once is cheaper
MOST_CHANNELS = 512  # of a head, as in native/cache.h


def supported(x: Tensor, spec: TensorSpec) -> bool:
    """Whether there are kernels for heads like x (…, head_dim) on such a grid."""
    fits = spec.bits in (4, 8) and x.shape[-1] % 32 == 0 and x.shape[-1] <= MOST_CHANNELS
    return fits and computable(x) and instruction_set() >= AVX2


def append(
    x: Float[Tensor, "batch heads tokens head_dim"],
    packed: Sequence[Tensor],
    position: int,
    rotation: Lowered,
    spec: TensorSpec,
) -> None:
    """Quantize x R into a cache, from a position on."""
    _append(x, *packed, position, *flatten(rotation), spec.bits, spec.fixed_clip, instruction_set())


def unpack(
    packed: Sequence[Tensor], spec: TensorSpec, dtype: torch.dtype
) -> Float[Tensor, "batch heads tokens head_dim"]:
    """All tokens of a cache."""
    return _unpack(*packed, spec.bits, dtype, torch.get_num_threads())


def attend(
    query: Float[Tensor, "batch heads tokens head_dim"],
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    mask: Bool[Tensor, "batch 1 tokens length"] | None,
    rotation: Lowered,
    scaling: float,
    spec: TensorSpec,
) -> Float[Tensor, "batch tokens heads head_dim"]:
    """softmax(scaling · (q R) kᵀ) v over all tokens of a cache; `mask` says where a query looks."""
    return _attend(query, *keys, *values, mask, *flatten(rotation), scaling, spec.bits, instruction_set())


@torch.library.custom_op("dfrot::append", mutates_args=("codes", "scale", "zero"))
def _append(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor,
    position: int,
    passes: Sequence[int],
    pass_data: Sequence[Tensor],
    square: float,
    bits: int,
    clip: float,
    isa: int,
) -> None:
    x = x.contiguous()
    packed, rotation = cache(codes, scale, zero, bits), transform(passes, pass_data, square)
    native().dfrot_append(
        *(isa, torch.get_num_threads(), pointer(x), DTYPES[x.dtype], size(x.shape[0]), size(x.shape[2])),
        *(size(position), ctypes.byref(rotation), ctypes.c_float(clip), ctypes.byref(packed)),
    )


@torch.library.custom_op("dfrot::unpack", mutates_args=())
def _unpack(codes: Tensor, scale: Tensor, zero: Tensor, bits: int, dtype: torch.dtype, threads: int) -> Tensor:
    batch, heads, tokens, num_bytes = codes.shape
    unpacked = torch.empty(batch, heads, tokens, num_bytes * 8 // bits, dtype=dtype)
    packed = cache(codes, scale, zero, bits)
    native().dfrot_unpack_cache(
        threads, ctypes.byref(packed), size(batch), size(tokens), pointer(unpacked), DTYPES[dtype]
    )
    return unpacked


@_unpack.register_fake
def _(codes: Tensor, scale: Tensor, zero: Tensor, bits: int, dtype: torch.dtype, threads: int) -> Tensor:
    return codes.new_empty((*codes.shape[:-1], codes.shape[-1] * 8 // bits), dtype=dtype)


@torch.library.custom_op("dfrot::attend", mutates_args=())
def _attend(
    query: Tensor,
    key_codes: Tensor,
    key_scale: Tensor,
    key_zero: Tensor,
    value_codes: Tensor,
    value_scale: Tensor,
    value_zero: Tensor,
    mask: Tensor | None,
    passes: Sequence[int],
    pass_data: Sequence[Tensor],
    square: float,
    scaling: float,
    bits: int,
    isa: int,
) -> Tensor:
    query = query.contiguous()
    batch, heads, tokens, head_dim = query.shape
    y = query.new_empty((batch, tokens, heads, head_dim))
    keys, values = cache(key_codes, key_scale, key_zero, bits), cache(value_codes, value_scale, value_zero, bits)
    rotation = transform(passes, pass_data, square)
    mask = None if mask is None else mask.contiguous()
    strides = mask_strides(mask)
    check(
        native().dfrot_attend(
            *(isa, torch.get_num_threads(), pointer(query), DTYPES[query.dtype]),
            *map(size, (batch, heads, tokens, key_codes.shape[2])),
            *(ctypes.byref(rotation), ctypes.c_double(scaling), pointer(mask), size(strides[0]), size(strides[1])),
            *(ctypes.byref(keys), ctypes.byref(values), pointer(y)),
        )
    )
    return y


@_attend.register_fake
def _(query: Tensor, *_: Any) -> Tensor:
    batch, heads, tokens, head_dim = query.shape
    return query.new_empty((batch, tokens, heads, head_dim))
