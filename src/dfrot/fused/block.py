"""A decoder block in few calls: the two halves around its attention, or for a few new tokens all of it.

`fuse_block_` gives a transformers block a subclass of its class, whose forward takes the short way where it can
and is the block's own otherwise: with gradients, hooks, torch.compile, other caches and attentions, another device.
"""

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from dfrot.kernels import attention, structures
from dfrot.kernels.linear import PackedWeight
from dfrot.kernels.lowering import NO_PASSES, Lowered, lower
from dfrot.kernels.structures import Block, Grid, Norm, Tokens, Transform, Weights, machine, native, pointer
from dfrot.models.graph import Config, ModelGraph, head_dim
from dfrot.quant.spec import UNQUANTIZED
from dfrot.runtime.kv import ATTENTION, KVQuantizer, QuantizedCacheLayer
from dfrot.runtime.linear import QuantLinear, version
from dfrot.runtime.norms import RotatedNorm


class _Fused:
    """Mixed into the class of a block."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        fused: FusedBlock = self.fused  # type: ignore[attr-defined]
        if not args and (output := fused(hidden_states, **kwargs)) is not None:
            return output
        return super().forward(hidden_states, *args, **kwargs)  # type: ignore[misc]


def fuse_block_(block: nn.Module, graph: ModelGraph, config: Config) -> None:
    """Let a block that has the runtime's modules take the short way where it can."""
    if config.hidden_act == "silu" and all(
        isinstance(block.get_submodule(name), QuantLinear) for name in graph.linears
    ):
        kind = type(block)
        block.fused = FusedBlock(block, graph, config)  # type: ignore[assignment]
        block.__class__ = type(f"Fused{kind.__name__}", (_Fused, kind), {})


