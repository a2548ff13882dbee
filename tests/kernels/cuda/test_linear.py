"""The kernels for GPUs against integer arithmetic in float64."""

import pytest
import torch
from torch import Tensor

from dfrot.kernels.lowering import NO_PASSES, Lowered, lower
from dfrot.linalg.rotation import Hadamard, Identity, Kronecker, Rotation, block_rotation, random_orthogonal
from dfrot.quant.spec import TensorSpec
from tests.kernels.test_linear import quantized, random_weight

pytest.importorskip("triton", reason="Triton is not there: pip install 'dfrot[dev]'")

from dfrot.kernels.cuda.linear import products
from dfrot.kernels.cuda.rows import rotate

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPS = {torch.float32: 2**-23, torch.bfloat16: 2**-8, torch.float16: 2**-11}
# one more place for each: the interpreter cuts off where it should round
ROUNDING = {dtype: eps * (2 if DEVICE == "cpu" else 1) for dtype, eps in EPS.items()}


def run(
    x: Tensor, parts: list[Tensor | None], rotation: Lowered, weights: TensorSpec, activations: TensorSpec
) -> Tensor:
    parts = [None if part is None else part.to(DEVICE) for part in parts]
    grid = activations.bits, activations.symmetric, activations.fixed_clip
    return products(x.to(DEVICE), parts, *rotation, weights.bits, *grid)[0].cpu()


@pytest.mark.parametrize("dtype", EPS)
@pytest.mark.parametrize(
    ("bits", "group", "symmetric"),
    [
        ((4, 4), None, (True, False)),
        ((4, 8), None, (True, False)),
        ((4, 8), None, (False, False)),
        ((4, 3), None, (False, True)),
        ((8, 8), None, (True, True)),
        ((8, 8), None, (False, False)),
        ((4, 4), 64, (True, False)),
        ((4, 8), 64, (False, False)),
        ((8, 4), 64, (False, False)),
    ],
)
@pytest.mark.parametrize(("rows", "out", "width"), [(1, 40, 128), (2, 20, 192), (5, 33, 192), (20, 70, 64)])
def test_the_product_is_that_of_the_integers(
    dtype: torch.dtype,
    bits: tuple[int, int],
    group: int | None,
    symmetric: tuple[bool, bool],
    rows: int,
    out: int,
    width: int,
    generator: torch.Generator,
) -> None:
    weights = TensorSpec(bits[0], symmetric[0], group=group)
    activations = TensorSpec(bits[1], symmetric[1], 0.9)
    packed, wide = random_weight(out, width, weights, generator, bias=rows == 5)
    x = torch.randn(rows, width, generator=generator).to(dtype)
    expected = quantized(x, activations) @ wide.T + (0 if packed.bias is None else packed.bias.double())
    size = quantized(x, activations).abs() @ wide.abs().T + 1
    y = run(x, [*packed], NO_PASSES, weights, activations)
    assert y.dtype == dtype
    assert ((y.double() - expected).abs() <= ROUNDING[dtype] * expected.abs() + 2**-21 * size).all()


ROTATIONS: dict[str, Rotation] = {
    "two powers": Hadamard(256),
    "three factors, the first shared": Hadamard(8960),
    "three factors, the second shared": Kronecker(Hadamard(12), Kronecker(Hadamard(16), Hadamard(32))),
    "three factors, too large": Hadamard(28672),
    "12 and a power": Hadamard(96),
    "28 and a power": Hadamard(224),
    "over the heads": Kronecker(Hadamard(4), Identity(32)),
    "over 12 heads": Kronecker(Hadamard(12), Identity(16)),
    "within heads": Kronecker(Identity(3), Hadamard(32)),
    "any matrix": random_orthogonal(48, torch.Generator().manual_seed(0)),
    "blocks and permutations": block_rotation(
        torch.stack([random_orthogonal(16, torch.Generator().manual_seed(seed)).matrix for seed in (1, 2)]),
        torch.randperm(48, generator=torch.Generator().manual_seed(3))[None],
    ),
}


@pytest.mark.parametrize("dtype", EPS)
@pytest.mark.parametrize("name", ROTATIONS)
def test_rotated_rows_are_the_rotations(name: str, dtype: torch.dtype, generator: torch.Generator) -> None:
    rotation = ROTATIONS[name]
    x = torch.randn(2, 3, rotation.size, generator=generator).to(dtype)
    lowered = lower(rotation)
    assert lowered is not None
    y = rotate(x.to(DEVICE), *lowered).cpu()
    expected = rotation.apply(x.double())
    assert y.dtype == dtype
    size = x.double().square().mean(-1, keepdim=True).sqrt()
    bound = ROUNDING[dtype] * (expected.abs() + 4 * size) + 2**-16 * rotation.size**0.5 * size
    assert ((y.double() - expected).abs() <= bound).all()


def test_large_inputs_in_float16_stay_finite(generator: torch.Generator) -> None:
    rotation, lowered = Hadamard(8960), lower(Hadamard(8960))
    assert lowered is not None
    x = torch.where(torch.rand(2, 8960, generator=generator) > 0.5, 3000.0, -3000.0).half()
    error = rotate(x.to(DEVICE), *lowered).cpu().double() - rotation.apply(x.double())
    assert error.abs().max() <= 3000 * 8 * ROUNDING[torch.float16]


@pytest.mark.parametrize("name", [name for name in ROTATIONS if name != "any matrix"])
@pytest.mark.parametrize("offset", [False, True])
def test_codes_behind_a_rotation_are_those_of_the_rotated_rows(
    name: str, offset: bool, generator: torch.Generator
) -> None:
    """As the kernel rotates them; which differs from float64 where an entry lies at a tie."""
    rotation = ROTATIONS[name]
    weights, activations = TensorSpec(4, True), TensorSpec(4, False, 0.9)
    packed, wide = random_weight(8, rotation.size, weights, generator)
    x = torch.randn(3, rotation.size, generator=generator)
    shift = torch.randn(rotation.size, generator=generator) if offset else None
    lowered = lower(rotation)
    assert lowered is not None
    y = run(x, [*packed], lowered.less(shift), weights, activations)
    rotated = rotate(x.to(DEVICE), *lowered).cpu() - (0 if shift is None else shift)
    expected = quantized(rotated, activations) @ wide.T
    assert torch.allclose(y.double(), expected, rtol=2**-20, atol=2**-18 * float(wide.abs().sum(1).max()))


@pytest.mark.parametrize("rotation", [NO_PASSES, lower(Hadamard(64))], ids=["as it is", "rotated"])
@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_a_row_that_is_not_finite_comes_out_as_nan_and_no_other(
    rotation: Lowered, wrong: float, generator: torch.Generator
) -> None:
    weights, activations = TensorSpec(4, True), TensorSpec(4, False, 0.9)
    packed, _ = random_weight(8, 64, weights, generator)
    x = torch.randn(3, 64, generator=generator)
    x[1, 5] = wrong
    y = run(x, [*packed], rotation, weights, activations)
    assert y[1].isnan().all()
    assert not y[[0, 2]].isnan().any()
