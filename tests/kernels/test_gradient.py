"""The kernel's gradient through a quantizer is that of the torch reference, with each instruction set."""

import pytest
import torch

from dfrot.kernels import gradient
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
    assert gradient.supported(x.detach())
    found = torch.autograd.grad(y, leaves, upstream, retain_graph=True)
    monkeypatch.setattr(gradient, "supported", lambda *_: False)
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
