"""Putting the runtime's modules into transformers' own."""

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers.activations import SiLUActivation

from dfrot.linalg.rotation import Rotation
from dfrot.models.experts import use_experts_
from dfrot.models.graph import Config, ModelGraph, graph_for, head_dim
from dfrot.models.norms import use_torch_norms_
from dfrot.runtime.cache import install_cache_
from dfrot.runtime.config import RuntimeConfig
from dfrot.runtime.key_bias import KeyBias
from dfrot.runtime.kv import KVQuantizer
from dfrot.runtime.linear import QuantLinear
from dfrot.runtime.norms import BlockRotation, Float64RMSNorm, Float64SiLU, TransformedNorm
from dfrot.system.errors import UserError

# Called with every block that has the runtime's modules. A ring that computes blocks faster registers here, so that the
# core does not know of it.
BLOCK_HOOKS: list[Callable[[nn.Module, ModelGraph, Config], None]] = []


def install_(model: Any, runtime: RuntimeConfig) -> None:
    """Put the runtime's modules into a transformers model, with any head or none, that is still on the meta device."""
    config, decoder, kind = model.config, model.base_model, type(model)
    graph = graph_for(config)
    if decoder is not model and kind.base_model_prefix != graph.decoder:  # transformers would find no tensor
        raise UserError(f"{kind.__name__} has no '{graph.decoder}', as checkpoints have: put its head on AutoModel.")
    root = nn.ModuleDict({graph.decoder: decoder})  # the names of a language model, whatever the head
    if decoder is not model and (head := model.get_output_embeddings()) is not None:
        root[graph.head] = head
    use_torch_norms_(root, graph)
    if graph.experts:
        with torch.device("meta"):
            use_experts_(root, config)
    blocks = list(root.get_submodule(graph.blocks).children())
    rotary, means = root.get_submodule(graph.rotary), runtime.key_means
    key_bias = KeyBias.of(blocks[0], graph, rotary, runtime.spec.keys, any_bias=means) if blocks else None
    of_cache = (("the bits of keys and values", runtime.kv_bits),) if runtime.kv_bits else ()
    by_block = (*runtime.clips.items(), *runtime.largest.items(), *of_cache)
    if wrong := [site for site, values in by_block if len(values) != len(blocks)]:
        raise UserError(f"this checkpoint's config has other than {len(blocks)} values for '{wrong[0]}', one a block.")
    for index, block in enumerate(blocks):
        install_block_(block, index, graph, runtime, key_bias)
    if runtime.spec.keys.enabled:
        if runtime.keys is not None and runtime.keys.size != head_dim(config):
            raise UserError(
                f"this checkpoint's config rotates keys of {runtime.keys.size}, not {head_dim(config)} channels."
            )
        for index, block in enumerate(blocks):
            spec = runtime.heads(index)
            quantizer = KVQuantizer(spec.keys, spec.values, runtime.keys, head_dim(config), spec.queries, key_bias)
            block.get_submodule(graph.attention).kv_quantizer = quantizer
        install_cache_(decoder)
    for block, hook in itertools.product(blocks, BLOCK_HOOKS):
        hook(block, graph, config)


def _check_sizes(block: nn.Module, graph: ModelGraph, runtime: RuntimeConfig) -> None:
    """Raise UserError if the runtime is one for another model."""
    wrong = "this checkpoint's config does not fit its model"
    sites = {site for name in graph.linears for site in graph.sites(name)}
    for name, rotation in runtime.online.items():
        if name not in sites or rotation.size != _width(block, name):
            raise UserError(f"{wrong}: '{name}' has no input of {rotation.size} channels, which are to be rotated.")
    if unknown := [name for name in runtime.biases if name not in graph.linears]:
        raise UserError(f"{wrong}: there is no linear layer {unknown[0]!r}, which is to have a bias.")
    if unknown := [*({*runtime.offsets, *runtime.largest} - sites), *(set(runtime.clips) - sites - {"keys", "values"})]:
        raise UserError(
            f"{wrong}: {unknown[0]!r} is no norm and no linear layer without one, as offsets, clips and largest need."
        )
    for site, (size, _) in runtime.rotation_blocks.items():
        if site not in sites or _width(block, site) % size:
            raise UserError(f"{wrong}: '{site}' has no channels that blocks of {size} divide.")


def _width(block: nn.Module, name: str) -> int:
    """Channels of a linear layer's input or a norm's output."""
    return block.get_submodule(name).weight.shape[-1]  # type: ignore[index,return-value]


def install_block_(
    block: nn.Module, index: int, graph: ModelGraph, runtime: RuntimeConfig, key_bias: KeyBias | None = None
) -> None:
    """Replace norms, activations and linear layers of decoder block `index` by the runtime's; with a `key_bias` the
    layer of keys leaves its bias to attention."""
    _check_sizes(block, graph, runtime)
    rotations: dict[str, Rotation | BlockRotation] = dict(runtime.online)
    for site, (size, count) in runtime.rotation_blocks.items():
        weight: Any = block.get_submodule(site).weight
        with torch.device("meta"):
            rotations[site] = BlockRotation(weight.shape[-1], size, count, weight.dtype)
    for site in graph.norms:
        if site in rotations or site in runtime.offsets:
            norm: Any = block.get_submodule(site)
            with torch.device("meta"):
                block.set_submodule(site, TransformedNorm(norm, rotations.get(site), site in runtime.offsets))
    for name, module in list(block.named_modules()):
        if type(module) is nn.RMSNorm:
            block.set_submodule(name, Float64RMSNorm(module))
        elif isinstance(module, SiLUActivation):
            block.set_submodule(name, Float64SiLU())
    for name in graph.linears:
        rotation, grid = rotations.get(name), runtime.activations(graph.norm_before(name) or name, index)
        quantizes = runtime.spec.weights.enabled or runtime.spec.activations.enabled
        leaves_out, means = key_bias is not None and name == graph.key, runtime.key_means and name == graph.key
        own = rotation is not None or name in runtime.biases or name in runtime.offsets or leaves_out or means
        if not own and not quantizes:
            continue
        linear = block.get_submodule(name)
        assert isinstance(linear, nn.Linear), f"{name} is a {type(linear).__name__}"
        with torch.device("meta"):
            quantized = QuantLinear(
                linear.in_features,
                linear.out_features,
                bias=linear.bias is not None or name in runtime.biases,
                weights=runtime.spec.weights,
                activations=grid,
                rotation=rotation,
                dtype=linear.weight.dtype,
                leaves_out=leaves_out,
                apart=means,
                offset=name in runtime.offsets,
            )
        block.set_submodule(name, quantized)
