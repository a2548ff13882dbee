"""Clip search: tries how much of a weight's range to keep (QuaRot's `find_params`, after GPTQ's)."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from dfrot.quant.affine import QParams, dequantize, grouped, qparams_of_range, quantize, value_range
from dfrot.quant.grids import Granularity, Grid, PerChannel

ERROR_POWER = 2.4  # GPTQ's and QuaRot's norm: between squared error and the largest error

# Entries that are worked on together, of some rows and all candidates: on a CPU what its cache holds.
_PIECE_ENTRIES = {"cpu": 1 << 19, "cuda": 1 << 26}

Errors = Callable[[Tensor, Grid, QParams], Tensor]  # of rows and what is tried with each, (clips, rows)


def search_clip(
    weight: Float[Tensor, "out in"],
    grid: Grid,
    granularity: Granularity,
    scale_dtype: torch.dtype | None = None,
    errors: Errors | None = None,
) -> QParams:
    """Scales (and zero points) that minimise Σ |ŵ − w|^2.4 in each group over the grid's clip ratios.

    Args:
        errors: that sum, where something computes it without a tensor of all candidates.

    Returns:
        Entries of shape (out, groups).

    Raises:
        ValueError: the group size does not divide `in`.
    """
    groups = grouped(weight, granularity)
    each = len(grid.clips) * (groups.shape[-1] if errors is None else 1)
    rows = groups.flatten(0, -2).split(max(1, _PIECE_ENTRIES[weight.device.type] // each))
    found = [_search_rows(piece, grid, scale_dtype, errors or clip_errors) for piece in rows]
    scale = torch.cat([qparams.scale for qparams in found]).reshape(groups.shape[:-1])
    zeros = [qparams.zero for qparams in found if qparams.zero is not None]
    return QParams(scale, torch.cat(zeros).reshape(scale.shape) if zeros else None)


def clip_errors(rows: Float[Tensor, "rows size"], grid: Grid, tried: QParams) -> Float[Tensor, "clips rows"]:
    """Σ |ŵ − w|^2.4 of every row with each of its scales (and zero points), (clips, rows)."""
    each = rows.expand(len(tried.scale), -1, -1)
    tried = QParams(tried.scale[..., None], None if tried.zero is None else tried.zero[..., None])
    restored = dequantize(quantize(each, grid, PerChannel(), tried), PerChannel(), tried)
    return restored.sub_(rows).abs_().pow_(ERROR_POWER).sum(-1).nan_to_num_(nan=torch.inf)


def _search_rows(
    rows: Float[Tensor, "rows size"], grid: Grid, scale_dtype: torch.dtype | None, errors: Errors
) -> QParams:
    low, high = value_range(rows, grid, PerChannel())  # (rows, 1)
    clips = torch.tensor(grid.clips, dtype=rows.dtype, device=rows.device)[:, None]

    def clipped(clip: Tensor) -> QParams:
        return qparams_of_range(None if low is None else low[:, 0] * clip, high[:, 0] * clip, grid, scale_dtype)

    error = errors(rows, grid, clipped(clips))
    return clipped(clips[error.argmin(0), 0])  # of equals the first
