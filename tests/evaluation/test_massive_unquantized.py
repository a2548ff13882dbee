from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import dfrot
from dfrot.evaluation.perplexity import (
    massive_positions,
    massive_unquantized,
)
from dfrot.evaluation.run import Measurement, evaluate
from dfrot.quant.spec import UNQUANTIZED
from dfrot.system.errors import UserError

Tiny = Callable[[str], Path]
BLOCKS = torch.randint(1, 96, (2, 30), generator=torch.Generator().manual_seed(2))


@pytest.fixture
def models(tiny: Tiny, tmp_path: Path) -> tuple[Any, Any]:
    """A checkpoint with quantized activations, and its original."""
    path = dfrot.quantize(tiny("llama"), dfrot.Recipe.parse("quarot", spec="w16a4kv16"), tmp_path / "out").path
    return dfrot.load(path)[0], dfrot.load(tiny("llama"))[0]


@torch.no_grad()
def test_with_every_token_passing_by_the_readers_are_not_quantized(
    models: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint, original = models
    everywhere = {name: torch.ones_like(mask) for name, mask in massive_positions(original, BLOCKS[0]).items()}
    monkeypatch.setattr("dfrot.evaluation.perplexity.massive_positions", lambda *_: everywhere)
    with massive_unquantized(checkpoint, original, BLOCKS[0]):
        passing = checkpoint(BLOCKS[:1], use_cache=False).logits
    quantized = checkpoint(BLOCKS[:1], use_cache=False).logits
    for block in checkpoint.model.layers:
        for reader in ("q_proj", "k_proj", "v_proj"):
            block.self_attn.get_submodule(reader).activations = UNQUANTIZED
        block.mlp.gate_proj.activations = block.mlp.up_proj.activations = UNQUANTIZED
    torch.testing.assert_close(passing, checkpoint(BLOCKS[:1], use_cache=False).logits, rtol=0, atol=1e-5)
    assert not torch.equal(passing, quantized)


def test_without_massive_tokens_nothing_changes(models: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint, original = models
    monkeypatch.setattr("dfrot.methods.massive.DOMINANT_SHARE", 1.1)
    found = dfrot.perplexity(checkpoint, BLOCKS, during=partial(massive_unquantized, checkpoint, original))
    assert found == pytest.approx(dfrot.perplexity(checkpoint, BLOCKS), rel=1e-6)


def test_a_record_has_it_for_every_text(
    tiny: Tiny, tmp_path: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dfrot.methods.massive.DOMINANT_SHARE", 0)
    monkeypatch.setattr("dfrot.methods.massive.RELATIVE_ERROR", 1)  # so every token is massive
    path = dfrot.quantize(tiny("llama"), dfrot.Recipe.parse("none", "rtn"), tmp_path / "out").path
    source = str(tiny("llama"))
    measurement = Measurement((str(text_file),), 32, max_tokens=96, against=source, massive_unquantized=True)
    metrics = evaluate(str(path), measurement).metrics
    assert metrics["ppl_massive_unquantized/text.txt"] != pytest.approx(metrics["ppl/text.txt"], rel=1e-3)
    metrics = evaluate(source, measurement).metrics  # no checkpoint: nothing is quantized
    assert metrics["ppl_massive_unquantized/text.txt"] == pytest.approx(metrics["ppl/text.txt"], rel=1e-6)
    with pytest.raises(UserError, match="--against MODEL"):
        Measurement(("pydoc",), massive_unquantized=True)
    with pytest.raises(UserError, match="compared on texts: give one"):
        Measurement(tasks=("piqa",), against=source, massive_unquantized=True)


@torch.no_grad()
def test_a_planted_token_is_found_where_it_is(models: tuple[Any, Any]) -> None:
    _, original = models
    original.model.embed_tokens.weight[7, 5] = 1e6
    original.model.embed_tokens.weight[:, 3] /= 12  # the tiny model's outlier channel is in every token
    tokens = torch.tensor([1, 2, 7, 3, 7])
    first = massive_positions(original, tokens)["model.layers.0.self_attn.q_proj"]
    assert first.nonzero().flatten().tolist() == [2, 4]
