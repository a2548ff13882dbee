"""What the cache costs is what the loaded checkpoint loses by it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import dfrot
from dfrot.models.graph import graph_for
from dfrot.models.norms import use_torch_norms_
from dfrot.models.source import open_source
from dfrot.pipeline.run import calibration_tokens
from tests.tiny_models import CONFIGS, write_biased_model

Tiny = Callable[[str], Path]
WORDS: dict[str, Any] = {"calib_tokens": 1280, "calib_seq_len": 32, "tune": "none", "dtype": "float64"}


def divergence(found: Tensor, original: Tensor) -> float:
    wanted = original.log_softmax(-1)
    return float((wanted.exp() * (wanted - found.log_softmax(-1))).sum(-1).mean())


@pytest.mark.parametrize("architecture", [*CONFIGS, "biased"])
@pytest.mark.parametrize("method", ["none", "quarot"])
def test_what_it_costs_is_what_the_loaded_checkpoints_lose(
    tiny: Tiny, tmp_path: Path, text_file: Path, architecture: str, method: str
) -> None:
    path = write_biased_model("qwen2", tmp_path / "m") if architecture == "biased" else tiny(architecture)
    original = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64)
    use_torch_norms_(original, graph_for(original.config))
    found, notes = {}, {}
    for spec in ("w4a4kv16", "w4a4kv4"):  # they have the same weights
        recipe = dfrot.Recipe.parse(method, "gptq", spec, calib=str(text_file), **WORDS)
        notes[spec] = dfrot.quantize(path, recipe, tmp_path / spec).notes
        tokens = calibration_tokens(open_source(str(path)), recipe)[:1]
        with torch.no_grad():
            found[spec] = dfrot.load(tmp_path / spec)[0](tokens, use_cache=False, output_hidden_states=True)
    with torch.no_grad():
        expected = original(tokens, use_cache=False).logits
    assert "cache" not in notes["w4a4kv16"]
    cost, with_cache, without = notes["w4a4kv4"]["cache"], found["w4a4kv4"], found["w4a4kv16"]
    assert cost["tokens"] == 32
    assert cost["kl"] == pytest.approx(divergence(with_cache.logits, expected), rel=1e-6)
    assert cost["kl_without"] == pytest.approx(divergence(without.logits, expected), rel=1e-6)
    (before, after), (_, plain) = (each.hidden_states[:2] for each in (with_cache, without))
    first = float((after - plain).norm() / (plain - before).norm())
    assert cost["error_by_block"] == [pytest.approx(first, rel=1e-6), pytest.approx(first, rel=10)]


def test_a_cache_that_costs_more_than_all_the_rest_is_warned_of(tiny: Tiny, tmp_path: Path, text_file: Path) -> None:
    recipe = dfrot.Recipe.parse("quarot", "gptq", "w8a16kv2", calib=str(text_file), **WORDS)
    with pytest.warns(UserWarning, match=r"keys and values cost more than all else.*kv8"):
        result = dfrot.quantize(tiny("llama"), recipe, tmp_path / "out")
    share = result.notes["cache"]["share"]
    assert 0.5 < share <= 1
    assert any(f"keys and values cost {share:.0%} of the KL" in line for line in result.summary())
