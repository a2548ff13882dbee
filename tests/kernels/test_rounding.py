"""Kernels for rounding weights: what they compute is what float64 does, with each instruction set."""

import pytest
import torch
from torch import Tensor

from dfrot.kernels import rounding as kernels
from dfrot.quant.affine import QParams, qparams_of_range, value_range
from dfrot.quant.clip import search_clip
from dfrot.quant.grids import FloatGrid, IntGrid, PerChannel, PerGroup
from dfrot.quant.spec import Spec
from dfrot.rounding import gptq, rtn

GRIDS = [IntGrid(bits, symmetric) for bits in (2, 4, 8) for symmetric in (True, False)]


def tried(rows: Tensor, grid: IntGrid) -> QParams:
    """Scales and zero points of three clip ratios, (3, rows)."""
    low, high = value_range(rows, grid, PerChannel())
    clips = torch.tensor([1.0, 0.7, 0.2])[:, None]
    return qparams_of_range(None if low is None else low[:, 0] * clips, high[:, 0] * clips, grid, torch.bfloat16)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("size", [1, 7, 16, 576])
@pytest.mark.parametrize("factor", [2.0**-90, 1.0, 2.0**90])
def test_errors_are_those_of_float64(
    grid: IntGrid, size: int, factor: float, isa: int, generator: torch.Generator
) -> None:
    rows = torch.randn(5, size, generator=generator) * factor
    rows[0], rows[1] = 0, rows[1].abs()
    scale, zero = tried(rows, grid)
    found = kernels.clip_errors(rows, grid, QParams(scale, zero))
    steps = rows.double() / scale.double()[..., None]
    points = torch.zeros(()) if zero is None else zero.double()[..., None]
    e = ((steps.round() + points).clamp(grid.lowest, grid.highest) - points - steps).abs()
    wanted = e.pow(2.4).sum(-1)
    # x / s is rounded twice; the power is good to 4e-6, a sum of n positive numbers to n roundings
    bound = (2.4 * e.pow(1.4) * steps.abs() * 2.0**-22).sum(-1) + wanted * (4e-6 + size * 2.0**-24) + size * 1e-15
    assert ((found / scale.double() ** 2.4 - wanted).abs() <= bound).all()


@pytest.mark.parametrize("spec", ["w4a16kv16", "w3g16a16kv16", "w4a16kv16 asymmetric"])
def test_the_search_ends_where_that_of_the_reference_ends(
    spec: str, isa: int, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    words, _, asymmetric = spec.partition(" ")
    grid, weight = (
        Spec.parse(words, "paper", weight_symmetric=not asymmetric).weights,
        torch.randn(50, 64, generator=generator),
    )
    weight[0, 0], weight[1] = 30, 0
    found = rtn.weight_qparams(weight, grid)
    monkeypatch.setattr(rtn, "supported", lambda *_: False)
    wanted = rtn.weight_qparams(weight, grid)
    assert torch.equal(found.scale, wanted.scale)
    assert (found.zero is None) == (wanted.zero is None) == grid.symmetric


def test_other_grids_and_dtypes_are_searched_by_torch() -> None:
    weight = torch.ones(2, 32)
    assert kernels.supported(weight, IntGrid(4))
    assert not kernels.supported(weight.double(), IntGrid(4))
    assert not kernels.supported(weight, FloatGrid("e8m0"))
    assert search_clip(weight, IntGrid(4), PerGroup(16), errors=kernels.clip_errors).scale.shape == (2, 2)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("columns", "out"), [(1, 1), (3, 7), (64, 130), (37, 300)])
def test_columns_are_rounded_one_after_the_other(
    symmetric: bool, columns: int, out: int, isa: int, generator: torch.Generator
) -> None:
    """All numbers are multiples of 1/16, few columns take others' errors: nothing is rounded but to the grid."""
    grid = IntGrid(4, symmetric)
    scale = 2.0 ** -torch.randint(0, 3, (2, out), generator=generator)
    zero = None if symmetric else torch.randint(0, 16, (2, out), generator=generator).float()
    group = torch.randint(2, (columns + 5,), generator=generator)
    few = torch.rand(columns + 5, columns + 5, generator=generator) < 0.05
    upper = few * torch.randint(-1, 2, few.shape, generator=generator).float()
    error = torch.randint(-64, 65, (columns + 5, out), generator=generator) / 16
    which, code = slice(3, 3 + columns), torch.zeros_like(error)
    kernels.round_columns(own := error.clone(), left := error.clone(), code, upper, group, scale, zero, which, grid)

    wanted, errors, codes = error.double(), error.double(), torch.zeros_like(error).double()
    points = None if zero is None else zero.double()
    gptq.round_columns(wanted, errors, codes, upper.double(), group, scale.double(), points, which, grid)
    assert code[which].unique().numel() > 1 or out == 1
    for got, expected in ((own, wanted), (left, errors), (code, codes)):
        assert torch.equal(got.double(), expected)
