import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config

import dfrot
from dfrot.models import files as models_files
from dfrot.models.graph import GRAPHS
from dfrot.models.norms import use_torch_norms_
from dfrot.models.source import Source, open_source
from dfrot.models.stream import BlockRunner, captured_inputs
from dfrot.system.errors import SetupError, UserError
from tests.tiny_models import CONFIGS

Tiny = Callable[[str], Path]
every_architecture = pytest.mark.parametrize("architecture", CONFIGS)


def test_every_known_architecture_has_a_tiny_model() -> None:
    assert set(CONFIGS) == set(GRAPHS)


@every_architecture
def test_the_table_names_modules_that_exist(tiny: Tiny, architecture: str) -> None:
    source = open_source(str(tiny(architecture)))
    block = source.block(0)
    found = {name for name, module in block.named_modules() if isinstance(module, torch.nn.Linear)}
    assert set(source.graph.linears) == found
    for name in (*source.graph.norms, *source.graph.head_norms, source.graph.attention):
        block.get_submodule(name)


@every_architecture
@torch.no_grad()
def test_blocks_one_by_one_compute_what_the_whole_model_computes(tiny: Tiny, architecture: str) -> None:
    source = open_source(str(tiny(architecture)))
    model = AutoModelForCausalLM.from_pretrained(tiny(architecture), dtype=torch.float64)
    use_torch_norms_(model, source.graph)
    tokens = torch.arange(1, 25)[None]  # longer than the sliding window of the tiny Mistral
    hidden = source.embedding()[tokens].double()
    run = BlockRunner(source, hidden)
    for index in range(source.num_blocks):
        hidden = run(source.block(index).double(), index, hidden)
    logits = source.final_norm().double()(hidden) @ source.head().double().T
    torch.testing.assert_close(logits, model(tokens, use_cache=False).logits, rtol=0, atol=1e-12)


@every_architecture
@torch.no_grad()
def test_torch_norms_equal_transformers_norms_in_float32(tiny: Tiny, architecture: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny(architecture))
    tokens = torch.arange(1, 20)[None]
    expected = model(tokens).logits
    use_torch_norms_(model, GRAPHS[architecture])
    norms = [module for module in model.modules() if type(module) is torch.nn.RMSNorm]
    assert len(norms) == 2 * (2 + len(GRAPHS[architecture].head_norms)) + 1
    error = (model(tokens).logits - expected).norm() / expected.norm()
    assert error < 1e-5  # 2⁻²³ through a hundred additions


@pytest.mark.parametrize("shape", [(2, 5, 4), (5, 4)])
def test_captured_inputs_are_what_the_modules_got_and_have_a_batch(shape: tuple[int, ...]) -> None:
    first, second = torch.nn.Linear(4, 3), torch.nn.Linear(3, 2)
    x = torch.randn(shape)
    with captured_inputs({"second": second}) as seen:
        second(first(x))
    second(first(x))
    assert len(seen["second"]) == 1
    assert torch.equal(seen["second"][0], first(x).view(-1, 5, 3))


@pytest.fixture
def broken(tiny: Tiny, tmp_path: Path) -> Path:
    """A copy of a tiny model, to be broken."""
    shutil.copytree(tiny("llama"), tmp_path / "model")
    return tmp_path / "model"


