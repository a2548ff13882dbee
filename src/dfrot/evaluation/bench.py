"""Speed and memory of a quantized model, against the same model unquantized, in one process and alternating.

A number of tokens per second means little on a machine that does other work too; ratios of runs that are moments apart
do. So every round measures each model once, and medians are compared.
"""

import gc
import itertools
import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch
from rich.table import Table
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

from dfrot.evaluation.record import conditions
from dfrot.linalg.rotation import Hadamard
from dfrot.models.graph import graph_for, head_dim
from dfrot.pipeline.recipe import Recipe
from dfrot.pipeline.run import require_groups
from dfrot.runtime.cache import PackedLayer
from dfrot.runtime.config import RuntimeConfig
from dfrot.runtime.install import install_
from dfrot.runtime.kv import ATTENTION
from dfrot.runtime.linear import QuantLinear
from dfrot.system.errors import UserError
from dfrot.system.progress import track
from dfrot.transform.transforms import Transforms, input_widths

Maker = Callable[[torch.dtype], Any]  # of a model that computes in that dtype
# One block of a real model, by fields of its config.
FIELDS = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
_ALIKE = ("model_type", "hidden_size", "num_hidden_layers", "vocab_size")
SHAPES = {
    "llama-2-7b": (4096, 11008, 32, 32),
    "llama-3-8b": (4096, 14336, 32, 8),
    "llama-2-13b": (5120, 13824, 40, 40),
    "llama-3-70b": (8192, 28672, 64, 8),
}


def random_block(shape: str, recipe: Recipe | None, dtype: torch.dtype) -> Any:
    """A model of one decoder block with random weights and the shape of a real model's, and a tiny vocabulary.

    Args:
        recipe: its spec quantizes the block, rotated as QuaRot would; None for the unquantized model.

    Raises:
        UserError: the shape is not known, or the recipe's groups do not divide it.
    """
    if shape not in SHAPES:
        raise UserError(f"there is no shape '{shape}'. Shapes: {', '.join(SHAPES)}.")
    sizes = dict(zip(FIELDS, SHAPES[shape], strict=True))
    config = LlamaConfig(vocab_size=256, num_hidden_layers=1, max_position_embeddings=1 << 17, dtype=dtype, **sizes)
    if recipe is not None and recipe.spec.keys.enabled:
        config._attn_implementation = ATTENTION
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    if recipe is not None:
        rotations = Transforms(ffn=Hadamard(config.intermediate_size), keys=Hadamard(head_dim(config)))
        require_groups(recipe.spec, input_widths(graph_for(config), config))
        install_(model, RuntimeConfig(recipe.spec, rotations.online(graph_for(config), config), rotations.keys, {}))
    model.model.norm = nn.Identity()  # a real model has one for all its blocks, not one a block
    model.to_empty(device="cpu").eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.dtype == torch.uint8:
            tensor.random_(0, 256, generator=generator)
        elif "inv_freq" in name:
            tensor.copy_(1 / config.rope_parameters["rope_theta"] ** torch.linspace(0, 1, tensor.numel()))
        else:
            tensor.normal_(0, 0.02, generator=generator).abs_()  # scales are positive
    return model


