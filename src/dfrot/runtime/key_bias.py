"""The bias of keys, which stays out of the cache.

RoPE turns linearly: RoPE(W x + b, p) = RoPE(W x, p) + RoPE(b, p). The last term is the same for all tokens at position
p, and may be by far the larger one: in Qwen2.5-Coder-0.5B ‖b‖ reaches 393. Quantized together, both would share steps
as wide as b. So only RoPE(W x, p) is quantized, and RoPE(b, p) is added where keys are read, or its scores are to
theirs.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from dfrot.models.graph import ModelGraph

Positions = Int[Tensor, "#batch length"]
_TEXT_DEPENDENT = ("dynamic", "longrope")  # kinds of RoPE whose frequencies depend on the length of the text


@dataclass(frozen=True)
class KeyBias:
    """Which layer of an attention module has the bias b, (kv_heads · head_dim), and how positions turn its heads.

    Channels j and j + head_dim / 2 are the coordinates of a plane. Angles are rounded to the element type of the
    residual stream, as transformers does it; all else is computed in float64 (in float32 for 16-bit streams).
    """

    layer: str
    frequencies: tuple[float, ...]  # of the planes, radians per position
    scaling: float  # of cos and sin

    @staticmethod
    def of(block: nn.Module, graph: ModelGraph, rotary: nn.Module) -> "KeyBias | None":
        """For a block as its model's config makes it; None if its keys have no bias, or one that stays within them:
        where a norm follows it, and where its turn is not a matter of the position alone.

        Args:
            rotary: transformers' module of the decoder; on any device.
        """
        fixed = getattr(rotary, "rope_type", None) not in _TEXT_DEPENDENT
        if graph.key is None or graph.head_norms or not fixed or block.get_submodule(graph.key).bias is None:
            return None
        with torch.device("cpu"):
            made = type(rotary)(config=rotary.config)
        layer = graph.key.removeprefix(f"{graph.attention}.")
        return KeyBias(layer, tuple(made.inv_freq.tolist()), made.attention_scaling)  # type: ignore[operator,arg-type]

    def read(self, attention: nn.Module) -> Float[Tensor, " channels"]:
        """b as the attention module has it now."""
        layer = attention.get_submodule(self.layer)
        if layer.bias.is_meta:
            from accelerate.utils import align_module_device  # has it elsewhere until it is needed

            with align_module_device(layer):
                return layer.bias  # type: ignore[return-value]
        return layer.bias  # type: ignore[return-value]

    def turned(
        self, bias: Float[Tensor, " channels"], positions: Positions, dtype: torch.dtype
    ) -> Float[Tensor, "#batch kv_heads length head_dim"]:
        """RoPE(b, p) in a stream of this dtype."""
        cos, sin = (part[:, None] for part in self._angles(positions, dtype))  # (batch, 1, length, head_dim / 2)
        first, second = self._planes(bias, cos.dtype)  # (kv_heads, 1, head_dim / 2)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)

    def scores(
        self,
        query: Float[Tensor, "batch heads tokens head_dim"],
        bias: Float[Tensor, " channels"],
        positions: Positions,
        dtype: torch.dtype,
    ) -> Float[Tensor, "batch heads tokens length"]:
        """q · RoPE(b, p) in a stream of this dtype, p by p: with each plane's (q₁b₁ + q₂b₂) cos + (q₂b₁ − q₁b₂) sin no
        key is made."""
        cos, sin = (part[:, None].mT for part in self._angles(positions, dtype))  # (batch, 1, head_dim / 2, length)
        first, second = self._planes(bias, cos.dtype)
        repeats = query.shape[1] // len(first)  # heads that share keys
        first, second = (part.repeat_interleave(repeats, 0) for part in (first, second))  # (heads, 1, head_dim / 2)
        one, other = query.to(cos.dtype).chunk(2, -1)
        return (one * first + other * second) @ cos + (other * first - one * second) @ sin

    def _angles(self, positions: Positions, dtype: torch.dtype) -> list[Float[Tensor, "#batch length planes"]]:
        """cos and sin, in the dtype of the computation."""
        wide = torch.float32 if dtype.itemsize == 2 else torch.float64
        frequencies = torch.tensor(self.frequencies, dtype=torch.float32, device=positions.device)
        angles = positions[..., None].float() * frequencies
        return [(part * self.scaling).to(dtype).to(wide) for part in (angles.cos(), angles.sin())]

    def _planes(
        self, bias: Float[Tensor, " channels"], dtype: torch.dtype
    ) -> tuple[Float[Tensor, "kv_heads 1 planes"], ...]:
        """The two coordinates of b in all planes."""
        return bias.to(dtype).view(-1, 1, 2 * len(self.frequencies)).chunk(2, -1)


def positions_of_all(new: Int[Tensor, "#batch tokens"], length: int, mask: Tensor | None) -> Positions:
    """Positions of all keys from those of the new tokens, for a cache that keeps none.

    Those of earlier keys are counted backwards over the keys at which some query looks, as `generate` counts them.

    Args:
        mask: (batch, 1, tokens, length), bool or what is added to scores; None where all keys are looked at.
    """
    if new.shape[-1] == length:
        return new
    if mask is None:
        return new[:, -1:] + torch.arange(1 - length, 1, device=new.device)
    looked = (mask if mask.dtype == torch.bool else mask == 0).flatten(1, 2).any(1)  # (batch, length)
    return new[:, -1:] + 1 - looked.flip(-1).cumsum(-1).flip(-1)
