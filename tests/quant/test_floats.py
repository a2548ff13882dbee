"""NVFP4 and MXFP4 against ml_dtypes, compressed-tensors' own quantizers, and all sixteen values."""

import ml_dtypes
import numpy as np
import pytest
import torch
from compressed_tensors.compressors.nvfp4 import pack_fp4_to_uint8, unpack_fp4_from_uint8
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization import fake_quantize as theirs
from compressed_tensors.quantization.quant_scheme import MXFP4, NVFP4
from compressed_tensors.quantization.utils import calculate_qparams
from hypothesis import given
from hypothesis import strategies as st

from dfrot.quant.affine import SCALE_DTYPE, choose_qparams, dequantize, fake_quantize, grouped, quantize
from dfrot.quant.clip import search_clip
from dfrot.quant.grids import FloatGrid, PerGroup, PerToken, tensor_factor
from dfrot.quant.packing import pack, unpack
from dfrot.quant.spec import PRESETS, Spec, TensorSpec
from dfrot.system.errors import UserError

SCHEMES: dict[str, QuantizationArgs] = {"nvfp4": NVFP4["weights"], "mxfp4": MXFP4["weights"]}
SPECS = {word: Spec.parse(word).weights for word in SCHEMES}
VALUES = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
every_format = pytest.mark.parametrize("word", SPECS)
seeds = st.integers(0, 2**31)