def refused(path: Path | str, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        dfrot.quantize(path, dfrot.Recipe.parse("quarot", "rtn"), Path("never-written"))
    assert not Path("never-written").exists()


def test_a_model_that_is_not_there_is_refused() -> None:
    refused("./no/such/model", "there is no model at './no/such/model'")


def test_a_file_that_is_no_gguf_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_bytes(b"x")
    refused(tmp_path / "model.bin", "a model file ends in .gguf")
    (tmp_path / "model.gguf").write_bytes(b"not a model")
    refused(tmp_path / "model.gguf", "does not begin with the bytes 'GGUF'")


def test_a_hub_that_cannot_be_reached_is_the_environments_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(SetupError, match=r"nobody/nothing.*cannot be reached"):
        open_source("nobody/nothing")


def test_an_architecture_that_cannot_be_read_says_why(tmp_path: Path) -> None:
    GPT2Config().save_pretrained(tmp_path)
    refused(tmp_path, "the architecture 'gpt2' has no table, and none could be found out: 'attn.c_attn' is a Conv1D")


def test_a_config_that_needs_remote_code_is_refused(broken: Path) -> None:
    config = json.loads((broken / "config.json").read_text())
    config |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Evil"}}
    (broken / "config.json").write_text(json.dumps(config))
    (broken / "evil.py").write_text("raise SystemExit('remote code ran')")
    refused(broken, "is not a config that transformers can load")


def test_truncated_weights_are_refused(broken: Path) -> None:
    whole = (broken / "model.safetensors").read_bytes()
    (broken / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    refused(broken, "is not a complete safetensors file")


def test_a_file_too_large_to_be_mapped_is_said(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_room(*_: Any, **__: Any) -> None:
        raise RuntimeError("unable to mmap 137953388012 bytes: Cannot allocate memory (12)")

    monkeypatch.setattr(models_files, "safe_open", no_room)
    with pytest.raises(SetupError, match=r"cannot be opened: unable to mmap.* A model in shards"):
        open_source(str(tiny("llama")))


def test_weights_that_are_not_safetensors_are_refused(broken: Path) -> None:
    (broken / "model.safetensors").write_bytes(b"PK\x03\x04 a zip")
    refused(broken, "is not a complete safetensors file")


def test_pickled_weights_are_refused(broken: Path) -> None:
    (broken / "model.safetensors").unlink()
    refused(broken, "has no safetensors weights")
    torch.save({}, broken / "pytorch_model.bin")
    refused(broken, "pickle files (pytorch_model.bin)")


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", ["model.layers.1.mlp.down_proj.weight", "model.embed_tokens.weight"])
def test_nan_in_a_weight_is_named_and_leaves_nothing_finished(
    broken: Path, tmp_path: Path, value: float, name: str
) -> None:
    tensors = load_file(broken / "model.safetensors")
    tensors[name][2, 3] = value
    save_file(tensors, broken / "model.safetensors")
    with pytest.raises(UserError, match=f"'{name}'.*NaN or infinite"):
        dfrot.quantize(broken, dfrot.Recipe.parse("quarot", "rtn"), tmp_path / "out")
    assert not (tmp_path / "out" / "config.json").exists()


def test_a_missing_tensor_is_named(broken: Path) -> None:
    tensors = load_file(broken / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, broken / "model.safetensors")
    refused(broken, "lack 'model.layers.1.mlp.up_proj.weight' (1 missing)")


def test_a_tensor_of_another_shape_is_named(broken: Path) -> None:
    tensors = load_file(broken / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"] = torch.zeros(3, 3)
    save_file(tensors, broken / "model.safetensors")
    refused(broken, "'model.layers.0.mlp.up_proj.weight'")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_hidden_layers": 1}, "hold 'model.layers.1."),
        ({"num_hidden_layers": 3}, "lack 'model.layers.2."),
        ({"vocab_size": 50}, "'model.embed_tokens.weight'"),
        ({"tie_word_embeddings": False}, "lack 'lm_head.weight'"),
        ({"num_attention_heads": 5}, "is not a config that transformers can load"),
    ],
)
def test_a_config_that_does_not_fit_the_weights_is_refused(broken: Path, change: dict[str, Any], message: str) -> None:
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(config | change))
    refused(broken, message)


def test_a_tensor_of_an_unknown_dtype_is_named(broken: Path) -> None:
    tensors = load_file(broken / "model.safetensors")
    save_file({**tensors, "model.extra": torch.zeros(2, dtype=torch.int16)}, broken / "model.safetensors")
    refused(broken, "the tensor 'model.extra'")


def test_a_model_without_a_tokenizer_is_refused_before_the_work(broken: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (broken / name).unlink()
    refused(broken, "has no tokenizer")


def test_an_index_that_assigns_a_tensor_to_the_wrong_shard_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    AutoModelForCausalLM.from_pretrained(tiny("qwen3")).save_pretrained(tmp_path, max_shard_size="20kB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    shards = sorted(set(index["weight_map"].values()))
    index["weight_map"]["model.norm.weight"] = next(s for s in shards if s != index["weight_map"]["model.norm.weight"])
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(tmp_path, "holds 'model.norm.weight', which it does not")


def test_a_bfloat16_model_with_float32_norms_is_a_bfloat16_model(broken: Path) -> None:
    tensors = load_file(broken / "model.safetensors")
    narrow = {name: tensor if "norm" in name else tensor.bfloat16() for name, tensor in tensors.items()}
    save_file(narrow, broken / "model.safetensors")
    assert open_source(str(broken)).dtype == torch.bfloat16


@pytest.mark.parametrize("shard", ["../model.safetensors", "/etc/passwd", "missing.safetensors"])
def test_an_index_that_points_elsewhere_is_refused(broken: Path, shard: str) -> None:
    index = {"weight_map": {"model.norm.weight": shard}}
    (broken / "model.safetensors").rename(broken.parent / "model.safetensors")
    (broken / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(broken, "which is not a file in")


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("[]", "holds no JSON object"),
        ("{}", "is not an index of safetensors shards"),
        ("not json", "is not a JSON file"),
        ('{"weight_map": 3}', "is not an index of safetensors shards"),
        ('{"weight_map": {"model.norm.weight": ["a"]}}', "is not an index of safetensors shards"),
        ("[" * 100_000, "nested too deeply"),
    ],
)
def test_an_index_that_is_none_is_refused(broken: Path, index: str, message: str) -> None:
    (broken / "model.safetensors").unlink()
    (broken / "model.safetensors.index.json").write_text(index)
    refused(broken, message)


def test_many_shards_are_read_like_one(tiny: Tiny, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny("qwen3"))
    model.save_pretrained(tmp_path, max_shard_size="20kB")
    shards = open_source(str(tmp_path))
    assert len({tensor.file for tensor in shards.stored.values()}) > 2
    whole = open_source(str(tiny("qwen3")))
    for name in whole.stored:
        assert torch.equal(shards.tensor(name), whole.tensor(name))


def test_a_checkpoint_is_not_quantized_twice(tiny: Tiny, tmp_path: Path) -> None:
    dfrot.quantize(tiny("llama"), dfrot.Recipe.parse("none", "rtn"), tmp_path / "once")
    with pytest.raises(UserError, match=r"quantized already \(quantization_config: dfrot\)"):
        dfrot.quantize(tmp_path / "once", dfrot.Recipe.parse("none", "rtn"), tmp_path / "twice")


def test_of_an_index_and_a_single_file_the_file_is_read(broken: Path) -> None:
    (broken / "model.safetensors.index.json").write_text('{"weight_map": {"model.norm.weight": "gone.safetensors"}}')
    assert {tensor.file.name for tensor in open_source(str(broken)).stored.values()} == {"model.safetensors"}


@torch.no_grad()
@pytest.mark.parametrize("method", ["none", "quarot"])
def test_a_head_of_its_own_is_kept_whatever_the_config_says(broken: Path, tmp_path: Path, method: str) -> None:
    tensors = load_file(broken / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].flip(0)
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    tokens = torch.arange(1, 25)[None]
    expected = AutoModelForCausalLM.from_pretrained(broken)(tokens).logits
    made = dfrot.quantize(broken, dfrot.Recipe.parse(method, "rtn", "w16a16kv16"), tmp_path / "out").path
    got = dfrot.load(made)[0](tokens).logits
    assert (got - expected).norm() < 1e-5 * expected.norm()


def test_a_head_that_is_a_copy_of_the_embedding_stays_tied(broken: Path) -> None:
    tensors = load_file(broken / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    assert open_source(str(broken)).tied


def test_a_tensor_without_place_is_named_wherever_it_stands(broken: Path) -> None:
    tensors = load_file(broken / "model.safetensors")
    ignored = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(6)}
    save_file(tensors | ignored, broken / "model.safetensors", {"format": "pt"})
    open_source(str(broken))
    for name in ("model.extra.weight", "vision.embedding.weight", "lm_head.bias"):
        save_file({**tensors, name: torch.ones(3)}, broken / "model.safetensors", {"format": "pt"})
        refused(broken, f"hold '{name}', for which its config has no place")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ["LlamaForSequenceClassification"]}, "['LlamaForSequenceClassification']"),
        ({"architectures": 1}, "has the architectures 1"),
        ({"sliding_window": 8}, "has a sliding_window, which llama does not know"),
        ({"is_causal": False}, "(is_causal)"),
        ({"transformers_weights": "other.safetensors"}, "(transformers_weights)"),
        ({"quantization_config": 3}, "has a quantization_config that is no JSON object"),
        ({"dtype": 1}, "has the dtype 1"),
    ],
)
def test_what_transformers_would_read_otherwise_is_refused(broken: Path, change: dict[str, Any], message: str) -> None:
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(config | change))
    refused(broken, message)


def test_an_adapter_is_named_as_one(broken: Path, tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    for folder in (broken, tmp_path / "adapter"):  # beside a model, with peft, transformers loads the other one
        (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "somebody/else"}')
        refused(folder, "holds an adapter of somebody/else: merge it first")


def test_a_source_that_computes_otherwise_than_in_transformers_is_refused(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    block = Source.block

    def other(source: Source, index: int) -> Any:
        module: Any = block(source, index)
        module.mlp.down_proj.weight *= 1.01
        return module

    recipe = dfrot.Recipe.parse("none", "rtn")
    with monkeypatch.context() as patched:
        patched.setattr(Source, "block", other)
        for check in ("auto", "always"):
            with pytest.raises(UserError, match="computes something else here than in transformers"):
                dfrot.quantize(tiny("qwen2"), recipe, tmp_path / "out", check_source=check)
        assert not (tmp_path / "out").exists()
        dfrot.quantize(tiny("qwen2"), recipe, tmp_path / "unchecked", check_source="never")
    with pytest.raises(UserError, match="never, auto or always, got 'maybe'"):
        dfrot.quantize(tiny("qwen2"), recipe, tmp_path / "out", check_source="maybe")
