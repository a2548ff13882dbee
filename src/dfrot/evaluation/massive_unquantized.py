"""What the massive tokens cost: the papers' QuaRot.FP16.

A checkpoint is measured with the tokens that have massive activations left unquantized where the residual stream is
read, and all else as it is. The difference to its perplexity bounds what treating massive tokens better can bring. The
tokens are found in the original model, run beside the checkpoint on the same text: the checkpoint need not know its
rotation.
"""

import contextlib
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from dfrot.evaluation.perplexity import negative_log_likelihood
from dfrot.methods.massive import Rule, massive_tokens
from dfrot.models.families import graph_for
from dfrot.models.stream import captured_inputs
from dfrot.runtime.linear import QuantLinear
from dfrot.system.progress import track

# Norm of the decoder (its full name) → which positions of a sequence have massive activations there.
Masks = Mapping[str, Bool[Tensor, " tokens"]]


def perplexity_with_massive_unquantized(
    checkpoint: Any, original: Any, blocks: Int[Tensor, "blocks seq_len"], rule: Rule = "relative"
) -> float:
    """Perplexity of a checkpoint whose activation quantizers pass massive tokens by.

    Args:
        checkpoint: a model that `dfrot.load` has loaded from a checkpoint.
        original: the model that it was made from, loaded by `dfrot.load`.
        blocks: token ids; `dfrot.models.texts.token_windows` makes them.
        rule: which tokens are massive.
    """
    total = 0.0
    for block in track(blocks, "massive tokens unquantized"):
        with massive_unquantized(checkpoint, massive_positions(original, block, rule)):
            total += negative_log_likelihood(checkpoint, block)
    return math.exp(total / (blocks.shape[0] * (blocks.shape[1] - 1)))


@torch.no_grad()
def massive_positions(original: Any, tokens: Int[Tensor, " seq_len"], rule: Rule = "relative") -> Masks:
    """Where a model has massive activations on one sequence."""
    graph = graph_for(original.config)
    norms = {
        f"{graph.blocks}.{index}.{norm}": original.get_submodule(f"{graph.blocks}.{index}.{norm}")
        for index in range(original.config.num_hidden_layers)
        for norm in graph.norms
    }
    with captured_inputs(norms) as seen:
        original.base_model(tokens[None].to(original.device), use_cache=False)
    masks = {}
    for name, inputs in seen.items():
        x = inputs[0][0].float()
        masks[name] = massive_tokens(nn.functional.rms_norm(x, x.shape[-1:], eps=original.config.rms_norm_eps), rule)
    return masks


@contextlib.contextmanager
def massive_unquantized(checkpoint: Any, masks: Masks) -> Iterator[None]:
    """While open, the readers of each norm see the masked tokens of a sequence as they are, not quantized."""
    graph = graph_for(checkpoint.config)
    handles = []
    for index in range(checkpoint.config.num_hidden_layers):
        for norm, readers in graph.norms.items():
            mask = masks[f"{graph.blocks}.{index}.{norm}"]
            for reader in readers:
                layer = checkpoint.get_submodule(f"{graph.blocks}.{index}.{reader}")
                if isinstance(layer, QuantLinear) and mask.any():
                    handles.append(layer.register_forward_hook(_passing_by(mask.to(checkpoint.device))))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _passing_by(mask: Bool[Tensor, " tokens"]) -> Any:
    def hook(layer: QuantLinear, args: tuple[Tensor], output: Tensor) -> Tensor:
        x = layer.rotated(args[0][:, mask])
        output[:, mask] = nn.functional.linear(x, layer.dense_weight(x.dtype), layer.bias)
        return output

    return hook
