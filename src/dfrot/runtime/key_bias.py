"""The bias of keys, which stays out of the cache.

RoPE is linear: RoPE(W x + b, p) = RoPE(W x, p) + RoPE(b, p). The last term is the same for all tokens at position p,
and may be by far the larger one: ‖b‖ reaches 393 in Qwen2.5-Coder-0.5B. Quantized with it, what tells tokens apart
would vanish between two steps. So only RoPE(W x, p) is quantized, and RoPE(b, p) is added where keys are read. The same
is done on demand with a mean key in place of b: see methods/key_means.py.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from dfrot.linalg.rotation import Rotation
from dfrot.models.graph import ModelGraph
from dfrot.quant.spec import TensorSpec
from dfrot.runtime.linear import QuantLinear

Positions = Int[Tensor, "#batch length"]


class BiasAt(NamedTuple):
    """RoPE(b, p) for the positions p of some keys. Channels j and j + head_dim / 2 are the coordinates of a plane."""

    first: Float[Tensor, "kv_heads 1 planes"]  # the coordinates of b
    second: Float[Tensor, "kv_heads 1 planes"]
    cos: Float[Tensor, "#batch 1 length planes"]
    sin: Float[Tensor, "#batch 1 length planes"]

    def keys(self, rotation: Rotation | None) -> Float[Tensor, "#batch kv_heads length head_dim"]:
        """RoPE(b, p), rotated."""
        (x, y), (cos, sin) = self[:2], self[2:]
        turned = torch.cat([x * cos - y * sin, y * cos + x * sin], -1)
        return turned if rotation is None else rotation.apply(turned)

    def scores(self, query: Tensor, rotation: Rotation | None) -> Float[Tensor, "batch heads tokens length"]:
        """Products of rotated queries (batch, heads, tokens, head_dim) with these keys, none of which is made."""
        plain = query.double() if rotation is None else rotation.T.apply(query.double())
        q, r = plain.to(self.cos.dtype).chunk(2, -1)
        x, y = (part.repeat_interleave(query.shape[1] // len(part), 0) for part in self[:2])  # heads that share keys
        return ((q * x + r * y) @ self.cos.mT + (r * x - q * y) @ self.sin.mT).double()


@dataclass(frozen=True)
class KeyBias:
    """How positions turn a bias that stays out of the keys."""

    frequencies: tuple[float, ...]  # of planes, radians per position
    scaling: float  # of cos and sin

    @staticmethod
    def of(
        block: nn.Module, graph: ModelGraph, rotary: Any, keys: TensorSpec, *, any_bias: bool = False
    ) -> "KeyBias | None":
        """For a block as its model's config makes it, and the decoder's RoPE; None if keys are not quantized, or have
        no bias and get none, or one that stays in: a norm follows it, RoPE is another, or its frequencies change with
        the text."""
        if not keys.enabled or graph.key is None or not (any_bias or block.get_submodule(graph.key).bias is not None):
            return None
        if graph.head_norms or not graph.rope_in_halves or rotary.rope_type in ("dynamic", "longrope"):
            return None
        with torch.device("cpu"):  # the block may be on no device
            made = type(rotary)(config=rotary.config)
        return KeyBias(tuple(made.inv_freq.tolist()), made.attention_scaling)

    def at(self, bias: Float[Tensor, " channels"], positions: Positions, dtype: torch.dtype) -> BiasAt:
        """In a stream of this dtype, to which cos and sin are rounded as by transformers; all else is computed in
        float64, for streams of 16 bits in float32."""
        wide = torch.float32 if dtype.itemsize == 2 else torch.float64
        frequencies = torch.tensor(self.frequencies, dtype=torch.float32, device=positions.device)
        angles = positions[:, None, :, None].float() * frequencies
        first, second = bias.to(wide).view(-1, 1, 2 * len(self.frequencies)).chunk(2, -1)
        return BiasAt(first, second, *((f(angles) * self.scaling).to(dtype).to(wide) for f in (torch.cos, torch.sin)))


def left_out(attention: nn.Module) -> Float[Tensor, " channels"] | None:
    """What the layer of keys leaves out, as it is now; None if another layer has taken its place."""
    layers: Any = (module for module in attention.modules() if isinstance(module, QuantLinear))
    layer = next((each for each in layers if each.leaves_out), None)
    if layer is None or layer.left_out is None or not layer.left_out.is_meta:
        return None if layer is None else layer.left_out
    from accelerate.utils import align_module_device  # which has it elsewhere until the layer runs

    with align_module_device(layer):
        return layer.left_out


def positions_of_all(new: Int[Tensor, "#batch tokens"], length: int, mask: Tensor | None) -> Positions:
    """Positions of all keys from those of the new tokens, for a cache that keeps none: counted back over the keys at
    which a query looks, as `generate` counts them.

    Args:
        mask: (batch, 1, tokens, length); None: one query looks at all keys, the i-th of several at the first i.
    """
    tokens = new.shape[-1]
    if tokens == length or (mask is None and tokens > 1):  # no key before, and maybe room behind
        return nn.functional.pad(new, (0, length - tokens))
    if mask is None:
        return new[:, -1:] + torch.arange(1 - length, 1, device=new.device)
    looked = (mask if mask.dtype == torch.bool else mask == 0).flatten(1, 2).any(1)  # (batch, length)
    return new[:, -1:] + 1 - looked.flip(-1).cumsum(-1).flip(-1)