@torch.inference_mode()
def bench(
    checkpoint: Maker,
    source: Maker,
    *,
    baselines: Sequence[str] = ("bfloat16",),
    dtype: str = "bfloat16",
    prompt: int = 1024,
    new_tokens: int = 32,
    rounds: int = 5,
) -> dict[str, Any]:
    """Time a checkpoint and the model that it was made from.

    Args:
        baselines: dtypes of the source; each is a separate model in memory.
        dtype: the checkpoint computes in it.
        prompt: tokens of the prompt.
        new_tokens: tokens that are generated after it.
        rounds: how often each model is timed.

    Returns:
        JSON. For each model, by round, the seconds of the prompt, which is the time to the first token (`prefill_s`),
        and of one more token (`decode_s`); memory of the decoder's linear layers, and of the cache after the prompt and
        the new tokens (`decoder_bytes`, `kv_bytes`). Medians as multiples of each baseline's (`ratios`); conditions.

    Raises:
        UserError: a setting is below 1, or the two models are not of one shape.
    """
    if min(prompt, new_tokens, rounds) < 1:
        raise UserError(f"prompt, new-tokens and rounds are at least 1, got {prompt}, {new_tokens} and {rounds}.")
    with torch.inference_mode(False):  # nothing that is derived from inference tensors is kept
        loaded = {"checkpoint": checkpoint(getattr(torch, dtype))}
        loaded |= {name: source(getattr(torch, name)) for name in baselines}
    for name in baselines:
        own, theirs = ([getattr(loaded[each].config, size) for size in _ALIKE] for each in ("checkpoint", name))
        if own != theirs:
            sizes = ", ".join(f"{b} for {a} ({size})" for size, a, b in zip(_ALIKE, own, theirs, strict=True) if a != b)
            raise UserError(f"the checkpoint was made from another model: the source has {sizes}.")
    timed: dict[str, dict[str, Any]] = {name: {"prefill_s": [], "decode_s": []} for name in loaded}
    vocabulary = loaded["checkpoint"].config.vocab_size
    token_ids = torch.randint(vocabulary, (1, prompt), generator=torch.Generator().manual_seed(0))
    for number in track(range(rounds + 1), "timing"):
        for name, model in loaded.items():
            gc.collect()
            began = time.perf_counter()
            output = model(token_ids, use_cache=True, logits_to_keep=1)
            prefilled = time.perf_counter()
            for _ in range(new_tokens):
                token = output.logits[:, -1:].argmax(-1)
                output = model(token, past_key_values=output.past_key_values, use_cache=True)
            ended = time.perf_counter()
            if number == 0:  # warms up: kernels are compiled, the reference unpacks its weights
                timed[name] |= {"decoder_bytes": decoder_bytes(model), "kv_bytes": kv_bytes(output.past_key_values)}
            else:
                timed[name]["prefill_s"].append(prefilled - began)
                timed[name]["decode_s"].append((ended - prefilled) / new_tokens)
    ours = timed.pop("checkpoint")
    ratios: dict[str, dict[str, float]] = {}  # how many times as fast, and which share of the memory
    for name, other in timed.items():
        ratios[name] = {key: median(other[f"{key}_s"]) / median(ours[f"{key}_s"]) for key in ("prefill", "decode")}
        ratios[name] |= {key: ours[key] / other[key] for key in ("decoder_bytes", "kv_bytes")}
    about = conditions(loaded["checkpoint"], prompt=prompt, new_tokens=new_tokens, rounds=rounds)
    return {"checkpoint": ours, "baselines": timed, "ratios": ratios, "conditions": about}


def described(result: dict[str, Any]) -> list[Table | str]:
    """The result of `bench` for a terminal: a table of the models, and sentences."""
    table = Table("", "prefill tokens/s", "decode tokens/s", "first token s", "decoder MB", "cache MB")
    conditions = result["conditions"]
    for name, timed in {"checkpoint": result["checkpoint"], **result["baselines"]}.items():
        prefill, decode = (median(timed[key]) for key in ("prefill_s", "decode_s"))
        speeds = (f"{conditions['prompt'] / prefill:.0f}", f"{1 / decode:.1f}", f"{prefill:.3f}")
        table.add_row(name, *speeds, *(f"{timed[key] / 1e6:.1f}" for key in ("decoder_bytes", "kv_bytes")))
    ratios = [
        f"against {name}: prefill {ratio['prefill']:.2f} times as fast, decode {ratio['decode']:.2f} times; "
        f"decoder weights {ratio['decoder_bytes']:.3f} and cache {ratio['kv_bytes']:.3f} of the memory"
        for name, ratio in result["ratios"].items()
    ]
    return [table, *ratios, f"{conditions['backend']}, {conditions['threads']} threads, {conditions['machine']}"]


def decoder_bytes(model: Any) -> int:
    """Memory of all blocks, with whatever their layers have unpacked or put aside."""
    graph = graph_for(model.config)
    found: dict[int, int] = {}  # address → bytes: layers may share tensors
    for block in model.get_submodule(graph.blocks):
        unpacked = [layer.kept_tensors() for layer in block.modules() if isinstance(layer, QuantLinear)]
        tensors = [*block.parameters(), *block.buffers(), *itertools.chain(*unpacked)]
        found |= {tensor.data_ptr(): tensor.nbytes for tensor in tensors}
    return sum(found.values())


def kv_bytes(cache: Any) -> int:
    """Memory of a cache, packed or not, with its room for tokens to come."""
    return sum(
        layer.nbytes if isinstance(layer, PackedLayer) else layer.keys.nbytes + layer.values.nbytes
        for layer in cache.layers
    )
