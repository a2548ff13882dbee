"""The kernels against integer arithmetic in float64, with each instruction set."""

import ctypes
import itertools
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from dfrot.kernels.library import library
from dfrot.kernels.linear import PackedWeight, linear, rotate, supported
from dfrot.kernels.lowering import NO_PASSES, lower
from dfrot.linalg.rotation import (
    Compose,
    Hadamard,
    Identity,
    Kronecker,
    Permutation,
    Rotation,
    block_rotation,
    random_hadamard,
    random_orthogonal,
)
from dfrot.quant.affine import QParams, choose_qparams, dequantize, quantize
from dfrot.quant.packing import pack
from dfrot.quant.spec import UNQUANTIZED, TensorSpec

EPS = {torch.float32: 2**-23, torch.bfloat16: 2**-7}
SLOW_SETUP = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def random_weight(
    out: int, width: int, spec: TensorSpec, generator: torch.Generator, *, bias: bool = False
) -> tuple[PackedWeight, Tensor]:
    """A packed weight and what it stands for in float64."""
    groups = 1 if spec.group is None else width // spec.group
    codes = torch.randint(0, 2**spec.bits, (out, width), generator=generator, dtype=torch.uint8)
    scales = (torch.rand(out, groups, generator=generator) + 0.1).bfloat16()
    zeros = torch.randint(0, 2**spec.bits, (out, groups), generator=generator, dtype=torch.uint8)
    b = torch.randn(out, generator=generator) if bias else None
    packed = PackedWeight(pack(codes, spec.bits), scales, None if spec.symmetric else zeros, b)
    zero = 2.0 ** (spec.bits - 1) if spec.symmetric else zeros.double()[..., None]
    wide = (codes.double().unflatten(-1, (groups, -1)) - zero) * scales.double()[..., None]
    return packed, wide.flatten(1)


def quantized(x: Tensor, spec: TensorSpec) -> Tensor:
    """What the integers of each row stand for, in float64, chosen in float32."""
    wide, granularity = x.float(), spec.token_granularity
    assert spec.clip_ratio is not None
    qparams = choose_qparams(wide, spec.grid, granularity, spec.clip_ratio)
    zero = None if qparams.zero is None else qparams.zero.double()
    codes = quantize(wide, spec.grid, granularity, qparams)
    return dequantize(codes.double(), granularity, QParams(qparams.scale.double(), zero))


