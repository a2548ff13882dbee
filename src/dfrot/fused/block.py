"""A decoder block in few calls: the two halves around its attention, or for a few new tokens all of it.

`fuse_block_` gives a transformers block a subclass of its class, whose forward takes the short way where it can
and is the block's own otherwise: with gradients, hooks, torch.compile, other caches and attentions, another device.

The short way reads the block's tensors by their addresses. So it is taken only while every module, attribute and tensor
of the block is the one that the addresses were taken from, and no tensor has been written to since.
"""

import ctypes
import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from transformers.cache_utils import Cache, DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from dfrot.kernels import attention, structures
from dfrot.kernels.lowering import NO_PASSES, Lowered
from dfrot.kernels.structures import Block, Grid, Norm, Tokens, Transform, Weights, machine, native, pointer
from dfrot.models.graph import Config, ModelGraph, head_dim, kv_heads
from dfrot.quant.spec import UNQUANTIZED
from dfrot.runtime.cache import QuantizedCacheLayer
from dfrot.runtime.key_bias import left_out
from dfrot.runtime.kv import ATTENTION, KVQuantizer
from dfrot.runtime.linear import QuantLinear
from dfrot.runtime.norms import TransformedNorm, differentiated
from dfrot.system.kept import lasting


class _Fused:
    """Mixed into the class of a block."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        fused: FusedBlock = self.fused  # type: ignore[attr-defined]
        if not args and (output := fused(self, hidden_states, **kwargs)) is not None:  # type: ignore[arg-type]
            return output
        return super().forward(hidden_states, *args, **kwargs)  # type: ignore[misc]

    def __reduce__(self) -> Any:  # by the class of the block: the mixed one has no address
        return _unfilled, (type(self).__mro__[2],), self.__dict__


@functools.cache
def _mixed(kind: type[nn.Module]) -> type[nn.Module]:
    """The class of blocks that take the short way, by the block's name, which device maps know."""
    return type(kind.__name__, (_Fused, kind), {"__module__": __name__})


def _unfilled(kind: type[nn.Module]) -> nn.Module:
    mixed = _mixed(kind)  # type: ignore[arg-type]
    return mixed.__new__(mixed)


def fuse_block_(block: nn.Module, graph: ModelGraph, config: Config) -> None:
    """Let a block that has the runtime's modules take the short way where it can."""
    if (
        not graph.traced
        and config.hidden_act == "silu"
        and all(isinstance(block.get_submodule(name), QuantLinear) for name in graph.linears)
    ):
        kinds = {name: type(module) for name, module in block.named_modules() if name}
        block.fused = FusedBlock(graph, kinds)  # type: ignore[assignment]
        block.__class__ = _mixed(type(block))  # type: ignore[arg-type]


