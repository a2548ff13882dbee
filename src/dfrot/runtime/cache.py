"""The packed cache: codes, scales and zero points of keys and values, in layers that grow or have room for as many
tokens as they were made for.

Nothing of transformers is patched. A forward pre-hook on the decoder puts these layers into an empty `DynamicCache` or
`StaticCache`, so that `generate` uses keys and values in few bits without being told. They hand what they keep to the
"dfrot" attention (kv.py) unchanged.
"""

import functools
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, DynamicLayer, StaticCache, StaticLayer

from dfrot.models.stream import cache_name
from dfrot.runtime.key_bias import Positions
from dfrot.runtime.kv import ATTENTION, GradedKV, Heads, KVQuantizer, PackedKV
from dfrot.runtime.norms import differentiated, in_float64

_ROOM = 64  # tokens by which a cache grows at least


class PackedLayer:
    """What cache layers of packed keys and values share.

    `update` returns `PackedKV` keys and values, which only the "dfrot" attention understands.
    """

    dtype: torch.dtype
    is_sliding = is_initialized = False

    def __init__(self, quantizer: KVQuantizer) -> None:  # transformers' base class would set keys and values
        self._quantizer = quantizer
        self.coming: Positions | None = None  # positions of the next tokens; None: those after the last one
        self._room: tuple[PackedKV, PackedKV] | None = None  # of which the first tokens are used
        self._positions: Tensor | None = None  # int32 (batch, 1, tokens, 1), as `_map` wants it

    keys = property(lambda self: self._shown(0))
    values = property(lambda self: self._shown(1))

    def _shown(self, which: int) -> Heads | None:
        """Keys (0) or values as other caches show them, unpacked, not rotated, without a bias that stays out of them;
        None before the first token."""
        if self._room is None:
            return None
        shown, rotation = self._quantizer.unpack(self.packed[which], self.dtype), self._quantizer.rotation
        return shown if which or rotation is None else in_float64(rotation.T.apply, shown)

    @property
    def packed(self) -> tuple[PackedKV, PackedKV]:
        """Keys and values as they are kept."""
        assert self._room is not None, "room is reserved before tokens are there"
        return self._room

    @property
    def positions(self) -> Positions | None:
        """Of all tokens; kept only where the bias of keys stays out of them."""
        return None if self._positions is None else self._positions[:, 0, :, 0]

    @property
    def nbytes(self) -> int:
        """With the room for tokens to come."""
        parts = [*self._room, self._positions] if self._room is not None else []
        return sum(part.nbytes for part in parts if part is not None)


