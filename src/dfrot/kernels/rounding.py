"""What rounding weights computes: the errors that the search for clip ratios compares, of all ratios in one pass, and
GPTQ's columns."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dfrot.kernels.structures import computable, machine, native, pointer
from dfrot.quant.affine import QParams
from dfrot.quant.grids import Grid, IntGrid

COLUMNS = 64  # that are rounded in one call


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


def round_columns(
    wanted: Float[Tensor, "in out"],
    error: Float[Tensor, "in out"],
    codes: Float[Tensor, "in out"],
    upper: Float[Tensor, "in in"],
    group: Int[Tensor, " in"],
    scale: Float[Tensor, "groups out"],
    zero: Float[Tensor, "groups out"] | None,
    columns: slice,
    grid: Grid,
) -> None:
    """As `dfrot.rounding.gptq.round_columns`, `COLUMNS` of them at a time."""
    rows = tuple(tensor[columns] for tensor in (wanted, error, codes))
    taken, groups = upper[columns, columns].contiguous(), group[columns].contiguous()
    given = *map(pointer, rows), pointer(taken), pointer(groups), pointer(scale), pointer(zero)
    native().dfrot_round_columns(*machine(), *given, wanted.shape[1], len(taken), grid.lowest, grid.highest)
