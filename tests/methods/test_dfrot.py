import importlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import scipy.linalg
import torch
from safetensors.torch import load_file

import dfrot
from dfrot.linalg.rotation import Dense, Hadamard, Rotation, random_hadamard, random_orthogonal
from dfrot.methods.dfrot import DFRot
from dfrot.methods.massive import Sample, describe_massive, drawn, massive_tokens
from dfrot.methods.rangerot import RangeRot, soft_range
from dfrot.methods.refinement import PAPER_QUANTIZER, Refined, squared_errors
from dfrot.models.texts import load_tokenizer
from dfrot.quant.spec import TensorSpec
from dfrot.system.distributed import SINGLE_PROCESS
from tests.reference import kl_of_quantized_norm_outputs
from tests.tiny_models import write_planted_model

Tiny = Callable[[str], Path]
METHODS: dict[str, type[Refined]] = {"rangerot": RangeRot, "dfrot": DFRot}
IN_USE = TensorSpec(4, symmetric=False, clip_ratio=0.9)
SIZE = 32


def tokens(rows: int, massive: int = 0, size: int = SIZE, seed: int = 0) -> torch.Tensor:
    """Gaussian tokens of RMS 1, the first few of them dominated by channel 5, as after an RMSNorm."""
    x = torch.randn(rows, size, generator=torch.Generator().manual_seed(seed))
    x[:massive, 5] = 1000
    return x / x.square().mean(-1, keepdim=True).sqrt()


def sample(rows: int = 300, massive: int = 8) -> Sample:
    x = tokens(rows, massive)
    return drawn(x, massive_tokens(x), None, torch.Generator().manual_seed(0))


every_method = pytest.mark.parametrize("method", METHODS)
every_quantizer = pytest.mark.parametrize("quantizer", [IN_USE, PAPER_QUANTIZER], ids=["in use", "paper"])


@every_method
@every_quantizer
@pytest.mark.parametrize("gamma", [1.0, 100.0])
def test_refining_never_makes_the_objective_worse_and_stays_orthogonal(
    method: str, quantizer: TensorSpec, gamma: float
) -> None:
    few, start = sample(), random_hadamard(SIZE, torch.Generator().manual_seed(1))
    refined, _ = METHODS[method](steps=20).refine(start, few, quantizer, gamma, SINGLE_PROCESS)

    def objective(rotation: Rotation) -> float:
        return float((squared_errors(few.tokens, rotation, quantizer) * few.weights(gamma)).sum())

    assert objective(refined) <= objective(Dense(start.as_matrix()))
    eye = torch.eye(SIZE, dtype=torch.float64)
    torch.testing.assert_close(refined.matrix @ refined.matrix.T, eye, rtol=0, atol=1e-9)


def test_descent_shortens_ranges_more_than_alternation_does() -> None:
    """On tokens that share a few directions, as those of a language model do."""
    generator = torch.Generator().manual_seed(1)
    shared = torch.randn(300, 4, generator=generator) @ torch.randn(4, SIZE, generator=generator)
    few = Sample(tokens(300) + shared, torch.zeros(300, dtype=torch.bool), torch.ones(300))
    start = random_hadamard(SIZE, generator)
    error = {}
    for name, method in METHODS.items():
        rotation, _ = method(steps=60).refine(start, few, IN_USE, 1.0, SINGLE_PROCESS)
        error[name] = squared_errors(few.tokens, rotation, IN_USE).mean()
    assert error["rangerot"] < error["dfrot"]


def test_a_start_that_cannot_be_improved_is_returned_as_it_is() -> None:
    """Tokens that are ± one value in every rotated channel lie on the grid: their error is rounding."""
    start = Hadamard(SIZE)
    flat = torch.randint(0, 2, (40, SIZE), generator=torch.Generator().manual_seed(0)).mul(2).sub(1).double()
    few = Sample(start.T.apply(flat), torch.zeros(40, dtype=torch.bool), torch.ones(40).double())
    spec = TensorSpec(4, symmetric=True, clip_ratio=1.0)
    refined, _ = DFRot(steps=30).refine(start, few, spec, 1.0, SINGLE_PROCESS)
    torch.testing.assert_close(refined.matrix, start.as_matrix(), rtol=0, atol=1e-9)


