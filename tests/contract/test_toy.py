"""A method and a rounding that dfrot does not have, added by CONTRIBUTING's steps: one class and one row each."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import dfrot
from dfrot.linalg.rotation import random_orthogonal
from dfrot.methods import METHODS
from dfrot.methods.method import Fit, FitContext, Method
from dfrot.models.graph import GRAPHS
from dfrot.models.norms import use_torch_norms_
from dfrot.models.sizes import ModelSizes
from dfrot.quant.affine import QParams, choose_qparams
from dfrot.rounding import ROUNDINGS
from dfrot.rounding.rounding import BlockTask, Rounded, Rounding
from dfrot.transform.transforms import Transforms
from tests.tiny_models import CONFIGS, write_tiny_model

TOKENS = torch.randint(1, 96, (2, 24), generator=torch.Generator().manual_seed(7))


@dataclass(frozen=True)
class Toy(Method):
    """Rotate the residual stream and nothing else."""

    turn: int = 1
    """Which random rotation."""

    name = "toy"

    def fit(self, on: FitContext) -> Fit:
        generator = torch.Generator().manual_seed(self.turn)
        return Fit(Transforms(residual=random_orthogonal(on.source.config.hidden_size, generator)), {"turn": self.turn})


@dataclass(frozen=True)
class Down(Rounding):
    """Round towards minus infinity."""

    name = "down"
    needs_data = False

    def round(self, task: BlockTask) -> Rounded:
        layers = {}
        for name in task.graph.linears:
            weight = task.module.get_submodule(name).weight
            assert isinstance(weight, torch.Tensor)
            qparams = choose_qparams(weight, task.spec.grid, task.spec.weight_granularity, 1.0, torch.bfloat16)
            codes = (weight / qparams.scale).floor().clamp(task.spec.grid.lowest, task.spec.grid.highest)
            layers[name] = codes.to(torch.int8), QParams(qparams.scale, None)
        return Rounded(layers, {})

    def peak_bytes(self, sizes: ModelSizes) -> int:
        return sizes.block * (sizes.working + 2)


@pytest.fixture(autouse=True)
def rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS, "toy", Toy)
    monkeypatch.setitem(ROUNDINGS, "down", Down)


def original_logits(path: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64)
    use_torch_norms_(model, GRAPHS[model.config.model_type])
    with torch.no_grad():
        return model(TOKENS, use_cache=False).logits


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("architecture", CONFIGS)
def test_a_new_method_leaves_logits_unchanged(architecture: str, tied: bool, tmp_path: Path) -> None:
    source = write_tiny_model(architecture, tmp_path / "source", tie_word_embeddings=tied)
    recipe = dfrot.Recipe.parse("toy", "down", "w16a16kv16", turn=3)
    result = dfrot.quantize(source, recipe, tmp_path / "out")
    model, _ = dfrot.load(result.path)
    expected = original_logits(source)
    with torch.no_grad():
        found = model(TOKENS, use_cache=False).logits.double()
    assert not model.config.tie_word_embeddings
    assert (found - expected).norm() / expected.norm() < 1e-4  # float32, as in test_contract.py
    assert result.notes["turn"] == 3


def test_a_new_rounding_chooses_the_integers_that_are_stored(tmp_path: Path) -> None:
    source = write_tiny_model("llama", tmp_path / "source")
    model, _ = dfrot.load(dfrot.quantize(source, dfrot.Recipe.parse("none", "down"), tmp_path / "out").path)
    original = AutoModelForCausalLM.from_pretrained(source)
    for name in ("self_attn.q_proj", "mlp.down_proj"):
        weight = original.model.layers[1].get_submodule(name).weight
        layer = model.model.layers[1].get_submodule(name)
        expected = (weight / layer.scales.float()).floor().clamp(-8, 7)
        assert torch.equal(layer.integer_weight(torch.float32), expected)


def test_options_of_a_new_method_are_refused_and_listed_like_any_other() -> None:
    with pytest.raises(
        dfrot.UserError, match="'toy' with 'down' weights has no option gamma; it takes mean_keys, turn"
    ):
        dfrot.Recipe.parse("toy", "down", gamma=1.0)
    with pytest.raises(dfrot.UserError, match="turn is a whole number, got 'x'"):
        dfrot.Recipe.parse("toy", "down", turn="x")