class QuantizedCacheLayer(PackedLayer, DynamicLayer):
    """A growing cache layer of packed keys and values."""

    def __init__(self, quantizer: KVQuantizer) -> None:
        super().__init__(quantizer)
        self._length = 0  # tokens

    @property
    def packed(self) -> tuple[PackedKV, PackedKV]:
        keys, values = super().packed
        return keys.first(self._length), values.first(self._length)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        room = self.reserve(*key_states.shape[:3])
        with torch.no_grad():
            self._quantizer.write(key_states, value_states, room, self.get_seq_length())
        self.advance(key_states.shape[2])
        packed = self.packed
        new = (key_states, value_states) if differentiated(key_states, value_states) else (None, None)
        if new[0] is None and self.positions is None:
            return packed
        return GradedKV(packed[0], new[0], self.positions), GradedKV(packed[1], new[1])

    def reserve(self, batch: int, heads: int, tokens: int) -> tuple[PackedKV, PackedKV]:
        """The cache with room for so many more tokens, and a sixteenth beyond, so that appending seldom copies it."""
        needed = self.get_seq_length() + tokens
        writable = torch.is_inference_mode_enabled() or self._room is None or not self._room[0].codes.is_inference()
        if writable and self._room is not None and self._room[0].codes.shape[-2] >= needed:
            return self._room
        capacity = -(-(needed + needed // 16) // _ROOM) * _ROOM
        room = self._quantizer.rooms(batch, heads, capacity, self.device)
        for old, new in zip(self.packed if self._length else (), room, strict=False):
            new.put(old, 0)
        self._room = room
        return room

    def advance(self, tokens: int) -> None:
        """So many of the reserved tokens have been written."""
        assert self._room is not None, "reserve comes first"
        self._length += tokens
        if self._quantizer.key_bias is not None:
            codes, length = self._room[0].codes, self._length
            new = torch.arange(length - tokens, length)[None] if self.coming is None else self.coming
            new = new.to(codes.device, torch.int32).expand(len(codes), -1)[:, None, :, None]
            self._positions = new if self._positions is None else torch.cat([self._positions, new], dim=2)
            self.coming = None

    def _map(self, change: Any) -> None:
        self._positions = None if self._positions is None else change(self._positions)
        if self._room is not None:
            keys, values = (PackedKV(*map(change, packed)) for packed in self.packed)
            self._room, self._length = (keys, values), keys.codes.shape[-2]

    def get_seq_length(self) -> int:
        return self._length

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes minus the number of tokens to remove, got {tokens_to_remove}")
        if tokens_to_remove:
            self._map(lambda part: part[..., :tokens_to_remove, :])

    def reset(self) -> None:
        self._room, self._positions, self._length, self.is_initialized = None, None, 0, False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._map(lambda part: part.index_select(0, beam_idx.to(part.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map(lambda part: part.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._map(lambda part: part[indices])

    def offload(self) -> None:
        self._map(lambda part: part.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        self._map(lambda part: part.to(self.device, non_blocking=True))


class StaticQuantizedLayer(PackedLayer, StaticLayer):
    """A cache layer of packed keys and values for so many tokens, all written in place, where tensors say: it can be
    compiled, and recorded as a CUDA graph."""

    def __init__(self, quantizer: KVQuantizer, max_cache_len: int) -> None:
        super().__init__(quantizer)
        self.max_cache_len = max_cache_len
        self.cumulative_length = torch.tensor(0)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        batch, heads = self.batch_size, self.num_heads = key_states.shape[:2]
        self._room = self._quantizer.rooms(batch, heads, self.max_cache_len, self.device)
        self.cumulative_length = self.cumulative_length.to(self.device)
        if self._quantizer.key_bias is not None:
            shape = batch, 1, self.max_cache_len, 1
            self._positions = torch.zeros(shape, dtype=torch.int32, device=self.device)
        if not torch.compiler.is_compiling():
            for tensor in self._tensors():
                torch._dynamo.mark_static_address(tensor)
        self.is_initialized = True

    def _tensors(self) -> list[Tensor]:
        assert self._room is not None, "lazy_initialization comes first"
        positions = [] if self._positions is None else [self._positions]
        return [*self._room[0], *self._room[1], *positions, self.cumulative_length]

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        if differentiated(key_states, value_states):
            raise ValueError("a static cache has no gradients: compute without them, or with another cache")
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self._room is not None
        keys, values = self._room
        self._quantizer.write(key_states, value_states, (keys, values), self.cumulative_length)
        if self._positions is not None:
            at = torch.arange(key_states.shape[2], device=self.device) + self.cumulative_length
            new = (at[None] if self.coming is None else self.coming).to(self.device, torch.int32)
            self._positions.index_copy_(2, at, new.expand(len(key_states), -1)[:, None, :, None])
            self.coming = None
        self.cumulative_length.add_(key_states.shape[2])
        return (keys, values) if self.positions is None else (GradedKV(keys, None, self.positions), GradedKV(values))

    def reset(self) -> None:
        for tensor in self._tensors() if self.is_initialized else ():
            tensor.zero_()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        for tensor in self._tensors()[:-1] if self.is_initialized else ():
            tensor.copy_(tensor.index_select(0, beam_idx.to(tensor.device)))


def _empty_and_static(layer: Any) -> bool:
    """No window: of one, transformers' layers and masks hold as much as is looked at."""
    return type(layer) is StaticLayer and not layer.is_initialized


def _quantize_empty_cache(name: str, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A forward pre-hook of the decoder, which calls its cache by this name; holds no module, so that a model can be
    copied and pickled."""
    if (chosen := decoder.config._attn_implementation) != ATTENTION:  # type: ignore[union-attr]
        raise ValueError(
            f"this checkpoint quantizes keys and values, which the attention '{chosen}' cannot do: "
            f"set_attn_implementation('{ATTENTION}')"
        )
    given = dict(zip(("input_ids", "attention_mask", "position_ids", name), args, strict=False)) | kwargs
    cache, wanted = given.get(name, given.get("past_key_values")), given.get("use_cache")
    if cache is None and (decoder.config.use_cache if wanted is None else wanted):  # type: ignore[union-attr]
        cache = kwargs[name] = DynamicCache()
    if isinstance(cache, DynamicCache) and cache.get_seq_length() == 0:
        quantizers = [module for module in decoder.modules() if isinstance(module, KVQuantizer)]
        cache.layers = [QuantizedCacheLayer(quantizer) for quantizer in quantizers]
    elif isinstance(cache, StaticCache) and not cache.offloading and any(map(_empty_and_static, cache.layers)):
        quantizers = [module for module in decoder.modules() if isinstance(module, KVQuantizer)]
        cache.layers = [
            StaticQuantizedLayer(quantizer, layer.max_cache_len) if _empty_and_static(layer) else layer
            for quantizer, layer in zip(quantizers, cache.layers, strict=True)
        ]
    for layer in cache.layers if isinstance(cache, DynamicCache | StaticCache) else ():
        if isinstance(layer, PackedLayer):
            layer.coming = given.get("position_ids")
    return args, kwargs


def install_cache_(decoder: nn.Module) -> None:
    """Give `generate` its cache; every attention module has its quantizer."""
    hook = functools.partial(_quantize_empty_cache, cache_name(decoder))
    decoder.register_forward_pre_hook(hook, with_kwargs=True)
