"""Putting the runtime's modules into transformers' own."""

import torch
from torch import nn

from dfrot.linalg.rotation import Rotation
from dfrot.models.families import graph_for
from dfrot.models.graph import ModelGraph
from dfrot.models.source import use_torch_norms_
from dfrot.runtime.blocks import BlockRotation, RotatedNorm
from dfrot.runtime.kv import install_kv_
from dfrot.runtime.linear import QuantLinear
from dfrot.runtime.plan import RuntimePlan


def install_(model: nn.Module, plan: RuntimePlan) -> None:
    """Put the runtime's modules into a transformers model that is still on the meta device."""
    config = model.config
    graph = graph_for(config)
    use_torch_norms_(model, graph)
    attentions = []
    for index in range(config.num_hidden_layers):  # type: ignore[union-attr,arg-type]
        block = model.get_submodule(f"{graph.blocks}.{index}")
        install_linears_(block, graph, plan)
        attentions.append(block.get_submodule(graph.attention))
    if plan.spec.keys.quantizes:
        install_kv_(model.get_submodule(graph.decoder), attentions, plan.spec, plan.keys)


def install_linears_(block: nn.Module, graph: ModelGraph, plan: RuntimePlan) -> None:
    """Replace the linear layers of a decoder block for which the plan has something to do, on the meta device."""
    rotations: dict[str, Rotation | BlockRotation] = dict(plan.online)
    for site, (size, count) in plan.blocks.items():
        module = block.get_submodule(site)
        with torch.device("meta"):
            blocks = BlockRotation(module.weight.shape[-1], size, count, module.weight.dtype)  # type: ignore
        if isinstance(module, nn.RMSNorm):
            block.set_submodule(site, RotatedNorm(module, blocks))
        else:
            rotations[site] = blocks
    for name in graph.linears:
        rotation = rotations.get(name)
        if rotation is None and not plan.spec.weights.quantizes and not plan.spec.activations.quantizes:
            continue
        linear = block.get_submodule(name)
        assert isinstance(linear, nn.Linear), f"{name} is a {type(linear).__name__}"
        with torch.device("meta"):
            quantized = QuantLinear(
                linear.in_features,
                linear.out_features,
                bias=linear.bias is not None,
                weights=plan.spec.weights,
                activations=plan.spec.activations,
                rotation=rotation,
                dtype=linear.weight.dtype,
            )
        block.set_submodule(name, quantized)
