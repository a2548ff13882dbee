"""Packed keys and values: writing to the cache, reading from it, and attention of a few new tokens over it.

A cache is three tensors, (batch, heads, capacity, …): codes uint8, scales bfloat16, zero points uint8. The
tensors may be views of the first tokens, as long as no other axis is cut. `passes`, `data` and `square` are those of a
`Lowered`, the rotation R of what is written or looked up.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from dfrot.kernels import cuda
from dfrot.kernels.structures import DTYPES, cache, computable, looks, machine, native, pointer, transform
from dfrot.quant.spec import TensorSpec

FEW = 8  # most new tokens that the attention kernel takes; for more, unpacking once is cheaper
MOST_CHANNELS = 512  # of a head, as in native/cache.h


def supported(x: Tensor, spec: TensorSpec) -> bool:
    """Whether there are kernels for heads like x (…, head_dim) on such a grid."""
    if cuda.computable(x):
        from dfrot.kernels.cuda.attention import supported as supported_there

        return supported_there(spec, x.shape[-1])
    return spec.bits in (4, 8) and x.shape[-1] % 32 == 0 and x.shape[-1] <= MOST_CHANNELS and computable(x)


@torch.library.custom_op("dfrot::append", mutates_args=("packed",))
def append(
    x: Tensor,
    packed: Sequence[Tensor],
    position: int,
    passes: Sequence[int],
    data: Sequence[Tensor],
    square: int,
    bits: int,
    clip: float,
    start: Tensor | None = None,
) -> None:
    """Quantize x R, x (batch, heads, tokens, head_dim), into a cache, from a position on; `start`, int64 of one
    element where x is, is added to it without waiting for a GPU, which leaves out tokens behind the capacity."""
    x = x.contiguous()
    position += 0 if start is None else int(start)
    if position + x.shape[2] > packed[0].shape[2]:
        raise IndexError(f"a cache of {packed[0].shape[2]} tokens has no room for {position + x.shape[2]}")
    rows = pointer(x), DTYPES[x.dtype], x.shape[0], x.shape[2]
    native().dfrot_append(*machine(), *rows, position, transform(passes, data, square), clip, cache(packed, bits))


@torch.library.custom_op("dfrot::unpack", mutates_args=())
def unpack(packed: Sequence[Tensor], bits: int, dtype: torch.dtype) -> Tensor:
    """All tokens of a cache, (batch, heads, tokens, head_dim)."""
    unpacked = _unpacked(packed, bits, dtype)
    batch, _, tokens, _ = unpacked.shape
    rows = batch, tokens, pointer(unpacked), DTYPES[dtype]
    native().dfrot_unpack_cache(torch.get_num_threads(), cache(packed, bits), *rows)
    return unpacked


@unpack.register_fake
def _unpacked(packed: Sequence[Tensor], bits: int, dtype: torch.dtype) -> Tensor:
    codes = packed[0]
    return codes.new_empty((*codes.shape[:-1], codes.shape[-1] * 8 // bits), dtype=dtype)


@torch.library.custom_op("dfrot::attend", mutates_args=())
def attend(
    query: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    mask: Tensor | None,
    more: Tensor | None,
    passes: Sequence[int],
    data: Sequence[Tensor],
    square: int,
    scaling: float,
    bits: int,
) -> Tensor:
    """softmax(scaling · (q R) kᵀ + more) v over all tokens of a cache.

    Args:
        query: (batch, heads, tokens, head_dim).
        mask: bool (batch, 1, tokens, length), where a query looks.
        more: float64 (batch, heads, tokens, length).

    Returns:
        (batch, tokens, heads, head_dim).
    """
    query, y = query.contiguous(), _attended(query)
    mask, more = (part if part is None else part.contiguous() for part in (mask, more))
    sizes = *query.shape[:3], keys[0].shape[2]
    native().dfrot_attend(
        *(*machine(), pointer(query), DTYPES[query.dtype], *sizes, transform(passes, data, square), scaling),
        *(*looks(mask), pointer(more), cache(keys, bits), cache(values, bits), pointer(y)),
    )
    return y


@attend.register_fake
def _attended(query: Tensor, *_: Any) -> Tensor:
    batch, heads, tokens, head_dim = query.shape
    return query.new_empty((batch, tokens, heads, head_dim))


def weights(
    query: Float[Tensor, "batch heads tokens head_dim"],
    keys: Float[Tensor, "batch kv_heads length head_dim"],
    mask: Tensor | None,
    scaling: float | None,
) -> Float[Tensor, "batch heads tokens length"]:
    """softmax(scaling · q kᵀ), which neither `attend` nor SDPA hands out; causal without a mask, as SDPA is."""
    (_, heads, tokens, head_dim), (_, kv_heads, length, _) = query.shape, keys.shape
    scores = query @ keys.repeat_interleave(heads // kv_heads, dim=1).mT * (scaling or head_dim**-0.5)
    if mask is None and tokens > 1:
        mask = torch.ones(tokens, length, dtype=torch.bool, device=query.device).tril()
    if mask is not None:
        least = torch.finfo(scores.dtype).min
        scores = scores.masked_fill(~mask, least) if mask.dtype == torch.bool else scores + mask
    return scores.softmax(-1, dtype=torch.promote_types(query.dtype, torch.float32)).to(query.dtype)


for _operator, _name in ((append, "append"), (unpack, "unpack"), (attend, "attend")):
    cuda.register(_operator, "attention", _name)
