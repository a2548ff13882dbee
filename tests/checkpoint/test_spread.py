"""A model on several devices. A block whose weights stay on the disk until it runs stands in for one on another GPU."""

import importlib.util
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import dfrot
from dfrot.evaluation.run import Measurement, evaluate
from dfrot.system.errors import SetupError, UserError

pytest.importorskip("accelerate", reason="spreading a model needs accelerate")

Tiny = Callable[[str], Path]
DEVICES = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "cpu"}
DEVICES |= {"model.rotary_emb": "cpu", "lm_head": "cpu"}


@pytest.fixture(params=["quarot", "duquant"])
def checkpoint(request: pytest.FixtureRequest, tiny: Tiny, text_file: Path, tmp_path: Path) -> Path:
    block = 16 if request.param == "duquant" else None
    recipe = dfrot.Recipe.parse(request.param, "rtn", calib=str(text_file), calib_tokens=64, block=block)
    return dfrot.quantize(tiny("llama"), recipe, tmp_path / "checkpoint").path


def test_a_model_computes_the_same_wherever_its_blocks_are(checkpoint: Path, tiny: Tiny) -> None:
    tokens = torch.arange(40)[None]
    for model in (checkpoint, tiny("llama")):
        together, _ = dfrot.load(model)
        for devices in (DEVICES, "auto"):
            spread, _ = dfrot.load(model, device=devices)
            assert torch.equal(spread(tokens).logits, together(tokens).logits)
            written = [one.generate(tokens, max_new_tokens=8, do_sample=False) for one in (spread, together)]
            assert torch.equal(*written)


def test_an_evaluation_says_where_the_model_was(checkpoint: Path, text_file: Path) -> None:
    measurement = Measurement(texts=(str(text_file),), seq_len=32, max_tokens=128)
    together, spread = (evaluate(str(checkpoint), measurement, device=where) for where in ("cpu", DEVICES))
    assert spread.metrics == together.metrics
    assert (together.conditions["device"], spread.conditions["device"]) == ("cpu", "cpu, disk")


def test_what_is_not_loaded_yet_is_checked_too(checkpoint: Path) -> None:
    shard = sorted(checkpoint.glob("model-*"))[2]  # of the second block
    tensors = load_file(shard)
    tensors["model.layers.1.input_layernorm.weight"][3] = torch.nan
    save_file(tensors, shard, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"layers\.1\.input_layernorm\.weight' in .* holds NaN"):
        dfrot.load(checkpoint, device=DEVICES)


def test_without_accelerate_it_is_named(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SetupError, match=r"pip install 'dfrot\[eval\]'"):
        dfrot.load(tiny("llama"), device="auto")
