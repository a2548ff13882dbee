import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dfrot.quant.affine import choose_qparams, dequantize, fake_quantize, quantize
from dfrot.quant.clip import search_clip
from dfrot.quant.grids import Granularity, IntGrid, PerChannel, PerGroup, PerToken

GRIDS = [IntGrid(bits, symmetric) for bits in range(2, 9) for symmetric in (True, False)]
every_grid = pytest.mark.parametrize("grid", GRIDS, ids=str)


def x(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@every_grid
def test_codes_stay_on_the_grid_and_the_error_below_half_a_step(grid: IntGrid) -> None:
    tensor = x(6, 32)
    qparams = choose_qparams(tensor, grid, PerToken())
    codes = quantize(tensor, grid, PerToken(), qparams)
    assert grid.lowest <= int(codes.min())
    assert int(codes.max()) <= grid.highest
    error = (dequantize(codes, PerToken(), qparams) - tensor).abs()
    # the zero point of an asymmetric grid is rounded too, so that one end may be cut by half a step more
    assert (error <= (0.5 if grid.symmetric else 1.0) * qparams.scale * (1 + 1e-12)).all()


@every_grid
def test_fake_quantize_is_the_composition_of_the_verbs(grid: IntGrid) -> None:
    tensor = x(3, 4, 16)
    qparams = choose_qparams(tensor, grid, PerGroup(8), 0.9)
    restored = dequantize(quantize(tensor, grid, PerGroup(8), qparams), PerGroup(8), qparams)
    assert torch.equal(fake_quantize(tensor, grid, PerGroup(8), 0.9), restored)


def test_known_small_cases_by_hand() -> None:
    row = torch.tensor([[-1.0, 0.0, 0.5, 2.0]])
    # symmetric, 3 bits: s = 2/3, x/s = −1.5, 0, 0.75, 3, rounded half to even
    symmetric = choose_qparams(row, IntGrid(3), PerChannel())
    assert symmetric.scale.item() == pytest.approx(2 / 3)
    assert quantize(row, IntGrid(3), PerChannel(), symmetric).tolist() == [[-2, 0, 1, 3]]
    # asymmetric, 2 bits: s = 1, z = 1
    asymmetric = choose_qparams(row, IntGrid(2, symmetric=False), PerChannel())
    assert asymmetric.zero is not None
    assert (asymmetric.scale.item(), asymmetric.zero.item()) == (1.0, 1.0)
    assert quantize(row, IntGrid(2, symmetric=False), PerChannel(), asymmetric).tolist() == [[0, 1, 1, 3]]


@pytest.mark.parametrize(
    ("granularity", "shape"),
    [(PerToken(), (8, 1)), (PerChannel(), (8, 1)), (PerGroup(16), (8, 4))],
    ids=str,
)
def test_scales_have_the_documented_shape(granularity: Granularity, shape: tuple[int, int]) -> None:
    assert choose_qparams(x(8, 64), IntGrid(4), granularity).scale.shape == shape


@pytest.mark.parametrize("symmetric", [True, False])
def test_values_already_on_the_grid_are_kept_exactly(symmetric: bool) -> None:
    grid = IntGrid(4, symmetric)
    codes = torch.arange(grid.lowest + symmetric, grid.highest + 1, dtype=torch.float64)[None]
    on_grid = 0.25 * (codes if symmetric else codes - 5)
    torch.testing.assert_close(fake_quantize(on_grid, grid, PerToken()), on_grid, rtol=1e-15, atol=0)


@every_grid
def test_zeros_stay_zero(grid: IntGrid) -> None:
    assert torch.equal(fake_quantize(torch.zeros(2, 8), grid, PerToken()), torch.zeros(2, 8))
    mixed = torch.tensor([[0.0, 3.0, -1.0, 0.0]])
    assert (fake_quantize(mixed, grid, PerToken())[mixed == 0] == 0).all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("symmetric", [True, False])
def test_nan_and_infinity_are_not_hidden(bad: float, symmetric: bool) -> None:
    tensor = x(2, 8, dtype=torch.float32)
    tensor[0, 3] = bad
    out = fake_quantize(tensor, IntGrid(4, symmetric), PerToken())
    assert out[0].isnan().any()
    assert out[1].isfinite().all()


def test_sixteen_bit_activations_are_quantized_in_float32() -> None:
    tensor = x(16, 64, dtype=torch.bfloat16)
    expected = fake_quantize(tensor.float(), IntGrid(8), PerToken()).bfloat16()
    assert torch.equal(fake_quantize(tensor, IntGrid(8), PerToken()), expected)


def test_a_group_size_that_does_not_divide_names_those_that_do() -> None:
    with pytest.raises(ValueError, match=r"group_size=10 for width 64.*\[16, 32, 64\]"):
        fake_quantize(x(2, 64), IntGrid(4), PerGroup(10))


@pytest.mark.parametrize("bits", [1, 9, 16])
def test_a_grid_of_other_bits_is_refused(bits: int) -> None:
    with pytest.raises(ValueError, match="2 to 8 bits"):
        IntGrid(bits)


@pytest.mark.parametrize("granularity", [PerChannel(), PerGroup(16)], ids=str)
@pytest.mark.parametrize("symmetric", [True, False])
def test_clip_search_finds_what_brute_force_finds(granularity: Granularity, symmetric: bool) -> None:
    """With GPTQ's and QuaRot's numbers: `norm=2.4, grid=100, maxshrink=.8` of their quantizer."""
    grid, weight = IntGrid(3, symmetric), x(40, 32)
    weight[0, 0] = 9.0
    found = search_clip(weight, grid, granularity)
    rows = weight.reshape(-1, 32 if granularity == PerChannel() else 16)

    def error(row: torch.Tensor, clip: float) -> float:
        return (fake_quantize(row[None], grid, PerChannel(), clip) - row).abs().pow(2.4).sum().item()

    least = torch.tensor([min(error(row, 1 - i / 100) for i in range(81)) for row in rows], dtype=torch.float64)
    restored = dequantize(quantize(weight, grid, granularity, found), granularity, found)
    reached = (restored - weight).reshape(rows.shape).abs().pow(2.4).sum(-1)
    torch.testing.assert_close(reached, least, rtol=1e-9, atol=0)


def test_clip_search_goes_down_to_a_fifth_of_the_range_and_no_further() -> None:
    """One entry so far from thousands of small ones that the least error, of all ratios, is at a smaller one still."""
    row = torch.cat([torch.ones(1), torch.linspace(-0.06, 0.06, 10000)])[None].double()

    def error(clip: float) -> float:
        return (fake_quantize(row, IntGrid(3), PerChannel(), clip) - row).abs().pow(2.4).sum().item()

    assert min(range(1, 101), key=lambda percent: error(percent / 100)) < 20
    assert search_clip(row, IntGrid(3), PerChannel()).scale.item() == pytest.approx(0.2 / 3, rel=1e-12)


def test_clip_search_does_not_depend_on_how_rows_are_cut_into_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = x(50, 64, dtype=torch.float32)
    whole = search_clip(weight, IntGrid(4), PerChannel(), torch.bfloat16)
    monkeypatch.setattr("dfrot.quant.clip._PIECE_ENTRIES", {"cpu": 130 * len(IntGrid.clips)})
    assert torch.equal(search_clip(weight, IntGrid(4), PerChannel(), torch.bfloat16).scale, whole.scale)


@given(st.integers(0, 2**31), st.sampled_from(GRIDS), st.floats(1e-30, 1e30))
def test_quantization_scales_with_its_input(seed: int, grid: IntGrid, factor: float) -> None:
    tensor = x(2, 16, seed=seed)
    plain = fake_quantize(tensor, grid, PerToken()) * 2.0 ** round(torch.tensor(factor).log2().item())
    scaled = fake_quantize(tensor * 2.0 ** round(torch.tensor(factor).log2().item()), grid, PerToken())
    assert torch.equal(plain, scaled)  # a power of two changes no mantissa


@given(st.integers(0, 2**31), st.sampled_from(GRIDS))
def test_scales_stored_in_bfloat16_are_rounded_up_so_that_nothing_more_is_clipped(seed: int, grid: IntGrid) -> None:
    tensor = x(4, 16, seed=seed, dtype=torch.float32)
    exact = choose_qparams(tensor, grid, PerToken()).scale
    stored = choose_qparams(tensor, grid, PerToken(), scale_dtype=torch.bfloat16).scale
    assert torch.equal(stored, stored.bfloat16().float())
    assert (stored >= exact).all()
    assert (stored <= exact * (1 + 2**-7)).all()
