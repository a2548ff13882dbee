"""What a checkpoint says of itself: two records, of which loading reads one."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel

import dfrot
from dfrot.checkpoint.load import read_checkpoint
from dfrot.runtime.config import RuntimeConfig
from dfrot.system.errors import UserError

# Written by dfrot at format 3, from a random two-layer Llama, with the logits that it computed in float32.
FORMAT_3 = Path(__file__).parent / "format3"
Tiny = Callable[[str], Path]


@pytest.fixture
def checkpoint(tiny: Tiny, tmp_path: Path, text_file: Path) -> Path:
    recipe = dfrot.Recipe.parse(
        "duquant", "rtn", preset="duquant", block=8, greedy_steps=2, calib=str(text_file), calib_tokens=32
    )
    return dfrot.quantize(tiny("llama"), recipe, tmp_path / "out").path


def edit(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    record = json.loads((path / "config.json").read_text())
    change(record["quantization_config"])
    (path / "config.json").write_text(json.dumps(record))


def logits(path: Path, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return dfrot.load(path, dtype=torch.float32)[0](tokens, use_cache=False).logits


@torch.no_grad()
def logits_with_bias_in_keys(path: Path, tokens: torch.Tensor) -> torch.Tensor:
    """As format 3 quantized keys: with their bias. Nothing else of what a checkpoint computes has changed."""
    model: Any = dfrot.load(path, dtype=torch.float32)[0]
    for attention in (block.self_attn for block in model.model.layers):
        assert attention.kv_quantizer.key_bias is not None
        attention.k_proj.leaves_out, attention.kv_quantizer.key_bias = False, None
    return model(tokens, use_cache=False).logits


@pytest.mark.parametrize("method", ["quarot", "duquant"])
def test_a_checkpoint_of_format_3_computes_what_it_did(method: str) -> None:
    expected = load_file(FORMAT_3 / f"{method}-logits.safetensors")
    found = logits_with_bias_in_keys(FORMAT_3 / method, expected["tokens"])
    # float32 sums in another order on another machine; a code that moves would be 2⁻⁴ of a range
    torch.testing.assert_close(found, expected["logits"], rtol=0, atol=2**-17 * float(expected["logits"].abs().max()))


def test_a_checkpoint_is_of_format_4_and_holds_two_records(checkpoint: Path) -> None:
    record = json.loads((checkpoint / "config.json").read_text())["quantization_config"]
    assert record.keys() == {"quant_method", "format", "runtime", "recipe", "unquantized_bytes"}
    assert record["format"] == 4
    assert record["runtime"].keys() == {"grids", "online", "keys", "rotation_blocks", "biases"}
    found = read_checkpoint(checkpoint)
    assert found is not None
    assert found.runtime.to_json() == record["runtime"]
    assert dfrot.Recipe.from_json(found.recipe).method.name == "duquant"


def test_nothing_in_the_recipe_keeps_a_checkpoint_from_loading(checkpoint: Path) -> None:
    tokens = torch.randint(1, 96, (1, 16), generator=torch.Generator().manual_seed(0))
    before = logits(checkpoint, tokens)
    edit(checkpoint, lambda record: record["recipe"]["options"].update(invented=7))
    edit(checkpoint, lambda record: record["recipe"].update(method="of-tomorrow", tune={"biases": True}))
    assert torch.equal(logits(checkpoint, tokens), before)
    edit(checkpoint, lambda record: record.pop("recipe"))
    assert torch.equal(logits(checkpoint, tokens), before)


@pytest.mark.parametrize("place", [(), ("grids", "weights"), ("keys",)], ids=["top", "grid", "rotation"])
def test_an_invented_option_of_the_runtime_is_refused_by_its_name(checkpoint: Path, place: tuple[str, ...]) -> None:
    def invent(record: dict[str, Any]) -> None:
        inner = record["runtime"]
        for name in place:
            inner = inner[name]
        inner["invented"] = 7

    edit(checkpoint, invent)
    with pytest.raises(UserError, match="invented"):
        dfrot.load(checkpoint)


def test_a_missing_part_of_the_runtime_is_refused_by_its_name(checkpoint: Path) -> None:
    edit(checkpoint, lambda record: record["runtime"].pop("rotation_blocks"))
    with pytest.raises(UserError, match="'rotation_blocks' is unknown or missing"):
        dfrot.load(checkpoint)


def test_a_checkpoint_from_before_tuning_is_read(checkpoint: Path) -> None:
    before = dfrot.load(checkpoint)[0].state_dict()
    edit(checkpoint, lambda record: record["runtime"].pop("biases"))
    assert dfrot.load(checkpoint)[0].state_dict().keys() == before.keys()


@pytest.mark.parametrize("name", ["mlp.sideways_proj", ["mlp.up_proj"]])
def test_a_bias_of_a_layer_that_there_is_not_is_refused(checkpoint: Path, name: Any) -> None:
    edit(checkpoint, lambda record: record["runtime"].update(biases=[name]))
    with pytest.raises(UserError, match=r"there is no linear layer|not the runtime record"):
        dfrot.load(checkpoint)


def test_another_format_says_which_are_read(checkpoint: Path) -> None:
    edit(checkpoint, lambda record: record.update(format=5))
    with pytest.raises(UserError, match=r"has format 5; this version of dfrot reads formats 3 and 4"):
        dfrot.load(checkpoint)


def test_loading_parses_the_runtime_record_once(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parsed = []
    original = RuntimeConfig.from_json

    def counted(record: Any) -> RuntimeConfig:
        parsed.append(record)
        return original(record)

    monkeypatch.setattr(RuntimeConfig, "from_json", staticmethod(counted))
    dfrot.load(checkpoint)
    assert len(parsed) == 1


def test_a_copied_checkpoint_loads(checkpoint: Path, tmp_path: Path) -> None:
    shutil.copytree(checkpoint, tmp_path / "copy")
    tokens = torch.arange(1, 9)[None]
    assert torch.equal(logits(checkpoint, tokens), logits(tmp_path / "copy", tokens))


LOAD = """
import sys, transformers
path, kind, attention = sys.argv[1:]
getattr(transformers, kind).from_pretrained(path, attn_implementation=attention or None)
"""


@pytest.mark.parametrize("spec", ["w4a4kv4", "w16a4kv16"])
def test_without_dfrot_transformers_refuses_a_checkpoint_and_says_why(tiny: Tiny, tmp_path: Path, spec: str) -> None:
    path = dfrot.quantize(tiny("llama"), dfrot.Recipe.parse("quarot", "rtn", spec), tmp_path / "out").path
    AutoModel.from_pretrained(path).save_pretrained(tmp_path / "saved")
    loads = [
        (path, "AutoModelForCausalLM", ""),
        (path, "LlamaForCausalLM", "eager"),
        (path, "AutoModelForSequenceClassification", "sdpa"),
        (tmp_path / "saved", "AutoModel", ""),
    ]
    for arguments in loads:
        done = subprocess.run([sys.executable, "-c", LOAD, *map(str, arguments)], capture_output=True, text=True)
        assert done.returncode == 1
        assert "run `import dfrot` before loading this checkpoint" in done.stderr.strip().splitlines()[-1]


@pytest.mark.parametrize("kept", [True, False], ids=["new", "older"])
def test_with_dfrot_a_checkpoint_loads_whether_or_not_its_config_asks_for_dfrot(checkpoint: Path, kept: bool) -> None:
    file = checkpoint / "config.json"
    config = json.loads(file.read_text())
    assert config.keys() >= {"fusion_config"}
    if not kept:  # as checkpoints were before
        del config["fusion_config"]
        file.write_text(json.dumps(config))
    assert logits(checkpoint, torch.arange(1, 9)[None]).isfinite().all()
