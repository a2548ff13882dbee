"""oneDNN's float32 products are products, and nothing else is touched."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear

from dfrot.system.products import OneDNNLinear, onednn_is_faster, with_fast_products

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")


def calls(of: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, bool]:
    """The product within the mode, and whether oneDNN's operator computed it."""
    with torch.profiler.profile() as profile, OneDNNLinear():
        found = linear(of, weight, bias)
    return found, any("mkldnn" in event.key for event in profile.key_averages())


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
    found, by_onednn = calls(x, weight, bias)
    wanted = linear(x.double(), weight.double(), None if bias is None else bias.double())
    magnitudes = linear(x.double().abs(), weight.double().abs(), None if bias is None else bias.double().abs())
    assert by_onednn
    assert ((found - wanted).abs() <= 97 * 2**-24 * magnitudes).all()  # Higham, §3.1: γ_n of the magnitudes


@pytest.mark.parametrize(
    ("rows", "dtype", "graded"), [(15, torch.float32, False), (16, torch.float64, False), (16, torch.float32, True)]
)
def test_few_rows_other_dtypes_and_gradients_are_left_to_torch(rows: int, dtype: torch.dtype, graded: bool) -> None:
    x = torch.ones(rows, 8, dtype=dtype, requires_grad=graded)
    found, by_onednn = calls(x, torch.ones(4, 8, dtype=dtype), None)
    assert not by_onednn
    assert found.requires_grad == graded


@pytest.mark.parametrize("bias", [torch.arange(8.0)[::2], torch.ones(1), torch.tensor(3.0)])
def test_what_onednn_would_take_for_another_bias_is_left_to_torch(bias: Tensor) -> None:
    x, weight = torch.ones(16, 8), torch.ones(4, 8)
    found, by_onednn = calls(x, weight, bias)
    assert not by_onednn
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
