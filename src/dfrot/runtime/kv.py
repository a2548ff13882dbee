"""Keys and values in few bits: the quantizer, and the attention that reads them.

Keys are rotated (R3) and quantized after RoPE, without a bias that the model gives them (key_bias.py), values as v_proj
makes them (R2 is folded into it); each head of each token has its own scale and zero point. Queries are rotated too, so
that scores are unchanged, and on demand quantized on the same grid, as DuQuant has it: then both inputs of Q Kᵀ are in
few bits. An attention function, registered with transformers as "dfrot", carries this: it takes packed keys and values
from the cache (cache.py) and quantizes those that arrive as plain tensors. It leaves a few new tokens to the kernels,
and many, for which it unpacks the cache, to SDPA.

A full-precision cache gives the same numbers: quantization is per token, so it does not matter when it happens.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from dfrot.kernels import attention, linear
from dfrot.kernels.lowering import NO_PASSES, Lowered, lower
from dfrot.linalg.rotation import Rotation
from dfrot.quant.affine import SCALE_DTYPE, QParams, choose_qparams, dequantize, quantize
from dfrot.quant.packing import pack, packed_width, unpack
from dfrot.quant.spec import UNQUANTIZED, TensorSpec
from dfrot.runtime.key_bias import BiasAt, KeyBias, Positions, left_out, positions_of_all
from dfrot.runtime.norms import differentiated, in_float64, straight_through

Heads = Float[Tensor, "batch heads tokens head_dim"]
ATTENTION = "dfrot"


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


AttentionInterface.register(ATTENTION, quantized_attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
