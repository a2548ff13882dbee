"""Quantization as training meets it, on a GPU: rows on their grid, and the gradient, each in one pass over them."""

from typing import Any, no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from dfrot.kernels.cuda.primitives import code_of, grid_of, rounded
from dfrot.kernels.cuda.rows import given_or
from dfrot.quant.spec import TensorSpec

_ENTRIES = 2048  # of a program that has several rows


@triton.jit
@no_type_check
def _tile(X, row, column, rows, size):
    """Rows and columns of X (rows, size), where they lie, and which of them are there."""
    inside = (row < rows)[:, None] & (column < size)[None, :]
    at = row[:, None] * size + column[None, :]
    return tl.load(X + at, mask=inside, other=0.0), at, inside


@triton.jit
@no_type_check
def _codes(x, step, first, LOWEST: tl.constexpr, HIGHEST: tl.constexpr):
    """x in steps, rounded, and on the grid, which begins at `first` + LOWEST."""
    steps = tl.div_rn(x, step[:, None])
    code = rounded(steps)
    return steps, code, tl.minimum(tl.maximum(code, (first + LOWEST)[:, None]), (first + HIGHEST)[:, None])


@triton.jit
@no_type_check
def grid_kernel(
    X,
    CLIP,
    Y,
    rows,
    size,
    clip,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    FREE: tl.constexpr,
    LOWEST: tl.constexpr,
    HIGHEST: tl.constexpr,
    NARROW: tl.constexpr,
):
    """Y: X (rows, size) on the grid of each row; a row that is not finite is NaN."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    x, at, inside = _tile(X, row, tl.arange(0, BLOCK), rows, size)
    bad = tl.max(tl.where(tl.abs(x) < float("inf"), 0, 1), 1)
    x = tl.where(bad[:, None] > 0, 0.0, x)
    if FREE:
        clip = tl.load(CLIP)
    low, high = tl.minimum(tl.min(x, 1), 0.0), tl.maximum(tl.max(x, 1), 0.0)
    scale, zero = grid_of(low, high, clip, LOWEST, HIGHEST, NARROW)
    y = (code_of(x, scale[:, None], zero[:, None], LOWEST, HIGHEST) - zero[:, None]) * scale[:, None]
    tl.store(Y + at, tl.where(bad[:, None] > 0, float("nan"), y), mask=inside)


@triton.jit
@no_type_check
def gradient_kernel(
    X,
    G,
    CLIP,
    OF_X,
    OF_CLIP,
    rows,
    size,
    clip,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    FREE: tl.constexpr,
    LOWEST: tl.constexpr,
    HIGHEST: tl.constexpr,
):
    """What X and the clip ratio get of the gradient G behind the grid, as `training.trained` derives it.

    BLOCK columns at a time, three times over: what spans the range, what moves it, and what all of that does to X.
    """
    row, columns = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK)
    if FREE:
        clip = tl.load(CLIP)
    high = tl.zeros([ROWS], tl.float32)
    low, bad = high * 0, tl.zeros([ROWS], tl.int32)
    most, least = bad - 1, bad - 1  # where they stand; nowhere if nothing is beyond 0
    for start in range(0, size, BLOCK):
        x, _at, _inside = _tile(X, row, columns + start, rows, size)
        bad = tl.maximum(bad, tl.max(tl.where(tl.abs(x) < float("inf"), 0, 1), 1))
        spans = tl.abs(x) if LOWEST < 0 else x
        top, bottom = tl.max(spans, 1), tl.min(x, 1)
        most = tl.where(top > high, start + tl.argmax(spans, 1, tie_break_left=True), most)
        least = tl.where(bottom < low, start + tl.argmin(x, 1, tie_break_left=True), least)
        high, low = tl.maximum(high, top), tl.minimum(low, bottom)
    high = tl.where(bad > 0, 0.0, high) * clip
    low = tl.where((bad > 0) | (LOWEST < 0), 0.0, low) * clip
    step = tl.div_rn(high - low, low * 0 + HIGHEST)
    step = tl.where(step == 0, 1.0, step)
    first = rounded(tl.div_rn(low, step))
    of_step, above, below = high * 0, high * 0, high * 0
    for start in range(0, size, BLOCK):
        x, at, inside = _tile(X, row, columns + start, rows, size)
        slope = tl.load(G + at, mask=inside, other=0.0)
        steps, code, on_grid = _codes(x, step, first, LOWEST, HIGHEST)
        of_step += tl.sum(tl.where(on_grid == code, slope * (on_grid - steps), 0.0), 1)
        above += tl.sum(tl.where(on_grid < code, slope, 0.0), 1)
        below += tl.sum(tl.where(on_grid > code, slope, 0.0), 1)
    of_step = of_step / HIGHEST
    of_high, of_low = of_step + above, below - of_step
    if LOWEST < 0:
        of_high, of_low = of_high + below * (LOWEST / HIGHEST), low
    of_clip = (of_high * high + of_low * low) / clip
    tl.store(OF_CLIP + row, tl.where(bad > 0, float("nan"), of_clip), mask=row < rows)
    for start in range(0, size, BLOCK):
        x, at, inside = _tile(X, row, columns + start, rows, size)
        slope = tl.load(G + at, mask=inside, other=0.0)
        _steps, code, on_grid = _codes(x, step, first, LOWEST, HIGHEST)
        of_x = tl.where(on_grid == code, slope, 0.0)
        at_high = (clip * of_high)[:, None]
        if LOWEST < 0:
            at_high = tl.where(x > 0, at_high, -at_high)
        of_x += tl.where((columns + start)[None, :] == most[:, None], at_high, 0.0)
        of_x += tl.where((columns + start)[None, :] == least[:, None], (clip * of_low)[:, None], 0.0)
        tl.store(OF_X + at, tl.where(bad[:, None] > 0, float("nan"), of_x), mask=inside)


def on_grid(
    groups: Float[Tensor, "*batch size"], spec: TensorSpec, clip: Tensor | float, narrow: bool
) -> Float[Tensor, "*batch size"]:
    """Rows on their grids; with `narrow` scales are rounded up to bfloat16."""
    x = groups.contiguous()
    y = torch.empty_like(x)
    launch, how = _launch(x, spec, clip)
    grid_kernel[launch](
        x, given_or(_tensor(clip), x), y, *_sizes(x, clip), **how, NARROW=narrow, enable_fp_fusion=False
    )
    return y


def quantize_backward(
    groups: Float[Tensor, "*batch size"], upstream: Float[Tensor, "*batch size"], spec: TensorSpec, clip: Tensor | float
) -> tuple[Float[Tensor, "*batch size"], Float[Tensor, "*batch"]]:
    """As `kernels.training.quantize_backward`."""
    x, slope = groups.contiguous(), upstream.contiguous()
    of_x, of_clip = torch.empty_like(x), x.new_empty(x.shape[:-1])
    launch, how = _launch(x, spec, clip, most=2048)
    gradient_kernel[launch](
        *(x, slope, given_or(_tensor(clip), x), of_x, of_clip, *_sizes(x, clip)), **how, enable_fp_fusion=False
    )
    return of_x, of_clip


def _tensor(clip: Tensor | float) -> Tensor | None:
    return clip if isinstance(clip, Tensor) else None


def _sizes(x: Tensor, clip: Tensor | float) -> tuple[int, int, float]:
    return x.numel() // x.shape[-1], x.shape[-1], 1.0 if isinstance(clip, Tensor) else clip


def _launch(
    x: Tensor, spec: TensorSpec, clip: Tensor | float, most: int = 1 << 20
) -> tuple[tuple[int], dict[str, Any]]:
    """How many programs, and what they are compiled with: at most so many columns at a time."""
    block = min(most, triton.next_power_of_2(x.shape[-1]))
    rows = max(1, _ENTRIES // block)
    how: dict[str, Any] = {"ROWS": rows, "BLOCK": block, "FREE": isinstance(clip, Tensor)}
    how |= {"LOWEST": spec.grid.lowest, "HIGHEST": spec.grid.highest}
    how["num_warps"] = min(32, max(4, block * rows // 256))
    return (triton.cdiv(x.numel() // x.shape[-1], rows),), how
