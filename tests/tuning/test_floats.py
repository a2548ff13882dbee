"""Tuning around 4-bit floats: gradients pass their quantizer, and their scales stay as they were rounded."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import dfrot
from dfrot.checkpoint.load import read_checkpoint
from dfrot.quant.spec import Spec
from dfrot.training.trained import quantized

Tiny = Callable[[str], Path]


@pytest.mark.parametrize("word", ["nvfp4", "mxfp4"])
def test_gradients_pass_straight_through_what_is_not_cut_off(word: str) -> None:
    spec = Spec.parse(word).activations
    x = torch.randn(8, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(8, 64, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    y = quantized(x, spec)
    y.backward(upstream)
    groups = x.detach().unflatten(-1, (-1, spec.group or 1))
    # by hand: the largest value of the grid is six times the group's scale
    scale = spec.grid.step(groups.abs().amax(-1)) * 2
    inside = (groups.abs() <= 6 * scale[..., None]).flatten(-2)
    assert inside.all() == (word == "nvfp4") or inside.double().mean() > 0.9
    assert x.grad is not None
    assert torch.equal(x.grad, upstream * inside)


@pytest.mark.parametrize("spec", ["nvfp4", "wmxfp4amxfp4kv4"])
def test_tuning_lowers_the_divergence_and_leaves_codes_and_scales_alone(
    tiny: Tiny, tmp_path: Path, text_file: Path, spec: str
) -> None:
    words: dict[str, Any] = {"calib": str(text_file), "calib_tokens": 64, "calib_seq_len": 32}
    few: dict[str, Any] = {"tune_steps": 8, "tune_tokens": 32, "tune_seq_len": 32}
    paths = {}
    for parts in ("none", "all"):
        recipe = dfrot.Recipe.parse("quarot", "rtn", spec, tune=parts, **words, **(few if parts == "all" else {}))
        result = dfrot.quantize(tiny("qwen3"), recipe, tmp_path / parts)
        paths[parts] = result.path
    assert recipe.tuning.parts == (("biases", "gains") if spec == "nvfp4" else ("biases", "clips", "gains"))
    held = result.notes["tuning"]["held_kl"]
    assert min(held.values()) < held["0"]
    before, after = (load_file(path / "model-00002-of-00004.safetensors") for path in paths.values())
    kept = [name for name in before if name.endswith((".qweight", ".scales"))]
    assert len(kept) == 14
    assert all(torch.equal(before[name], after[name]) for name in kept)
    assert any(not torch.equal(before[name], after[name]) for name in before if name not in kept)
    found = read_checkpoint(paths["all"])
    assert found is not None
    assert bool(found.runtime.largest) == (spec == "nvfp4")
