"""A GGUF file is the model that it was made from, or refused by the name of what has no place, before any work."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

gguf = pytest.importorskip("gguf", reason="writes GGUF files")

from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer  # noqa: E402

import dfrot  # noqa: E402
from dfrot.cli import main  # noqa: E402
from dfrot.export import export  # noqa: E402
from dfrot.models.source import open_source  # noqa: E402
from dfrot.system.errors import SetupError, UserError  # noqa: E402
from tests.export.test_gguf import byte_tokenizer, save_tokenizer  # noqa: E402
from tests.sources import contents, typed, write_gguf  # noqa: E402
from tests.tiny_models import write_tiny_model  # noqa: E402

TOKENS = torch.randint(1, 300, (1, 100), generator=torch.Generator().manual_seed(0))
SIZES = {"hidden_size": 64, "head_dim": 16, "intermediate_size": 96, "vocab_size": 300}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1 + 0.1 * index for index in range(8)],
    "long_factor": [2 + 0.5 * index for index in range(8)],
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 64}
Made = Callable[..., tuple[Path, Path]]


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Made:
    """The directory of a tiny model, and the GGUF file of it; the cache is empty."""
    monkeypatch.setenv("DFROT_CACHE", str(tmp_path / "cache"))

    def get(architecture: str = "llama", **changed: Any) -> tuple[Path, Path]:
        model = write_tiny_model(architecture, tmp_path / "model", **{**SIZES, **changed})
        save_tokenizer(byte_tokenizer(), model)
        recipe = dfrot.Recipe.parse("none", "rtn", "w16a16kv16")
        export(dfrot.quantize(model, recipe, tmp_path / "ckpt").path, "gguf", tmp_path / "a.gguf", kind="f32")
        return model, tmp_path / "a.gguf"

    return get


@torch.no_grad()
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    ("architecture", "changed"),
    [
        ("llama", {}),  # with biases, tied
        ("llama", {"mlp_bias": True, "tie_word_embeddings": False}),
        ("llama", {"rope_parameters": {**LLAMA3, "rope_theta": 5e5, "original_max_position_embeddings": 64}}),
        ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}}),
        ("qwen2", {}),
        ("qwen3", {"head_dim": 32, "attention_bias": True}),
        ("phi3", {"rope_parameters": LONG, "original_max_position_embeddings": 64, "max_position_embeddings": 256}),
        ("phi3", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}}),
    ],
)
def test_a_gguf_file_computes_what_its_model_computes(made: Made, architecture: str, changed: dict[str, Any]) -> None:
    model, file = made(architecture, **changed)
    expected = AutoModelForCausalLM.from_pretrained(model)(TOKENS).logits
    got = dfrot.load(str(file))[0](TOKENS).logits
    assert (got - expected).norm() < 1e-5 * expected.norm()


@torch.no_grad()
def test_yarn_is_read_as_llama_cpps_converter_writes_it(made: Made) -> None:
    model, file = made("qwen2", max_position_embeddings=256)
    fields, tensors = contents(file)
    scaling = {"type": "yarn", "factor": 4.0, "original_context_length": 64}
    given = {f"qwen2.rope.scaling.{key}": typed(value) for key, value in scaling.items()}
    write_gguf(file, fields | given, tensors)
    config = AutoConfig.from_pretrained(model, rope_parameters=YARN)
    expected = AutoModelForCausalLM.from_pretrained(model, config=config)(TOKENS).logits
    got = dfrot.load(str(file))[0](TOKENS).logits
    assert (got - expected).norm() < 1e-5 * expected.norm()
    unscaled = AutoModelForCausalLM.from_pretrained(model)(TOKENS).logits
    assert (unscaled - expected).norm() > 1e-3 * expected.norm()


@torch.no_grad()
def test_divisors_of_no_known_rule_go_over_one_by_one(made: Made) -> None:
    model, file = made()
    fields, tensors = contents(file)
    factors = np.array([1, 3, 1, 2, 5, 1, 1, 7], np.float32)
    write_gguf(file, fields, {**tensors, "rope_freqs.weight": (factors, gguf.GGMLQuantizationType.F32)})
    whole = AutoModelForCausalLM.from_pretrained(model)
    whole.model.rotary_emb.inv_freq /= torch.from_numpy(factors)
    expected = whole(TOKENS).logits
    got = dfrot.load(str(file))[0](TOKENS).logits
    assert (got - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("llama.attention.sliding_window", 8),
        ("llama.rope.scaling.type", "magic"),
        ("llama.rope.scaling.attn_factor", 2.0),
        ("llama.rope.dimension_count", 8),
        ("llama.attention.value_length", 8),
        ("llama.expert_count", 4),
        ("llama.attention.head_count", "four"),
        ("general.type", "adapter"),
        ("general.architecture", "mamba"),
        ("split.count", 2),
        ("nonsense", 1),
    ],
)
def test_a_key_without_place_is_named_and_nothing_is_left(made: Made, tmp_path: Path, key: str, value: Any) -> None:
    _, file = made()
    fields, tensors = contents(file)
    write_gguf(file, fields | {key: typed(value)}, tensors)
    named = {"llama.attention.value_length": "llama.attention.key_length", "general.architecture": "mamba"}
    with pytest.raises(UserError, match=re.escape(named.get(key, key.removeprefix("llama.")))):
        open_source(str(file))
    assert not (tmp_path / "cache").exists()


def test_a_tensor_without_place_or_missing_is_named_and_nothing_is_left(made: Made, tmp_path: Path) -> None:
    _, file = made()
    fields, tensors = contents(file)
    write_gguf(file, fields, {**tensors, "blk.0.attn_sinks.weight": tensors["blk.0.attn_norm.weight"]})
    with pytest.raises(UserError, match=r"the tensor 'blk.0.attn_sinks.weight' has no place"):
        open_source(str(file))
    del tensors["blk.1.ffn_up.weight"]
    write_gguf(file, fields, tensors)
    with pytest.raises(UserError, match=r"lack 'model.layers.1.mlp.up_proj.weight'"):
        open_source(str(file))
    assert not (tmp_path / "cache").exists()


def test_a_plan_and_a_refusal_unpack_nothing(
    made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, file = made()
    words = ["quantize", str(file), "-o", str(tmp_path / "out"), "--method", "none", "--weights", "rtn"]
    assert main([*words, "--dry-run"]) == 0
    assert "in the cache 0.00 GB, unpacked from GGUF" in capsys.readouterr().out
    assert main([*words, "--memory", "100MB"]) == 2
    assert main([*words, "--spec", "w4g7a4kv4"]) == 2
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(SetupError, match="unpacked; the disk of"):
        open_source(str(file), fetch=False)
    assert not (tmp_path / "cache").exists()
    assert not (tmp_path / "out").exists()


def test_what_is_unpacked_is_what_was_planned(made: Made) -> None:
    _, file = made("qwen3")
    planned, unpacked = open_source(str(file), fetch=False), open_source(str(file))
    assert planned.pending == sum(tensor.nbytes for tensor in unpacked.stored.values())
    assert (unpacked.pending, len({tensor.file for tensor in unpacked.stored.values()})) == (0, 2 + 3)
    assert {name: tensor.shape for name, tensor in planned.stored.items()} == {
        name: tensor.shape for name, tensor in unpacked.stored.items()
    }
    assert open_source(str(file), fetch=False).pending == 0


def test_info_says_what_a_gguf_file_is(made: Made, capsys: pytest.CaptureFixture[str]) -> None:
    _, file = made()
    assert main(["info", str(file)]) == 0
    assert json.loads(capsys.readouterr().out)["model_type"] == "llama"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_file_has_its_own_tokenizer_whatever_lies_beside_it(made: Made, tmp_path: Path) -> None:
    _, file = made()
    write_tiny_model("qwen2", tmp_path)  # another model, with a tokenizer of characters
    tokenizer = AutoTokenizer.from_pretrained(open_source(str(file)).path)
    assert tokenizer("the").input_ids == byte_tokenizer().encode("the").ids
