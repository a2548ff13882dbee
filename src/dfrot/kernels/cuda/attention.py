"""The packed cache on a GPU: tokens are written to it, read from it, and looked up by a few new ones.

Bytes are taken apart into even and odd channels, which stay apart until the end: a product over channels is the sum of
two. Scales and zero points are folded into scores and probabilities, so nothing is ever unpacked to be multiplied:

    q · s (n − z) = s (q · n − z Σ q),      Σ p s (n − z) = Σ (p s) n − Σ (p s) z
"""

from collections.abc import Sequence
from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from dfrot.kernels.cuda.primitives import NATIVE, code_of, dot, element_type, float_nibbles, grid_of
from dfrot.kernels.cuda.rows import rotate
from dfrot.kernels.structures import mask_strides
from dfrot.quant.spec import TensorSpec

LARGEST_HEAD = 256  # channels
_KEYS = 64  # cached tokens of one step
_PROGRAMS = 512  # as many as keep a large GPU busy
_LAUNCH = {"num_warps": 4, "num_stages": 3}
_LOG2E = 1.4426950408889634


@triton.jit
@no_type_check
def append_kernel(
    X,
    CODES,
    SCALE,
    ZERO,
    START,
    tokens,
    position,
    capacity,
    clip,
    D2: tl.constexpr,
    BLOCK: tl.constexpr,
    BITS: tl.constexpr,
    STARTED: tl.constexpr,
):
    """X (heads, tokens, 2 D2) into a cache from a position on, to which START is added; program (head, 16 tokens)."""
    HIGHEST: tl.constexpr = 2**BITS - 1
    head = tl.program_id(0).to(tl.int64)
    rt, rd = tl.program_id(1) * 16 + tl.arange(0, 16), tl.arange(0, BLOCK)
    oks, ok = rt < tokens, (rt < tokens)[:, None] & (rd < D2)[None, :]
    x_at = X + (head * tokens + rt)[:, None] * (2 * D2) + 2 * rd[None, :]
    even = tl.load(x_at, mask=ok, other=0.0).to(tl.float32)
    odd = tl.load(x_at + 1, mask=ok, other=0.0).to(tl.float32)
    finite = (tl.abs(even) < float("inf")) & (tl.abs(odd) < float("inf"))
    bad = tl.max(tl.where(finite, 0, 1), 1)
    even, odd = tl.where(bad[:, None] > 0, 0.0, even), tl.where(bad[:, None] > 0, 0.0, odd)
    low = tl.minimum(tl.min(tl.minimum(even, odd), 1), 0.0)
    high = tl.maximum(tl.max(tl.maximum(even, odd), 1), 0.0)
    scale, zero = grid_of(low, high, clip, 0, HIGHEST, True)
    even = code_of(even, scale[:, None], zero[:, None], 0, HIGHEST).to(tl.int32)
    odd = code_of(odd, scale[:, None], zero[:, None], 0, HIGHEST).to(tl.int32)
    at = position + rt
    if STARTED:
        at += tl.load(START)
        oks &= at < capacity
        ok &= (at < capacity)[:, None]
    slot = head * capacity + at
    if BITS == 4:
        tl.store(CODES + slot[:, None] * D2 + rd[None, :], (even | (odd << 4)).to(tl.uint8), mask=ok)
    else:
        code_at = CODES + slot[:, None] * (2 * D2) + 2 * rd[None, :]
        tl.store(code_at, even.to(tl.uint8), mask=ok)
        tl.store(code_at + 1, odd.to(tl.uint8), mask=ok)
    tl.store(SCALE + slot, tl.where(bad > 0, float("nan"), scale).to(SCALE.dtype.element_ty), mask=oks)
    tl.store(ZERO + slot, tl.where(bad > 0, 0.0, zero).to(tl.int32).to(tl.uint8), mask=oks)


@triton.jit
@no_type_check
def _codes(CODES, slot, rd, ok, D2: tl.constexpr, BITS: tl.constexpr):
    """Even and odd channels of cached tokens, as integers; slot and rd are shaped to fit one another."""
    if BITS == 4:
        byte = tl.load(CODES + slot * D2 + rd, mask=ok, other=0).to(tl.int32)
        return byte & 15, byte >> 4
    else:
        at = CODES + slot * (2 * D2) + 2 * rd
        return tl.load(at, mask=ok, other=0).to(tl.int32), tl.load(at + 1, mask=ok, other=0).to(tl.int32)


