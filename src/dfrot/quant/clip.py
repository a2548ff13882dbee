"""Clip search: tries how much of a weight's range to keep (QuaRot's `find_params`, after GPTQ's)."""

import torch
from jaxtyping import Float
from torch import Tensor

from dfrot.quant.affine import QParams, dequantize, grouped, qparams_of_range, quantize, value_range
from dfrot.quant.grids import Granularity, Grid, PerChannel

ERROR_POWER = 2.4  # GPTQ's and QuaRot's norm: between squared error and the largest error

# Rows are searched in pieces that stay in the cache through all candidates.
_PIECE_ENTRIES = 1 << 17


def search_clip(
    weight: Float[Tensor, "out in"], grid: Grid, granularity: Granularity, scale_dtype: torch.dtype | None = None
) -> QParams:
    """Scales (and zero points) that minimise Σ |ŵ − w|^2.4 in each group over the grid's clip ratios.

    Returns:
        Entries of shape (out, groups).

    Raises:
        ValueError: the group size does not divide `in`.
    """
    groups = grouped(weight, granularity)
    rows = groups.flatten(0, -2).split(max(1, _PIECE_ENTRIES // groups.shape[-1]))
    found = [_search_rows(piece, grid, scale_dtype) for piece in rows]
    scale = torch.cat([qparams.scale for qparams in found]).reshape(groups.shape[:-1])
    zeros = [qparams.zero for qparams in found if qparams.zero is not None]
    return QParams(scale, torch.cat(zeros).reshape(scale.shape) if zeros else None)


def _search_rows(rows: Float[Tensor, "rows size"], grid: Grid, scale_dtype: torch.dtype | None) -> QParams:
    best_error = torch.full(rows.shape[:1], torch.inf, dtype=rows.dtype, device=rows.device)
    low, high = value_range(rows, grid, PerChannel())
    best = qparams_of_range(low, high, grid, scale_dtype)
    for clip in grid.clips:
        qparams = qparams_of_range(None if low is None else low * clip, high * clip, grid, scale_dtype)
        restored = dequantize(quantize(rows, grid, PerChannel(), qparams), PerChannel(), qparams)
        error = restored.sub_(rows).abs_().pow_(ERROR_POWER).sum(-1)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        scale, zero = torch.where(better[:, None], qparams.scale, best.scale), None
        if qparams.zero is not None and best.zero is not None:
            zero = torch.where(better[:, None], qparams.zero, best.zero)
        best = QParams(scale, zero)
    return best
