"""Speed and memory of a quantized model, against the same model unquantized, in one process and alternating.

A number of tokens per second means little on a machine that other work shares; ratios of what ran moments apart do. So
every round measures each model once, and medians are compared.
"""

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig

from dfrot.checkpoint.load import load
from dfrot.evaluation.record import conditions
from dfrot.linalg.rotation import Hadamard
from dfrot.models.families import graph_for
from dfrot.models.graph import head_dim
from dfrot.pipeline.recipe import Recipe
from dfrot.runtime.config import RuntimeConfig
from dfrot.runtime.install import install_
from dfrot.runtime.kv import ATTENTION, QuantizedCacheLayer
from dfrot.runtime.linear import QuantLinear
from dfrot.system.errors import UserError
from dfrot.system.progress import track
from dfrot.transform.transforms import Transforms

# One block of a real model: hidden and intermediate size, heads, key-value heads.
SHAPES = {
    "llama-2-7b": (4096, 11008, 32, 32),
    "llama-3-8b": (4096, 14336, 32, 8),
    "llama-2-13b": (5120, 13824, 40, 40),
    "llama-3-70b": (8192, 28672, 64, 8),
}


@dataclass
class Timed:
    """What one model took.

    Attributes:
        prefill_s, decode_s: seconds of a prompt, which is the time to the first token, and of one more token; by round.
        decoder_bytes: what the decoder's linear layers keep in memory.
        kv_bytes: what the cache keeps of the prompt and the new tokens.
    """

    prefill_s: list[float] = field(default_factory=list)
    decode_s: list[float] = field(default_factory=list)
    decoder_bytes: int = 0
    kv_bytes: int = 0


def bench(
    checkpoint: str,
    source: str,
    *,
    baselines: Sequence[str] = ("bfloat16",),
    dtype: str = "bfloat16",
    prompt: int = 1024,
    new_tokens: int = 32,
    rounds: int = 5,
) -> dict[str, Any]:
    """Time a checkpoint and the model that it was made from.

    Args:
        source: the unquantized model.
        baselines: its dtypes; each is a model of its own in memory.
        dtype: in which the checkpoint computes.

    Returns:
        JSON: seconds by round, bytes, ratios of medians to each baseline, conditions.

    Raises:
        UserError: one of the two models cannot be loaded, or `checkpoint` is not quantized.
    """
    models: dict[str, Callable[[], Any]] = {"checkpoint": lambda: load(checkpoint, dtype=_dtype(dtype))[0]}
    for baseline in baselines:
        models[baseline] = lambda baseline=baseline: load(source, dtype=_dtype(baseline))[0]  # type: ignore[misc]
    return _compare(models, prompt, new_tokens, rounds)


def bench_shape(
    shape: str,
    recipe: Recipe,
    *,
    baselines: Sequence[str] = ("bfloat16",),
    dtype: str = "bfloat16",
    prompt: int = 2048,
    new_tokens: int = 32,
    rounds: int = 5,
) -> dict[str, Any]:
    """The same for one decoder block with random weights and the shape of a real model.

    Raises:
        UserError: the shape is not known.
    """
    if shape not in SHAPES:
        raise UserError(f"there is no shape '{shape}'. Shapes: {', '.join(SHAPES)}.")
    models: dict[str, Callable[[], Any]] = {"checkpoint": lambda: random_block(shape, recipe, _dtype(dtype))}
    for baseline in baselines:
        models[baseline] = lambda baseline=baseline: random_block(shape, None, _dtype(baseline))  # type: ignore[misc]
    return _compare(models, prompt, new_tokens, rounds)