@triton.jit
@no_type_check
def _floats(CODES, slot, rd, ok, D2: tl.constexpr, BITS: tl.constexpr, TYPE: tl.constexpr, NATIVE: tl.constexpr):
    """The same as numbers to be multiplied: nibbles in 16 bits with the base of `float_nibbles`, others as they are."""
    if BITS == 4 and tl.float32 != TYPE:
        byte = tl.load(CODES + slot * D2 + rd, mask=ok, other=0)
        return float_nibbles(byte, False, TYPE, NATIVE), float_nibbles(byte, True, TYPE, NATIVE)
    else:
        even, odd = _codes(CODES, slot, rd, ok, D2, BITS)
        return even.to(tl.float32).to(TYPE), odd.to(tl.float32).to(TYPE)


@triton.jit
@no_type_check
def unpack_kernel(
    CODES,
    SCALE,
    ZERO,
    Y,
    tokens,
    capacity,
    D2: tl.constexpr,
    BLOCK: tl.constexpr,
    BITS: tl.constexpr,
):
    """Y (heads, tokens, 2 D2) from a cache; program (head, 16 tokens)."""
    head = tl.program_id(0).to(tl.int64)
    rt, rd = tl.program_id(1) * 16 + tl.arange(0, 16), tl.arange(0, BLOCK)
    oks, ok = rt < tokens, (rt < tokens)[:, None] & (rd < D2)[None, :]
    slot = head * capacity + rt
    even, odd = _codes(CODES, slot[:, None], rd[None, :], ok, D2, BITS)
    scale = tl.load(SCALE + slot, mask=oks, other=0.0).to(tl.float32)[:, None]
    zero = tl.load(ZERO + slot, mask=oks, other=0).to(tl.int32)[:, None]
    at = Y + (head * tokens + rt)[:, None] * (2 * D2) + 2 * rd[None, :]
    tl.store(at, ((even - zero).to(tl.float32) * scale).to(Y.dtype.element_ty), mask=ok)
    tl.store(at + 1, ((odd - zero).to(tl.float32) * scale).to(Y.dtype.element_ty), mask=ok)


