from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import dfrot
from dfrot.linalg.rotation import Hadamard, Rotation
from dfrot.quant.affine import QParams, dequantize, fake_quantize
from dfrot.quant.grids import IntGrid, PerToken
from dfrot.quant.spec import UNQUANTIZED, TensorSpec
from dfrot.rounding.rtn import rtn
from dfrot.runtime.linear import QuantLinear, packed_tensors


def layer(
    weight: torch.Tensor,
    weights: TensorSpec,
    activations: TensorSpec = UNQUANTIZED,
    rotation: Rotation | None = None,
    offset: torch.Tensor | None = None,
) -> QuantLinear:
    made = QuantLinear(
        weight.shape[1],
        weight.shape[0],
        bias=False,
        weights=weights,
        activations=activations,
        rotation=rotation,
        dtype=weight.dtype,
        offset=offset is not None,
    )
    tensors = packed_tensors(*rtn(weight, weights), weights) if weights.enabled else {"weight": weight}
    made.load_state_dict(tensors | ({} if offset is None else {"offset": offset}))
    return made


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [None, 8])
def test_packing_loses_nothing(bits: int, symmetric: bool, group: int | None) -> None:
    weight = torch.randn(6, 24, generator=torch.Generator().manual_seed(bits))
    spec = TensorSpec(bits, symmetric, 1.0, group)
    codes, qparams = rtn(weight, spec)
    expected = dequantize(codes, spec.weight_granularity, qparams)
    assert torch.equal(layer(weight, spec).dense_weight(torch.float32), expected)


def test_the_forward_pass_is_rotate_quantize_multiply() -> None:
    weight, x = torch.randn(5, 12, dtype=torch.float64), torch.randn(3, 2, 12, dtype=torch.float64)
    activations = TensorSpec(4, symmetric=False, clip_ratio=0.9)
    quantized = layer(weight, TensorSpec(4, True, None), activations, Hadamard(12))
    rotated = x @ Hadamard(12).as_matrix()
    expected = fake_quantize(rotated, IntGrid(4, False), PerToken(), 0.9) @ quantized.dense_weight(x.dtype).T
    torch.testing.assert_close(quantized(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rotation", [None, Hadamard(64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])  # the kernels and the reference
def test_an_offset_is_subtracted_behind_the_rotation(
    rotation: Rotation | None, dtype: torch.dtype, generator: torch.Generator
) -> None:
    weight, offset, x = (torch.randn(*shape, generator=generator).to(dtype) for shape in ((5, 64), (64,), (3, 64)))
    quantized = layer(weight, TensorSpec(4, True, None), TensorSpec(8, False, 1.0), rotation, 3 * offset)
    shifted = (x if rotation is None else x @ rotation.as_matrix().to(dtype)) - 3 * offset
    expected = fake_quantize(shifted, IntGrid(8, False), PerToken()) @ quantized.dense_weight(dtype).T
    # in float32 an integer of 8 bits may fall on the other side of a tie
    tolerance = 1e-12 if dtype == torch.float64 else float(shifted.abs().max() * weight.abs().max()) / 100
    torch.testing.assert_close(quantized(x), expected, rtol=0, atol=tolerance)
    graded = x.clone().requires_grad_()
    torch.testing.assert_close(quantized(graded), expected, rtol=0, atol=tolerance)


def test_a_pass_with_gradients_has_the_value_of_one_without_and_the_gradient_of_the_weight() -> None:
    weight, x = torch.randn(5, 16), torch.randn(3, 16)
    quantized = layer(weight, TensorSpec(4, True, None), TensorSpec(4, symmetric=False, clip_ratio=1.0))
    followed = x.clone().requires_grad_()
    y = quantized(followed)
    assert torch.equal(y, quantized(x))
    y.sum().backward()
    torch.testing.assert_close(followed.grad, quantized.dense_weight(torch.float32).sum(0).expand(3, -1))


@pytest.mark.parametrize("width", [256, 4096, 14336])
def test_integers_are_summed_exactly_however_wide_the_layer(width: int, generator: torch.Generator) -> None:
    """Eight-bit integers near the ends of their grids: 2**24 is passed after some 1,100 products. Against int64."""
    eight, shape = TensorSpec(8, symmetric=True, clip_ratio=1.0), (width,)
    codes = torch.randint(100, 128, (6, *shape), generator=generator, dtype=torch.int8)
    x = torch.randint(100, 128, (4, *shape), generator=generator)
    x[:, 0] = 127  # so that the step is 1 and every entry its own integer
    made = QuantLinear(width, 6, bias=False, weights=eight, activations=eight, rotation=None, dtype=torch.float32)
    made.load_state_dict(packed_tensors(codes, QParams(torch.ones(6, 1), None), eight))
    exact = (x @ codes.long().T).float()
    assert torch.equal(made.integer_product(x.float()), exact)
    assert torch.equal(made(x.float()), exact)
    if width > 1100:  # such a layer tells float32 sums from exact ones
        assert not torch.equal(x.float() @ codes.float().T, exact)


def test_with_everything_left_alone_it_is_a_linear_layer() -> None:
    weight, x = torch.randn(5, 12), torch.randn(3, 12)
    assert torch.equal(layer(weight, UNQUANTIZED)(x), torch.nn.functional.linear(x, weight))


def test_changing_the_dtype_changes_the_unpacked_weight() -> None:
    quantized = layer(torch.randn(4, 16), TensorSpec(4, True))
    assert quantized(torch.randn(2, 16)).dtype == torch.float32
    assert quantized(torch.randn(2, 16, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_a_bfloat16_model_runs(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    path = dfrot.quantize(tiny("llama"), dfrot.Recipe.parse("quarot", "rtn"), tmp_path / "out").path
    tokens = torch.arange(1, 20)[None]
    wide, _ = dfrot.load(path)
    narrow, _ = dfrot.load(path, dtype=torch.bfloat16)
    with torch.no_grad():
        expected, got = wide(tokens).logits, narrow(tokens).logits
    assert got.dtype == torch.bfloat16
    assert (got.float() - expected).norm() / expected.norm() < 0.5  # 4-bit rounding amplifies bfloat16's
