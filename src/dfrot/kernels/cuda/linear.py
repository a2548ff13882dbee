"""Linear layers: an input is rotated and quantized row by row, and multiplied by packed weights with exact sums.

Two kernels a layer. The first hands out int8 codes a′ and a float32 scale for every row; the second multiplies them by
the checkpoint's own bytes. With codes a and zero point z of an input, q and v of a weight,

    a′ = a − z            up to 7 bits, and on symmetric grids: nothing is left to correct
    a′ = a − 128          asymmetric in 8 bits, z′ = z − 128
    w′ = q − 2^(b − 1),   v′ = v − 2^(b − 1), which is 0 on symmetric grids
    Σ (a − z)(q − v) = Σ a′w′ − v′ Σ a′ − z′ Σ w′ + n z′v′

For weights of 4 bits the codes of a row stand in order of their nibbles: even channels first, then odd ones.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from dfrot.kernels.cuda.primitives import (
    NATIVE,
    code_of,
    dot,
    dot_in_two,
    element_type,
    grid_of,
    high_nibbles,
    low_nibbles,
)
from dfrot.kernels.cuda.transforms import rotated, sides
from dfrot.kernels.linear import PackedWeight
from dfrot.kernels.lowering import SUBTRACT
from dfrot.quant.grids import IntGrid
from dfrot.quant.spec import TensorSpec

FEW = 16  # rows that the kernel for a few takes


class Codes(NamedTuple):
    """Rows as the products take them."""

    codes: Tensor  # int8 (rows, width): a′
    scale: Tensor  # float32 (rows,)
    shift: Tensor | None  # float32 (rows,): z′; None where it is 0
    sums: Tensor | None  # int32 (rows, groups): Σ a′; None where no weight asks


@triton.jit
@no_type_check
def _store_codes(
    x,
    inside,
    at,
    row,
    C,
    S,
    Z,
    SUMS,
    clip,
    SUMMED: tl.constexpr,
    LOWEST: tl.constexpr,
    HIGHEST: tl.constexpr,
    SHIFTED: tl.constexpr,
):
    """Quantize one row, float32, and store it; a row that is not finite gets the scale NaN."""
    bad = tl.max(tl.where((tl.abs(x) < float("inf")) | (inside == 0), 0, 1))
    x = tl.where(inside & (bad == 0), x, 0.0)
    low, high = tl.minimum(tl.min(x), 0.0), tl.maximum(tl.max(x), 0.0)
    scale, zero = grid_of(low, high, clip, LOWEST, HIGHEST, False)
    shift = zero
    if SHIFTED:
        shift = zero * 0 + 128.0
        tl.store(Z + row, zero - 128.0)
    codes = (code_of(x, scale, zero, LOWEST, HIGHEST) - shift).to(tl.int32)
    tl.store(C + at, codes.to(tl.int8), mask=inside)
    tl.store(S + row, tl.where(bad > 0, float("nan"), scale))
    if SUMMED:
        tl.store(SUMS + row, tl.sum(tl.where(inside, codes, 0)))


@triton.jit
@no_type_check
def quantize_kernel(
    X,
    OFFSET,
    C,
    S,
    Z,
    SUMS,
    width,
    clip,
    BLOCK: tl.constexpr,
    EVENS_FIRST: tl.constexpr,
    OFF: tl.constexpr,
    SUMMED: tl.constexpr,
    LOWEST: tl.constexpr,
    HIGHEST: tl.constexpr,
    SHIFTED: tl.constexpr,
):
    """A program a row: X (rows, width), less OFFSET, to codes."""
    row = tl.program_id(0).to(tl.int64)
    channel = tl.arange(0, BLOCK)
    inside = channel < width
    x = tl.load(X + row * width + channel, mask=inside, other=0.0).to(tl.float32)
    if OFF:
        x -= tl.load(OFFSET + channel, mask=inside, other=0.0)
    place = channel
    if EVENS_FIRST:
        place = (channel % 2) * (width // 2) + channel // 2
    at = row * width + place
    _store_codes(x, inside, at, row, C, S, Z, SUMS, clip, SUMMED, LOWEST, HIGHEST, SHIFTED)


@triton.jit
@no_type_check
def rotate_kernel(
    X,
    HL,
    HM,
    HR,
    OFFSET,
    Y,
    C,
    S,
    Z,
    SUMS,
    rows,
    norm,
    clip,
    L: tl.constexpr,
    LP: tl.constexpr,
    M: tl.constexpr,
    MP: tl.constexpr,
    R: tl.constexpr,
    RP: tl.constexpr,
    LEFT: tl.constexpr,
    MIDDLE: tl.constexpr,
    RIGHT: tl.constexpr,
    TYPE: tl.constexpr,
    QUANTIZED: tl.constexpr,
    EVENS_FIRST: tl.constexpr,
    OFF: tl.constexpr,
    SUMMED: tl.constexpr,
    LOWEST: tl.constexpr,
    HIGHEST: tl.constexpr,
    SHIFTED: tl.constexpr,
    NATIVE: tl.constexpr,
):
    """A row at a time, seen as an array (L, M, R): multiplied along its axes, times norm, less OFFSET, to codes or Y.

    HL (LP, LP), HM (MP, MP) and HR (RP, RP) are zero beyond L, M and R; LEFT, MIDDLE and RIGHT: whether they are there.
    """
    width: tl.constexpr = L * M * R
    lm, r = tl.arange(0, LP * MP)[:, None], tl.arange(0, RP)[None, :]
    inside_x = (lm // MP < L) & (lm % MP < M) & (r < R)
    channel_x = ((lm // MP) * M + lm % MP) * R + r
    if LEFT:
        hl = tl.load(HL + tl.arange(0, LP)[:, None] * LP + tl.arange(0, LP)[None, :])
        left, mr = tl.arange(0, LP)[:, None], tl.arange(0, MP * RP)[None, :]
        inside = (left < L) & (mr // RP < M) & (mr % RP < R)
        channel = (left * M + mr // RP) * R + mr % RP
    else:
        inside, channel = inside_x, channel_x
    if MIDDLE:
        hm = tl.load(HM + tl.arange(0, MP)[:, None] * MP + tl.arange(0, MP)[None, :])
        hm = tl.broadcast_to(hm[None, :, :], (LP, MP, MP))
    if RIGHT:
        hr = tl.load(HR + tl.arange(0, RP)[:, None] * RP + r)
    place = channel
    if EVENS_FIRST:
        place = (channel % 2) * (width // 2) + channel // 2
    far = tl.program_id(0).to(tl.int64) * 0  # so that places are counted in 64 bits
    for row in range(tl.program_id(0), rows, tl.num_programs(0)):
        start = (row + far) * width
        x = tl.load(X + start + channel_x, mask=inside_x, other=0.0)
        y = dot(x, hr, NATIVE) if RIGHT else x.to(tl.float32)
        if MIDDLE:
            y = dot_in_two(hm, tl.reshape(y, (LP, MP, RP)), TYPE, NATIVE)
            y = tl.reshape(y, (LP * MP, RP))
        if LEFT:
            y = dot_in_two(hl, tl.reshape(y, (LP, MP * RP)), TYPE, NATIVE)
        y = y * norm
        if OFF:
            y -= tl.load(OFFSET + channel, mask=inside, other=0.0)
        if QUANTIZED:
            at = start + place
            _store_codes(y, inside, at, row, C, S, Z, SUMS, clip, SUMMED, LOWEST, HIGHEST, SHIFTED)
        else:
            tl.store(Y + start + channel, y.to(Y.dtype.element_ty), mask=inside)


@triton.jit
@no_type_check
def _corrected(
    total,
    rn,
    rm,
    okn,
    okm,
    V,
    SUMS,
    Z,
    WSUMS,
    group,
    groups,
    size,
    VARIED: tl.constexpr,
    SHIFTED: tl.constexpr,
    HALF: tl.constexpr,
):
    """Σ a′w′ (rn, rm) of a group to Σ (a − z)(q − v), int32."""
    if VARIED:
        v = tl.load(V + rn * groups + group, mask=okn, other=0).to(tl.int32) - HALF
        total -= v[:, None] * tl.load(SUMS + rm * groups + group, mask=okm, other=0)[None, :]
    if SHIFTED:
        z = tl.load(Z + rm, mask=okm, other=0.0).to(tl.int32)
        w = tl.load(WSUMS + rn * groups + group, mask=okn, other=0)
        if VARIED:
            w -= v * size
        total -= w[:, None] * z[None, :]
    return total


@triton.jit
@no_type_check
def _store_product(y, rn, rm, okn, okm, S, BIAS, Y, out, BIASED: tl.constexpr):
    """Scale float32 sums (rn, rm) by the rows' scales, add the bias, and store them."""
    y = y * tl.load(S + rm, mask=okm, other=0.0)[None, :]
    if BIASED:
        y += tl.load(BIAS + rn, mask=okn, other=0.0).to(tl.float32)[:, None]
    at = rm.to(tl.int64)[None, :] * out + rn[:, None]
    tl.store(Y + at, y.to(Y.dtype.element_ty), mask=okn[:, None] & okm[None, :])


