"""The metadata of a GGUF file as config.json says it. A key without place there is refused by name."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dfrot.gguf.header import PackedTensor

# llama.cpp's architecture, which is our model_type but for Gemma 3, → transformers' class
CLASSES = {name: f"{name.capitalize()}ForCausalLM" for name in ("llama", "qwen2", "qwen3", "phi3", "gemma3")}
# Keys below the architecture's name → config.json; a file has all of them.
_HYPERPARAMETERS = {
    **{"block_count": "num_hidden_layers", "context_length": "max_position_embeddings"},
    **{"embedding_length": "hidden_size", "feed_forward_length": "intermediate_size"},
    **{"attention.head_count": "num_attention_heads", "attention.layer_norm_rms_epsilon": "rms_norm_eps"},
}
# Keys that change nothing that is computed: where the file comes from, and the tokenizer, which transformers reads.
_NOTES = ("general.", "tokenizer.", "quantize.imatrix.")
_NOTES_BELOW = ("rope.scaling.finetuned", "tensor_data_layout")
_ORIGINAL = "phi3.rope.scaling.original_context_length"
# Tensors of divisors of RoPE's frequencies.
FACTORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
_BETAS = (("fast", 32.0), ("slow", 1.0))  # llama.cpp's defaults, and transformers'


def config_of(values: dict[str, Any], packed: dict[str, PackedTensor], factors: dict[str, Tensor]) -> dict[str, Any]:
    """What config.json says; ValueError for a key that is missing, has no place, or a value of another type."""
    left, architecture = dict(values), values["general.architecture"]

    def take(key: str, default: Any = None, kind: type = int) -> Any:
        value = left.pop(f"{architecture}.{key}", default)
        value = float(value) if kind is float and type(value) is int else value
        if type(value) is not kind:
            raise ValueError(f"'{architecture}.{key}' is {'missing' if value is None else repr(value)}")
        return value

    config: dict[str, Any] = {"model_type": architecture, "architectures": [CLASSES[architecture]], "dtype": "float32"}
    for key, name in _HYPERPARAMETERS.items():
        config[name] = take(key, kind=float if name == "rms_norm_eps" else int)
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    config["num_key_value_heads"] = take("attention.head_count_kv", heads)
    config["head_dim"] = width = take("attention.key_length", hidden // max(1, heads))
    config["vocab_size"] = rows = packed["token_embd.weight"].shape[0]
    if (vocabulary := take("vocab_size", rows)) != rows:
        raise ValueError(f"'{architecture}.vocab_size' is {vocabulary}, and 'token_embd.weight' has {rows} rows")
    config["tie_word_embeddings"] = "output.weight" not in packed
    if architecture in ("llama", "qwen3"):
        config["attention_bias"] = "blk.0.attn_q.bias" in packed
    if architecture == "llama":
        config["mlp_bias"] = "blk.0.ffn_gate.bias" in packed
    if architecture == "phi3":  # llama.cpp has windows for it; 0 is none
        config["sliding_window"] = take("attention.sliding_window", 0) or None
        config["original_max_position_embeddings"] = values.get(_ORIGINAL, config["max_position_embeddings"])
    if (of_values := take("attention.value_length", width)) != width:
        raise ValueError(f"'{architecture}.attention.key_length' is {width}, and that of values {of_values}")
    rotated = take("rope.dimension_count", width)
    if rotated != width and (architecture != "phi3" or int(width * (rotated / width)) != rotated):
        raise ValueError(f"'{architecture}.rope.dimension_count' is {rotated}, of {width} channels of a head")
    if wrong := [name for name, each in factors.items() if each.shape != (rotated // 2,)]:
        raise ValueError(f"'{wrong[0]}' has the shape {tuple(factors[wrong[0]].shape)}, and RoPE {rotated} channels")
    config["rope_parameters"] = _rope(take, config, factors)
    if architecture == "gemma3":
        _gemma3_(config, take)
    if rotated != width:
        config["rope_parameters"]["partial_rotary_factor"] = rotated / width
    if (kind := left.pop("general.type", "model")) != "model":
        raise ValueError(f"'general.type' is '{kind}', not 'model'")
    if (parts := left.pop("split.count", 1)) > 1:
        raise ValueError(f"'split.count' says that it is one of {parts} parts: merge them (llama-gguf-split --merge)")
    notes = (*_NOTES, *(f"{architecture}.{key}" for key in _NOTES_BELOW))
    if unread := sorted(key for key in left if not key.startswith(notes)):
        raise ValueError(f"the key '{unread[0]}' ({left[unread[0]]!r}) has no place in a model of that architecture")
    for name in ("bos", "eos", "padding"):
        if type(token := values.get(f"tokenizer.ggml.{name}_token_id")) is int:
            config[f"{name[:3]}_token_id"] = token
    return config


def _gemma3_(config: dict[str, Any], take: Callable[..., Any]) -> None:
    """What llama.cpp knows of Gemma 3 without being told: every sixth block sees the whole text, the others a window,
    with frequencies of RoPE that nothing scales; and scores are divided by √head_dim, in the largest model by √168."""
    config["model_type"], blocks = "gemma3_text", config["num_hidden_layers"]
    config["sliding_window"], pattern = take("attention.sliding_window"), take("attention.sliding_window_pattern", 6)
    kinds = ["full_attention" if (index + 1) % pattern == 0 else "sliding_attention" for index in range(blocks)]
    local = {"rope_type": "default", "rope_theta": take("rope.freq_base_swa", 1e4, float)}
    config["layer_types"] = kinds
    config["rope_parameters"] = {"full_attention": config["rope_parameters"], "sliding_attention": local}
    largest = blocks == 62
    config["query_pre_attn_scalar"] = (
        config["hidden_size"] // config["num_attention_heads"] if largest else config["head_dim"]
    )


def _rope(take: Callable[..., Any], config: dict[str, Any], factors: dict[str, Tensor]) -> dict[str, Any]:
    """transformers' `rope_parameters`; ValueError for a scaling that it does not have."""
    theta, context = take("rope.freq_base", 1e4, float), config["max_position_embeddings"]
    original = take("rope.scaling.original_context_length", context)
    scaling = take("rope.scaling.type", "longrope" if len(factors) == 2 else "none", str)
    rope: dict[str, Any] = {"rope_theta": theta}
    match scaling, sorted(factors):
        case "none", []:
            return rope | {"rope_type": "default"}
        case "none", ["rope_freqs.weight"]:
            return rope | _llama3(factors["rope_freqs.weight"], theta, context)
        case "linear", []:
            return rope | {"rope_type": "linear", "factor": take("rope.scaling.factor", kind=float)}
        case "yarn", [] if config["model_type"] != "phi3":  # whose class takes the word for LongRoPE
            rope |= {"rope_type": "yarn", "factor": take("rope.scaling.factor", kind=float)}
            rope |= {f"beta_{end}": take(f"rope.scaling.yarn_beta_{end}", default, float) for end, default in _BETAS}
            return rope | {"original_max_position_embeddings": original}
        case "longrope", ["rope_factors_long.weight", "rope_factors_short.weight"]:
            rope |= {f"{end}_factor": factors[f"rope_factors_{end}.weight"].tolist() for end in ("long", "short")}
            rope |= {"rope_type": "longrope", "attention_factor": take("rope.scaling.attn_factor", 1.0, float)}
            return rope | {"original_max_position_embeddings": original}
    given = " and ".join(factors) or "no tensor of factors"
    raise ValueError(f"'rope.scaling.type' is '{scaling}' with {given}, which is not known for {config['model_type']}")


