"""Keys and values in few bits: the quantizer, the cache, and the attention that reads it.

Keys are rotated (R3) and quantized after RoPE, without a bias that the model gives them (key_bias.py), values as v_proj
makes them (R2 is folded into it); each head of each token has its own scale and zero point. Queries are rotated too, so
that scores are unchanged, and on demand quantized on the same grid, as DuQuant has it: then both inputs of Q Kᵀ are in
few bits. Three of transformers' extension points carry this, and nothing is patched:

* an attention function, registered as "dfrot", which quantizes keys and values that arrive as plain tensors, and leaves
  a few new tokens to the kernels, and many, for which it unpacks them, to SDPA;
* cache layers, growing and static, which keep codes, scales and zero points, and hand them to the attention function
  unchanged;
* a forward pre-hook on the decoder, which puts these layers into an empty `DynamicCache` or `StaticCache`, so that
  `generate` uses 4-bit keys and values without being told.

A full-precision cache gives the same numbers: quantization is per token, so it does not matter when it happens.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import DynamicCache, DynamicLayer, StaticCache, StaticLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from dfrot.kernels import attention, linear
from dfrot.kernels.lowering import NO_PASSES, Lowered, lower
from dfrot.linalg.rotation import Rotation
from dfrot.models.graph import head_dim
from dfrot.models.stream import cache_name
from dfrot.quant.affine import SCALE_DTYPE, QParams, choose_qparams, dequantize, quantize
from dfrot.quant.packing import pack, packed_width, unpack
from dfrot.quant.spec import UNQUANTIZED, Spec, TensorSpec
from dfrot.runtime.key_bias import BiasAt, KeyBias, Positions, left_out, positions_of_all
from dfrot.runtime.norms import differentiated, in_float64, straight_through

Heads = Float[Tensor, "batch heads tokens head_dim"]
ATTENTION = "dfrot"
_ROOM = 64  # tokens by which a cache grows at least


class PackedKV(NamedTuple):
    """Quantized keys or values of one layer."""

    codes: Tensor  # uint8 (batch, heads, tokens, ⌈head_dim · bits / 8⌉)
    scale: Tensor  # bfloat16 (batch, heads, tokens, 1)
    zero: Tensor  # uint8 (batch, heads, tokens, 1)

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self)

    def first(self, tokens: int) -> "PackedKV":
        """A view of the first tokens."""
        return PackedKV(*(part[:, :, :tokens] for part in self))

    def put(self, new: "PackedKV", at: int | Tensor) -> None:
        """Overwrite tokens from position `at` on."""
        for part, of_new in zip(self, new, strict=True):
            if isinstance(at, Tensor):
                part.index_copy_(2, at + torch.arange(of_new.shape[2], device=at.device), of_new)
            else:
                part[:, :, at : at + of_new.shape[2]] = of_new


class GradedKV(NamedTuple):
    """Quantized keys or values with what they are read by: the last tokens may have to get a gradient."""

    packed: PackedKV
    new: Tensor | None = None  # these tokens before they were quantized
    positions: Positions | None = None  # of cached keys whose bias stays out of them

    @staticmethod
    def of(states: "Tensor | PackedKV | GradedKV", pack: Callable[[Tensor], PackedKV]) -> "GradedKV":
        if isinstance(states, Tensor):
            return GradedKV(pack(states.detach()), states if differentiated(states) else None)
        return GradedKV(states) if isinstance(states, PackedKV) else states


class KVQuantizer(nn.Module):
    """Quantizes the keys and values of one attention module; has no weights.

    Args:
        keys, values, queries: the grids, asymmetric, one group per head; keys and values have the same bits.
        rotation: R3, or None.
        head_dim: channels of a head.
        key_bias: what stays out of the keys, if they have a bias.
    """

    def __init__(
        self,
        keys: TensorSpec,
        values: TensorSpec,
        rotation: Rotation | None,
        head_dim: int,
        queries: TensorSpec = UNQUANTIZED,
        key_bias: KeyBias | None = None,
    ) -> None:
        super().__init__()
        self.key_bias = key_bias
        self.keys, self.values, self.queries = keys, values, queries
        self.rotation, self.head_dim = rotation, head_dim
        # now: what torch.compile traces finds it made
        self._lowered: tuple[Rotation | None, Lowered | None] = rotation, None if rotation is None else lower(rotation)

    def rotate(self, x: Heads) -> Heads:
        """Queries or keys, rotated by R3."""
        if self.rotation is None:
            return x
        if linear.computable(x) and self.passes is not None:
            return linear.rotate(x, *self.passes)
        return in_float64(self.rotation.apply, x)

    def quantize_queries(self, x: Heads) -> Heads:
        """Queries as keys meet them: rotated, and quantized if that is asked for."""
        rotated = self.rotate(x)
        return straight_through(self.queries.fake_quantize(rotated.detach()), rotated)

    def native(self, x: Tensor) -> bool:
        """Whether the kernels can do their part for such heads."""
        return attention.supported(x, self.keys) and self.passes is not None

    @property
    def passes(self) -> Lowered | None:
        """R3 as the kernels take it, if they can."""
        if self._lowered[0] is not self.rotation:
            self._lowered = self.rotation, None if self.rotation is None else lower(self.rotation)
        return NO_PASSES if self.rotation is None else self._lowered[1]

    def room(self, batch: int, heads: int, capacity: int, device: torch.device) -> PackedKV:
        """For keys or values of so many tokens."""
        parts = (packed_width(self.head_dim, self.keys.bits), torch.uint8), (1, SCALE_DTYPE), (1, torch.uint8)
        made = (torch.zeros(batch, heads, capacity, n, dtype=dtype, device=device) for n, dtype in parts)
        return PackedKV(*made)

    def rooms(self, batch: int, heads: int, capacity: int, device: torch.device) -> tuple[PackedKV, PackedKV]:
        """For both."""
        return self.room(batch, heads, capacity, device), self.room(batch, heads, capacity, device)

    def write(self, keys: Heads, values: Heads, room: tuple[PackedKV, PackedKV], at: int | Tensor) -> None:
        """Quantize new keys, rotated, and values into `room`, from position `at` on."""
        if self.native(keys):
            assert self.passes is not None, "native() has checked the rotation"
            position, start = (0, at) if isinstance(at, Tensor) else (at, None)
            grids = (self.keys.bits, self.keys.fixed_clip), (self.values.bits, self.values.fixed_clip)
            attention.append(keys, [*room[0]], position, *self.passes, *grids[0], start)
            attention.append(values, [*room[1]], position, *NO_PASSES, *grids[1], start)
        else:
            room[0].put(self.pack_keys(keys), at)
            room[1].put(self.pack_values(values), at)

    def pack_keys(self, x: Heads) -> PackedKV:
        """Keys, rotated and quantized."""
        if self.native(x) and self.passes is not None:
            return self._append(x, self.passes, self.keys)
        return self.pack(self.rotate(x), self.keys)

    def pack_values(self, x: Heads) -> PackedKV:
        return self._append(x, NO_PASSES, self.values) if self.native(x) else self.pack(x, self.values)

    def _append(self, x: Heads, passes: Lowered, spec: TensorSpec) -> PackedKV:
        """The kernels' way: to a cache that is empty."""
        packed = self.room(x.shape[0], x.shape[1], x.shape[2], x.device)
        attention.append(x, [*packed], 0, *passes, spec.bits, spec.fixed_clip)
        return packed

    def pack(self, x: Heads, spec: TensorSpec) -> PackedKV:
        """Heads quantized as they are, by torch alone."""
        wide = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
        grid, granularity = spec.grid, spec.token_granularity
        qparams = choose_qparams(wide, grid, granularity, spec.fixed_clip, SCALE_DTYPE)
        codes = quantize(wide, grid, granularity, qparams)
        assert qparams.zero is not None, "keys and values have an asymmetric grid"
        zero = torch.nan_to_num(qparams.zero).to(torch.uint8)  # a NaN lives on in the scale
        parts = pack(codes, spec.bits), qparams.scale.to(SCALE_DTYPE), zero
        return PackedKV(*(part.contiguous() for part in parts))

    def unpack(self, packed: PackedKV, dtype: torch.dtype) -> Heads:
        if attention.supported(torch.empty(0, self.head_dim, dtype=dtype, device=packed.codes.device), self.keys):
            return attention.unpack([*packed], self.keys.bits, dtype)
        wide = torch.promote_types(dtype, torch.float32)
        codes = unpack(packed.codes, self.keys.bits, self.head_dim)
        qparams = QParams(packed.scale.to(wide), packed.zero.to(wide))
        return dequantize(codes, self.keys.token_granularity, qparams).to(dtype)


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
        self._packed: tuple[PackedKV, PackedKV] | None = None
        self._positions: Tensor | None = None  # int32 (batch, 1, tokens, 1), as `_map` wants it

    keys = property(lambda self: self._shown(0))
    values = property(lambda self: self._shown(1))

    def _shown(self, which: int) -> Heads | None:
        """Keys (0) or values as other caches show them, unpacked, not rotated, without a bias that stays out of them;
        None before the first token."""
        if self._packed is None:
            return None
        shown, rotation = self._quantizer.unpack(self._packed[which], self.dtype), self._quantizer.rotation
        return shown if which or rotation is None else in_float64(rotation.T.apply, shown)

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

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        room = self.reserve(*key_states.shape[:3])
        with torch.no_grad():
            self._quantizer.write(key_states, value_states, room, self.get_seq_length())
        packed = self.advance(key_states.shape[2])
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
        for old, new in zip(self._packed or (), room, strict=False):
            new.put(old, 0)
        self._room = room
        return room

    def advance(self, tokens: int) -> tuple[PackedKV, PackedKV]:
        """The cache with so many of the reserved tokens, which have been written."""
        assert self._room is not None, "reserve comes first"
        keys, values = self._room
        length = self.get_seq_length() + tokens
        if self._quantizer.key_bias is not None:
            new = torch.arange(length - tokens, length)[None] if self.coming is None else self.coming
            new = new.to(keys.codes.device, torch.int32).expand(len(keys.codes), -1)[:, None, :, None]
            self._positions = new if self._positions is None else torch.cat([self._positions, new], dim=2)
            self.coming = None
        self._packed = keys.first(length), values.first(length)
        return self._packed

    def _map(self, change: Any) -> None:
        self._positions = None if self._positions is None else change(self._positions)
        if self._packed is not None:
            self._packed = self._room = tuple(PackedKV(*map(change, packed)) for packed in self._packed)  # type: ignore[assignment]

    def get_seq_length(self) -> int:
        return 0 if self._packed is None else self._packed[0].codes.shape[-2]

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes minus the number of tokens to remove, got {tokens_to_remove}")
        if tokens_to_remove:
            self._map(lambda part: part[..., :tokens_to_remove, :])

    def reset(self) -> None:
        self._packed, self._room, self._positions, self.is_initialized = None, None, None, False

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
        self._room = self._packed = self._quantizer.rooms(batch, heads, self.max_cache_len, self.device)
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