def x(seed: int, *shape: int, spread: float = 4.0) -> torch.Tensor:
    """Entries whose size varies over many powers of two, as a model's do."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.exp2(spread * torch.randn(*shape[:-1], 1, generator=generator))
    return torch.randn(*shape, generator=generator) * sizes


def their_scales(groups: torch.Tensor, word: str, factor: torch.Tensor | None) -> torch.Tensor:
    return calculate_qparams(groups.amin(-1), groups.amax(-1), SCHEMES[word], global_scale=factor)[0]


@given(seeds)
@pytest.mark.parametrize("word", SPECS)
def test_scales_and_values_are_those_of_compressed_tensors_to_the_bit(word: str, seed: int) -> None:
    tensor, spec = x(seed, 4, 96), SPECS[word]
    tensor[0, :32] = 0
    spec = spec.holding(tensor.abs().max())
    factor = tensor_factor(tensor.abs().max()) if word == "nvfp4" else None
    qparams = choose_qparams(tensor, spec.grid, spec.weight_granularity)
    groups = grouped(tensor, spec.weight_granularity)
    scales = their_scales(groups, word, factor)
    there = groups.abs().amax(-1) > 0  # of an empty group theirs has no meaning
    assert torch.equal((2 * qparams.scale * (1 if factor is None else factor))[there], scales[there])
    zero = torch.zeros_like(scales)
    expected = theirs(tensor, scales, zero, SCHEMES[word], global_scale=factor)
    found = fake_quantize(tensor, spec.grid, spec.weight_granularity)
    assert torch.equal(found, expected.where(expected.isfinite(), 0))


@given(seeds)
@every_format
def test_rounding_is_that_of_ml_dtypes(word: str, seed: int) -> None:
    """In float32, whose ties between floats of 4 bits both see; half of the entries are such ties."""
    steps = torch.cat([x(seed, 64, spread=1.0), torch.randint(-13, 14, (64,)) / 2.0]).clamp(-12, 12)
    expected = (steps / 2).numpy().astype(ml_dtypes.float4_e2m1fn)
    found = SPECS[word].grid.nearest_(steps.clone())
    assert torch.equal(found / 2, torch.from_numpy(expected.astype(np.float32)))
    codes = SPECS[word].grid.encode(found.to(torch.int8))
    nonzero = found != 0  # ml_dtypes has two zeros
    assert torch.equal(codes[nonzero], torch.from_numpy(expected.view(np.uint8))[nonzero])


@given(seeds)
def test_e4m3_and_e8m0_round_scales_as_ml_dtypes_does(seed: int) -> None:
    width = x(seed, 64, 1).abs()[:, 0]
    largest = width.max()
    factor = tensor_factor(largest)
    expected = (width / 6 * factor).numpy().astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
    found = FloatGrid("e4m3", float(largest)).step(width) * 2 * factor
    assert torch.equal(found, torch.where(torch.from_numpy(expected) == 0, 0.125, torch.from_numpy(expected)))
    powers = (2 * FloatGrid("e8m0").step(width)).numpy()
    assert np.array_equal(powers.astype(ml_dtypes.float8_e8m0fnu).astype(np.float32), powers)


@given(seeds)
@every_format
def test_no_value_of_the_grid_is_nearer_than_the_one_chosen(word: str, seed: int) -> None:
    tensor, spec = x(seed, 3, 64), SPECS[word].holding(torch.tensor(100.0))
    qparams = choose_qparams(tensor, spec.grid, spec.weight_granularity)
    groups = grouped(tensor, spec.weight_granularity)[..., None].double()
    signed = torch.cat([-VALUES, VALUES]).double() * 2 * qparams.scale[..., None, None].double()
    least = (groups - signed).abs().amin(-1).flatten(-2)
    found = (fake_quantize(tensor, spec.grid, spec.weight_granularity).double() - tensor).abs()
    # a tie in float32 may be none in float64, by the rounding of x / s
    assert (found <= least * (1 + 2**-22)).all()


@every_format
def test_codes_are_those_that_compressed_tensors_packs(word: str) -> None:
    spec = SPECS[word]
    integers = torch.randint(0, 15, (5, 32))
    integers = torch.tensor([-12, -8, -6, -4, -3, -2, -1, 0, 1, 2, 3, 4, 6, 8, 12])[integers].to(torch.int8)
    packed = pack(spec.grid.encode(integers), 4)
    assert torch.equal(packed, pack_fp4_to_uint8(integers / 2))
    assert torch.equal(spec.grid.decode(unpack(packed, 4, 32)), integers)
    every = torch.arange(256, dtype=torch.uint8)[:, None]
    assert torch.equal(spec.grid.decode(unpack(every, 4, 2)) / 2, unpack_fp4_from_uint8(every, 256, 2, torch.float32))


@given(seeds)
@every_format
def test_bfloat16_holds_every_step_and_a_coarser_factor_every_scale(word: str, seed: int) -> None:
    """So a checkpoint stores the steps of floats as those of integers, and an exporter can choose the factor."""
    tensor, spec = x(seed, 8, 64), SPECS[word]
    spec = spec.holding(tensor.abs().max())
    scale = search_clip(tensor, spec.grid, spec.weight_granularity, SCALE_DTYPE).scale
    assert torch.equal(scale.bfloat16().float(), scale)
    if word == "nvfp4":
        factor = tensor_factor(12 * scale.max())
        assert factor >= tensor_factor(tensor.abs().max())
        as_stored = 2 * scale * factor
        assert torch.equal(as_stored.to(torch.float8_e4m3fn).float(), as_stored)


@every_format
def test_fake_quantize_is_the_composition_of_the_verbs(word: str) -> None:
    tensor, spec = x(3, 4, 64).double(), SPECS[word]
    grid, granularity = spec.grid, spec.weight_granularity
    qparams = choose_qparams(tensor, grid, granularity)
    codes = quantize(tensor, grid, granularity, qparams)
    assert codes.dtype == torch.int8
    assert torch.equal(fake_quantize(tensor, grid, granularity), dequantize(codes, granularity, qparams))


@every_format
def test_values_on_the_grid_are_kept_and_negation_changes_signs_alone(word: str) -> None:
    spec = SPECS[word]
    on_grid = torch.cat([-VALUES, VALUES]).repeat(spec.group or 1, 2)[:, : spec.group]
    assert torch.equal(fake_quantize(on_grid, spec.grid, spec.weight_granularity), on_grid)
    tensor = x(5, 4, 64)
    assert torch.equal(
        fake_quantize(-tensor, spec.grid, spec.weight_granularity),
        -fake_quantize(tensor, spec.grid, spec.weight_granularity),
    )


@every_format
@pytest.mark.parametrize("broken", [torch.nan, torch.inf, -torch.inf])
def test_what_is_no_number_stays_none(word: str, broken: float) -> None:
    tensor = torch.ones(1, 32)
    tensor[0, 3] = broken
    assert fake_quantize(tensor, SPECS[word].grid, SPECS[word].weight_granularity)[0, 3].isnan()


def test_each_token_has_its_own_factor_until_the_largest_entry_is_known() -> None:
    tensor, grid = x(1, 6, 64, spread=8.0), FloatGrid("e4m3")
    rows = torch.cat([fake_quantize(row[None], grid, PerGroup(16)) for row in tensor])
    assert torch.equal(fake_quantize(tensor, grid, PerGroup(16)), rows)


def test_beyond_the_largest_entry_that_was_known_values_are_cut_off() -> None:
    spec = SPECS["nvfp4"].holding(torch.tensor(6.0))
    far = torch.full((1, 16), 1000.0)
    # the factor is 256: scales reach 448 / 256, and values 6 times that
    assert fake_quantize(far, spec.grid, spec.weight_granularity)[0, 0] == 6 * 448 / 256


@every_format
def test_clip_search_is_never_worse_than_the_rule(word: str) -> None:
    tensor = x(9, 32, 64, spread=0.0)
    spec = SPECS[word].holding(tensor.abs().max())
    searched = search_clip(tensor, spec.grid, spec.weight_granularity)
    codes = quantize(tensor, spec.grid, spec.weight_granularity, searched)
    found = dequantize(codes, spec.weight_granularity, searched)
    ruled = fake_quantize(tensor, spec.grid, spec.weight_granularity)
    assert (found - tensor).abs().pow(2.4).sum() < (ruled - tensor).abs().pow(2.4).sum()


@pytest.mark.parametrize(
    ("text", "full"),
    [
        ("nvfp4", "wnvfp4anvfp4kv16"),
        ("mxfp4", "wmxfp4amxfp4kv16"),
        ("wnvfp4a16kv8", "wnvfp4a16kv8"),
        ("w4g32amxfp4kv4", "w4g32amxfp4kv4"),
    ],
)
@pytest.mark.parametrize("preset", PRESETS)
def test_the_grammar_has_floats_for_weights_and_activations(text: str, full: str, preset: str) -> None:
    spec = Spec.parse(text, preset)
    assert str(spec) == full == str(Spec.parse(full))
    if not spec.activations.integer:
        assert (spec.activations.clip_ratio, spec.activations.symmetric) == (1.0, True)
    assert Spec(**{kind: TensorSpec.checked(**grid) for kind, grid in spec.to_json().items()}) == spec


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("wnvfp4g32a16kv16", "nvfp4 has groups of 16, which cannot be chosen: leave out g32"),
        ("w4a4kvnvfp4", "does not parse"),
        ("fp4", "nvfp4 alone is wnvfp4anvfp4kv16"),
    ],
)
def test_what_the_grammar_does_not_have_is_refused(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Spec.parse(text)
    with pytest.raises(UserError, match="mxfp4 has 4 bits, no zero point and groups of 32"):
        TensorSpec.checked(bits=4, symmetric=True, group=16, format="mxfp4")


def test_integers_are_written_as_before() -> None:
    assert Spec.parse("w4a4kv4").to_json()["weights"].keys() == {"bits", "symmetric", "clip_ratio", "group"}
    assert fake_quantize(torch.ones(2, 4), TensorSpec(4, True).grid, PerToken()).tolist() == [[1.0] * 4] * 2
