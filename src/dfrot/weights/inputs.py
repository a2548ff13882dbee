"""What the blocks of the quantized-so-far model really get as input, carried from block to block.

Weights are fitted to the inputs that they will meet: those that the rotated model produces whose earlier blocks are
quantized already. Memory holds the hidden states of the calibration text, or a memory-mapped file does.
"""

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from dfrot.models.source import Source, loaded
from dfrot.models.stream import BlockRunner
from dfrot.recipe import Recipe
from dfrot.runtime.install import install_linears_
from dfrot.runtime.linear import QuantLinear
from dfrot.runtime.plan import RuntimePlan


class CalibrationStream:
    """Hidden states of the calibration text before one block after the other.

    Args:
        plan: how the checkpoint computes.
        embedding: of the checkpoint, (vocabulary, hidden).
        token_ids: (sequences, seq_len).
        dtype: of the computation.
        spill: a directory for a memory-mapped file that holds the states; None keeps them in memory.
    """

    def __init__(
        self,
        source: Source,
        plan: RuntimePlan,
        embedding: Tensor,
        token_ids: Int[Tensor, "sequences seq_len"],
        dtype: torch.dtype,
        device: torch.device,
        spill: Path | None = None,
    ) -> None:
        self.source, self.plan, self.device = source, plan, device
        shape = (*token_ids.shape, embedding.shape[1])
        self.states = _allocated(shape, dtype, spill)
        for state, ids in zip(self.states, token_ids, strict=True):
            state.copy_(embedding[ids])
        self.run = BlockRunner(source, self.states[:1].to(device))

    @property
    def tokens(self) -> int:
        return self.states.shape[0] * self.states.shape[1]

    def __iter__(self) -> Iterator[Float[Tensor, "1 seq_len hidden"]]:
        return (state[None].to(self.device) for state in self.states)

    def block(self, index: int, tensors: dict[str, Tensor], plan: RuntimePlan) -> nn.Module:
        """Block `index` as `plan` computes it."""
        block = self.source.empty_block(index)
        install_linears_(block, self.source.graph, plan)
        return loaded(block, tensors).to(self.states.dtype).to(self.device)

    def advance(self, index: int, tensors: dict[str, Tensor]) -> None:
        """Go through block `index` of the checkpoint; its activations are not quantized, as in the paper."""
        block = self.block(index, tensors, self.plan.without("activations"))
        for state, output in zip(self.states, map(lambda x: self.run(block, index, x), self), strict=True):
            state.copy_(output[0])


def _allocated(shape: tuple[int, ...], dtype: torch.dtype, folder: Path | None) -> Tensor:
    if folder is None:
        return torch.empty(shape, dtype=dtype)
    with tempfile.NamedTemporaryFile(dir=folder) as file:  # without a name, but there, until the tensor is gone
        size = torch.Size(shape).numel()
        return torch.from_file(file.name, shared=True, size=size, dtype=dtype).view(shape)


@dataclass
class BlockTask:
    """A folded block whose linear layers are to be quantized.

    Attributes:
        index: which block.
        module: with the runtime's modules and weights that are not quantized yet.
        stream: the inputs, if the recipe fits weights.
        notes: what the weight quantizer found out, as JSON; it stays with the checkpoint.
    """

    index: int
    module: nn.Module
    source: Source
    recipe: Recipe
    stream: CalibrationStream | None
    notes: dict[str, Any] = field(default_factory=dict)

    def hessian(self, linear: str) -> Float[Tensor, "in in"]:
        """Xᵀ X over all inputs of one linear layer."""
        assert self.stream is not None, "a recipe that fits weights has a stream"
        layer = self.module.get_submodule(linear)
        total: Tensor | None = None
        for state in self.stream:
            x = self.stream.run.until(layer, self.module, self.index, state)
            x = (layer.prepared(x) if isinstance(layer, QuantLinear) else x).flatten(0, -2)
            total = x.T @ x if total is None else total.addmm_(x.T, x)
        assert total is not None, "calibration has at least one sequence"
        return total
