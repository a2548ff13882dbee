"""The algebra of folding, derived once.

A linear layer is y = x Wᵀ + b with W of shape (out, in) and rows of x being tokens. Let its input arrive as x Q,
and let its output leave as y P. Then

    y P = x Wᵀ P + b P = (x Q) (Qᵀ Wᵀ P) + b P = (x Q) (Pᵀ W Q)ᵀ + b P,

so the folded weight is Pᵀ W Q and the folded bias b P. If a norm's gain g stood in between, x = x̂ diag(g), W is
replaced by W diag(g) first: RMSNorm without gain commutes with Q, since ‖x Q‖ = ‖x‖; with a gain it does not. Nothing
needs centring here: RMSNorm subtracts no mean, and subtracting the embedding's is a known mistake. (A LayerNorm became
an RMSNorm when the model was read: `models.source.Source`.)

Smoothing divides the rotated input by s, channel by channel, before the online rotation R. The layer before, or the
norm's gain, absorbs the division, and

    y P = ((x Q) diag(1/s) R) (Pᵀ W Q diag(s) R)ᵀ + b P.

An input that arrives less an offset o, in the basis behind R, leaves the weight alone: the bias becomes b P + o Ŵᵀ, Ŵ
the folded weight. The runtime subtracts o; or the layer before does, whose bias is shifted.

Everything is computed in float64 and cast once, by the caller.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dfrot.linalg.rotation import Rotation


@dataclass(frozen=True, eq=False)
class Fold:
    """What one linear layer absorbs from its surroundings."""

    gain: Float[Tensor, " in"] | None = None  # of the norm before the layer
    input_rotation: Rotation | None = None  # Q, in whose basis the input arrives
    smooth: Float[Tensor, " in"] | None = None  # s, which divides the rotated input
    online: Rotation | None = None  # R, which the runtime then applies just before the layer
    output_rotation: Rotation | None = None  # P, in whose basis the output leaves
    output_rows: Int[Tensor, " rows"] | None = None  # on which P acts, if not on all: in a fused qkv the values
    output_divisor: Float[Tensor, " out"] | None = None  # divides the rotated output
    output_offset: Float[Tensor, " out"] | None = None  # is then subtracted from it
    offset: Float[Tensor, " in"] | None = None  # o, in the basis behind R
    offset_online: bool = True  # whether the runtime subtracts it; else the layer before

    def weight(self, weight: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        """Pᵀ W diag(g) Q diag(s) R in float64, its rows divided; always a new tensor."""
        w = weight.to(torch.float64, copy=True)
        if self.gain is not None:
            w = w * self.gain.to(w)
        if self.input_rotation is not None:
            w = self.input_rotation.apply(w)
        if self.smooth is not None:
            w = w * self.smooth.to(w)
        if self.online is not None:
            w = self.online.apply(w)
        if self.output_rotation is not None:
            rows = slice(None) if self.output_rows is None else self.output_rows
            w[rows] = self.output_rotation.apply(w[rows].T).T
        if self.output_divisor is not None:
            w /= self.output_divisor.to(w)[:, None]
        return w

    def bias(self, bias: Float[Tensor, " out"] | None, weight: Float[Tensor, "out in"]) -> Float[Tensor, " out"] | None:
        """b P + o Ŵᵀ in float64, divided and shifted; always a new tensor, None if there is no bias.

        Args:
            weight: Ŵ, the folded weight in float64.
        """
        if bias is None and self.offset is None and self.output_offset is None:
            return None
        b = torch.zeros_like(weight[:, 0]) if bias is None else bias.to(torch.float64, copy=True)
        if self.output_rotation is not None:
            rows = slice(None) if self.output_rows is None else self.output_rows
            b[rows] = self.output_rotation.apply(b[rows])
        if self.output_divisor is not None:
            b /= self.output_divisor.to(b)
        if self.offset is not None:
            b += weight @ self.offset.to(weight)
        if self.output_offset is not None:
            b -= self.output_offset.to(b)
        return b

    def arriving(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch in"]:
        """What the runtime makes of the layer's input: x R − o."""
        x = x if self.online is None else self.online.apply(x)
        return x if self.offset is None or not self.offset_online else x - self.offset.to(x)

    def norm_gain(self, gain: Float[Tensor, " in"]) -> Float[Tensor, " in"]:
        """The remaining gain of the norm before the layer, in float64: ones if it is folded; divided by s."""
        left = torch.ones_like(gain, dtype=torch.float64) if self.gain is not None else gain.double()
        return left if self.smooth is None else left / self.smooth.to(left)