def _llama3(factors: Tensor, theta: float, context: int) -> dict[str, Any]:
    """RoPE parameters of Llama 3.x, whose frequencies are the usual ones divided by `factors`.

    The file has only the divisors. All models of Meta let them rise between a quarter of the original context and the
    whole of it; where that is not so, they go over one by one, as LongRoPE's.
    """
    waves = 2 * math.pi * theta ** (torch.arange(len(factors), dtype=torch.float64) / len(factors))
    factors, most = factors.double(), float(factors.max())
    smooth = (1 / factors - 1 / most) / (1 - 1 / most)  # 0: wholly scaled, 1: not at all; NaN if there is one factor
    between = (smooth > 1e-3) & (smooth < 1 - 1e-3)
    original = int((waves * (3 * smooth + 1))[between].median().round()) if between.any() else 8192
    ramp = ((original / waves - 1) / 3).clamp(0, 1)
    if torch.allclose(1 / ((1 - ramp) / most + ramp), factors, rtol=1e-5, atol=0):
        rope = {"rope_type": "llama3", "factor": most, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
        return rope | {"original_max_position_embeddings": original}
    each = factors.tolist()
    rope = {"rope_type": "longrope", "short_factor": each, "long_factor": each, "attention_factor": 1.0}
    return rope | {"original_max_position_embeddings": context}
