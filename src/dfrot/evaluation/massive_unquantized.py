"""What the massive tokens cost: the papers' QuaRot.FP16().

A checkpoint is measured with the tokens that have massive activations left unquantized where the residual stream is
read (inputs of q, k, v, gate and up). Everything else, the cache included, stays quantized, as in DFRot's released
code. The difference to the checkpoint's perplexity bounds the gain from treating massive tokens better. The tokens are
found in the original model, run beside the checkpoint on the same text, so the checkpoint's rotation may be unknown.
"""

import contextlib
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from dfrot.evaluation.perplexity import perplexity
from dfrot.methods.massive import Rule, massive_tokens
from dfrot.models.graph import graph_for
from dfrot.models.stream import captured_inputs
from dfrot.runtime.linear import QuantLinear

# Norm of the decoder (its full name) → which positions of a sequence have massive activations there.
Masks = Mapping[str, Bool[Tensor, " tokens"]]


def perplexity_with_massive_unquantized(
    checkpoint: Any, original: Any, blocks: Int[Tensor, "blocks seq_len"], rule: Rule = "relative"
) -> float:
    """`perplexity` of a checkpoint that does not quantize the activations of massive tokens.

    Args:
        checkpoint: a model that `dfrot.load` has loaded from a checkpoint; any other quantizes nothing, and its
            perplexity stays the same.
        original: the model that it was made from, loaded by `dfrot.load`.
        rule: which tokens are massive.
    """
    return perplexity(
        checkpoint,
        blocks,
        "massive tokens unquantized",
        during=lambda block: massive_unquantized(checkpoint, massive_positions(original, block, rule)),
    )


@torch.no_grad()
def massive_positions(original: Any, tokens: Int[Tensor, " seq_len"], rule: Rule = "relative") -> Masks:
    """Where a model has massive activations on one sequence."""
    graph, config = graph_for(original.config), original.config
    names = [f"{graph.blocks}.{index}.{norm}" for index in range(config.num_hidden_layers) for norm in graph.norms]
    with captured_inputs({name: original.get_submodule(name) for name in names}) as seen:
        original.base_model(tokens[None].to(original.device), use_cache=False)
    masks = {}
    for name, inputs in seen.items():
        x = inputs[0][0].float()  # (tokens, hidden)
        # without the norm's gain, which is folded into its readers before anything is rotated
        masks[name] = massive_tokens(nn.functional.rms_norm(x, x.shape[-1:], eps=config.rms_norm_eps), rule)
    return masks


@contextlib.contextmanager
def massive_unquantized(checkpoint: Any, masks: Masks) -> Iterator[None]:
    """While open, the readers of each norm take the masked tokens of a sequence unquantized."""
    graph = graph_for(checkpoint.config)
    with contextlib.ExitStack() as stack:
        for index in range(checkpoint.config.num_hidden_layers):
            for norm, readers in graph.norms.items():
                mask = masks[f"{graph.blocks}.{index}.{norm}"]
                for reader in readers:
                    layer = checkpoint.get_submodule(f"{graph.blocks}.{index}.{reader}")
                    if isinstance(layer, QuantLinear) and mask.any():
                        stack.callback(layer.register_forward_hook(partial(_passing_by, mask)).remove)
        yield


def _passing_by(mask: Bool[Tensor, " tokens"], layer: QuantLinear, args: tuple[Tensor], output: Tensor) -> Tensor:
    """A forward hook: the layer's outputs (1, tokens, out), of masked tokens from inputs that are not quantized."""
    massive = mask.to(output.device)
    x = layer.rotated(args[0][:, massive])
    output[:, massive] = nn.functional.linear(x, layer.dense_weight(x.dtype), layer.bias)
    return output