class FusedBlock:
    """The short way through one block."""

    def __init__(self, block: nn.Module, graph: ModelGraph, config: Config) -> None:
        self.graph, self.config = graph, config
        self.modules: dict[str, Any] = dict(block.named_modules())
        self.attention = self.modules[graph.attention]
        self.linears: list[QuantLinear] = [self.modules[name] for name in graph.linears]
        self._made: tuple[tuple[Any, ...], Block | None, list[Any]] | None = None

    @property
    def quantizer(self) -> KVQuantizer | None:
        """Of keys and values."""
        return getattr(self.attention, "kv_quantizer", None)

    def __call__(
        self,
        x: Tensor,
        *,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        output_attentions: bool | None = False,
        **_: Any,
    ) -> Tensor | None:
        """The block's output for x (batch, tokens, width); None if it has to be computed the long way."""
        if torch.compiler.is_compiling() or output_attentions or position_embeddings is None:
            return None
        if attention_mask is not None and attention_mask.dtype != torch.bool:
            return None
        if (layer := self._cache(past_key_values)) is None or (block := self._structure(x)) is None:
            return None
        batch, count = x.shape[:2]
        x = x.contiguous()
        cos, sin = (each.expand(batch, -1, -1).to(x.dtype).contiguous() for each in position_embeddings)
        tokens = Tokens(x.data_ptr(), structures.DTYPES[x.dtype], batch, count, cos.data_ptr(), sin.data_ptr())
        few = count == 1 or (attention_mask is not None and count <= attention.FEW)
        if few and isinstance(layer, QuantizedCacheLayer):
            return self._whole(block, tokens, x, layer, attention_mask)
        query, keys, values = self._read(block, tokens, x, layer)
        if isinstance(layer, Cache):
            keys, values = layer.update(keys, values, self.attention.layer_idx)
        attended, _nothing = sdpa_attention_forward(
            self.attention, query, keys, values, attention_mask, scaling=self.attention.scaling
        )
        return self._write(block, x, attended)

    def _cache(self, past_key_values: Any) -> Any:
        """The packed cache of this block; a cache of transformers; False for none; None if the long way knows."""
        chosen = self.config._attn_implementation
        if self.quantizer is None:
            return None if chosen != "sdpa" else False if past_key_values is None else past_key_values
        if chosen != ATTENTION:
            return None
        if past_key_values is None:
            return False
        layer = past_key_values.layers[self.attention.layer_idx] if isinstance(past_key_values, DynamicCache) else None
        return layer if isinstance(layer, QuantizedCacheLayer) else None

    def _whole(
        self, block: Block, tokens: Tokens, x: Tensor, layer: QuantizedCacheLayer, mask: Tensor | None
    ) -> Tensor:
        y = torch.empty_like(x)
        mask = None if mask is None else mask.contiguous()
        keys, values, length = self._room(layer, x)
        looks = structures.looks(mask)
        native().dfrot_block(*machine(), block, tokens, keys, values, length, *looks, pointer(y))
        layer.advance(x.shape[1])
        return y

    def _read(self, block: Block, tokens: Tokens, x: Tensor, layer: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, and keys and values of the new tokens, or of all if the cache is packed."""
        batch, count = x.shape[:2]
        query = x.new_empty(batch, block.heads, count, block.dim)
        keys, values = (x.new_empty(batch, block.kv_heads, count, block.dim) for _ in range(2))
        packed: list[Any] = [None, None]
        length = 0
        if isinstance(layer, QuantizedCacheLayer):
            *packed, length = self._room(layer, x)
        native().dfrot_block_read(*machine(), block, tokens, *packed, length, *map(pointer, (query, keys, values)))
        if isinstance(layer, QuantizedCacheLayer):
            whole = layer.advance(count)
            if length:
                spec = self.attention.kv_quantizer.keys
                keys, values = (attention.unpack([*part], spec.bits, x.dtype) for part in whole)
        return query, keys, values

    def _write(self, block: Block, x: Tensor, attended: Tensor) -> Tensor:
        attended, y = attended.contiguous(), torch.empty_like(x)
        rows = structures.DTYPES[x.dtype], x.shape[0] * x.shape[1]
        native().dfrot_block_write(*machine(), block, pointer(x), pointer(attended), *rows, pointer(y))
        return y

    def _room(self, layer: QuantizedCacheLayer, x: Tensor) -> tuple[Any, Any, int]:
        """Room for the new tokens in a packed cache, and how many it has."""
        if not layer.is_initialized:
            layer.lazy_initialization(x, x)
        bits = self.attention.kv_quantizer.keys.bits
        keys, values = layer.reserve(x.shape[0], self.config.num_key_value_heads, x.shape[1])
        return structures.cache(keys, bits), structures.cache(values, bits), layer.get_seq_length()

    def _structure(self, x: Tensor) -> Block | None:
        """The block as the kernels take it; None if they cannot compute it for such an input."""
        if (x.requires_grad and torch.is_grad_enabled()) or any(
            module._forward_hooks or module._forward_pre_hooks for module in self.modules.values()
        ):
            return None
        weights = [layer._buffers.get("qweight") for layer in self.linears]
        grids = (layer.activations for layer in self.linears)
        versions = ((id(weight), version(weight)) for weight in weights)
        state = (x.dtype, x.device, *versions, *grids)
        if self._made is None or self._made[0] != state:
            kept: list[Any] = []
            self._made = state, self._build(x, kept), kept
        return self._made[1]

    def _build(self, x: Tensor, kept: list[Any]) -> Block | None:
        """As `_structure`; what it points to is put into `kept`."""
        graph, quantizer = self.graph, self.quantizer
        activations = self.linears[0].activations
        if any(
            layer.activations != activations or not layer.native(x.new_empty(1, layer.in_features))
            for layer in self.linears
        ):
            return None
        if quantizer is not None and not quantizer.native(x.new_empty(1, quantizer.head_dim)):
            return None
        if head_dim(self.config) > attention.MOST_CHANNELS:
            return None
        packed = {name: self.modules[name].packed() for name in graph.linears}
        before = {name: passes for name, (_, passes) in packed.items()}
        for name in graph.norms:
            module = self.modules[name]
            rotation = module.rotation if isinstance(module, RotatedNorm) else None
            before[name] = NO_PASSES if rotation is None else lower(rotation.as_rotation)
        before["keys"] = NO_PASSES if quantizer is None else quantizer.passes
        if any(passes is None for passes in before.values()):
            return None

        def transform(name: str) -> Transform:
            passes: Lowered = before[name]
            kept.append(passes)
            return structures.transform(*passes)

        def weights(stage: Sequence[str]) -> Any:
            columns: list[PackedWeight] = [packed[name][0] for name in stage]
            bits = self.modules[stage[0]].weights.bits
            array = (Weights * len(columns))(*(each.structure(bits) for each in columns))
            kept.append((columns, array))
            return ctypes.cast(array, ctypes.POINTER(Weights))

        def norm(name: str | None) -> Norm:
            if name is None:
                return Norm(None, 0)
            weight = self.modules[name].weight.detach().to(x.dtype).contiguous()
            kept.append(weight)
            return Norm(weight.data_ptr(), self.modules[name].eps)

        attention_norm, mlp_norm = graph.norms
        query_norm, key_norm = graph.head_norms or (None, None)
        readers, (output,), gates, (down,) = graph.stages
        queries = keys = values = UNQUANTIZED
        if quantizer is not None:
            queries, keys, values = quantizer.queries, quantizer.keys, quantizer.values
        return Block(
            *(self.config.num_attention_heads, self.config.num_key_value_heads, head_dim(self.config), self._rotary()),
            *(norm(attention_norm), norm(mlp_norm), norm(query_norm), norm(key_norm)),
            *(weights(readers), len(readers), weights([output]), weights(gates), weights([down]), len(gates)),
            *map(transform, (attention_norm, "keys", output, mlp_norm, down)),
            Grid(activations.bits, activations.symmetric, activations.fixed_clip),
            Grid(queries.bits, queries.symmetric, queries.fixed_clip),
            *(keys.bits, keys.fixed_clip, values.fixed_clip, self.attention.scaling),
        )

    def _rotary(self) -> int:
        """Channels of a head that are turned by position."""
        factor = (getattr(self.config, "rope_parameters", None) or {}).get("partial_rotary_factor", 1.0)
        return int(head_dim(self.config) * factor)
