"""Sizes of a model's tensors, from its config and file headers, by which methods and roundings estimate memory."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from dfrot.models.graph import head_dim
from dfrot.models.source import Source


@dataclass(frozen=True)
class ModelSizes:
    """Sizes in entries, and bytes per entry."""

    num_blocks: int
    hidden: int  # width of the residual stream
    vocabulary: int  # rows of the embedding
    heads: int  # channels of all heads' outputs
    block: int  # all tensors of a block
    linears: Mapping[str, torch.Size]  # (out, in) of each linear layer of a block
    stages: tuple[tuple[int, int], ...]  # for each input that layers share, the rows of these layers and its width
    source: int  # bytes of an entry in the source …
    working: int  # … while a block is folded …
    stored: int  # … and in the checkpoint
    seq_len: int  # tokens of a calibration sequence
    sequence: int  # one sequence inside a block: the stream, and the widest layer's input with gate and up
    tokens: int  # calibration tokens of one process

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