def quantized_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor | PackedKV | GradedKV,
    value: Tensor | PackedKV | GradedKV,
    attention_mask: Tensor | None,
    output_attentions: bool = False,
    **arguments: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention over quantized keys and values, with its weights if they are asked for; registered as "dfrot"."""
    quantizer = getattr(module, "kv_quantizer", None)
    if not isinstance(quantizer, KVQuantizer):
        raise ValueError(f"the attention '{ATTENTION}' belongs to checkpoints of dfrot that quantize keys and values")
    keys, values = GradedKV.of(key, quantizer.pack_keys), GradedKV.of(value, quantizer.pack_values)
    apart: BiasAt | None = None
    if quantizer.key_bias is not None and (bias := left_out(module)) is not None:
        positions, length = keys.positions, keys.packed.codes.shape[2]
        if positions is None:
            positions = positions_of_all(arguments["position_ids"], length, attention_mask)
        apart = quantizer.key_bias.at(bias, positions, query.dtype)
    tokens = query.shape[-2]
    fits = not output_attentions and (tokens == 1 if attention_mask is None else attention_mask.dtype == torch.bool)
    graded = keys.new is not None or values.new is not None or (apart is not None and differentiated(apart.first))
    if tokens <= attention.FEW and fits and quantizer.native(query) and not graded:
        prepared = quantizer.queries.enabled or apart is not None
        passes = NO_PASSES if prepared else quantizer.passes
        assert passes is not None, "native() has seen to it"
        scaling = arguments.get("scaling") or quantizer.head_dim**-0.5
        query = quantizer.quantize_queries(query) if prepared else query
        more = None if apart is None else scaling * apart.scores(query, quantizer.rotation)
        both = [*keys.packed], [*values.packed]
        return attention.attend(query, *both, attention_mask, more, *passes, scaling, quantizer.keys.bits), None
    dtype = query.dtype
    new_keys = None if keys.new is None else quantizer.rotate(keys.new)
    read_keys = _graded(quantizer.unpack(keys.packed, dtype), new_keys)
    read_values = _graded(quantizer.unpack(values.packed, dtype), values.new)
    parts = quantizer.quantize_queries(query), read_keys, read_values
    mask = attention_mask
    if tokens <= attention.FEW and dtype == torch.float32:  # as a block computes between its products
        parts = parts[0].double(), parts[1].double(), parts[2].double()
        mask = mask.double() if mask is not None and mask.dtype == torch.float32 else mask
    if apart is not None:
        parts = parts[0], (parts[1] + apart.keys(quantizer.rotation)).to(parts[1].dtype), parts[2]
    weights = attention.weights(*parts[:2], mask, arguments.get("scaling")).to(dtype) if output_attentions else None
    return sdpa_attention_forward(module, *parts, mask, **arguments)[0].to(dtype), weights


def _graded(unpacked: Tensor, new: Tensor | None) -> Tensor:
    """Unpacked keys or values; gradients of the last, new tokens pass straight through the quantizer."""
    if new is None:
        return unpacked
    before, last = unpacked.split([unpacked.shape[2] - new.shape[2], new.shape[2]], dim=2)
    return torch.cat([before, straight_through(last, new)], dim=2)


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


def install_kv_(
    decoder: nn.Module,
    attentions: list[nn.Module],
    specs: list[Spec],
    rotation: Rotation | None,
    key_bias: KeyBias | None,
) -> None:
    """Give every attention module its quantizer, with `rotation` for R3, and `generate` its cache."""
    for module, spec in zip(attentions, specs, strict=True):
        size = head_dim(decoder.config)
        module.kv_quantizer = KVQuantizer(spec.keys, spec.values, rotation, size, spec.queries, key_bias)
    hook = functools.partial(_quantize_empty_cache, cache_name(decoder))
    decoder.register_forward_pre_hook(hook, with_kwargs=True)


AttentionInterface.register(ATTENTION, quantized_attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
