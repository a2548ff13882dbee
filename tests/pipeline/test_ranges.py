"""The largest inputs that NVFP4's activations are to hold."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import dfrot
from dfrot.checkpoint.load import read_checkpoint
from dfrot.models.source import open_source
from dfrot.pipeline.run import calibration_tokens
from dfrot.runtime.linear import QuantLinear
from dfrot.system.errors import UserError

Tiny = Callable[[str], Path]


@pytest.fixture
def made(tiny: Tiny, tmp_path: Path, text_file: Path) -> tuple[Path, dfrot.Recipe]:
    recipe = dfrot.Recipe.parse(
        "quarot", "rtn", "nvfp4", calib=str(text_file), calib_tokens=128, calib_seq_len=32, tune="none"
    )
    return dfrot.quantize(tiny("qwen3"), recipe, tmp_path / "out").path, recipe


def test_they_are_twice_those_that_the_model_meets_on_the_calibration_text(
    tiny: Tiny, made: tuple[Path, dfrot.Recipe]
) -> None:
    path, recipe = made
    found = read_checkpoint(path)
    assert found is not None
    model, _ = dfrot.load(path)
    met: dict[str, list[float]] = {}
    for name, module in model.named_modules():
        if isinstance(module, QuantLinear):
            module.activations = replace(module.activations, largest=None)  # as it was while it was measured

            def note(layer: QuantLinear, inputs: tuple[torch.Tensor], name: str = name) -> None:
                met.setdefault(name, []).append(float(layer.transformed(*inputs).abs().max()))

            module.register_forward_pre_hook(note)
    with torch.no_grad():
        model(calibration_tokens(open_source(str(tiny("qwen3"))), recipe), use_cache=False)
    layers = {"input_layernorm": "self_attn.k_proj", "post_attention_layernorm": "mlp.up_proj"}
    assert found.runtime.largest.keys() == {*layers, "self_attn.o_proj", "mlp.down_proj"}
    for site, values in found.runtime.largest.items():
        for index, value in enumerate(values):
            assert value == pytest.approx(2 * max(met[f"model.layers.{index}.{layers.get(site, site)}"]), rel=1e-3)


def test_other_formats_need_none_and_read_no_text(tiny: Tiny, tmp_path: Path) -> None:
    recipe = dfrot.Recipe.parse("quarot", "rtn", "wnvfp4amxfp4kv16", calib="no-such-text", tune="none")
    found = read_checkpoint(dfrot.quantize(tiny("qwen3"), recipe, tmp_path / "out").path)
    assert found is not None
    assert not found.runtime.largest


@pytest.mark.parametrize(
    ("largest", "message"),
    [
        ({"mlp.down_proj": [1.0]}, "other than 2 values for 'mlp.down_proj'"),
        ({"mlp.down_proj": [1.0, -1.0]}, "largest magnitude of a tensor is positive and finite, got -1.0"),
        ({"mlp.down_proj": [1.0, "x"]}, "largest is a number or left out, got 'x'"),
        ({"mlp.up": [1.0, 1.0]}, "'mlp.up' is no norm and no linear layer without one"),
    ],
)
def test_what_is_no_largest_input_is_refused(
    made: tuple[Path, dfrot.Recipe], largest: dict[str, Any], message: str
) -> None:
    file = made[0] / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"]["runtime"]["largest"] = largest
    file.write_text(json.dumps(config))
    with pytest.raises(UserError, match=message):
        dfrot.load(made[0])
