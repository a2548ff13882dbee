"""The errors that the search for clip ratios compares, of all ratios in one pass over a weight."""

import torch
from jaxtyping import Float
from torch import Tensor

from dfrot.kernels.structures import computable, machine, native, pointer
from dfrot.quant.affine import QParams
from dfrot.quant.grids import Grid, IntGrid


def supported(weight: Tensor, grid: Grid) -> bool:
    """Whether there is a kernel for such a weight."""
    return isinstance(grid, IntGrid) and weight.dtype == torch.float32 and computable(weight)


def clip_errors(rows: Float[Tensor, "rows size"], grid: Grid, tried: QParams) -> Float[Tensor, "clips rows"]:
    """Σ |ŵ − w|^2.4 of every row with each of its scales (and zero points), (clips, rows), to some 1e-6 of it."""
    rows, scale = rows.contiguous(), tried.scale.contiguous()
    zero = None if tried.zero is None else tried.zero.contiguous()
    errors = torch.empty(scale.shape, dtype=torch.float64)
    given = pointer(rows), *rows.shape, pointer(scale), pointer(zero), len(scale)
    native().dfrot_clip_errors(*machine(), *given, grid.lowest, grid.highest, pointer(errors))
    return errors
