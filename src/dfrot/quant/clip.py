"""Clip search: tries how much of a weight's range to keep (QuaRot's `find_params`, after GPTQ's)."""

import torch
from jaxtyping import Float
from torch import Tensor

from dfrot.quant.affine import QParams, dequantize, grouped, qparams_of_range, quantize, value_range
from dfrot.quant.grids import Granularity, Grid, PerChannel

ERROR_POWER = 2.4  # GPTQ's and QuaRot's norm: between squared error and the largest error

# Entries that are worked on together, of some rows and all candidates: on a CPU what its cache holds.
_PIECE_ENTRIES = {"cpu": 1 << 19, "cuda": 1 << 26}


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
    together = _PIECE_ENTRIES[weight.device.type] // (groups.shape[-1] * len(grid.clips))
    rows = groups.flatten(0, -2).split(max(1, together))
    found = [_search_rows(piece, grid, scale_dtype) for piece in rows]
    scale = torch.cat([qparams.scale for qparams in found]).reshape(groups.shape[:-1])
    zeros = [qparams.zero for qparams in found if qparams.zero is not None]
    return QParams(scale, torch.cat(zeros).reshape(scale.shape) if zeros else None)


def _search_rows(rows: Float[Tensor, "rows size"], grid: Grid, scale_dtype: torch.dtype | None) -> QParams:
    low, high = value_range(rows, grid, PerChannel())
    clips = torch.tensor(grid.clips, dtype=rows.dtype, device=rows.device)[:, None, None]

    def clipped(clip: Tensor) -> QParams:
        return qparams_of_range(None if low is None else low * clip, high * clip, grid, scale_dtype)

    tried, each = clipped(clips), rows.expand(len(clips), -1, -1)
    restored = dequantize(quantize(each, grid, PerChannel(), tried), PerChannel(), tried)
    error = restored.sub_(rows).abs_().pow_(ERROR_POWER).sum(-1).nan_to_num_(nan=torch.inf)
    return clipped(clips[error.argmin(0), 0])  # of equals the first
