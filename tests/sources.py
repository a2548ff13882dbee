"""Sources that somebody changed: each is read as transformers reads it, or refused by the name of what was changed.

One tensor, one key of the metadata or one file of a tiny model is added, removed, renamed or changed. The authority is
`AutoModelForCausalLM` on the changed source. It leaves RoPE's scaling, and Phi-3's window, out of a GGUF file; there
they are put into the model that it loads.
"""

import json
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import dfrot
from dfrot.export import export
from dfrot.models.source import open_source
from dfrot.models.stream import logits_by_blocks
from dfrot.system.errors import UserError
from tests.export.test_gguf import byte_tokenizer, save_tokenizer
from tests.tiny_models import write_tiny_model

TOKENS = torch.randint(1, 90, (2, 24), generator=torch.Generator().manual_seed(0))
BOUND = 1e-4  # float32, two blocks
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
ROPE = [
    {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4},
    {**LLAMA3, "original_max_position_embeddings": 16, "rope_theta": 1e4},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 1e4},
    {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4},
    {"rope_type": "nonsense", "rope_theta": 1e4},
    {"rope_theta": 1e5},
]
# Keys of config.json, those of other architectures and of nobody among them, with values.
KEYS: dict[str, list[Any]] = {
    "adapter": [1],
    "architectures": [["LlamaForSequenceClassification"], ["MistralModel"], ["Qwen2ForCausalLM"], None],
    "attention_bias": [True, False],
    "attention_multiplier": [3.0],
    "attn_logit_softcapping": [2.0],
    "dtype": ["float16", "bfloat16"],
    "head_dim": [8, 12, 16, 32, None],
    "hidden_act": ["gelu", "relu", "nonsense"],
    "hidden_size": [48, 64, 96],
    "intermediate_size": [80, 96, 10],
    "is_causal": [False],
    "layer_types": [["sliding_attention", "full_attention"], ["full_attention"] * 2, ["nonsense"] * 2],
    "max_position_embeddings": [8, 16, 4096],
    "max_window_layers": [0, 1],
    "mlp_bias": [True],
    "model_type": ["llama", "mistral", "qwen2", "qwen3", "phi3", "gpt2", "nonsense"],
    "no_rope_layers": [[0, 1]],
    "num_attention_heads": [2, 4, 8],
    "num_hidden_layers": [1, 2, 3],
    "num_key_value_heads": [1, 2, 4],
    "partial_rotary_factor": [0.5],
    "pretraining_tp": [2],
    "quantization_config": [{"quant_method": "gptq", "bits": 4}],
    "rms_norm_eps": [1e-6, 1e-1],
    "rope_parameters": ROPE,
    "rope_scaling": ROPE,
    "rope_theta": [1e3, 5e5],
    "scale_embedding": [True],
    "sliding_window": [4, 100, None],
    "tie_word_embeddings": [True, False],
    "transformers_weights": ["other.safetensors"],
    "use_bidirectional_attention": [True],
    "use_sliding_window": [True],
    "vocab_size": [96, 97],
}
# Keys of a GGUF file, without the name of its architecture, with values and what transformers has to be told of them.
GGUF_KEYS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
    (
        {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 16},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    ),
    ({"rope.scaling.type": "none"}, {}),
    ({"rope.scaling.type": "nonsense"}, {}),
    ({"rope.scaling.factor": 2.0}, {}),
    ({"rope.scaling.attn_factor": 1.5}, {}),
    ({"rope.scaling.finetuned": True}, {}),
    ({"rope.scale_linear": 2.0}, {}),
    ({"rope.freq_base": 1e5}, {}),
    ({"attention.layer_norm_rms_epsilon": 0.1}, {}),
    ({"attention.head_count": 2}, {}),
    ({"attention.head_count_kv": 1}, {}),
    ({"attention.key_length": 8}, {}),
    ({"attention.value_length": 8}, {}),
    ({"attention.sliding_window": 4}, {"sliding_window": 4}),
    ({"attention.causal": False}, {}),
    ({"attention.scale": 0.5}, {}),
    ({"rope.dimension_count": 8}, {"partial_rotary_factor": 0.5}),
    ({"block_count": 1}, {}),
    ({"expert_count": 4}, {}),
    ({"logit_scale": 0.5}, {}),
    ({"vocab_size": 10}, {}),
    ({"context_length": 4096}, {}),
    ({"embedding_length": 32}, {}),
    ({"feed_forward_length": 32}, {}),
    ({"nonsense": 1}, {}),
]


