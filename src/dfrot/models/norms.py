"""Norms of a model in transformers, replaced by torch's."""

from typing import Any

import torch
from torch import nn

from dfrot.models.graph import ModelGraph


def use_torch_norms_(model: nn.Module, graph: ModelGraph) -> None:
    """Replace the norms by torch.nn.RMSNorm, which computes float64 inputs in float64.

    transformers' own RMS norms always cast to float32, so that no invariance could be checked below 1e-7. A norm with a
    bias leaves it to the layers that read it, and to the head, whose biases have no values yet: see `Source`.
    """
    modules = dict(model.named_modules())
    blocks: Any = modules[graph.blocks]
    places = [f"{graph.blocks}.{index}." for index in range(len(blocks))]
    readers = {f"{at}{norm}": [at + name for name in names] for at in places for norm, names in graph.norms.items()}
    others = {f"{at}{norm}" for at in places for norm in (*graph.norms_behind, *graph.head_norms)}
    for name in (*readers, *others, graph.final_norm):
        module: Any = modules[name]
        norm = nn.RMSNorm(module.weight.shape, eps=norm_eps(module))
        gain = nn.Parameter(1 + module.weight.detach(), requires_grad=False) if graph.unit_gains else module.weight
        norm.weight = gain
        model.set_submodule(name, norm)
        if getattr(module, "bias", None) is not None:
            for reader in readers.get(name, [graph.head] if graph.head in modules else []):
                add_bias_(modules[reader])


def norm_eps(norm: Any) -> float:
    """ε of a norm."""
    return norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps


def add_bias_(linear: Any) -> None:
    """Give a linear layer a bias, without values, unless it has one."""
    if linear.bias is None:
        empty = torch.empty_like(linear.weight[:, 0])
        linear.bias = nn.Parameter(empty, requires_grad=False)
