"""Affine quantization: three verbs, `choose_qparams`, `quantize`, `dequantize`, and their composition.

    symmetric    s = c · max|x| / (2^(b−1) − 1),                 q = clamp(round(x / s)),      x̂ = s q
    asymmetric   s = c · (max(x, 0) − min(x, 0)) / (2^b − 1),    q = clamp(round(x / s) + z),  x̂ = s (q − z)
                 z = round(−c · min(x, 0) / s)

Grids of 4-bit floats are symmetric, with gaps between their integers q and another rule for the step s: see grids.py.
The range always contains 0, so zeros (padding, dead channels) stay exactly zero. NaN and infinities come out as NaN and
are never clamped into something that looks like a number.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from dfrot.quant.grids import Granularity, Grid, PerGroup

# Of stored scales. It has the range of float32. Since the integers are chosen for the stored scale, the short mantissa
# only makes a step up to 2⁻⁷ longer.
SCALE_DTYPE = torch.bfloat16


class QParams(NamedTuple):
    """Scale and zero point, one entry per group of the granularity. `zero` is None for symmetric grids."""

    scale: Tensor
    zero: Tensor | None

    def rows(self, which: slice) -> "QParams":
        return QParams(self.scale[which], None if self.zero is None else self.zero[which])


def grouped(x: Tensor, granularity: Granularity) -> Tensor:
    """A view of x whose last axis holds what shares one scale: (…, groups, group_size).

    Raises:
        ValueError: the group size does not divide the last axis.
    """
    if not isinstance(granularity, PerGroup):
        return x.unsqueeze(-2)
    width, size = x.shape[-1], granularity.size
    if width % size:
        divisors = [g for g in (16, 32, 64, 128, 256) if width % g == 0]
        hint = f"Group sizes that do: {divisors}." if divisors else "Use one scale per channel."
        raise ValueError(f"group_size must divide the width, got group_size={size} for width {width}. {hint}")
    return x.unflatten(-1, (-1, size))


def choose_qparams(
    x: Float[Tensor, "..."],
    grid: Grid,
    granularity: Granularity,
    clip: float | Tensor = 1.0,
    scale_dtype: torch.dtype | None = None,
) -> QParams:
    """The scales (and zero points) that fit `grid` to the range of x.

    Args:
        x: (…, channels).
        clip: the share c of the range that is kept, a number or one per group.
        scale_dtype: a narrower dtype in which the scales will be stored. They are rounded up to it here: the integers
            then fit the stored scale, and nothing else is clipped.

    Returns:
        scale (and zero) of shape (…, groups), in the dtype of x; an all-zero group has scale 1.

    Raises:
        ValueError: the group size does not divide the last axis.
    """
    low, high = value_range(x, grid, granularity)
    return qparams_of_range(None if low is None else low * clip, high * clip, grid, scale_dtype)


def value_range(x: Float[Tensor, "..."], grid: Grid, granularity: Granularity) -> tuple[Tensor | None, Tensor]:
    """min(x, 0) and max(x, 0) of every group, (…, groups); for symmetric grids None and max |x|."""
    groups = grouped(x, granularity)
    if grid.symmetric:
        return None, groups.abs().amax(-1)
    return groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)


def qparams_of_range(low: Tensor | None, high: Tensor, grid: Grid, scale_dtype: torch.dtype | None = None) -> QParams:
    """The scales (and zero points) whose grid spans [low, high], for symmetric grids [−high, high]."""
    scale = grid.step(high if low is None else high - low, scale_dtype)
    zero = None if low is None else torch.round(-low / scale).clamp(grid.lowest, grid.highest)
    return QParams(scale, zero)


def _rounded(groups: Tensor, grid: Grid, qparams: QParams) -> Tensor:
    """The integers, still as floats, of a grouped tensor."""
    zero = None if qparams.zero is None else qparams.zero.unsqueeze(-1)
    return grid.nearest_(groups / qparams.scale.unsqueeze(-1), zero)


def quantize(x: Float[Tensor, "..."], grid: Grid, granularity: Granularity, qparams: QParams) -> Tensor:
    """The integers nearest to x: int8 (uint8 for asymmetric grids), in the shape of x."""
    q = _rounded(grouped(x, granularity), grid, qparams)
    return q.to(torch.int8 if grid.symmetric else torch.uint8).reshape(x.shape)


def dequantize(q: Tensor, granularity: Granularity, qparams: QParams) -> Float[Tensor, "..."]:
    """s (q − z), in the shape of q and the dtype of the scales."""
    groups = grouped(q, granularity).to(qparams.scale.dtype)
    if qparams.zero is not None:
        groups = groups - qparams.zero.unsqueeze(-1)
    return (groups * qparams.scale.unsqueeze(-1)).reshape(q.shape)


def fake_quantize(
    x: Float[Tensor, "..."],
    grid: Grid,
    granularity: Granularity,
    clip: float | Tensor = 1.0,
    scale_dtype: torch.dtype | None = None,
) -> Float[Tensor, "..."]:
    """x quantized and dequantized; same shape and dtype.

    16-bit tensors are quantized in float32: in bfloat16 the quotient x / s itself would be off by up to half a step.
    """
    wide = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
    qparams = choose_qparams(wide, grid, granularity, clip, scale_dtype)
    q = _rounded(grouped(wide, granularity), grid, qparams)
    if qparams.zero is not None:
        q -= qparams.zero.unsqueeze(-1)
    return q.mul_(qparams.scale.unsqueeze(-1)).reshape(x.shape).to(x.dtype)
