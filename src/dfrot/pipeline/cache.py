"""What the cache costs: how far quantized keys and values take a checkpoint from the original model's predictions.

Several streams of the same tokens go through the blocks side by side: the original model, the checkpoint, and the
checkpoint with keys and values as they are, or with more bits in one of its blocks. At the end their predictions are
compared. In each block the checkpoint's stream goes through attention with and without the cache's grids; how much that
changes of what the block adds tells blocks apart.
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
from dfrot.models.sizes import ModelSizes
from dfrot.models.source import Source, loaded
from dfrot.models.stream import BlockRunner
from dfrot.quant.spec import Spec
from dfrot.runtime.config import RuntimeConfig
from dfrot.runtime.install import install_block_
from dfrot.runtime.key_bias import KeyBias
from dfrot.runtime.kv import ATTENTION, KVQuantizer
from dfrot.system.errors import UserError
from dfrot.system.progress import track
from dfrot.training.teacher import LOGITS, Teacher, product_dtype
from dfrot.tuning.run import written_head

TOKENS = 1024  # at most; of the first calibration sequence
NAMED = 3  # blocks that the summary names
MORE_BITS = 8  # of keys and values in blocks that are to have more than others


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


@dataclass(frozen=True)
class Written:
    """A checkpoint whose shards are written.

    Args:
        runtime: how it computes.
        residual: R1.
        dtype: of the computation.
    """

    source: Source
    runtime: RuntimeConfig
    residual: Rotation | None
    writer: CheckpointWriter
    dtype: torch.dtype
    device: torch.device

    def embedded(self, tokens: Int[Tensor, "1 tokens"]) -> Float[Tensor, "1 tokens hidden"]:
        return self.source.embedded(tokens, self.writer.read(0)).to(self.device, self.dtype)

    def block(self, index: int, *runtimes: RuntimeConfig) -> list[nn.Module]:
        """Block `index`, computing as each of these says."""
        prefix = f"{self.source.graph.blocks}.{index}."
        tensors = {name.removeprefix(prefix): tensor for name, tensor in self.writer.read(index + 1).items()}
        return [self._block(index, tensors, runtime) for runtime in runtimes]

    def _block(self, index: int, tensors: dict[str, Tensor], runtime: RuntimeConfig) -> nn.Module:
        source, graph, spec = self.source, self.source.graph, runtime.heads(index)
        block = source.empty_block(index)
        key_bias = KeyBias.of(block, graph, source.rotary, spec.keys, any_bias=runtime.key_means)
        install_block_(block, index, graph, runtime, key_bias)
        block = loaded(block, dict(tensors)).to(self.device, self.dtype)
        if spec.keys.enabled:
            attention: Any = block.get_submodule(graph.attention)
            how = runtime.keys, head_dim(source.config), spec.queries, key_bias
            attention.kv_quantizer = KVQuantizer(spec.keys, spec.values, *how)
            attention.config._attn_implementation = ATTENTION
        return block

    def divergences(
        self, original: Float[Tensor, "1 tokens hidden"], others: list[Float[Tensor, "1 tokens hidden"]]
    ) -> list[float]:
        """KL divergences from the original model in nats a token, of streams behind the last block."""
        norm, head, bias = written_head(self.source, self.writer)
        gain, eps = norm.to(self.device, self.dtype), self.source.eps

        def read_by_head(states: Tensor) -> Float[Tensor, "1 tokens hidden"]:
            return nn.functional.rms_norm(states, gain.shape, gain, eps)

        goal = read_by_head(original if self.residual is None else self.residual.apply(original))
        teacher = Teacher(goal, head.to(self.device, product_dtype(self.dtype, self.device)), bias)
        return [float(teacher.divergence(read_by_head(states), [0])[0]) for states in others]


@torch.no_grad()
def cache_cost(model: Written, tokens: Int[Tensor, "1 tokens"]) -> CacheCost:
    """Measure it on one sequence."""
    source, runtime = model.source, model.runtime
    original = source.embedded(tokens).to(model.device, model.dtype)
    cached = plain = model.embedded(tokens)
    run, errors = BlockRunner(source, original), []
    for index in track(range(source.num_blocks), "cache"):
        original = run(source.block(index).to(model.device, model.dtype), index, original)
        with_cache, without = model.block(index, runtime, runtime.without("keys", "values"))
        before, cached = cached, run(with_cache, index, cached)
        expected = run(without, index, before)
        errors.append(float((cached - expected).norm() / (expected - before).norm()))
        plain = run(without, index, plain)
    kl, kl_without = model.divergences(original, [cached, plain])
    return CacheCost(kl, kl_without, errors)


@torch.no_grad()
def bits_by_block(model: Written, tokens: Int[Tensor, "1 tokens"], average: float) -> dict[str, Any]:
    """Choose `bits` of keys and values for every block: 8 where these lower the divergence most, as often as the
    average allows, elsewhere those of the model. Returns them with what they were chosen by.

    The time grows with the square of the number of blocks: each of them is a checkpoint of its own.
    """
    source, few = model.source, model.runtime.spec.keys.bits
    more = model.runtime.with_kv_bits([MORE_BITS] * source.num_blocks)
    original = source.embedded(tokens).to(model.device, model.dtype)
    run, streams = BlockRunner(source, original), [model.embedded(tokens)]
    for index in track(range(source.num_blocks), "bits of the cache"):
        original = run(source.block(index).to(model.device, model.dtype), index, original)
        with_few, with_more = model.block(index, model.runtime, more)
        other = run(with_more, index, streams[0])
        streams = [*(run(with_few, index, stream) for stream in streams), other]
    kl, *kls = model.divergences(original, streams)
    count = blocks_with_more(source.num_blocks, few, average)
    best = {block for block in sorted(range(source.num_blocks), key=kls.__getitem__)[:count] if kls[block] < kl}
    bits = [MORE_BITS if block in best else few for block in range(source.num_blocks)]
    return {"bits": bits, "kl": kl, f"kl_with_{MORE_BITS}_in_block": kls}


def blocks_with_more(blocks: int, few: int, average: float) -> int:
    """How many of the blocks can have more bits. Raises UserError if not one can."""
    count = int(blocks * (average - few) / (MORE_BITS - few) + 1e-9)
    if count == 0:
        least = few + (MORE_BITS - few) / blocks
        raise UserError(
            f"one block of {blocks} with {MORE_BITS} bits is {least:.3f} bits on average, more than "
            f"--kv-bits-by-block {average:g}: give a larger average."
        )
    return count


def peak_bytes(sizes: ModelSizes, choosing: bool) -> int:
    """Memory that `cache_cost` takes, or `bits_by_block`, which is `choosing`."""
    streams = (3 + sizes.num_blocks * choosing) * min(sizes.seq_len, TOKENS) * sizes.hidden * sizes.working
    block = sizes.block * (sizes.source + sizes.working)  # the original's; those of the checkpoint are packed
    head = sizes.vocabulary * sizes.hidden * (sizes.stored + 4) + 4 * 4 * LOGITS
    return streams + max(block, head)


def warn_if_dear(notes: dict[str, Any], spec: Spec) -> None:
    """Warn if quantizing keys and values costs more than all the rest together."""
    if notes["share"] > 0.5 and (spec.weights.enabled or spec.activations.enabled):
        warnings.warn(
            "quantized keys and values cost more than all else that is quantized: with them the KL divergence from the "
            f"original model is {notes['kl']:.3f} nats a token, without {notes['kl_without']:.3f}. Give them more bits "
            f"than in {spec} (kv8, or --kv-bits-by-block for some of them), or leave them alone (kv16).",
            stacklevel=2,
        )


def summary(notes: dict[str, Any], kv_bits: dict[str, Any]) -> list[str]:
    """What was found out, in sentences, from notes of `CacheCost` and of `bits_by_block`; either may be empty."""
    chosen = [str(block) for block, bits in enumerate(kv_bits.get("bits", ())) if bits == MORE_BITS]
    said = [f"keys and values have {MORE_BITS} bits in blocks {', '.join(chosen)}"] if chosen else []
    if not notes:
        return said
    worst = sorted(range(len(notes["error_by_block"])), key=lambda block: -notes["error_by_block"][block])[:NAMED]
    named = ", ".join(f"{block} ({notes['error_by_block'][block]:.1%} of what it adds)" for block in worst)
    return [
        *said,
        f"keys and values cost {notes['share']:.0%} of the KL divergence from the original model, "
        f"{notes['kl']:.3f} nats a token; they change most in block {named}",
    ]