def random_block(shape: str, recipe: Recipe | None, dtype: torch.dtype) -> Any:
    """A model of one block and a tiny vocabulary, quantized as QuaRot would if there is a recipe."""
    hidden, intermediate, heads, kv_heads = SHAPES[shape]
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=1,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=1 << 17,
        dtype=dtype,
    )
    if recipe is not None and recipe.spec.keys.enabled:
        config._attn_implementation = ATTENTION
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    if recipe is not None:
        rotations = Transforms(ffn=Hadamard(intermediate), keys=Hadamard(head_dim(config)))
        install_(model, RuntimeConfig(recipe.spec, rotations.online(graph_for(config), config), rotations.keys, {}))
    model.model.norm = nn.Identity()  # a model has one for all its blocks
    model.to_empty(device="cpu").eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.dtype == torch.uint8:
            tensor.random_(0, 256, generator=generator)
        elif "inv_freq" in name:
            tensor.copy_(1 / config.rope_parameters["rope_theta"] ** torch.linspace(0, 1, tensor.numel()))
        else:
            tensor.normal_(0, 0.02, generator=generator).abs_()
    return model


@torch.inference_mode()
def _compare(models: dict[str, Callable[[], Any]], prompt: int, new_tokens: int, rounds: int) -> dict[str, Any]:
    if min(prompt, new_tokens, rounds) < 1:
        raise UserError(f"prompt, new-tokens and rounds are at least 1, got {prompt}, {new_tokens} and {rounds}.")
    loaded = {name: make() for name, make in models.items()}
    timed = {name: Timed() for name in models}
    first = next(iter(loaded.values()))
    token_ids = torch.randint(first.config.vocab_size, (1, prompt), generator=torch.Generator().manual_seed(0))
    for number in track(range(rounds + 1), "timing"):
        for name, model in loaded.items():
            gc.collect()
            prefill, decode, cache = _once(model, token_ids, new_tokens)
            if number == 0:  # warms up: kernels are compiled, the reference unpacks its weights
                timed[name].decoder_bytes, timed[name].kv_bytes = decoder_bytes(model), _kv_bytes(cache)
                continue
            timed[name].prefill_s.append(prefill)
            timed[name].decode_s.append(decode)
    ours = timed.pop("checkpoint")
    return {
        "checkpoint": vars(ours),
        "baselines": {name: vars(other) for name, other in timed.items()},
        "ratios": {name: _ratios(ours, other) for name, other in timed.items()},
        "conditions": conditions(loaded["checkpoint"], prompt=prompt, new_tokens=new_tokens, rounds=rounds),
    }


def _ratios(ours: Timed, other: Timed) -> dict[str, float]:
    """How many times as fast, and which share of the memory."""
    return {
        "prefill": statistics.median(other.prefill_s) / statistics.median(ours.prefill_s),
        "decode": statistics.median(other.decode_s) / statistics.median(ours.decode_s),
        "decoder_bytes": ours.decoder_bytes / other.decoder_bytes,
        "kv_bytes": ours.kv_bytes / other.kv_bytes,
    }


def _once(model: Any, token_ids: Tensor, new_tokens: int) -> tuple[float, float, Any]:
    """Seconds of the prompt and of one more token, and the cache after all of them."""
    began = time.perf_counter()
    output = model(token_ids, use_cache=True, logits_to_keep=1)
    prefill = time.perf_counter() - began
    began = time.perf_counter()
    for _ in range(new_tokens):
        token = output.logits[:, -1:].argmax(-1)
        output = model(token, past_key_values=output.past_key_values, use_cache=True)
    return prefill, (time.perf_counter() - began) / new_tokens, output.past_key_values


def decoder_bytes(model: Any) -> int:
    """Memory of the linear layers of all blocks, with whatever they have unpacked or put aside."""
    graph = graph_for(model.config)
    found: dict[int, int] = {}
    for block in model.get_submodule(graph.blocks):
        for name in graph.linears:
            layer = block.get_submodule(name)
            kept = layer.kept_tensors() if isinstance(layer, QuantLinear) else [*layer.parameters(), *layer.buffers()]
            found |= {tensor.data_ptr(): tensor.nbytes for tensor in kept}
    return sum(found.values())


def _kv_bytes(cache: Any) -> int:
    total = 0
    for layer in cache.layers:
        packed = isinstance(layer, QuantizedCacheLayer)
        total += layer.resident_bytes if packed else layer.keys.nbytes + layer.values.nbytes
    return total


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise UserError(f"there is no dtype '{name}'; say bfloat16 or float32.")
    return dtype