class FusedBlock:
    """The short way through one block. Copies of it, by `copy` or pickle, hold no address.

    Args:
        kinds: the classes of the block's modules; with any others it is computed the long way.
    """

    def __init__(self, graph: ModelGraph, kinds: dict[str, type[nn.Module]]) -> None:
        self.graph, self.kinds = graph, kinds
        self._native: _NativeBlock | None = None
        self._made_from: tuple[list[Any], list[Any]] | None = None
        self._modules: list[nn.Module] = []
        self._memory: list[Tensor] = []  # of the block's tensors: while it is kept no other tensor gets their addresses

    def __reduce__(self) -> Any:
        return FusedBlock, (self.graph, self.kinds)

    def __call__(
        self,
        block: nn.Module,
        x: Tensor,
        *,
        attention_mask: Tensor | None = None,
        cache: Any = None,
        past_key_values: Any = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        position_ids: Tensor | None = None,
        output_attentions: bool | None = False,
        **others: Any,
    ) -> Tensor | None:
        """The block's output for x (batch, tokens, width); None if it has to be computed the long way.

        Args:
            cache, past_key_values: the cache, as transformers calls it from 5.24 on, and before.
        """
        if any(isinstance(each, Cache) for each in others.values()):  # by a name that nobody knows yet
            return None
        past_key_values = past_key_values if cache is None else cache
        if torch.compiler.is_compiling() or output_attentions or position_embeddings is None:
            return None
        if attention_mask is not None and attention_mask.dtype != torch.bool:
            return None
        if (made := self._current(block, x)) is None or (layer := made.cache(past_key_values)) is None:
            return None
        return made(x, layer, attention_mask, position_embeddings, position_ids)

    def _current(self, block: nn.Module, x: Tensor) -> "_NativeBlock | None":
        """The block as the kernels take it; None if they cannot compute what it is now, or not for such an input."""
        if type(x) is not Tensor or torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks:
            return None
        if differentiated(x) or not structures.computable(x):  # C reads addresses
            return None
        known = self._parts(self._modules, x)
        if known is None or self._made_from is None or not _same(known, self._made_from):
            self._native, self._made_from, self._memory = None, None, []
            self._modules = list(block.modules())
            if (known := self._parts(self._modules, x)) is None:
                return None
            tensors = [tensor for module in self._modules for tensor in _tensors(module)]
            if all(map(lasting, tensors)) and self._unchanged(block):
                self._native = _NativeBlock.of(block, self.graph, x)
            self._made_from, self._memory = known, [tensor.detach() for tensor in tensors]
        return self._native

    def _parts(self, modules: Sequence[nn.Module], x: Tensor) -> tuple[list[Any], list[Any]] | None:
        """All that modules consist of: objects, and numbers that tell the state of tensors; None with hooks."""
        objects: list[Any] = []
        numbers: list[Any] = [x.dtype, x.device]
        graded = torch.is_grad_enabled()
        for module in modules:
            own, kind = module.__dict__, type(module)
            if own["_forward_hooks"] or own["_forward_pre_hooks"]:
                return None
            objects += (kind, kind.forward)
            objects += own.values()
            objects += own["_modules"].values()
            for tensors in own["_parameters"].values(), own["_buffers"].values():
                objects += tensors
                for tensor in tensors:
                    if tensor is not None:
                        if tensor.is_inference() or (graded and tensor.requires_grad):
                            return None
                        numbers += (tensor.data_ptr(), tensor._version, tensor.dtype, tensor.shape)
        return objects, numbers

    def _unchanged(self, block: nn.Module) -> bool:
        """Whether a block has modules of the classes that it was given, and they compute as these say."""
        inner = {name: module for name, module in block.named_modules() if name}
        if {name: type(module) for name, module in inner.items()} != self.kinds:
            return False
        kinds = {type(block).__mro__[2], *self.kinds.values()}
        return not any("forward" in vars(module) for module in inner.values()) and not any(map(_patched, kinds))


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(recurse=False), *module.buffers(recurse=False)]


def _same(one: tuple[list[Any], list[Any]], other: tuple[list[Any], list[Any]]) -> bool:
    """Whether the objects are the same, or at least equal, and the numbers are.

    Lists are compared in C, by identity first, in a tenth of the time that a loop takes. An equal object in the place
    of another computes the same; tensors, whose equality is no answer, have their addresses among the numbers.
    """
    (objects, numbers), (before, numbers_before) = one, other
    try:
        return numbers == numbers_before and objects == before
    except (RuntimeError, ValueError):  # another tensor or array, of several entries
        return False


def _patched(kind: type[nn.Module]) -> bool:
    """Whether somebody has given a class another forward than the one in its source."""
    own = {(each.__module__, f"{each.__qualname__}.forward") for each in kind.__mro__}
    return kind.forward is not nn.Module.forward and (kind.forward.__module__, kind.forward.__qualname__) not in own


