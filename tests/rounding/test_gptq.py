from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import dfrot
from dfrot.pipeline.recipe import Recipe
from dfrot.quant.affine import QParams, dequantize, quantize
from dfrot.quant.spec import TensorSpec
from dfrot.rounding.gptq import RIDGE, factorize, gptq, gptq_with_rtn_fallback, layer_loss, towards_original
from dfrot.rounding.rtn import weight_qparams
from dfrot.system.errors import UserError

SPECS = [
    TensorSpec(4, symmetric=True, clip_ratio=None),
    TensorSpec(4, symmetric=False, clip_ratio=None),
    TensorSpec(2, symmetric=True, clip_ratio=None, group=32),
    TensorSpec(3, symmetric=False, clip_ratio=1.0, group=16),
    TensorSpec(8, symmetric=True, clip_ratio=None),
]
every_spec = pytest.mark.parametrize("spec", SPECS, ids=str)
every_order = pytest.mark.parametrize("act_order", [False, True])


def layer(
    generator: torch.Generator, out: int = 24, width: int = 96, tokens: int = 300, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    """A weight and the Gram matrix of inputs whose channels are correlated and of different sizes."""
    mixing = torch.randn(width, width, generator=generator, dtype=dtype)
    x = torch.randn(tokens, width, generator=generator, dtype=dtype) @ mixing
    x = x * torch.logspace(-1, 1, width, dtype=dtype)
    return torch.randn(out, width, generator=generator, dtype=dtype), x.T @ x


def paper(weight: Tensor, hessian: Tensor, spec: TensorSpec, qparams: QParams, damping: float, order: bool) -> Tensor:
    """GPTQ as the paper's Algorithm 1 has it, column by column, with the Cholesky factor of the inverse; float64."""
    w, h = weight.double().clone(), hessian.double().clone()
    columns = torch.argsort(h.diagonal(), descending=True, stable=True) if order else torch.arange(len(h))
    h += damping * h.diagonal().mean() * torch.eye(len(h), dtype=torch.float64)
    inverse = torch.linalg.inv(h[columns][:, columns])
    upper = torch.linalg.cholesky(inverse, upper=True)
    w = w[:, columns]
    result = torch.empty_like(w)
    for i, column in enumerate(columns.tolist()):
        group = column // (spec.group or len(h))
        scale = qparams.scale[:, group].double()
        zero = 0 if qparams.zero is None else qparams.zero[:, group].double()
        code = (torch.round(w[:, i] / scale) + zero).clamp(spec.grid.lowest, spec.grid.highest)
        result[:, i] = scale * (code - zero)
        error = (w[:, i] - result[:, i]) / upper[i, i]
        w[:, i:] -= error[:, None] * upper[i, i:]
    return result[:, torch.argsort(columns)]


@every_spec
@every_order
def test_it_gives_the_weights_of_the_papers_algorithm(
    spec: TensorSpec, act_order: bool, generator: torch.Generator
) -> None:
    weight, hessian = layer(generator)
    qparams = weight_qparams(weight, spec)
    codes, loss = gptq(weight, factorize(hessian, 0.01, act_order), qparams, spec)
    expected = paper(weight, hessian, spec, qparams, 0.01, act_order)
    ours = dequantize(codes, spec.weight_granularity, qparams)
    assert torch.equal(ours, expected)
    torch.testing.assert_close(loss, layer_loss(weight - expected, hessian), rtol=1e-6, atol=0)


@every_spec
@every_order
@pytest.mark.parametrize("seed", range(5))
def test_no_row_is_worse_than_rounded_to_nearest_on_the_same_grid(spec: TensorSpec, act_order: bool, seed: int) -> None:
    weight, hessian = layer(torch.Generator().manual_seed(seed), dtype=torch.float32, tokens=20 + 60 * seed)
    qparams = weight_qparams(weight, spec)
    codes, losses = gptq_with_rtn_fallback(weight, hessian, factorize(hessian, 0.01, act_order), qparams, spec)
    nearest = quantize(weight, spec.grid, spec.weight_granularity, qparams)
    exact = [
        layer_loss((weight - dequantize(c, spec.weight_granularity, qparams)).double(), hessian.double())
        for c in (codes, nearest)
    ]
    # float32 compares two sums of 96² terms; rows that are equal in it may differ by its rounding
    assert (exact[0] <= exact[1] * (1 + 96 * torch.finfo(torch.float32).eps)).all()
    assert exact[0].sum() < exact[1].sum()
    torch.testing.assert_close(losses.double(), torch.stack([e.sum() for e in exact]), rtol=1e-3, atol=0)


def test_blocks_of_columns_change_nothing(generator: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, hessian = layer(generator, width=80)
    factor, qparams = factorize(hessian, 0.01, act_order=True), weight_qparams(weight, SPECS[0])
    codes, _ = gptq(weight, factor, qparams, SPECS[0])
    monkeypatch.setattr("dfrot.rounding.gptq._INNER", 3)
    monkeypatch.setattr("dfrot.rounding.gptq._OUTER", 17)
    assert torch.equal(codes, gptq(weight, factor, qparams, SPECS[0])[0])


def test_rows_in_pieces_change_nothing(generator: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, hessian = layer(generator)
    spec = TensorSpec(4, symmetric=False, group=16)
    arguments = weight, hessian, factorize(hessian, 0.01, True), weight_qparams(weight, spec), spec
    together, losses = gptq_with_rtn_fallback(*arguments)
    monkeypatch.setattr("dfrot.rounding.gptq.PIECE_ENTRIES", 5 * weight.shape[1])
    in_pieces, of_pieces = gptq_with_rtn_fallback(*arguments)
    assert torch.equal(in_pieces, together)
    assert torch.allclose(of_pieces, losses, rtol=1e-12)  # float64


def test_independent_inputs_leave_nothing_to_compensate(generator: torch.Generator) -> None:
    weight, _ = layer(generator)
    hessian = torch.diag(torch.rand(96, generator=generator, dtype=torch.float64))
    qparams = weight_qparams(weight, SPECS[0])
    codes, _ = gptq(weight, factorize(hessian, 0.01, act_order=True), qparams, SPECS[0])
    assert torch.equal(codes, quantize(weight, SPECS[0].grid, SPECS[0].weight_granularity, qparams))


def test_the_weight_towards_the_original_output_solves_least_squares(generator: torch.Generator) -> None:
    x0 = torch.randn(64, 12, generator=generator, dtype=torch.float64)
    x = x0 + 0.3 * torch.randn(64, 12, generator=generator, dtype=torch.float64)
    weight = torch.randn(5, 12, generator=generator, dtype=torch.float64)
    root = (RIDGE * (x.T @ x).diagonal().mean()).sqrt() * torch.eye(12, dtype=torch.float64)
    solved = torch.linalg.lstsq(torch.cat([x, root]), torch.cat([x0 @ weight.T, root @ weight.T])).solution.T
    torch.testing.assert_close(towards_original(weight, x.T @ x, x0.T @ x), solved)
    torch.testing.assert_close(towards_original(weight, x.T @ x, x.T @ x), weight)


def test_a_channel_that_never_fires_is_rounded_to_nearest(generator: torch.Generator) -> None:
    weight, hessian = layer(generator)
    hessian[[3, 40]], hessian[:, [3, 40]] = 0, 0
    qparams = weight_qparams(weight, SPECS[0])
    codes, _ = gptq(weight, factorize(hessian, 0.01, act_order=True), qparams, SPECS[0])
    nearest = quantize(weight, SPECS[0].grid, SPECS[0].weight_granularity, qparams)
    assert torch.equal(codes[:, [3, 40]], nearest[:, [3, 40]])
    silent = torch.zeros_like(hessian)
    assert torch.equal(gptq(weight, factorize(silent, 0.01, act_order=False), qparams, SPECS[0])[0], nearest)


def test_a_singular_hessian_raises_the_damping_and_says_so(generator: torch.Generator) -> None:
    x = torch.randn(5, 96, generator=generator, dtype=torch.float64)
    factor = factorize(x.T @ x, 0.0, act_order=False)
    assert 0 < factor.damping < 1e-6
    rebuilt = factor.upper * factor.diagonal @ factor.upper.T
    expected = x.T @ x + factor.added * torch.eye(96, dtype=torch.float64)
    torch.testing.assert_close(rebuilt, expected, rtol=0, atol=1e-10)
    rounded = (x.T @ x).float()  # whose smallest eigenvalues are −1e-6 or so
    assert factorize(rounded, 0.0, act_order=True).damping <= 1e-5
    with pytest.raises(UserError, match="not positive semidefinite"):
        factorize(-torch.eye(4), 0.0, act_order=False)
    with pytest.raises(UserError, match="NaN or infinite"):
        factorize(torch.full((4, 4), torch.nan), 0.01, act_order=False)


def test_losses_on_a_model_are_those_of_its_own_inputs(
    tiny: Callable[[str], Path], text_file: Path, tmp_path: Path
) -> None:
    recipe = Recipe.parse("quarot", "gptq", tune="none", calib=str(text_file), calib_tokens=96, calib_seq_len=32)
    report = dfrot.quantize(tiny("qwen2"), recipe, tmp_path / "out")
    blocks = report.notes["weights_by_block"]
    assert len(blocks) == 2
    stages = {"self_attn.q_proj self_attn.k_proj self_attn.v_proj", "self_attn.o_proj"}
    for block in blocks:
        assert stages < block["stages"].keys()
        assert all(0 < stage["loss"] <= stage["rtn_loss"] < 1 for stage in block["stages"].values())


def test_fewer_tokens_than_channels_are_warned_of(tiny: Callable[[str], Path], text_file: Path, tmp_path: Path) -> None:
    recipe = Recipe.parse("none", "gptq", tune="none", calib=str(text_file), calib_tokens=70, calib_seq_len=35)
    with pytest.warns(UserWarning, match=r"70 calibration tokens are few .* mlp.down_proj has 80 inputs.* 665 or more"):
        dfrot.quantize(tiny("llama"), recipe, tmp_path / "out")
