"""What the cache costs is what the loaded checkpoint loses by it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import dfrot
from dfrot.evaluation.record import model_size
from dfrot.export.hub import model_card
from dfrot.models.graph import graph_for
from dfrot.models.norms import use_torch_norms_
from dfrot.models.source import open_source
from dfrot.pipeline import cache
from dfrot.pipeline.run import calibration_tokens
from dfrot.quant.spec import Spec
from dfrot.runtime.config import RuntimeConfig
from dfrot.tuning.run import TuningRun
from tests.tiny_models import CONFIGS, write_biased_model

Tiny = Callable[[str], Path]
WORDS: dict[str, Any] = {"calib_tokens": 1280, "calib_seq_len": 32, "tune": "none", "dtype": "float64"}


def divergence(found: Tensor, original: Tensor) -> float:
    wanted = original.log_softmax(-1)
    return float((wanted.exp() * (wanted - found.log_softmax(-1))).sum(-1).mean())


def test_clip_ratios_that_were_learned_for_few_bits_are_not_those_of_blocks_with_more() -> None:
    spec, learned = Spec.parse("w4a4kv4"), {"keys": (0.9, 0.8), "values": (0.7, 0.6), "mlp.down_proj": (0.5, 0.4)}
    runtime = RuntimeConfig(spec, {}, None, {}, clips=learned).with_kv_bits([4, 8])
    grids = [(runtime.heads(block).keys, runtime.heads(block).values) for block in range(2)]
    assert [(grid.bits, grid.clip_ratio) for pair in grids for grid in pair] == [(4, 0.9), (4, 0.7), (8, 1.0), (8, 1.0)]
    assert runtime.activations("mlp.down_proj", 1).clip_ratio == 0.4


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


@pytest.mark.parametrize("architecture", ["llama", "phi3"])
def test_blocks_that_need_it_most_get_8_bits(tiny: Tiny, tmp_path: Path, text_file: Path, architecture: str) -> None:
    words = {**WORDS, "calib": str(text_file), "preset": "deploy", "kv_clip": 1.0}
    recipe = dfrot.Recipe.parse("quarot", "gptq", "w4a8kv2", kv_bits_by_block=5.0, **words)
    notes = dfrot.quantize(tiny(architecture), recipe, tmp_path / "out").notes
    original = AutoModelForCausalLM.from_pretrained(tiny(architecture), dtype=torch.float64)
    use_torch_norms_(original, graph_for(original.config))
    model, _ = dfrot.load(tmp_path / "out")
    tokens = calibration_tokens(open_source(str(tiny(architecture))), recipe)[:1]
    found = []
    for bits in ([2, 2], [8, 2], [2, 8]):
        for layer, own in zip(model.model.layers, bits, strict=True):
            spec = recipe.spec.with_kv_bits(own)
            layer.self_attn.kv_quantizer.keys, layer.self_attn.kv_quantizer.values = spec.keys, spec.values
        with torch.no_grad():
            found.append(divergence(model(tokens).logits, original(tokens, use_cache=False).logits))
    assert [notes["kv_bits"]["kl"], *notes["kv_bits"]["kl_with_8_in_block"]] == pytest.approx(found, rel=1e-6)
    best = [8, 2] if found[1] < found[2] else [2, 8]
    assert notes["kv_bits"]["bits"] == best
    assert notes["cache"]["kl"] == pytest.approx(min(found), rel=1e-6)
    loaded, _ = dfrot.load(tmp_path / "out")
    assert [layer.self_attn.kv_quantizer.keys.bits for layer in loaded.model.layers] == best
    generated = loaded.generate(tokens, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert torch.equal(
        generated, loaded.generate(tokens, max_new_tokens=4, do_sample=False, pad_token_id=0, use_cache=False)
    )
    width = 2 * original.config.num_key_value_heads * original.config.head_dim
    heads = 2 * original.config.num_key_value_heads
    assert "keys and values in 2 bits (more in 1 of 2 blocks)" in model_card(tmp_path / "out", "me/tiny")
    assert model_size(tmp_path / "out")["kv_bytes_per_token"] == 2 * heads * 3 + width * 10 // 8


def test_an_interrupted_run_keeps_its_choice(
    tiny: Tiny, tmp_path: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = {**WORDS, "calib": str(text_file), "tune": "biases", "tune_steps": 2, "tune_tokens": 64, "dtype": "float32"}
    recipe = dfrot.Recipe.parse("quarot", "gptq", "w4a4kv2", kv_bits_by_block=5.5, **words)
    notes = dfrot.quantize(tiny("llama"), recipe, tmp_path / "whole").notes
    monkeypatch.setattr(TuningRun, "__call__", interrupted)
    with pytest.raises(KeyboardInterrupt):
        dfrot.quantize(tiny("llama"), recipe, tmp_path / "out")
    monkeypatch.undo()
    monkeypatch.setattr(cache, "bits_by_block", None)
    resumed = dfrot.quantize(tiny("llama"), recipe, tmp_path / "out", resume=True).notes
    assert resumed["kv_bits"] == notes["kv_bits"]
    assert resumed["tuning"] == notes["tuning"]


def test_an_average_that_no_block_can_use_is_refused_before_the_work(tiny: Tiny, tmp_path: Path) -> None:
    recipe = dfrot.Recipe.parse("quarot", "gptq", "w4a4kv4", calib="nowhere.txt", kv_bits_by_block=5.9)
    with pytest.raises(dfrot.UserError, match=r"one block of 2 with 8 bits is 6.000 bits on average, more than"):
        dfrot.quantize(tiny("llama"), recipe, tmp_path / "out")


def interrupted(*_: Any) -> Any:
    raise KeyboardInterrupt


@pytest.mark.parametrize(("spec", "average"), [("w4a4kv4", 4.0), ("w4a4kv4", 8.0), ("w4a4kv16", 5.0), ("w4a4kv8", 8.5)])
def test_an_average_that_cannot_be_is_refused(spec: str, average: float) -> None:
    with pytest.raises(dfrot.UserError, match=r"average between the bits of keys in .* and 8"):
        dfrot.Recipe.parse("quarot", "gptq", spec, kv_bits_by_block=average)