@triton.jit(do_not_specialize=["length"])
@no_type_check
def attend_kernel(
    Q,
    KC,
    KS,
    KZ,
    VC,
    VS,
    VZ,
    MASK,
    MORE,
    PARTIAL,
    ML,
    rows,
    new,
    length,
    per_split,
    capacity,
    heads,
    mask_batch,
    mask_new,
    scaling,
    more_scaling,
    D2: tl.constexpr,
    BLOCK: tl.constexpr,
    RP: tl.constexpr,
    BT: tl.constexpr,
    BITS: tl.constexpr,
    MASKED: tl.constexpr,
    MORED: tl.constexpr,
    TYPE: tl.constexpr,
    NATIVE: tl.constexpr,
):
    """A part of the cached tokens for all queries of a head of keys; program (batch · kv head, part).

    Q: (batch · kv heads, rows, 2 D2), rows = queries of one kv head, `new` of each query head. PARTIAL: float32 (…,
    parts, RP, 2 BLOCK), even channels first; ML: (…, parts, 2, RP), the largest score to base 2 and the sum.
    """
    SPAN: tl.constexpr = 1024
    FLOATS: tl.constexpr = BITS == 4 and tl.float32 != TYPE
    BASE: tl.constexpr = (128 if tl.bfloat16 == TYPE else 1024) if FLOATS else 0
    head, part = tl.program_id(0), tl.program_id(1)
    rr, rd = tl.arange(0, RP), tl.arange(0, BLOCK)
    okr, okd = rr < rows, rd < D2
    q_at = Q + (head.to(tl.int64) * rows + rr)[:, None] * (2 * D2) + 2 * rd[None, :]
    q_even = tl.load(q_at, mask=okr[:, None] & okd[None, :], other=0.0)
    q_odd = tl.load(q_at + 1, mask=okr[:, None] & okd[None, :], other=0.0)
    q_sum = tl.sum(q_even.to(tl.float32) + q_odd.to(tl.float32), 1)
    largest = tl.full([RP], float("-inf"), tl.float32)
    total = tl.zeros([RP], tl.float32)
    shift = tl.zeros([RP], tl.float32)
    even = tl.zeros([RP, BLOCK], tl.float32)
    odd = tl.zeros([RP, BLOCK], tl.float32)
    first = head.to(tl.int64) * capacity
    begin = part * per_split
    end = tl.minimum(begin + per_split, length)
    if MASKED:  # nothing is read behind the last token that somebody looks at, such as the room of a static cache
        mask_at, last = MASK + (head // heads) * mask_batch, begin
        for query in range(0, new):
            for t in range(begin, end, SPAN):
                rt = t + tl.arange(0, SPAN)
                seen = tl.load(mask_at + query * mask_new + rt, mask=rt < end, other=0) != 0
                last = tl.maximum(last, tl.max(tl.where(seen, rt + 1, 0)))
        end = last
    for t in range(begin, end, BT):
        rt = t + tl.arange(0, BT)
        ok = rt < end
        slot = first + rt
        k_even, k_odd = _floats(KC, slot[None, :], rd[:, None], ok[None, :] & okd[:, None], D2, BITS, TYPE, NATIVE)
        k_scale = tl.load(KS + slot, mask=ok, other=0.0).to(tl.float32)
        k_zero = tl.load(KZ + slot, mask=ok, other=0).to(tl.float32) + BASE
        scores = dot(q_even, k_even, NATIVE) + dot(q_odd, k_odd, NATIVE)
        scores = (scores - q_sum[:, None] * k_zero[None, :]) * (k_scale * scaling)[None, :]
        seen = okr[:, None] & ok[None, :]
        if MORED:
            more = MORE + (head.to(tl.int64) * rows + rr)[:, None] * length + rt[None, :]
            scores += tl.load(more, mask=seen, other=0.0).to(tl.float32) * more_scaling
        if MASKED:
            seen &= tl.load(mask_at + (rr % new)[:, None] * mask_new + rt[None, :], mask=seen, other=0) != 0
        scores = tl.where(seen, scores, float("-inf"))
        now = tl.maximum(largest, tl.max(scores, 1))
        base = tl.where(now == float("-inf"), 0.0, now)
        shrink = tl.exp2(largest - base)
        p = tl.exp2(scores - base[:, None])
        total = total * shrink + tl.sum(p, 1)
        v_even, v_odd = _floats(VC, slot[:, None], rd[None, :], ok[:, None] & okd[None, :], D2, BITS, TYPE, NATIVE)
        v_scale = tl.load(VS + slot, mask=ok, other=0.0).to(tl.float32)
        v_zero = tl.load(VZ + slot, mask=ok, other=0).to(tl.float32) + BASE
        # where nobody looks, a NaN must not be met
        weighted = tl.where(seen, p * v_scale[None, :], 0.0).to(TYPE)
        shift = shift * shrink + tl.sum(weighted.to(tl.float32) * v_zero[None, :], 1)
        even = even * shrink[:, None] + dot(weighted, v_even, NATIVE)
        odd = odd * shrink[:, None] + dot(weighted, v_odd, NATIVE)
        largest = now
    place = (head * tl.num_programs(1) + part).to(tl.int64) * RP
    o_at = PARTIAL + (place + rr)[:, None] * (2 * BLOCK) + rd[None, :]
    tl.store(o_at, even - shift[:, None])
    tl.store(o_at + BLOCK, odd - shift[:, None])
    tl.store(ML + 2 * place + rr, largest)
    tl.store(ML + 2 * place + RP + rr, total)


@triton.jit
@no_type_check
def combine_kernel(
    PARTIAL,
    ML,
    Y,
    parts,
    rows,
    new,
    heads,
    D2: tl.constexpr,
    BLOCK: tl.constexpr,
    RP: tl.constexpr,
    PARTS: tl.constexpr,
):
    """The parts of one query to Y (batch, new, query heads, 2 D2); program (batch · kv head, row)."""
    head, row = tl.program_id(0), tl.program_id(1)
    rp, rd = tl.arange(0, PARTS), tl.arange(0, BLOCK)
    ok = rp < parts
    place = (head * parts + rp).to(tl.int64) * RP
    largest = tl.load(ML + 2 * place + row, mask=ok, other=float("-inf"))
    totals = tl.load(ML + 2 * place + RP + row, mask=ok, other=0.0)
    most = tl.max(largest)
    weight = tl.exp2(largest - tl.where(most == float("-inf"), 0.0, most))  # a query may look nowhere
    total = tl.sum(totals * weight)
    total = tl.where(total == 0, 1.0, total)
    o_at = PARTIAL + (place + row)[:, None] * (2 * BLOCK) + rd[None, :]
    weight = tl.where(ok, weight, 0.0)[:, None]
    even = tl.sum(tl.load(o_at, mask=ok[:, None], other=0.0) * weight, 0)
    odd = tl.sum(tl.load(o_at + BLOCK, mask=ok[:, None], other=0.0) * weight, 0)
    query_head = (head % heads) * (rows // new) + row // new
    token = (head // heads) * new + row % new
    at = Y + (token.to(tl.int64) * (heads * (rows // new)) + query_head) * (2 * D2) + 2 * rd
    tl.store(at, (even / total).to(Y.dtype.element_ty), mask=rd < D2)
    tl.store(at + 1, (odd / total).to(Y.dtype.element_ty), mask=rd < D2)


def supported(spec: TensorSpec, head_dim: int) -> bool:
    """Whether there are kernels for heads on such a grid."""
    return spec.bits in (4, 8) and head_dim % 2 == 0 and head_dim <= LARGEST_HEAD


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
    """`dfrot::append` on a GPU."""
    x = rotate(x, passes, data, square, torch.float32) if passes else x.contiguous()
    batch, heads, tokens, head_dim = x.shape
    append_kernel[(batch * heads, triton.cdiv(tokens, 16))](
        *(x, *packed, x if start is None else start, tokens, position, _capacity(packed), clip),
        **{"D2": head_dim // 2, "BLOCK": _half(head_dim), "BITS": bits, "STARTED": start is not None},
        enable_fp_fusion=False,
    )


def unpack(packed: Sequence[Tensor], bits: int, dtype: torch.dtype) -> Tensor:
    """`dfrot::unpack` on a GPU."""
    batch, heads, tokens, num_bytes = packed[0].shape
    head_dim = num_bytes * 8 // bits
    y = packed[0].new_empty(batch, heads, tokens, head_dim, dtype=dtype)
    unpack_kernel[(batch * heads, triton.cdiv(tokens, 16))](
        *(*packed, y, tokens, _capacity(packed)),
        **{"D2": head_dim // 2, "BLOCK": _half(head_dim), "BITS": bits, "enable_fp_fusion": False},
    )
    return y


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
    """`dfrot::attend` on a GPU."""
    query = rotate(query, passes, data, square) if passes else query.contiguous()
    (batch, query_heads, new, head_dim), (_, heads, length, _) = query.shape, keys[0].shape
    mask, more = (part if part is None else part.contiguous() for part in (mask, more))
    rows = query_heads // heads * new
    padded, block = max(16, triton.next_power_of_2(rows)), _half(head_dim)
    per_split = triton.cdiv(triton.cdiv(length, max(1, _PROGRAMS // (batch * heads))), _KEYS) * _KEYS
    parts = triton.cdiv(length, per_split)
    partial = query.new_empty(batch * heads * parts, padded, 2 * block, dtype=torch.float32)
    sums = query.new_empty(batch * heads * parts, 2, padded, dtype=torch.float32)
    y = query.new_empty(batch, new, query_heads, head_dim)
    attend_kernel[(batch * heads, parts)](
        *(query, *keys, *values, query if mask is None else mask.view(torch.uint8), query if more is None else more),
        *(
            partial,
            sums,
            rows,
            new,
            length,
            per_split,
            _capacity(keys),
            heads,
            *mask_strides(mask),
            scaling * _LOG2E,
            _LOG2E,
        ),
        **{"D2": head_dim // 2, "BLOCK": block, "RP": padded, "BT": _KEYS, "BITS": bits, "NATIVE": NATIVE},
        **{"MASKED": mask is not None, "MORED": more is not None, "TYPE": element_type(query.dtype)},
        **_LAUNCH,
    )
    combine_kernel[(batch * heads, rows)](
        *(partial, sums, y, parts, rows, new, heads),
        **{"D2": head_dim // 2, "BLOCK": block, "RP": padded, "PARTS": max(2, triton.next_power_of_2(parts))},
    )
    return y


def _capacity(packed: Sequence[Tensor]) -> int:
    """Tokens from one head to the next; a view may cut the tokens, no other axis."""
    return packed[0].stride(1) // packed[0].shape[3]


def _half(head_dim: int) -> int:
    """Even channels of a head, as a power of two that products take."""
    return max(16, triton.next_power_of_2(head_dim // 2))