@dataclass
class Changed:
    """What was changed, and what is to be told to transformers, which does not read it."""

    names: list[str] = field(default_factory=list)  # one of them has to stand in a refusal
    patch: Callable[[Any], None] = lambda model: None


def judge(path: Path, changed: Changed, theirs: Callable[[], Any]) -> None:
    """Raise UserError where the source is refused by name, AssertionError where it is read otherwise."""
    with torch.no_grad():
        try:
            ours = logits_by_blocks(open_source(str(path)), TOKENS)
        except UserError as error:
            if changed.names and not any(name in str(error) for name in changed.names):
                raise AssertionError(f"{changed.names} are not named: {error}") from error
            raise
        model = theirs()
        changed.patch(model)
        expected = model.eval()(TOKENS, use_cache=False).logits
    off, size = float((ours - expected).norm()), float(expected.norm())
    assert off <= BOUND * size, f"{changed.names}: off by {off:.1e} of {size:.1e}"


def directories(scratch: Path, sharded: bool) -> Callable[[Path], None]:
    """A reader of a seed, from which it changes a tiny directory in the seed's folder and judges it."""
    bases = []
    for name in ("llama", "mistral", "qwen2", "qwen3", "phi3"):
        base = write_tiny_model(name, scratch / f"{name}-{sharded}")
        if sharded:
            (base / SINGLE).rename(base / "whole")
            split(base, load_file(base / "whole"))
            (base / "whole").unlink()
        bases.append(base)

    def read(folder: Path) -> None:
        rng = random.Random(seed := (folder / "seed").read_bytes())
        source = folder / "source"
        shutil.copytree(rng.choice(bases), source)
        changed = change_directory(source, rng) if seed else Changed()
        judge(source, changed, lambda: AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32))

    return read