def test_one_alternation_is_the_papers_step() -> None:
    """Massive rows multiplied by γ, quantized, and scipy's Procrustes solution."""
    few, start, gamma = sample(), random_orthogonal(SIZE, torch.Generator().manual_seed(2)).matrix, 10.0
    steps = DFRot().walk(few.tokens.double(), few.weights(gamma).double(), start, PAPER_QUANTIZER, SINGLE_PROCESS)
    A = torch.where(few.massive[:, None], gamma, 1.0) * few.tokens.double()
    expected, _ = scipy.linalg.orthogonal_procrustes(A.numpy(), PAPER_QUANTIZER.fake_quantize(A @ start).numpy())
    next(steps)
    torch.testing.assert_close(next(steps)[0], torch.from_numpy(expected), rtol=0, atol=1e-9)


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_soft_range_has_the_gradient_that_autograd_finds(symmetric: bool) -> None:
    v = torch.randn(4, SIZE, dtype=torch.float64, requires_grad=True)
    r, slope = soft_range(v, 0.3, symmetric=symmetric)
    r.sum().backward()
    torch.testing.assert_close(slope.detach(), v.grad, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_soft_range_tends_to_the_range(symmetric: bool) -> None:
    v = torch.randn(4, SIZE, dtype=torch.float64)
    exact = 2 * v.abs().amax(-1) if symmetric else v.amax(-1) - v.amin(-1)
    for tau in (1e-1, 1e-2, 1e-3):
        r, _ = soft_range(v, tau, symmetric=symmetric)
        excess = r[:, 0] - exact
        assert (excess >= -1e-12).all()
        assert (excess <= 2 * tau * math.log(2 * SIZE) + 1e-12).all()


@pytest.mark.parametrize("rule", ["relative", "rotation"])
def test_massive_tokens_are_found_and_only_they(rule: Any) -> None:
    for size in (32, 576):
        assert massive_tokens(tokens(2000, 3, size), rule).nonzero().flatten().tolist() == [0, 1, 2]
        assert not massive_tokens(tokens(2000, 0, size), rule).any()


def test_the_sample_keeps_every_massive_token_and_counts_for_the_whole_text() -> None:
    generator = torch.Generator().manual_seed(0)
    pieces = [tokens(400, 2, seed=seed) for seed in range(3)]
    few = Sample.joined([drawn(piece, massive_tokens(piece), 50, generator) for piece in pieces])
    assert (int(few.massive.sum()), len(few.tokens)) == (6, 156)
    assert few.multiplicity[~few.massive].sum() == pytest.approx(3 * 398)
    assert few.weights(10.0).sum() == pytest.approx(1)


def test_massive_tokens_are_described_by_where_they_are() -> None:
    x = torch.cat([tokens(200, 2), tokens(200, 1)])
    ids = torch.arange(400).view(2, 200)
    found = describe_massive(x, massive_tokens(x), ids, block=3, norm="norm")
    assert [(f["block"], f["position"], f["token_id"], f["channel"]) for f in found] == [
        (3, 0, 0, 5),
        (3, 1, 1, 5),
        (3, 0, 200, 5),
    ]


def quantized_model(model: Path, out: Path, text_file: Path, **options: Any) -> dfrot.QuantizeResult:
    words = {"calib": str(text_file), "calib_tokens": 128, "calib_seq_len": 64, "steps": 2, "spec": "w16a4kv16"}
    recipe = dfrot.Recipe.parse(**{"method": "dfrot", "gamma": "auto", **words, **options})
    return dfrot.quantize(model, recipe, out, overwrite=True)


def notes(tiny: Tiny, tmp_path: Path, text_file: Path, **options: Any) -> dict[str, Any]:
    return quantized_model(tiny("llama"), tmp_path / "out", text_file, **options).notes


@pytest.mark.parametrize(("method", "seed"), [("rangerot", 2), ("dfrot", 0)])
def test_gamma_is_the_one_that_changes_the_model_least(
    tmp_path: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch, method: str, seed: int
) -> None:
    """On a model with massive tokens, where that is not the first one tried; its rotation is the checkpoint's."""
    model = write_planted_model(tmp_path / "model", channel=5)
    options: dict[str, Any] = {"method": method, "seed": seed, "steps": 5}
    found = quantized_model(model, tmp_path / "out", text_file, **options).notes
    kl, gamma = found["kl_by_gamma"], found["gamma"]
    assert found["massive_tokens"]
    assert list(kl) == ["1.0", "10.0", "100.0", "1000.0"]
    assert len(set(kl.values())) == 4
    assert kl[str(gamma)] == min(kl.values()) < kl["1.0"]
    assert (tmp_path / "out" / "fit.json").is_file()
    assert set(found["squared_error_by_rotation"]) == {"none", "RO", "start", "refined"}
    # a choice among one, on the same sample
    monkeypatch.setattr(importlib.import_module("dfrot.methods.refinement"), "GAMMAS", (gamma, gamma))
    quantized_model(model, tmp_path / "only", text_file, **options)
    for shard in (tmp_path / "out").glob("*.safetensors"):
        assert shard.read_bytes() == (tmp_path / "only" / shard.name).read_bytes()


def test_gamma_is_judged_on_the_last_quarter_of_the_text_which_nothing_was_refined_on(tmp_path: Path) -> None:
    """The figure in the notes against transformers in float64, the rotation found from the checkpoint's embedding."""
    model, text = write_planted_model(tmp_path / "model", channel=5), tmp_path / "text.txt"
    text.write_text(("thequickbrownfoxjumpsoverthelazydog;" * 2)[:64])  # one sequence, which is the whole text
    report = quantized_model(model, tmp_path / "out", text, calib_tokens=64, calib_seq_len=64, dtype="float32", seed=3)
    name = "model.embed_tokens.weight"
    (rotated,) = (t[name] for t in map(load_file, (tmp_path / "out").glob("*.safetensors")) if name in t)
    embedding = load_file(model / "model.safetensors")[name].double()
    matrix = torch.linalg.lstsq(embedding, rotated.double()).solution
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(48, dtype=torch.float64), rtol=0, atol=1e-5)

    tokens = load_tokenizer(model)(text.read_text(), return_tensors="pt").input_ids
    assert tokens.shape == (1, 64)
    kl = kl_of_quantized_norm_outputs(model, tokens, matrix, clip=0.9)
    gamma = str(report.notes["gamma"])
    assert report.notes["kl_by_gamma"][gamma] == pytest.approx(kl[:, 48:].mean().item(), rel=1e-3)
    assert kl.mean().item() != pytest.approx(kl[:, 48:].mean().item(), rel=0.1)


def test_the_papers_objective_brings_the_papers_gamma(tiny: Tiny, tmp_path: Path, text_file: Path) -> None:
    assert dfrot.Recipe.parse("dfrot").method.gamma == 100.0  # type: ignore[attr-defined]
    found = notes(tiny, tmp_path, text_file, objective="paper", gamma=None)
    assert (found["gamma"], found["kl_by_gamma"]) == (100.0, None)
    assert [entry["step"] for entry in found["objective_by_step"]] == [0, 1, 2]
    assert set(found["objective_by_step"][0]) == {"step", "objective", "ordinary", "massive"}


def test_the_shortest_sample_still_holds_a_token_back(tiny: Tiny, tmp_path: Path, text_file: Path) -> None:
    found = notes(tiny, tmp_path, text_file, calib_tokens=3, calib_seq_len=3)
    assert all(math.isfinite(kl) for kl in found["kl_by_gamma"].values())
