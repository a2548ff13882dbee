"""Two-layer random models of every known architecture, small enough for milliseconds.

Some have shapes that the kernels take; Llama and Qwen2 have heads of 12 channels, which go the long way.

Norm gains are far from 1 and biases from 0, so that a fold that forgets them is found; channel 3 of the embedding
and the residual writers is large, as in real models.
"""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

ALPHABET = [chr(code) for code in range(32, 127)]
_SIZES = {
    "vocab_size": len(ALPHABET) + 1,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
# Heads of 32 channels, from which on there are kernels for keys and values, and a fused block.
_WIDE = {**_SIZES, "hidden_size": 64, "intermediate_size": 96, "head_dim": 32}
CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**_SIZES, tie_word_embeddings=True, attention_bias=True),
    "mistral": MistralConfig(**_WIDE, sliding_window=8),
    "qwen2": Qwen2Config(**_SIZES),
    "qwen3": Qwen3Config(**_WIDE),
    "phi3": Phi3Config(**{**_WIDE, "hidden_size": 128}),
}


def _traced() -> dict[str, PreTrainedConfig]:
    """Architectures without a table, which are traced."""
    narrow = {"head_dim": 16, "hidden_size": 64}  # helium's attention is as wide as the stream
    hybrid = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
    other: dict[str, dict[str, Any]] = {
        "arcee": {},
        "cwm": {"sliding_window": 8},
        "ernie4_5": {"use_bias": True},
        "exaone4": hybrid,
        "gemma": {"tie_word_embeddings": True},
        "gemma3_text": {**hybrid, "tie_word_embeddings": True, "query_pre_attn_scalar": 32},
        "glm": {"partial_rotary_factor": 0.5},
        "glm4": {"partial_rotary_factor": 0.5},
        "granite": {"embedding_multiplier": 12.0, "logits_scaling": 8.0, "residual_multiplier": 0.22}
        | {"attention_multiplier": 0.1, "tie_word_embeddings": True},
        "helium": narrow,
        "hunyuan_v1_dense": {},
        "ministral": {"sliding_window": 8},
        "mixtral": {"num_local_experts": 4},
        "olmoe": {"hidden_size": 128, "num_experts": 4, "num_experts_per_tok": 2},
        "qwen3_moe": {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 48},
        "cohere": {"logit_scale": 0.0625, "tie_word_embeddings": True},
        "cohere2": {**hybrid, "tie_word_embeddings": True},
        "gpt_neox": {**narrow, "num_key_value_heads": None},
        "nemotron": {"partial_rotary_factor": 0.5},
        "olmo2": {},
        "opt": {
            "intermediate_size": None,
            "ffn_dim": 96,
            "word_embed_proj_dim": 64,
            "head_dim": None,
            "num_key_value_heads": None,
        },
        "phi": narrow,
        "olmo3": hybrid,
        "seed_oss": {"attention_bias": True},
        "smollm3": {"no_rope_layers": [1, 0]},
        "stablelm": narrow,
        "starcoder2": {"sliding_window": 8, "tie_word_embeddings": True},
    }
    return {name: CONFIG_MAPPING[name](**{**_WIDE, **words}) for name, words in other.items()}


TRACED = _traced()

_TOWER = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
_PICTURES = {**_TOWER, "image_size": 16, "patch_size": 8}
_QWEN_TOWER = {"depth": 1, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 64}
_ROPE = {"rope_type": "default", "rope_theta": 1e4}
# Models of text and pictures: what is special about the config of their text, and that of the rest.
MULTIMODAL: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "gemma3": (
        {"model_type": "gemma3_text", "sliding_window": 8, "query_pre_attn_scalar": 32},
        {"vision_config": {**_PICTURES, "model_type": "siglip_vision_model"}, "mm_tokens_per_image": 4},
    ),
    "llava": ({"model_type": "llama"}, {"vision_config": {**_PICTURES, "model_type": "clip_vision_model"}}),
    "mistral3": ({"model_type": "mistral"}, {"vision_config": {**_PICTURES, "model_type": "pixtral", "head_dim": 8}}),
    "qwen2_5_vl": (
        {"head_dim": 16, "rope_parameters": {**_ROPE, "mrope_section": [2, 3, 3]}},
        {"vision_config": _QWEN_TOWER},
    ),
    "qwen3_vl": (
        {"rope_parameters": {**_ROPE, "mrope_section": [4, 6, 6]}},
        {"vision_config": {**_QWEN_TOWER, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]}},
    ),
    "smolvlm": ({"model_type": "llama"}, {"vision_config": _PICTURES}),
}


def write_tiny_model(
    name: str, folder: Path, dtype: torch.dtype = torch.float32, head_dim: int | None = None, **changed: Any
) -> Path:
    """Write the tiny model `name` with a tokenizer of single characters.

    Args:
        head_dim: one like it with larger heads.
        changed: of its config.
    """
    config = (CONFIGS | TRACED)[name]
    kind = type(config)
    if head_dim is not None:
        width = {"hidden_size": 4 * head_dim} if kind in (Qwen2Config, Phi3Config) else {}
        changed = {"head_dim": head_dim, **width, **changed}
    config = kind(**{**config.to_diff_dict(), **changed})
    return write_at_random(AutoModelForCausalLM.from_config(config), folder, dtype)


def write_multimodal_model(name: str, folder: Path, **changed: Any) -> Path:
    """Write the tiny model `name` of text and pictures; `changed`: of the text's config."""
    text, others = MULTIMODAL[name]
    config = CONFIG_MAPPING[name](text_config={**_WIDE, **text, **changed}, **others)
    return write_at_random(AutoModelForImageTextToText.from_config(config), folder)


def write_at_random(model: Any, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """Draw the model's weights, and write it with a tokenizer of single characters."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in key:
                parameter.copy_(1 + 0.3 * noise)
            else:
                parameter.copy_(noise * (0.1 if parameter.ndim == 2 else 0.3))
            if key.endswith(("embed_tokens.weight", "down_proj.bias")):
                parameter[..., 3] *= 12
            if key.endswith(("o_proj.weight", "down_proj.weight")):
                parameter[3] *= 4
    model.to(dtype).save_pretrained(folder)
    vocabulary = {token: index for index, token in enumerate(["<pad>", *ALPHABET])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<pad>").save_pretrained(folder)
    return folder


def write_biased_model(name: str, folder: Path, norm: float = 300.0, **words: Any) -> Path:
    """Write the tiny model `name`, its keys' biases as large as some of Qwen2.5's; without them keys are near 1."""
    write_tiny_model(name, folder, **words)
    tensors = load_file(folder / "model.safetensors")
    for key, tensor in tensors.items():
        if key.endswith("k_proj.bias"):
            tensors[key] = tensor * (norm / tensor.norm())
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def write_planted_model(folder: Path, channel: int) -> Path:
    """Write a tiny model in which the token "q", and no other, has a massive activation, in one channel."""
    write_tiny_model("qwen2", folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    embedding = model.model.embed_tokens.weight.data
    embedding[:, 3] /= 12  # no outlier in every token
    embedding[1 + ALPHABET.index("q"), channel] = 1000
    model.save_pretrained(folder)
    return folder