@triton.jit(do_not_specialize=["rows"])
@no_type_check
def product_kernel(
    C,
    S,
    Z,
    SUMS,
    W,
    WS,
    V,
    WSUMS,
    BIAS,
    Y,
    rows,
    out,
    num_bytes,
    groups,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GM: tl.constexpr,
    GROUP_BYTES: tl.constexpr,
    BITS: tl.constexpr,
    VARIED: tl.constexpr,
    SHIFTED: tl.constexpr,
    BIASED: tl.constexpr,
    NATIVE: tl.constexpr,
):
    """Y (rows, out) of codes (rows, in) and bytes (out, num_bytes), a tile (BN, BM) a program; BK counts bytes.

    The product is transposed, so that the weight, unpacked in registers, is the operand that Hopper takes from there.
    GROUP_BYTES is a multiple of BK, or 0 for one scale a row.
    """
    HALF: tl.constexpr = 2 ** (BITS - 1)
    CODES: tl.constexpr = 8 // BITS
    pid = tl.program_id(0)
    num_m, num_n = tl.cdiv(rows, BM), tl.cdiv(out, BN)
    first = (pid // (GM * num_n)) * GM
    height = tl.minimum(num_m - first, GM)
    within = pid % (GM * num_n)
    rm = (first + within % height) * BM + tl.arange(0, BM)
    rn = (within // height) * BN + tl.arange(0, BN)
    rk = tl.arange(0, BK)
    okm, okn = rm < rows, rn < out
    width = num_bytes * CODES
    w_at = W + rn.to(tl.int64)[:, None] * num_bytes + rk[None, :]
    c_at = C + rm.to(tl.int64)[None, :] * width + rk[:, None]
    sums = tl.zeros([BN, BM], tl.int32)
    y = tl.zeros([BN, BM], tl.float32)
    for k in range(0, num_bytes, BK):
        here = rk + k < num_bytes
        w = tl.load(w_at + k, mask=okn[:, None] & here[None, :], other=0)
        okc = here[:, None] & okm[None, :]
        even = tl.load(c_at + k, mask=okc, other=0)
        if BITS == 4:
            odd = tl.load(c_at + k + num_bytes, mask=okc, other=0)
            sums = tl.dot(low_nibbles(w, NATIVE), even, acc=sums, out_dtype=tl.int32)
            sums = tl.dot(high_nibbles(w, NATIVE), odd, acc=sums, out_dtype=tl.int32)
        else:
            sums = tl.dot((w ^ 128).to(tl.int8, bitcast=True), even, acc=sums, out_dtype=tl.int32)
        if GROUP_BYTES > 0:  # noqa: SIM102 (one of them is known when it is compiled)
            if (k + BK) % GROUP_BYTES == 0:
                group = k // GROUP_BYTES
                part = sums >> 4 if BITS == 4 else sums
                part = _corrected(
                    part, rn, rm, okn, okm, V, SUMS, Z, WSUMS, group, groups, GROUP_BYTES * CODES, VARIED, SHIFTED, HALF
                )
                y += (
                    part.to(tl.float32) * tl.load(WS + rn * groups + group, mask=okn, other=0.0).to(tl.float32)[:, None]
                )
                sums = tl.zeros([BN, BM], tl.int32)
    if GROUP_BYTES == 0:
        part = sums >> 4 if BITS == 4 else sums
        part = _corrected(part, rn, rm, okn, okm, V, SUMS, Z, WSUMS, 0, 1, width, VARIED, SHIFTED, HALF)
        y = part.to(tl.float32) * tl.load(WS + rn, mask=okn, other=0.0).to(tl.float32)[:, None]
    _store_product(y, rn, rm, okn, okm, S, BIAS, Y, out, BIASED)


@triton.jit(do_not_specialize=["rows"])
@no_type_check
def few_kernel(
    C,
    S,
    Z,
    SUMS,
    W,
    WS,
    V,
    WSUMS,
    BIAS,
    Y,
    rows,
    out,
    num_bytes: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    SHARES: tl.constexpr,
    BITS: tl.constexpr,
    VARIED: tl.constexpr,
    SHIFTED: tl.constexpr,
    BIASED: tl.constexpr,
    NATIVE: tl.constexpr,
):
    """The same for at most 16 rows and one scale a row: warps share the channels among them, and add up at the end."""
    HALF: tl.constexpr = 2 ** (BITS - 1)
    width: tl.constexpr = num_bytes * 8 // BITS
    SHARE: tl.constexpr = ((num_bytes + SHARES * BK - 1) // (SHARES * BK)) * BK
    rn, rm, rk = tl.program_id(0) * BN + tl.arange(0, BN), tl.arange(0, 16), tl.arange(0, BK)
    okm, okn = rm < rows, rn < out
    start = tl.arange(0, SHARES)[:, None, None] * SHARE
    w_at = start + rk[None, None, :]
    c_at = start + rk[None, :, None]
    wp = W + rn.to(tl.int64)[None, :, None] * num_bytes
    cp = C + rm[None, None, :] * width
    sums = tl.zeros([SHARES, BN, 16], tl.int32)
    for k in range(0, SHARE, BK):
        w = tl.load(wp + (w_at + k), mask=okn[None, :, None] & (w_at + k < num_bytes), other=0)
        okc = okm[None, None, :] & (c_at + k < num_bytes)
        even = tl.load(cp + (c_at + k), mask=okc, other=0)
        if BITS == 4:
            odd = tl.load(cp + (c_at + k + num_bytes), mask=okc, other=0)
            sums = tl.dot(low_nibbles(w, NATIVE), even, acc=sums, out_dtype=tl.int32)
            sums = tl.dot(high_nibbles(w, NATIVE), odd, acc=sums, out_dtype=tl.int32)
        else:
            sums = tl.dot((w ^ 128).to(tl.int8, bitcast=True), even, acc=sums, out_dtype=tl.int32)
    total = tl.sum(sums, 0)
    if BITS == 4:
        total = total >> 4
    total = _corrected(total, rn, rm, okn, okm, V, SUMS, Z, WSUMS, 0, 1, width, VARIED, SHIFTED, HALF)
    y = total.to(tl.float32) * tl.load(WS + rn, mask=okn, other=0.0).to(tl.float32)[:, None]
    _store_product(y, rn, rm, okn, okm, S, BIAS, Y, out, BIASED)


def quantize_rows(
    x: Tensor,
    passes: Sequence[int],
    data: Sequence[Tensor],
    square: int,
    grid: IntGrid,
    clip: float,
    *,
    evens_first: bool,
    groups: int,
) -> Codes:
    """Codes of rows x (rows, width), behind a transform.

    Args:
        evens_first: even channels first, as weights of 4 bits want it.
        groups: of which sums are handed out; 0 for none.
    """
    rows, width = x.shape
    codes, scale = x.new_empty(rows, width, dtype=torch.int8), x.new_empty(rows, dtype=torch.float32)
    shift = torch.empty_like(scale) if grid.bits == 8 and not grid.symmetric else None
    sums = x.new_empty(rows, 1, dtype=torch.int32) if groups == 1 else None
    made = Codes(codes, scale, shift, sums)
    how: dict[str, Any] = {"EVENS_FIRST": evens_first, "SUMMED": groups == 1, "SHIFTED": shift is not None}
    how |= {"LOWEST": grid.lowest, "HIGHEST": grid.highest}
    if not _rotate(x, passes, data, square, codes, made, clip, how):
        _quantize(x, passes, data, square, made, clip, how)
    if groups > 1:
        parts = codes.view(rows, 2, groups, -1) if evens_first else codes.view(rows, 1, groups, -1)
        made = made._replace(sums=parts.sum((1, 3), dtype=torch.int32))
    return made


def _quantize(
    x: Tensor,
    passes: Sequence[int],
    data: Sequence[Tensor],
    square: int,
    made: Codes,
    clip: float,
    how: dict[str, Any],
) -> None:
    """Rows that the rotating kernel cannot take: rotated by torch, if at all."""
    (rows, width), offset = x.shape, None
    if list(passes[::3]) == [SUBTRACT]:
        offset = data[0].to(x.device)
    elif passes:
        x = rotated(x, passes, data, square)
    block = triton.next_power_of_2(width)
    arguments = x, _or(offset, made.scale), made.codes, made.scale, _or(made.shift, made.scale)
    quantize_kernel[(rows,)](
        *(*arguments, _or(made.sums, made.codes), width, clip),
        **{"BLOCK": block, "OFF": offset is not None, **how, "num_warps": _warps(block)},
        enable_fp_fusion=False,
    )


def rotate(
    x: Tensor, passes: Sequence[int], data: Sequence[Tensor], square: int, dtype: torch.dtype | None = None
) -> Tensor:
    """x R (…, n), in the dtype of x unless another is asked for."""
    rows, nothing = x.reshape(-1, x.shape[-1]).contiguous(), x.new_empty(0, dtype=torch.float32)
    y = torch.empty_like(rows, dtype=dtype)
    how = {"EVENS_FIRST": False, "SUMMED": False, "LOWEST": 0, "HIGHEST": 1, "SHIFTED": False}
    if not _rotate(rows, passes, data, square, y, Codes(nothing, nothing, None, None), 1.0, how):
        y = rotated(rows, passes, data, square).to(y.dtype)
    return y.view(x.shape)


def _rotate(
    x: Tensor,
    passes: Sequence[int],
    data: Sequence[Tensor],
    square: int,
    y: Tensor,
    made: Codes,
    clip: float,
    how: dict[str, Any],
) -> bool:
    """Rotate rows into y, int8 codes or numbers; False if the kernel cannot."""
    offset = data[-1].to(x.device) if passes and passes[-3] == SUBTRACT else None
    found = sides(passes, data, x.shape[1], x.dtype, x.device)
    if found is None:
        return False
    (left, middle, right), rows = found[:3], len(x)
    (lp, mp, rp), (size_l, size_m, size_r), rotates_only = found.padded, found.shape, y.dtype != torch.int8
    if size_l == size_m == 1 and rotates_only and offset is None:  # heads: several rows are one
        size_l = math.gcd(rows, lp)
        rows //= size_l
    entries = max(lp * mp * rp, rp * rp if x.dtype == torch.float32 else 0)
    rotate_kernel[(min(rows, 1 << 16),)](
        *(x, _or(left, x), _or(middle, x), _or(right, x), _or(offset, x), y, y, made.scale),
        *(_or(made.shift, made.scale), _or(made.sums, y), rows, square**-0.5, clip),
        **{"L": size_l, "LP": lp, "M": size_m, "MP": mp, "R": size_r, "RP": rp, "LEFT": left is not None},
        **{"MIDDLE": middle is not None, "RIGHT": right is not None, "TYPE": element_type(x.dtype)},
        **{"QUANTIZED": not rotates_only, "OFF": offset is not None, "NATIVE": NATIVE, **how},
        num_warps=_warps(entries // 2),
        num_stages=1,
        enable_fp_fusion=False,
    )
    return True


def products(
    x: Tensor,
    parts: Sequence[Tensor | None],
    passes: Sequence[int],
    data: Sequence[Tensor],
    square: int,
    weight_bits: int,
    bits: int,
    symmetric: bool,
    clip: float,
) -> list[Tensor]:
    """`dfrot::linear` on a GPU."""
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    weights = [PackedWeight(*parts[at : at + 4]) for at in range(0, len(parts), 4)]  # type: ignore[arg-type]
    groups = max((weight.scales.shape[1] for weight in weights if weight.zeros is not None), default=0)
    grid = IntGrid(bits, symmetric)
    codes = quantize_rows(rows, passes, data, square, grid, clip, evens_first=weight_bits == 4, groups=groups)
    return [_product(codes, weight, weight_bits, x.dtype).view(*x.shape[:-1], -1) for weight in weights]


def _product(codes: Codes, weight: PackedWeight, bits: int, dtype: torch.dtype) -> Tensor:
    """Scaled products of codes with a weight, (rows, out)."""
    rows, (out, num_bytes), groups = len(codes.codes), weight.qweight.shape, weight.scales.shape[1]
    y = codes.codes.new_empty(rows, out, dtype=dtype)
    wsums = None if codes.shift is None else weight.code_sums(bits) - codes.codes.shape[1] // groups * 2 ** (bits - 1)
    arguments: list[Any] = [codes.codes, codes.scale, _or(codes.shift, codes.scale), _or(codes.sums, codes.codes)]
    arguments += weight.qweight, weight.scales, _or(weight.zeros, weight.qweight), _or(wsums, codes.codes)
    arguments += _or(weight.bias, codes.scale), y, rows, out, num_bytes
    how = {"BITS": bits, "VARIED": weight.zeros is not None, "SHIFTED": codes.shift is not None, "NATIVE": NATIVE}
    how["BIASED"] = weight.bias is not None
    if rows <= FEW and groups == 1:
        few_kernel[(triton.cdiv(out, 32),)](*arguments, BN=32, BK=64, SHARES=4, **how, num_warps=4, num_stages=3)
        return y
    group_bytes = num_bytes // groups if groups > 1 else 0
    if rows <= FEW:
        bm, bn, bk, warps, stages = 16, 64, 64, 4, 4
    elif rows <= 512 or group_bytes:  # of groups there are two sums
        bm, bn, bk, warps, stages = 64, 64, 64, 4, 4
    else:
        bm, bn, bk, warps, stages = 128, 128, 64, 8, 4
    bk = min(bk, group_bytes or bk)
    tiles = triton.cdiv(rows, bm) * triton.cdiv(out, bn)
    tile = {"BM": bm, "BN": bn, "BK": bk, "GM": 8, "GROUP_BYTES": group_bytes}
    product_kernel[(tiles,)](*arguments, groups, **tile, **how, num_warps=warps, num_stages=stages)
    return y


def supported(weights: TensorSpec, activations: TensorSpec, width: int) -> bool:
    """Whether there is a kernel for such grids."""
    if weights.bits not in (4, 8) or width * weights.bits % 8:
        return False
    group_bytes = 0 if weights.group is None else weights.group * weights.bits // 8
    return group_bytes == 0 or (group_bytes in (32, 64) or group_bytes % 64 == 0)


def _or(tensor: Tensor | None, placeholder: Tensor) -> Tensor:
    """A kernel takes a pointer for what it does not read."""
    return placeholder if tensor is None else tensor


def _warps(entries: int) -> int:
    """Warps of a program that holds so many numbers."""
    return min(16, max(4, entries // 1024))
