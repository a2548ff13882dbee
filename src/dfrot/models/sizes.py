"""How large the tensors of a model are."""

import torch

from dfrot.models.graph import head_dim, kv_heads
from dfrot.models.source import Source


class ModelSizes:
    """Sizes of a model's tensors in entries, and bytes per entry: from these, methods and roundings estimate memory."""

    def __init__(self, source: Source, working: torch.dtype, stored: torch.dtype, seq_len: int, tokens: int) -> None:
        graph, config = source.graph, source.config
        shapes = {name: tensor.shape for name, tensor in source.empty_block(0).state_dict().items()}
        self.num_blocks = source.num_blocks
        self.hidden = config.hidden_size  # width of the residual stream
        self.vocabulary = config.vocab_size  # rows of the embedding
        self.heads = config.num_attention_heads * head_dim(config)  # channels of all heads' outputs
        self.kv_heads = kv_heads(config) * head_dim(config)  # channels of all keys
        self.experts = graph.experts
        self.block = sum(shape.numel() for shape in shapes.values())  # all tensors of a block
        self.linears = linears = {name: shapes[f"{name}.weight"] for name in graph.linears}  # (out, in)
        self.unbiased = sum(rows for name, (rows, _) in linears.items() if f"{name}.bias" not in shapes)  # outputs
        self.largest = max(shape.numel() for shape in linears.values())  # weight of a block
        # for the layers that are rounded together, their rows and their input's width
        together = graph.rounded_together
        self.stages = [(sum(linears[name][0] for name in stage), linears[stage[0]][1]) for stage in together]
        # bytes of an entry in the source, while a block is folded, and in the checkpoint
        self.source, self.working, self.stored = source.dtype.itemsize, working.itemsize, stored.itemsize
        self.source *= 1 + graph.centred
        self.seq_len = seq_len  # tokens of a calibration sequence
        # one sequence inside a block: the stream, and the widest layer's input with gate and up
        self.chosen = config.num_experts_per_tok if graph.experts else 1  # experts of a token
        self.sequence = seq_len * (4 * self.hidden + 3 * self.chosen * linears[graph.down][1])
        self.tokens = tokens  # of the calibration text, of all processes together