class _NativeBlock:
    """A block for C. It points to the block's tensors and is of use as long as they are what they were."""

    def __init__(self, block: nn.Module, graph: ModelGraph, structure: Block, kept: list[Any]) -> None:
        self.attention: Any = block.get_submodule(graph.attention)
        self.structure, self._kept = structure, kept

    @property
    def quantizer(self) -> KVQuantizer | None:
        """Of keys and values."""
        return getattr(self.attention, "kv_quantizer", None)

    def __call__(
        self, x: Tensor, layer: Any, mask: Tensor | None, angles: tuple[Tensor, Tensor], positions: Tensor | None
    ) -> Tensor:
        """The block's output; `layer` is what `cache` has found, `angles` are the cosines and sines of `positions`."""
        batch, count = x.shape[:2]
        x = x.contiguous()
        cos, sin = (each.expand(batch, -1, -1).to(x.dtype).contiguous() for each in angles)
        tokens = Tokens(pointer(x), structures.DTYPES[x.dtype], batch, count, pointer(cos), pointer(sin))
        packed, scaling = isinstance(layer, QuantizedCacheLayer), self.attention.scaling
        quantizer: Any = self.quantizer
        few = packed and (count == 1 or (mask is not None and count <= attention.FEW))
        bias = None if quantizer is None or quantizer.key_bias is None else left_out(self.attention)
        if few and bias is None:
            return self._whole(tokens, x, layer, mask)
        query, keys, values = self._read(tokens, x, layer, few)
        if bias is not None:
            at: Any = layer.positions if packed else positions
            apart = quantizer.key_bias.at(bias, at, x.dtype)
            if few:
                more, bits = scaling * apart.scores(query, quantizer.rotation), self.structure.kv_bits
                return self._write(x, attention.attend(query, keys, values, mask, more, *NO_PASSES, scaling, bits))
            keys = (keys + apart.keys(quantizer.rotation)).to(x.dtype)
        if isinstance(layer, Cache):
            keys, values = layer.update(keys, values, self.attention.layer_idx)
        attended, _nothing = sdpa_attention_forward(self.attention, query, keys, values, mask, scaling=scaling)
        return self._write(x, attended)

    def cache(self, past_key_values: Any) -> Any:
        """The packed cache of this block; a cache of transformers; False for none; None if the long way knows."""
        chosen = self.attention.config._attn_implementation
        if self.quantizer is None:
            return None if chosen != "sdpa" else False if past_key_values is None else past_key_values
        if chosen != ATTENTION:
            return None
        if past_key_values is None:
            return False
        layer = past_key_values.layers[self.attention.layer_idx] if isinstance(past_key_values, DynamicCache) else None
        return layer if isinstance(layer, QuantizedCacheLayer) else None

    def _whole(self, tokens: Tokens, x: Tensor, layer: QuantizedCacheLayer, mask: Tensor | None) -> Tensor:
        y = torch.empty_like(x)
        mask = None if mask is None else mask.contiguous()
        keys, values, length = self._room(layer, x)
        looks = structures.looks(mask)
        native().dfrot_block(*machine(), self.structure, tokens, keys, values, length, *looks, pointer(y))
        layer.advance(x.shape[1])
        return y

    def _read(self, tokens: Tokens, x: Tensor, layer: Any, packed: bool) -> Any:
        """Queries, and keys and values of the new tokens, or of all if the cache is packed, as tensors or `packed`."""
        (batch, count), block = x.shape[:2], self.structure
        query = x.new_empty(batch, block.heads, count, block.dim)
        keys, values = (x.new_empty(batch, block.kv_heads, count, block.dim) for _ in range(2))
        room: list[Any] = [None, None]
        length = 0
        if isinstance(layer, QuantizedCacheLayer):
            *room, length = self._room(layer, x)
        native().dfrot_block_read(*machine(), block, tokens, *room, length, *map(pointer, (query, keys, values)))
        if isinstance(layer, QuantizedCacheLayer):
            layer.advance(count)
            whole = [[*part] for part in layer.packed]
            if packed:
                return query, *whole
            if length:
                bits = self.structure.kv_bits
                keys, values = (attention.unpack(part, bits, x.dtype) for part in whole)
        return query, keys, values

    def _write(self, x: Tensor, attended: Tensor) -> Tensor:
        attended, y = attended.contiguous(), torch.empty_like(x)
        rows = structures.DTYPES[x.dtype], x.shape[0] * x.shape[1]
        native().dfrot_block_write(*machine(), self.structure, pointer(x), pointer(attended), *rows, pointer(y))
        return y

    def _room(self, layer: QuantizedCacheLayer, x: Tensor) -> tuple[Any, Any, int]:
        """Room for the new tokens in a packed cache, and how many it has."""
        if not layer.is_initialized:
            layer.lazy_initialization(x, x)
        bits = self.structure.kv_bits
        keys, values = layer.reserve(x.shape[0], self.structure.kv_heads, x.shape[1])
        return structures.cache(keys, bits), structures.cache(values, bits), layer.get_seq_length()

    @staticmethod
    def of(block: nn.Module, graph: ModelGraph, x: Tensor) -> "_NativeBlock | None":
        """For inputs like x; None if the kernels cannot compute the block for those."""
        modules: dict[str, Any] = dict(block.named_modules())
        linears: list[QuantLinear] = [modules[name] for name in graph.linears]
        attention_module = modules[graph.attention]
        config: Config = attention_module.config
        quantizer: KVQuantizer | None = getattr(attention_module, "kv_quantizer", None)
        grids = [{modules[name].activations for name in stage} for stage in graph.stages]
        if any(len(each) > 1 for each in grids):  # one input is quantized once
            return None
        if not all(layer.native(x.new_empty(1, layer.in_features)) for layer in linears):
            return None
        if quantizer is not None and not quantizer.native(x.new_empty(1, quantizer.head_dim)):
            return None
        if head_dim(config) > attention.MOST_CHANNELS:
            return None
        before = {name: modules[name].passes for name in graph.linears}
        for name in graph.norms:
            before[name] = modules[name].passes if isinstance(modules[name], TransformedNorm) else NO_PASSES
        before["keys"] = NO_PASSES if quantizer is None else quantizer.passes
        if any(passes is None for passes in before.values()):
            return None
        if any(before[name].passes for names in graph.norms.values() for name in names):  # norms alone transform here
            return None
        kept: list[Any] = []  # what the structure points to

        def transform(name: str) -> Transform:
            passes: Lowered = before[name]
            kept.append(passes)
            return structures.transform(*passes)

        def weights(stage: Sequence[str]) -> Any:
            bits, quantized = modules[stage[0]].weights.bits, modules[stage[0]].activations.enabled
            made = [modules[name].packed.structure(bits, quantized) for name in stage]
            array = (Weights * len(made))(*(each for each, _ in made))
            kept.append((made, array))
            return ctypes.cast(array, ctypes.POINTER(Weights))

        def norm(name: str | None) -> Norm:
            if name is None:
                return Norm(None, 0)
            weight = modules[name].weight.detach().to(x.dtype).contiguous()
            kept.append(weight)
            return Norm(pointer(weight), modules[name].eps)

        attention_norm, mlp_norm = graph.norms
        query_norm, key_norm = graph.head_norms or (None, None)
        readers, (output,), gates, (down,) = graph.stages
        queries = keys = values = UNQUANTIZED
        if quantizer is not None:
            queries, keys, values = quantizer.queries, quantizer.keys, quantizer.values
        structure = Block(
            *(config.num_attention_heads, kv_heads(config), head_dim(config), _rotary(config)),
            *(norm(attention_norm), norm(mlp_norm), norm(query_norm), norm(key_norm)),
            *(weights(readers), len(readers), weights([output]), weights(gates), weights([down]), len(gates)),
            *map(transform, (attention_norm, "keys", output, mlp_norm, down)),
            *(Grid(grid.bits, grid.symmetric, grid.fixed_clip) for (grid,) in grids),
            Grid(queries.bits, queries.symmetric, queries.fixed_clip),
            *(keys.bits, keys.fixed_clip, values.fixed_clip, attention_module.scaling),
        )
        return _NativeBlock(block, graph, structure, kept)


def _rotary(config: Config) -> int:
    """Channels of a head that are turned by position."""
    factor = (getattr(config, "rope_parameters", None) or {}).get("partial_rotary_factor", 1.0)
    return int(head_dim(config) * factor)
