"""Quantization as training meets it, and GPTQ's columns, on a GPU: against the torch reference."""

from typing import Any

import pytest
import torch
from torch import Tensor

from dfrot.quant.affine import fake_quantize
from dfrot.quant.grids import IntGrid
from dfrot.quant.spec import TensorSpec
from dfrot.rounding import gptq as reference

pytest.importorskip("triton", reason="Triton is not there: pip install 'dfrot[dev]'")

from dfrot.kernels.cuda import gptq, training

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GRIDS = [(bits, symmetric) for bits in (2, 4, 8) for symmetric in (True, False)]


def rows(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Some without a range, and some with one of a single sign."""
    x = torch.randn(shape, generator=generator)
    x[0] = 0
    x[1] = x[1].abs()
    return x


@pytest.mark.parametrize("narrow", [True, False])
@pytest.mark.parametrize("free", [True, False])
@pytest.mark.parametrize(("bits", "symmetric"), GRIDS)
@pytest.mark.parametrize("shape", [(5, 48), (3, 7, 64), (2, 2, 320)])
def test_rows_on_a_grid_are_those_of_the_reference_bit_by_bit(
    shape: tuple[int, ...], bits: int, symmetric: bool, free: bool, narrow: bool, generator: torch.Generator
) -> None:
    spec, x = TensorSpec(bits, symmetric, clip_ratio=0.9), rows(shape, generator)
    clip = torch.tensor([0.9]) if free else 0.9
    expected = fake_quantize(x, spec.grid, spec.token_granularity, clip, torch.bfloat16 if narrow else None)
    ratio = clip.to(DEVICE) if isinstance(clip, Tensor) else clip
    assert torch.equal(training.on_grid(x.to(DEVICE), spec, ratio, narrow).cpu(), expected)


@pytest.mark.parametrize("free", [True, False])
@pytest.mark.parametrize(("bits", "symmetric"), GRIDS)
@pytest.mark.parametrize("shape", [(5, 48), (3, 7, 64), (2, 9000)])
def test_the_gradient_is_that_of_the_reference(
    shape: tuple[int, ...], bits: int, symmetric: bool, free: bool, generator: torch.Generator
) -> None:
    from dfrot.training.trained import _Quantized

    spec, x, slope = TensorSpec(bits, symmetric, clip_ratio=0.9), rows(shape, generator), torch.randn(shape)
    # in float64 torch computes it, without a kernel
    wide, clip = x.double().requires_grad_(), torch.tensor([0.9], dtype=torch.float64, requires_grad=True)
    _Quantized.apply(wide, spec, None, clip).backward(slope.double())
    ratio = torch.tensor([0.9], device=DEVICE) if free else 0.9
    of_x, of_clip = training.quantize_backward(x.to(DEVICE), slope.to(DEVICE), spec, ratio)
    assert wide.grad is not None
    assert clip.grad is not None
    tolerance = 2**-20 * shape[-1]  # sums over a row
    torch.testing.assert_close(of_x.cpu().double(), wide.grad, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(of_clip.cpu().double().sum(), clip.grad[0], rtol=tolerance, atol=x.numel() * tolerance)


def test_a_row_that_is_not_finite_is_nan_and_its_neighbours_are_not() -> None:
    x = torch.randn(3, 32, device=DEVICE)
    x[1, 3] = torch.inf
    spec = TensorSpec(4, symmetric=False)
    made, (of_x, of_clip) = (
        training.on_grid(x, spec, 0.9, True),
        training.quantize_backward(x, torch.ones_like(x), spec, 0.9),
    )
    for found in (made, of_x, of_clip[:, None]):
        assert found.isnan().all(1).tolist() == [False, True, False]
        assert not found[::2].isnan().any()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("out", "width", "group"), [(5, 48, None), (40, 128, 16), (33, 200, None)])
def test_columns_are_rounded_as_one_after_the_other(
    out: int, width: int, group: int | None, symmetric: bool, generator: torch.Generator
) -> None:
    """Of numbers whose sums float32 holds: whatever their order, nothing is rounded."""

    def drawn(low: int, high: int, step: float, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=generator) * step

    groups, grid = 1 if group is None else width // group, IntGrid(4, symmetric)
    error = drawn(-64, 65, 1 / 16, width, out)
    upper = drawn(-8, 9, 1 / 8, width, width).triu(1) + torch.eye(width)
    scale, zero = 2.0 ** torch.randint(-2, 1, (groups, out), generator=generator), drawn(0, 16, 1.0, groups, out)
    order = torch.randperm(width, generator=generator) // (width if group is None else group)
    made: list[Any] = [[error.clone(), error.clone(), torch.empty_like(error)] for _ in range(2)]
    for first in range(0, width, gptq.COLUMNS):
        columns = slice(first, min(width, first + gptq.COLUMNS))
        arguments: list[Any] = [upper, order, scale, None if symmetric else zero]
        reference.round_columns(*[*made[0], *arguments, columns, grid])
        there: list[Any] = [part if part is None else part.to(DEVICE) for part in (*made[1], *arguments)]
        gptq.round_columns(*[*there, columns, grid])
        made[1] = [part.cpu() for part in there[:3]]
        for wanted, error_so_far, _ in made:
            wanted[columns.stop :] += upper[columns, columns.stop :].T @ error_so_far[columns]
    for ours, theirs in zip(made[1], made[0], strict=True):
        assert torch.equal(ours, theirs)