def split(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Write three shards and their index."""
    names = sorted(tensors)
    weight_map = {name: f"model-{number % 3 + 1:05}-of-00003.safetensors" for number, name in enumerate(names)}
    for shard in set(weight_map.values()):
        save_file(
            {name: tensors[name] for name in names if weight_map[name] == shard}, folder / shard, {"format": "pt"}
        )
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def change_directory(folder: Path, rng: random.Random) -> Changed:
    """Change one thing about a directory."""
    match rng.randrange(10):
        case 0 | 1 | 2 | 3:
            return change_config(folder, rng)
        case 4:
            return change_files(folder, rng)
    shards = sorted(folder.glob("model*.safetensors"))
    shard = rng.choice(shards)
    tensors = load_file(shard)
    names = change_tensors(tensors, rng)
    save_file(tensors, shard, {"format": "pt"})
    if (folder / INDEX).is_file() and rng.randrange(4):  # else the index does not know
        index = json.loads((folder / INDEX).read_text())
        weight_map = {name: where for name, where in index["weight_map"].items() if where != shard.name}
        (folder / INDEX).write_text(json.dumps(index | {"weight_map": weight_map | dict.fromkeys(tensors, shard.name)}))
    return Changed(names)


def change_config(folder: Path, rng: random.Random) -> Changed:
    """Add, remove, rename or change one key of config.json; a tensor that no longer fits may be named, too."""
    config = json.loads((folder / "config.json").read_text())
    key = rng.choice(sorted(set(config) | set(KEYS)))
    # what transformers cannot load it says in words
    names = [key, "transformers can load", "transformers can make", "has no table", "model.", "lm_head."]
    match rng.randrange(4):
        case 0:
            config.pop(key, None)
        case 1:
            config[other := rng.choice(sorted(KEYS))] = config.pop(key, 1)
            names.append(other)
        case _:
            if key in KEYS:
                config[key] = rng.choice(KEYS[key])
            else:
                config[key] = rng.choice([None, 1, "nonsense", [], {}])
    (folder / "config.json").write_text(json.dumps(config))
    return Changed([*names, str(config.get(key))])


def change_files(folder: Path, rng: random.Random) -> Changed:
    """Put a file beside the others that competes with them, or take one away."""
    tensors = {name: tensor for shard in folder.glob("model*.safetensors") for name, tensor in load_file(shard).items()}
    scaled = {name: tensor * (-2 if "down_proj" in name else 1) for name, tensor in tensors.items()}
    match rng.randrange(5):
        case 0:  # an index and shards of an earlier model, or its single file
            if (folder / SINGLE).is_file():
                split(folder, scaled)
            else:
                save_file(scaled, folder / SINGLE, {"format": "pt"})
            return Changed([SINGLE, INDEX])
        case 1:
            (folder / INDEX).write_text(json.dumps({"weight_map": {"model.norm.weight": "gone.safetensors"}}))
            return Changed(["gone.safetensors"])
        case 2:
            record = {"peft_type": "LORA", "base_model_name_or_path": "somebody/else"}
            (folder / "adapter_config.json").write_text(json.dumps(record))
            return Changed(["somebody/else"])
        case 3:
            (gone := rng.choice(sorted(folder.glob("model*")))).unlink()
            return Changed([gone.name])
    save_file(scaled, folder / "other.safetensors", {"format": "pt"})
    return Changed(["other.safetensors"])


def change_tensors(tensors: dict[str, Tensor], rng: random.Random) -> list[str]:
    """Add, remove, rename, exchange or change tensors in place; returns their names."""
    name = rng.choice(sorted(tensors))
    other = another_name(name, sorted(tensors), rng)
    tensor = tensors[name]
    match rng.randrange(8):
        case 0:
            tensors[other] = tensor.clone()
        case 1:
            tensors["lm_head.weight"] = torch.randn(96, tensor.shape[-1])
            other = "lm_head.weight"
        case 2:
            del tensors[name]
        case 3:
            tensors[other] = tensors.pop(name)
        case 4:
            tensors[name], other = tensors.get(other, tensor).clone(), name
        case 5:
            tensors[name] = tensor * rng.choice([0.0, -3.0, 1.5, float("nan")])
        case 6:
            tensors[name] = rng.choice([tensor.flip(0), tensor.T.contiguous(), tensor[:-1].clone(), tensor[None]])
        case 7:
            dtypes = [torch.float16, torch.bfloat16, torch.float64, torch.int8, torch.int16, torch.float8_e4m3fn]
            tensors[name] = tensor.to(rng.choice(dtypes))
    return [name, other]


def another_name(name: str, names: list[str], rng: random.Random) -> str:
    """The name of something beside a tensor, or of nothing."""
    return rng.choice(
        [
            rng.choice(names),
            name.removeprefix("model."),
            f"model.{name}",
            name.replace(".weight", ".bias"),
            name.replace("layers.1.", "layers.2.").replace("layers.0.", "layers.1."),
            name.rpartition(".")[0] + ".scale",
            name.replace("norm", "layernorm"),
            "model.layers.0.self_attn.q_norm.weight",
            "model.layers.0.self_attn.rotary_emb.inv_freq",
            "model.layers.1.self_attn.sinks",
            "lm_head.bias",
            "model.extra",
        ]
    )


def gguf_files(scratch: Path) -> Callable[[Path], None]:
    """A reader of a seed, from which it changes a tiny GGUF file in the seed's folder and judges it."""
    bases = []
    sizes: dict[str, Any] = {"hidden_size": 64, "head_dim": 16, "intermediate_size": 96, "vocab_size": 300}
    # transformers' reader knows no biases in Llama, and only heads of 128 channels in Qwen3
    families: dict[str, dict[str, Any]] = {
        "llama": {"attention_bias": False},
        "qwen2": {},
        "qwen3": {"head_dim": 128},
        "phi3": {},
    }
    for name, changes in families.items():
        model = write_tiny_model(name, scratch / f"{name}-gguf", **{**sizes, **changes})
        save_tokenizer(byte_tokenizer(), model)
        recipe = dfrot.Recipe.parse("none", "rtn", "w8g32a16kv16" if name == "qwen2" else "w16a16kv16", preset="deploy")
        checkpoint = dfrot.quantize(model, recipe, scratch / f"{name}-checkpoint").path
        kind = "q8_0" if name == "qwen2" else "f32"
        export(checkpoint, "gguf", scratch / f"{name}.gguf", kind=kind)
        bases.append(scratch / f"{name}.gguf")

    def read(folder: Path) -> None:
        rng = random.Random(seed := (folder / "seed").read_bytes())
        base, source = rng.choice(bases), folder / "source.gguf"
        fields, tensors = contents(base)
        changed = change_gguf(fields, tensors, rng) if seed else Changed()
        write_gguf(source, fields, tensors)
        judge(
            source,
            changed,
            lambda: AutoModelForCausalLM.from_pretrained(folder, gguf_file=source.name, dtype=torch.float32),
        )

    return read


Fields = dict[str, tuple[Any, Any, Any]]  # name → value, type, type of an array's values
Tensors = dict[str, tuple[np.ndarray, Any]]  # name → data, type


def contents(path: Path) -> tuple[Fields, Tensors]:
    reader = gguf.GGUFReader(path)
    fields = {
        name: (each.contents(), each.types[0], each.types[-1] if len(each.types) > 1 else None)
        for name, each in reader.fields.items()
        if not name.startswith("GGUF.")
    }
    return fields, {tensor.name: (np.array(tensor.data), tensor.tensor_type) for tensor in reader.tensors}


def write_gguf(path: Path, fields: Fields, tensors: Tensors) -> None:
    writer = gguf.GGUFWriter(path, fields["general.architecture"][0])
    for name, (value, kind, sub_type) in fields.items():
        if name != "general.architecture":
            writer.add_key_value(name, value, kind, sub_type)
    for name, (data, kind) in tensors.items():
        writer.add_tensor(name, data, raw_dtype=kind)
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        write()
    writer.close()


def change_gguf(fields: Fields, tensors: Tensors, rng: random.Random) -> Changed:
    """Change one key or tensor."""
    architecture = fields["general.architecture"][0]
    if rng.randrange(2):
        return change_gguf_tensors(tensors, rng)
    mine = sorted(name for name in fields if name.startswith(f"{architecture}."))
    key = rng.choice(mine)
    match rng.randrange(6):
        case 0:
            del fields[key]
            return Changed([key, "model.", "lm_head."])
        case 1:
            other = key + rng.choice(["s", ".x"])
            fields[other] = fields.pop(key)
            return Changed([key, other])
        case 2:
            fields[key] = ("a text", gguf.GGUFValueType.STRING, None)
            return Changed([key])
        case 3:
            name, value = rng.choice(
                [
                    ("general.architecture", "mamba"),
                    ("general.type", "adapter"),
                    ("general.name", "a name"),
                    ("split.count", 2),
                    ("quantize.imatrix.file", "a file"),
                    ("adapter.type", "lora"),
                    ("clip.has_text_encoder", 1),
                ]
            )
            fields[name] = typed(value)
            return Changed([name, str(value)])
    added, told = rng.choice(GGUF_KEYS)
    fields |= {f"{architecture}.{name}": typed(value) for name, value in added.items()}
    names = [f"{architecture}.{name}" for name in added] + list(added)

    def patch(model: Any) -> None:
        told_rope = {name: value for name, value in told.items() if name != "sliding_window"}
        if "sliding_window" in told:
            model.config.sliding_window = told["sliding_window"]
        if told_rope:
            model.config.rope_parameters = {**model.config.rope_parameters, **told_rope}
            model.model.rotary_emb = type(model.model.rotary_emb)(model.config)

    return Changed([*names, "model.", "lm_head.", *map(str, added.values())], patch)


def typed(value: Any) -> tuple[Any, Any, Any]:
    return value, gguf.GGUFValueType.get_type(value), None


def change_gguf_tensors(tensors: Tensors, rng: random.Random) -> Changed:
    name = rng.choice(sorted(tensors))
    data, kind = tensors[name]
    floats, f32 = gguf.quants.dequantize(data, kind), gguf.GGMLQuantizationType.F32
    other = rng.choice(
        [
            rng.choice(sorted(tensors)),
            name.replace(".weight", ".bias"),
            name.replace("blk.1.", "blk.2."),
            name.replace("weight", "scale"),
            "blk.0.attn_q.bias",
            "blk.0.attn_sinks.weight",
            "blk.0.attn_q_norm.weight",
            "output.bias",
            "extra",
        ]
    )
    match rng.randrange(7):
        case 0:
            if other not in tensors:
                tensors[other] = data, kind
        case 1:
            del tensors[name]
        case 2:
            if other not in tensors:
                tensors[other] = tensors.pop(name)
        case 3:
            tensors[name] = floats * np.float32(-1.5), f32
        case 4:
            tensors[name] = np.flip(floats, 0).copy(), f32
        case 5:
            tensors[name] = floats[:-1].copy(), f32
        case 6:  # divisors of RoPE's frequencies
            factors = np.array([rng.choice([1, 1.5, 8]) for _ in range(8)], np.float32)
            tensors["rope_freqs.weight"] = factors, f32

            def patch(model: Any) -> None:
                frequencies = model.model.rotary_emb.inv_freq
                frequencies /= torch.from_numpy(factors)

            return Changed(["rope_freqs.weight"], patch)
    mapped = [each.replace("token_embd", "model.embed_tokens").replace("output.", "lm_head.") for each in (name, other)]
    return Changed([name, other, *mapped, "model."])
