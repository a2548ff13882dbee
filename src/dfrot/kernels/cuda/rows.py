"""Rows rotated, and quantized to what products take: int8 codes a′ and a float32 scale for every row.

With codes a and a zero point z,

    a′ = a − z      up to 7 bits, and on symmetric grids: nothing is left to correct
    a′ = a − 128    asymmetric in 8 bits, z′ = z − 128

For weights of 4 bits the codes of a row stand in order of their nibbles: even channels first, then odd ones.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from dfrot.kernels.cuda.primitives import NATIVE, code_of, dot, element_type, grid_of
from dfrot.kernels.cuda.transforms import rotated, sides
from dfrot.kernels.lowering import SUBTRACT
from dfrot.quant.grids import IntGrid

_PROGRAMS = 528  # as many as keep a large GPU busy; each rotates several rows, and reads the matrices once


class Codes(NamedTuple):
    """Rows as the products take them."""

    codes: Tensor  # int8 (rows, width): a′
    scale: Tensor  # float32 (rows,)
    shift: Tensor | None  # float32 (rows,): z′; None where it is 0
    sums: Tensor | None  # int32 (rows, groups): Σ a′; None where no weight asks


@triton.jit
@no_type_check
def _codes(x, inside, row, S, Z, clip, LOWEST: tl.constexpr, HIGHEST: tl.constexpr, SHIFTED: tl.constexpr):
    """a′ of one row, int8; its scale and zero point are stored, for a row that is not finite the scale NaN."""
    bad = tl.max(tl.where((tl.abs(x) < float("inf")) | (inside == 0), 0, 1))
    x = tl.where(inside & (bad == 0), x, 0.0)
    low, high = tl.minimum(tl.min(x), 0.0), tl.maximum(tl.max(x), 0.0)
    scale, zero = grid_of(low, high, clip, LOWEST, HIGHEST, False)
    shift = zero
    if SHIFTED:
        shift = zero * 0 + 128.0
        tl.store(Z + row, zero - 128.0)
    tl.store(S + row, tl.where(bad > 0, float("nan"), scale))
    return (code_of(x, scale, zero, LOWEST, HIGHEST) - shift).to(tl.int32).to(tl.int8)


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
    codes = _codes(x, inside, row, S, Z, clip, LOWEST, HIGHEST, SHIFTED)
    if SUMMED:
        tl.store(SUMS + row, tl.sum(tl.where(inside, codes, 0).to(tl.int32)))
    if EVENS_FIRST:
        even, odd = tl.split(tl.reshape(codes, (BLOCK // 2, 2)))
        pair = tl.arange(0, BLOCK // 2)
        at = C + row * width + pair
        tl.store(at, even, mask=pair < width // 2)
        tl.store(at + width // 2, odd, mask=pair < width // 2)
    else:
        tl.store(C + row * width + channel, codes, mask=inside)


@triton.jit
@no_type_check
def rotate_kernel(
    X,
    HL,
    HR,
    OFFSET,
    Y,
    C,
    S,
    Z,
    SUMS,
    rows,
    width,
    norm,
    clip,
    L: tl.constexpr,
    L2: tl.constexpr,
    LP: tl.constexpr,
    R: tl.constexpr,
    R2: tl.constexpr,
    RP: tl.constexpr,
    STEP_L: tl.constexpr,
    STEP_L2: tl.constexpr,
    STEP_R: tl.constexpr,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    TYPE: tl.constexpr,
    SHRINK: tl.constexpr,
    QUANTIZED: tl.constexpr,
    EVENS_FIRST: tl.constexpr,
    OFF: tl.constexpr,
    SUMMED: tl.constexpr,
    LOWEST: tl.constexpr,
    HIGHEST: tl.constexpr,
    SHIFTED: tl.constexpr,
    NATIVE: tl.constexpr,
):
    """A row at a time, seen as an array (L, R): multiplied from both sides, times norm, less OFFSET, to codes or Y.

    Entry (l, r) is channel l // L2 · STEP_L + l % L2 · STEP_L2 + r // R2 · STEP_R + r % R2. HL (LP, LP) and HR (RP, RP)
    are zero beyond L and R; LEFT and RIGHT: whether they are there. Between the two products numbers have TYPE, as
    torch has it, and are SHRINK times as large. With EVENS_FIRST the columns of HR, and so those of the product, stand
    in order of the codes.
    """
    left, right = tl.arange(0, LP)[:, None], tl.arange(0, RP)[None, :]
    inside = (left < L) & (right < R)
    start = (left // L2) * STEP_L + (left % L2) * STEP_L2
    read = start + (right // R2) * STEP_R + right % R2
    channel = read
    place = read
    if EVENS_FIRST:
        odd, pair = right // (R // 2), right % (R // 2)
        column = 2 * pair + odd
        channel = start + (column // R2) * STEP_R + column % R2
        place = odd * (width // 2) + start // 2 + (pair // (R2 // 2)) * (STEP_R // 2) + pair % (R2 // 2)
        if not RIGHT:
            read = channel
    if LEFT:
        hl = tl.load(HL + left * LP + tl.arange(0, LP)[None, :])
    if RIGHT:
        hr = tl.load(HR + tl.arange(0, RP)[:, None] * RP + right)
    far = tl.program_id(0).to(tl.int64) * 0  # so that places are counted in 64 bits
    for row in range(tl.program_id(0), rows, tl.num_programs(0)):
        first = (row + far) * width
        x = tl.load(X + first + read, mask=inside, other=0.0)
        y = dot(x, hr, NATIVE) if RIGHT else x.to(tl.float32)
        if LEFT:
            y = dot(hl, (y * SHRINK).to(TYPE), NATIVE)
        y = y * norm
        if OFF:
            y -= tl.load(OFFSET + channel, mask=inside, other=0.0)
        if QUANTIZED:
            codes = _codes(y, inside, row, S, Z, clip, LOWEST, HIGHEST, SHIFTED)
            if SUMMED:
                tl.store(SUMS + row, tl.sum(tl.where(inside, codes, 0).to(tl.int32)))
            tl.store(C + first + place, codes, mask=inside)
        else:
            tl.store(Y + first + channel, y.to(Y.dtype.element_ty), mask=inside)


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
    arguments = x, given_or(offset, made.scale), made.codes, made.scale, given_or(made.shift, made.scale)
    quantize_kernel[(rows,)](
        *(*arguments, given_or(made.sums, made.codes), width, clip),
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
    if found is None or (how["EVENS_FIRST"] and found.shape[3] % 2):
        return False
    (size_l, inner_l, size_r, inner_r), (lp, rp), steps = found.shape, found.padded, found.steps
    left, right = found.left, found.codes if how["EVENS_FIRST"] else found.right
    (rows, width), rotates_only = x.shape, y.dtype != torch.int8
    if size_l == 1 and rotates_only and offset is None:  # heads: several rows are one
        size_l = inner_l = math.gcd(rows, lp)
        rows, width, steps = rows // size_l, width * size_l, (0, width, steps[2])
    # the sums of a side go beyond float16 where inputs are large
    shrink = 2.0 ** -(rp.bit_length() // 2) if x.dtype == torch.float16 and left is not None else 1.0
    entries = max(lp * rp, rp * rp if x.dtype == torch.float32 else 0)
    rotate_kernel[(min(rows, _PROGRAMS),)](
        *(x, given_or(left, x), given_or(right, x), given_or(offset, x), y, y, made.scale),
        *(given_or(made.shift, made.scale), given_or(made.sums, y), rows, width, square**-0.5 / shrink, clip),
        **{"L": size_l, "L2": inner_l, "LP": lp, "R": size_r, "R2": inner_r, "RP": rp},
        **dict(zip(("STEP_L", "STEP_L2", "STEP_R"), steps, strict=True)),
        **{"LEFT": left is not None, "RIGHT": right is not None, "TYPE": element_type(x.dtype), "SHRINK": shrink},
        **{"QUANTIZED": not rotates_only, "OFF": offset is not None, "NATIVE": NATIVE, **how},
        num_warps=_warps(entries // 2),
        num_stages=1,
        enable_fp_fusion=False,
    )
    return True


def given_or(tensor: Tensor | None, placeholder: Tensor) -> Tensor:
    """A kernel takes a pointer for what it does not read."""
    return placeholder if tensor is None else tensor


def _warps(entries: int) -> int:
    """Warps of a program that holds so many numbers."""
    return min(16, max(4, entries // 1024))
