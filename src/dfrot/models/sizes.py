"""Sizes of a model's tensors, from its config and file headers, by which methods and roundings estimate memory."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from dfrot.models.graph import head_dim
from dfrot.models.source import Source


@dataclass(frozen=True)
class ModelSizes:
    """Sizes in entries, and bytes per entry.

    Attributes:
        num_blocks: decoder blocks.
        hidden, vocabulary: width of the residual stream, rows of the embedding.
        heads: channels of all heads' outputs.
        block: all tensors of a block.
        linears: (out, in) of each linear layer of a block.
        stages: for each input that layers share, the rows of these layers and the input's width.
        source, working, stored: bytes of an entry in the source, while a block is folded, and in the checkpoint.
        seq_len: tokens of a calibration sequence.
        sequence: one sequence inside a block: the stream, and the widest layer's input with gate and up.
        tokens: calibration tokens of one process.
    """

    num_blocks: int
    hidden: int
    vocabulary: int
    heads: int
    block: int
    linears: Mapping[str, torch.Size]
    stages: tuple[tuple[int, int], ...]
    source: int
    working: int
    stored: int
    seq_len: int
    sequence: int
    tokens: int

    @staticmethod
    def of(source: Source, working: torch.dtype, stored: torch.dtype, seq_len: int, tokens: int) -> "ModelSizes":
        graph, config = source.graph, source.config
        tensors = {name: tensor.shape for name, tensor in source.empty_block(0).state_dict().items()}
        linears = {name: tensors[f"{name}.weight"] for name in graph.linears}
        return ModelSizes(
            num_blocks=source.num_blocks,
            hidden=config.hidden_size,
            vocabulary=config.vocab_size,
            heads=config.num_attention_heads * head_dim(config),
            block=sum(shape.numel() for shape in tensors.values()),
            linears=linears,
            stages=tuple((sum(linears[name][0] for name in stage), linears[stage[0]][1]) for stage in graph.stages),
            source=source.dtype.itemsize,
            working=working.itemsize,
            stored=stored.itemsize,
            seq_len=seq_len,
            sequence=seq_len * (4 * config.hidden_size + 3 * linears[graph.down][1]),
            tokens=tokens,
        )

    @property
    def largest(self) -> int:
        """The largest weight of a block."""
        return max(shape.numel() for shape in self.linears.values())
