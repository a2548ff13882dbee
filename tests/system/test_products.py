"""Products in float32 by oneDNN are products, and nothing else is touched."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear

from dfrot.system.products import OneDNNProducts, onednn_is_faster, with_fast_products

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")


def calls(of: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, bool]:
    """The product within the mode, and whether oneDNN's operator computed it."""
    return by_onednn(lambda: linear(of, weight, bias))


@pytest.mark.parametrize("shape", [(16,), (2, 40), (1, 3, 17)])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("contiguous", [True, False])
def test_products_are_those_of_float64(
    shape: tuple[int, ...], biased: bool, contiguous: bool, generator: torch.Generator
) -> None:
    x, weight = torch.randn(*shape, 96, generator=generator), torch.randn(80, 96, generator=generator)
    bias = torch.randn(80, generator=generator) if biased else None
    if not contiguous:
        x, weight = torch.randn(96, *shape, generator=generator).movedim(0, -1), weight.T.contiguous().T
    found, fast = calls(x, weight, bias)
    wanted = linear(x.double(), weight.double(), None if bias is None else bias.double())
    magnitudes = linear(x.double().abs(), weight.double().abs(), None if bias is None else bias.double().abs())
    assert fast
    assert ((found - wanted).abs() <= 97 * 2**-24 * magnitudes).all()  # Higham, §3.1: γ_n of the magnitudes


def by_onednn(function: Callable[[], Tensor]) -> tuple[Tensor, bool]:
    """What it returns within the mode, and whether oneDNN's operator was part of it."""
    with torch.profiler.profile() as profile, OneDNNProducts():
        found = function()
    return found, any("mkldnn" in event.key for event in profile.key_averages())


@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("batched", [True, False])
def test_matrix_products_are_those_of_float64(transposed: bool, batched: bool, generator: torch.Generator) -> None:
    x = torch.randn(96, 200, generator=generator).T if transposed else torch.randn(200, 96, generator=generator)
    x = x.expand(2, 200, 96) if batched else x
    y = torch.randn(96, 90, generator=generator)
    found, fast = by_onednn(lambda: x @ y)
    assert fast
    assert ((found - x.double() @ y.double()).abs() <= 97 * 2**-24 * (x.double().abs() @ y.double().abs())).all()


@pytest.mark.parametrize("rows", [40, 2500])
def test_what_is_added_up_in_place_is_the_sum_in_float64(rows: int, generator: torch.Generator) -> None:
    x, y = torch.randn(300, rows, generator=generator), torch.randn(300, 96, generator=generator)
    whole = torch.randn(rows + 2, 96, generator=generator)
    total = whole.clone()
    found, fast = by_onednn(lambda: total[2:].addmm_(x.T, y))
    wanted = whole[2:].double() + x.T.double() @ y.double()
    assert fast
    assert found.data_ptr() == total[2:].data_ptr()
    assert torch.equal(total[:2], whole[:2])
    magnitudes = whole[2:].double().abs() + x.T.double().abs() @ y.double().abs()
    assert ((total[2:] - wanted).abs() <= 302 * 2**-24 * magnitudes).all()


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x @ x,  # small
        lambda x: x.expand(400, 60, 60) @ x.expand(400, 60, 60),  # a product each
        lambda x: x.double().repeat(40, 1) @ x.double(),
        lambda x: x[0] @ x.repeat(1, 400),
        lambda x: torch.zeros(2400, 60).addmm_(x.repeat(40, 1), x, beta=2),
        lambda x: x.requires_grad_().repeat(40, 1) @ x,
    ],
)
def test_other_products_are_left_to_torch(function: Callable[[Tensor], Tensor], generator: torch.Generator) -> None:
    x = torch.randn(60, 60, generator=generator)
    found, fast = by_onednn(lambda: function(x))
    assert not fast
    assert torch.equal(found, function(x))


@pytest.mark.parametrize(
    ("rows", "dtype", "graded"), [(15, torch.float32, False), (16, torch.float64, False), (16, torch.float32, True)]
)
def test_few_rows_other_dtypes_and_gradients_are_left_to_torch(rows: int, dtype: torch.dtype, graded: bool) -> None:
    x = torch.ones(rows, 8, dtype=dtype, requires_grad=graded)
    found, fast = calls(x, torch.ones(4, 8, dtype=dtype), None)
    assert not fast
    assert found.requires_grad == graded


@pytest.mark.parametrize("bias", [torch.arange(8.0)[::2], torch.ones(1), torch.tensor(3.0)])
def test_what_onednn_would_take_for_another_bias_is_left_to_torch(bias: Tensor) -> None:
    x, weight = torch.ones(16, 8), torch.ones(4, 8)
    found, fast = calls(x, weight, bias)
    assert not fast
    assert torch.equal(found, linear(x, weight, bias))


def test_onednn_is_taken_where_mkl_is_slow_and_only_while_a_function_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for maker, faster in (("AuthenticAMD", torch.backends.mkl.is_available()), ("GenuineIntel", False)):
        (tmp_path / maker).write_text(f"processor : 0\nvendor_id : {maker}\n")
        assert onednn_is_faster(tmp_path / maker) == faster
    assert not onednn_is_faster(tmp_path / "none")
    modes = torch.overrides._get_current_function_mode_stack
    for faster in (True, False):
        monkeypatch.setattr("dfrot.system.products.onednn_is_faster", lambda faster=faster: faster)
        assert with_fast_products(lambda: len(modes()))() == faster
        assert not modes()