@given(
    rows=st.sampled_from([1, 2, 3, 5, 8, 9, 31, 33, 70, 300]),
    out=st.integers(1, 100),
    width=st.integers(1, 40).map(lambda n: 2 * n) | st.sampled_from([127 * 2, 256, 576, 1000]),
    bits=st.tuples(st.sampled_from([4, 8]), st.integers(2, 8)),
    symmetric=st.tuples(st.booleans(), st.booleans()),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    bias=st.booleans(),
    seed=st.integers(0, 2**20),
)
@SLOW_SETUP
def test_the_product_is_that_of_the_integers(
    isa: int,
    rows: int,
    out: int,
    width: int,
    bits: tuple[int, int],
    symmetric: tuple[bool, bool],
    dtype: torch.dtype,
    bias: bool,
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weights, activations = TensorSpec(bits[0], symmetric[0]), TensorSpec(bits[1], symmetric[1], 0.9)
    x = (torch.randn(rows, width, generator=generator) * torch.logspace(-20, 20, rows)[:, None]).to(dtype)
    packed, w = random_weight(out, width, weights, generator, bias=bias)
    q = quantized(x, activations)
    expected, b = q @ w.T, torch.zeros(out) if packed.bias is None else packed.bias
    (y,) = linear(x, [packed], NO_PASSES, weights, activations)
    # integers are exact; the two scales, their product, the bias and the result are rounded
    bound = EPS[dtype] / 2 * (expected + b).abs() + 4 * EPS[torch.float32] * (expected.abs() + b.abs())
    assert ((y.double() - expected - b).abs() <= bound + 1e-37).all()


@pytest.mark.parametrize(("bits", "group"), [(4, 8), (4, 32), (4, 64), (4, 128), (4, 256), (8, 16), (8, 64), (8, 128)])
@pytest.mark.parametrize("rows", [1, 7, 40])
def test_groups_have_their_own_scales(isa: int, bits: int, group: int, rows: int, generator: torch.Generator) -> None:
    weights = TensorSpec(bits, symmetric=False, group=group)
    for activations in (TensorSpec(4, False, 0.9), TensorSpec(8, False, 1.0), TensorSpec(8, True, 1.0)):
        x = torch.randn(rows, 768, generator=generator)
        if not supported(x, weights, activations):
            assert isa <= 2  # AVX2, AVX-VNNI
            continue
        packed, w = random_weight(50, 768, weights, generator)
        expected = quantized(x, activations) @ w.T
        (y,) = linear(x, [packed], NO_PASSES, weights, activations)
        # as many roundings as there are groups, of terms as large as all of them together
        terms = quantized(x, activations).abs() @ w.abs().T
        assert ((y - expected).abs() <= 768 / group * EPS[torch.float32] * terms).all()


@pytest.mark.parametrize(("bits", "group", "width"), [(4, None, 2178), (4, 64, 2240), (4, 128, 2176), (8, None, 1037)])
@pytest.mark.parametrize("rows", [9, 205])
def test_rows_of_more_inputs_and_tokens_than_are_worked_on_together(
    isa: int, bits: int, group: int | None, width: int, rows: int, generator: torch.Generator
) -> None:
    weights, activations = TensorSpec(bits, symmetric=False, group=group), TensorSpec(4, False, 0.9)
    x = torch.randn(rows, width, generator=generator)
    packed, w = random_weight(35, width, weights, generator)
    q = quantized(x, activations)
    (y,) = linear(x, [packed], NO_PASSES, weights, activations)
    assert ((y - q @ w.T).abs() <= width / (group or width) * 4 * EPS[torch.float32] * (q.abs() @ w.abs().T)).all()


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", range(2, 9))
def test_sums_of_the_largest_codes_do_not_overflow(isa: int, bits: int, symmetric: bool, sign: int) -> None:
    """Every product is the largest of its sign, in rows longer than any that sums of 16 bits would hold."""
    weights, activations = TensorSpec(4, symmetric=False), TensorSpec(bits, symmetric, 0.8)  # −2^(b − 1), too
    codes = torch.full((33, 4096), 15, dtype=torch.uint8)
    packed = PackedWeight(pack(codes, 4), torch.ones(33, 1).bfloat16(), torch.zeros(33, 1, dtype=torch.uint8), None)
    x = torch.full((40, 4096), float(sign))
    (y,) = linear(x, [packed], NO_PASSES, weights, activations)
    expected = 15 * quantized(x, activations).sum(1, keepdim=True)
    assert ((y - expected).abs() <= 4 * EPS[torch.float32] * expected.abs()).all()


def with_vdpbf16ps_and_without(isa: int) -> Iterator[None]:
    """Without it, and with it where an instruction set has it and takes no AMX in its place."""
    found, _ = library()
    assert found is not None
    chosen = ctypes.c_int.in_dll(found, "dfrot_pairs")
    before = chosen.value
    for chosen.value in (False, True) if isa == 3 and torch.cpu._is_avx512_bf16_supported() else (False,):
        yield
    chosen.value = before


FLOATS = [(4, None), (4, 8), (4, 32), (4, 64), (4, 256), (2, None), (3, 32), (3, 256), (5, 8), (6, 64), (7, 128)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 2, 4, 7, 9, 35, 205])
@pytest.mark.parametrize(("bits", "group"), [*FLOATS, (8, None), (8, 32)])
def test_inputs_that_are_not_quantized_are_multiplied_by_what_the_integers_stand_for(
    isa: int, bits: int, group: int | None, rows: int, dtype: torch.dtype, generator: torch.Generator
) -> None:
    for symmetric, width in ((True, 768), (False, 1280), *(((False, 1000), (True, 8)) if group in (None, 8) else ())):
        weights = TensorSpec(bits, symmetric, group=group)
        packed, w = random_weight(70, width, weights, generator, bias=True)
        x = torch.randn(rows, width, generator=generator).to(dtype)
        assert supported(x, weights, UNQUANTIZED)
        assert packed.bias is not None
        expected, terms = x.double() @ w.T + packed.bias, x.double().abs() @ w.abs().T + packed.bias.abs()
        # γ_2n of the terms (floats.c); bfloat16 rounds the result, and of many tokens the weights of groups
        bound = 2 * width * EPS[torch.float32] / 2 * terms
        if dtype == torch.bfloat16:
            bound += EPS[dtype] / 2 * expected.abs() + (EPS[dtype] / 2 * terms if group and rows > 8 else 0)
        for _ in with_vdpbf16ps_and_without(isa):
            (y,) = linear(x, [packed], NO_PASSES, weights, UNQUANTIZED)
            assert ((y.double() - expected).abs() <= bound).all()


