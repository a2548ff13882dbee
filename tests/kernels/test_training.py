"""Kernels for training compute what torch does, with each instruction set."""

import pytest
import torch
from torch import nn

from dfrot.kernels import training
from dfrot.quant import affine
from dfrot.quant.spec import TensorSpec
from dfrot.training.trained import quantized


@pytest.mark.parametrize("shape", [(7, 33), (3, 576), (2, 3, 5, 64)])
@pytest.mark.parametrize("group", [None, 16])
@pytest.mark.parametrize("clip", [None, 0.7])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_the_gradient_is_that_of_the_reference(
    symmetric: bool,
    bits: int,
    clip: float | None,
    group: int | None,
    shape: tuple[int, ...],
    isa: int,
    generator: torch.Generator,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if group is not None and shape[-1] % group:
        group = shape[-1]
    spec = TensorSpec(bits, symmetric=symmetric, group=group, clip_ratio=0.9)
    x, upstream = torch.randn(2, *shape, generator=generator)
    x[0], x[1] = 0, x[1].abs()  # rows without a range, and with one of a single sign
    x.requires_grad_()
    ratio = None if clip is None else torch.tensor([clip], requires_grad=True)
    leaves = [x] if ratio is None else [x, ratio]
    y = quantized(x, spec, clip=ratio)
    assert training.supported(x.detach())
    found = torch.autograd.grad(y, leaves, upstream, retain_graph=True)
    monkeypatch.setattr(training, "supported", lambda *_: False)
    for got, wanted in zip(found, torch.autograd.grad(y, leaves, upstream), strict=True):
        # sums of up to 2 · 3 · 5 · 64 products in another order
        torch.testing.assert_close(got, wanted, rtol=2**-23 * x.numel(), atol=2**-23 * x.shape[-1] * 4)


def test_a_row_that_is_not_finite_gets_no_numbers() -> None:
    x = torch.randn(2, 32)
    x[1, 3] = torch.inf
    x.requires_grad_()
    y = quantized(x, TensorSpec(4, symmetric=False, clip_ratio=0.9))
    (found,) = torch.autograd.grad(y, x, torch.ones(2, 32))
    assert found[0].isfinite().all()
    assert found[1].isnan().all()


def test_a_gradient_that_is_differentiated_again_has_a_graph() -> None:
    x = torch.randn(2, 32, requires_grad=True)
    y = quantized(x, TensorSpec(4, symmetric=False, clip_ratio=0.9))
    (found,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    assert found.requires_grad


@pytest.mark.parametrize("shape", [(7, 33), (3, 576), (2, 3, 5, 64)])
@pytest.mark.parametrize("scale_dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_what_quantizing_leaves_is_that_of_the_reference_to_the_last_bit(
    symmetric: bool,
    bits: int,
    scale_dtype: torch.dtype | None,
    shape: tuple[int, ...],
    isa: int,
    generator: torch.Generator,
) -> None:
    spec = TensorSpec(bits, symmetric=symmetric, group=16 if shape[-1] == 64 else None, clip_ratio=0.9)
    x = torch.randn(shape, generator=generator).mul_(torch.logspace(-30, 10, shape[-2])[:, None])
    x[0], x[1] = 0, x[1].abs()  # no range, one of a single sign,
    x.flatten(0, -2)[-1, 3] = torch.inf  # and none that is finite
    found = training.fake_quantize(x, spec, 0.9, scale_dtype)
    wanted = affine.fake_quantize(x, spec.grid, spec.token_granularity, 0.9, scale_dtype)
    torch.testing.assert_close(found, wanted, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("size", [1, 33, 576])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("made", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scaling_rounds_as_torch_does(
    dtype: torch.dtype, made: torch.dtype, biased: bool, size: int, isa: int, generator: torch.Generator
) -> None:
    x = torch.randn(3, 5, size, generator=generator).to(dtype)
    scale, bias = torch.randn(2, size, generator=generator)
    expected = x.float() * scale + bias if biased else x.float() * scale
    found = training.scaled(x, scale, bias if biased else None, made)
    torch.testing.assert_close(found, expected.to(made), rtol=0, atol=0)


@pytest.mark.parametrize("size", [1, 19, 2048, 5000])
@pytest.mark.parametrize("spread", [0.1, 5, 30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_divergence_and_slope_are_those_of_float64(
    dtype: torch.dtype, spread: float, size: int, isa: int, generator: torch.Generator
) -> None:
    student, teacher = (spread * torch.randn(2, 7, size, generator=generator)).to(dtype)
    own, goal = student.double().log_softmax(-1), teacher.double().log_softmax(-1)
    expected = nn.functional.kl_div(own, goal, reduction="sum", log_target=True)
    # a logarithm of a chance is off by float32's precision of a logit, and e^x by as much relative to 1
    error = 8 * 2**-23 * max(1, 4 * spread)
    found, nothing = training.divergence(student, teacher)
    assert nothing is None
    torch.testing.assert_close(found, expected, rtol=error, atol=7 * error)
    again, slope = training.divergence(student, teacher, 0.5)
    assert again == found
    assert slope is not None
    wanted = 0.5 * (own.exp() - goal.exp())
    torch.testing.assert_close(slope.double(), wanted, rtol=torch.finfo(dtype).eps, atol=error)


def test_logits_that_are_not_numbers_have_no_divergence() -> None:
    student, teacher = torch.randn(2, 3, 40)
    student[1, 2] = torch.nan
    assert training.divergence(student, teacher)[0].isnan()
