"""What the cache costs: how far quantized keys and values take a checkpoint from the original model's predictions.

Three streams of the same tokens go through the blocks side by side: the original model, the checkpoint, and the
checkpoint with keys and values as they are. At the end their predictions are compared. In each block the checkpoint's
stream goes through attention with and without the cache's grids; how much that changes of what the block adds tells
blocks apart.
"""

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from dfrot.checkpoint.writer import CheckpointWriter
from dfrot.linalg.rotation import Rotation
from dfrot.models.graph import head_dim
from dfrot.models.source import Source, loaded
from dfrot.models.stream import BlockRunner
from dfrot.quant.spec import Spec
from dfrot.runtime.config import RuntimeConfig
from dfrot.runtime.install import install_block_
from dfrot.runtime.key_bias import KeyBias
from dfrot.runtime.kv import ATTENTION, KVQuantizer
from dfrot.system.progress import track
from dfrot.training.teacher import Teacher, product_dtype
from dfrot.tuning.run import written_head

TOKENS = 1024  # at most; of the first calibration sequence
NAMED = 3  # blocks that the summary names


@dataclass(frozen=True)
class CacheCost:
    """Divergences from the original model in nats a token."""

    kl: float  # of the checkpoint
    kl_without: float  # of the checkpoint with keys and values as they are
    error_by_block: list[float]  # ‖change by the cache‖ / ‖what the block adds‖

    @property
    def share(self) -> float:
        """Of the checkpoint's divergence, what keys and values add; 0 if they add nothing."""
        return max(0.0, self.kl - self.kl_without) / self.kl if self.kl > 0 else 0.0

    def notes(self, tokens: int) -> dict[str, Any]:
        return {"tokens": tokens, **vars(self), "share": self.share}


@torch.no_grad()
def cache_cost(
    source: Source,
    runtime: RuntimeConfig,
    residual: Rotation | None,
    writer: CheckpointWriter,
    tokens: Int[Tensor, "1 tokens"],
    dtype: torch.dtype,
    device: torch.device,
) -> CacheCost:
    """Measure a checkpoint whose shards are written, on one sequence.

    Args:
        residual: R1.
        dtype: of the computation.
    """
    original = source.embedded(tokens).to(device, dtype)
    cached = plain = source.embedded(tokens, writer.read(0)).to(device, dtype)
    run, errors = BlockRunner(source, original), []
    for index in track(range(source.num_blocks), "cache"):
        original = run(source.block(index).to(device, dtype), index, original)
        prefix = f"{source.graph.blocks}.{index}."
        tensors = {name.removeprefix(prefix): tensor for name, tensor in writer.read(index + 1).items()}
        with_cache = _block(source, index, tensors, runtime, dtype, device)
        without = _block(source, index, tensors, runtime.without("keys", "values"), dtype, device)
        before, cached = cached, run(with_cache, index, cached)
        expected = run(without, index, before)
        errors.append(float((cached - expected).norm() / (expected - before).norm()))
        plain = run(without, index, plain)
    norm, head, bias = written_head(source, writer)
    gain, eps = norm.to(device, dtype), source.eps

    def read_by_head(states: Tensor) -> Float[Tensor, "1 tokens hidden"]:
        return nn.functional.rms_norm(states, gain.shape, gain, eps)

    goal = read_by_head(original if residual is None else residual.apply(original))
    teacher = Teacher(goal, head.to(device, product_dtype(dtype, device)), bias)
    kl, kl_without = (float(teacher.divergence(read_by_head(states), [0])[0]) for states in (cached, plain))
    return CacheCost(kl, kl_without, errors)


def _block(
    source: Source,
    index: int,
    tensors: dict[str, Tensor],
    runtime: RuntimeConfig,
    dtype: torch.dtype,
    device: torch.device,
) -> nn.Module:
    """Block `index` of the checkpoint, its attention with the grids of the cache if there are any."""
    graph, block, spec = source.graph, source.empty_block(index), runtime.heads(index)
    key_bias = KeyBias.of(block, graph, source.skeleton.get_submodule(graph.rotary), spec)
    install_block_(block, index, graph, runtime, key_bias)
    block = loaded(block, dict(tensors)).to(device, dtype)
    if spec.keys.enabled:
        attention: Any = block.get_submodule(graph.attention)
        how = runtime.keys, head_dim(source.config), spec.queries, key_bias
        attention.kv_quantizer = KVQuantizer(spec.keys, spec.values, *how)
        attention.config._attn_implementation = ATTENTION
    return block


def warn_if_dear(notes: dict[str, Any], spec: Spec) -> None:
    """Warn if quantizing keys and values costs more than all the rest together."""
    if notes["share"] > 0.5 and (spec.weights.enabled or spec.activations.enabled):
        warnings.warn(
            "quantized keys and values cost more than all else that is quantized: with them the KL divergence from the "
            f"original model is {notes['kl']:.3f} nats a token, without {notes['kl_without']:.3f}. Give them more bits "
            f"than in {spec} (kv8), or leave them alone (kv16).",
            stacklevel=2,
        )


def summary(notes: dict[str, Any]) -> list[str]:
    """What was found out, in sentences."""
    if not notes:
        return []
    worst = sorted(range(len(notes["error_by_block"])), key=lambda block: -notes["error_by_block"][block])[:NAMED]
    named = ", ".join(f"{block} ({notes['error_by_block'][block]:.1%} of what it adds)" for block in worst)
    return [
        f"keys and values cost {notes['share']:.0%} of the KL divergence from the original model, "
        f"{notes['kl']:.3f} nats a token; they change most in block {named}"
    ]