def test_what_is_not_quantized_is_rotated_and_rounded_to_the_stream(isa: int, generator: torch.Generator) -> None:
    weights, passes = TensorSpec(4, True), lower(Hadamard(64))
    packed, w = random_weight(33, 64, weights, generator)
    assert passes is not None
    for rows, dtype in itertools.product((1, 40), (torch.float32, torch.bfloat16)):
        x = torch.randn(rows, 64, generator=generator).to(dtype)
        turned = x.double() @ Hadamard(64).as_matrix()
        (y,) = linear(x, [packed], passes, weights, UNQUANTIZED)
        terms = turned.abs() @ w.abs().T
        assert ((y.double() - turned @ w.T).abs() <= 2 * EPS[dtype] / 2 * terms + 64 * EPS[torch.float32] * terms).all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("rows", [3, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_not_finite_stays_in_its_row_without_quantization_too(
    isa: int, rows: int, bad: float, dtype: torch.dtype, generator: torch.Generator
) -> None:
    packed, _ = random_weight(20, 64, TensorSpec(4, False), generator)
    x = torch.randn(rows, 64, generator=generator).to(dtype)
    (clean,) = linear(x, [packed], NO_PASSES, TensorSpec(4, False), UNQUANTIZED)
    x[1, 5] = bad
    (y,) = linear(x, [packed], NO_PASSES, TensorSpec(4, False), UNQUANTIZED)
    assert not y[1].isfinite().any()
    others = torch.arange(rows) != 1
    assert torch.equal(y[others], clean[others])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("rows", [3, 40])
def test_what_is_not_finite_is_not_hidden_and_stays_in_its_row(
    isa: int, rows: int, bad: float, generator: torch.Generator
) -> None:
    weights, activations = TensorSpec(4, True), TensorSpec(4, False, 0.9)
    packed, _ = random_weight(20, 64, weights, generator)
    x = torch.randn(rows, 64, generator=generator)
    (clean,) = linear(x, [packed], NO_PASSES, weights, activations)
    x[1, 5] = bad
    (y,) = linear(x, [packed], NO_PASSES, weights, activations)
    assert y[1].isnan().all()
    others = torch.arange(rows) != 1
    assert torch.equal(y[others], clean[others])


def test_zeros_give_the_bias(isa: int, generator: torch.Generator) -> None:
    weights, activations = TensorSpec(4, False), TensorSpec(4, False, 0.9)
    packed, _ = random_weight(20, 64, weights, generator, bias=True)
    (y,) = linear(torch.zeros(9, 64), [packed], NO_PASSES, weights, activations)
    assert packed.bias is not None
    assert torch.equal(y, packed.bias.expand(9, -1))


@pytest.mark.parametrize(("width", "bits"), [(576, 4), (5632, 4), (14336, 4), (5000, 8)])
def test_a_token_is_computed_alike_alone_and_among_many(
    isa: int, width: int, bits: int, generator: torch.Generator
) -> None:
    weights, activations = TensorSpec(bits, True), TensorSpec(4, False, 0.9)
    packed, _ = random_weight(300, width, weights, generator)
    x = torch.randn(600, width, generator=generator)
    (together,) = linear(x, [packed], NO_PASSES, weights, activations)
    for row in (0, 191, 192, 599):
        (alone,) = linear(x[row : row + 1], [packed], NO_PASSES, weights, activations)
        assert torch.equal(alone[0], together[row])


ROTATIONS: list[Rotation] = [
    *(Hadamard(size) for size in (2, 4, 12, 16, 20, 64, 128, 172, 576, 688, 1536, 1792)),
    Hadamard(688).T,
    Kronecker(Hadamard(12), Identity(8)),
    Kronecker(Identity(3), Hadamard(20)),
    Compose((Permutation(torch.arange(24).flip(0)), Kronecker(Identity(2), Hadamard(12)))),
    block_rotation(
        torch.stack([random_orthogonal(size, torch.Generator().manual_seed(1)).matrix for size in (64, 64)]),
        torch.randperm(192, generator=torch.Generator().manual_seed(2))[None],
    ),
    block_rotation(random_orthogonal(36, torch.Generator().manual_seed(1)).matrix[None], torch.empty(0, 72).long()),
]


@pytest.mark.parametrize("rotation", ROTATIONS, ids=lambda rotation: f"{type(rotation).__name__}{rotation.size}")
def test_passes_are_the_rotation(isa: int, rotation: Rotation, generator: torch.Generator) -> None:
    x, offset = torch.randn(3, rotation.size, generator=generator), torch.randn(rotation.size, generator=generator)
    passes = lower(rotation)
    assert passes is not None
    expected = x.double() @ rotation.as_matrix()
    error = (rotate(x, *passes).double() - expected).abs().amax(-1)
    shifted = rotate(x, *passes.less(offset)).double() + offset.double()
    error = torch.maximum(error, (shifted - expected).abs().amax(-1))
    # log2 n rounded sums, or one of n terms, of a vector of this length
    assert (error <= rotation.size**0.5 * EPS[torch.float32] * x.double().norm(dim=-1)).all()


def test_a_rotation_that_the_kernels_do_not_know_is_said(generator: torch.Generator) -> None:
    assert lower(random_hadamard(16, generator)) is None
    assert lower(Kronecker(Permutation(torch.arange(3)), Hadamard(4))) is None


def test_weights_that_read_one_input_share_its_rotation_and_quantization(isa: int, generator: torch.Generator) -> None:
    """Eight bits, so that an integer that falls on the other side of a tie hardly shows."""
    weights, activations = TensorSpec(4, True), TensorSpec(8, False, 1.0)
    (one, w_one), (two, w_two) = (random_weight(out, 64, weights, generator) for out in (96, 33))
    passes = lower(Hadamard(64))
    assert passes is not None
    for rows in (1, 40, 300):
        x = torch.randn(rows, 64, generator=generator)
        q = quantized((x.double() @ Hadamard(64).as_matrix()).float(), activations)
        for y, w in zip(linear(x, [one, two], passes, weights, activations), (w_one, w_two), strict=True):
            torch.testing.assert_close(y.double(), q @ w.T, rtol=0, atol=1e-3 * float((q @ w.T).std()))


def test_what_there_is_no_kernel_for(isa: int) -> None:
    weights, activations = TensorSpec(4, True), TensorSpec(4, False, 0.9)
    x = torch.zeros(1, 64)
    assert supported(x, weights, activations)
    assert not supported(x.double(), weights, activations)
    assert not supported(x.requires_grad_(), weights, activations)
    for bits, spec in itertools.product((3, 16), (weights, activations)):
        other = TensorSpec(bits, spec.symmetric, spec.clip_ratio)
        pair = (other, activations) if spec is weights else (weights, other)
        assert supported(torch.zeros(1, 64), *pair) == (spec is activations)
    assert not supported(torch.zeros(1, 72), TensorSpec(4, True, group=36), activations)
    assert not supported(torch.zeros(1, 72), TensorSpec(4, True, group=36), UNQUANTIZED)
    assert not supported(torch.zeros(1, 9), TensorSpec(3, True), UNQUANTIZED)  # the last byte is not full
    assert not supported(torch.zeros(1, 64), UNQUANTIZED, UNQUANTIZED)
