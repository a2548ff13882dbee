"""Quantization as transformers in float64 computes it, in plain arithmetic: what our numbers are compared with."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM


def in_four_bits(x: Tensor, clip: float) -> Tensor:
    """Rows rounded to 16 values from clip · min(x, 0) to clip · max(x, 0)."""
    low, high = clip * x.amin(-1, True).clamp(max=0), clip * x.amax(-1, True).clamp(min=0)
    step = (high - low) / 15
    zero = (-low / step).round()
    return step * (((x / step).round() + zero).clamp(0, 15) - zero)


@torch.no_grad()
def kl_of_quantized_norm_outputs(path: Path, tokens: Tensor, matrix: Tensor, clip: float) -> Tensor:
    """KL(original ‖ norm outputs in four bits in the basis of the matrix) of every prediction.

    Args:
        tokens: (sequences, seq_len).
        matrix: an orthogonal one, in float64, of the hidden size.

    Returns:
        In nats, (sequences, seq_len).
    """

    def hook(norm: Any, _: Any, output: Tensor) -> Tensor:
        return in_four_bits(output / norm.weight @ matrix, clip) @ matrix.T * norm.weight

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64)
    p = model(tokens).logits.log_softmax(-1)
    for block in model.model.layers:
        block.input_layernorm.register_forward_hook(hook)
        block.post_attention_layernorm.register_forward_hook(hook)
    q = model(tokens).logits.log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)
