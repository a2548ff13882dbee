"""A linear layer with an online rotation, a quantized input and a packed weight, each of them optional."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dfrot.linalg.rotation import Rotation
from dfrot.quant.affine import SCALE_DTYPE, QParams, dequantize, fake_quantize
from dfrot.quant.packing import pack, packed_width, unpack
from dfrot.runtime.blocks import BlockRotation
from dfrot.spec import TensorSpec


class QuantLinear(nn.Module):
    """y = Q_a(x R) Ŵᵀ + b: rotate, quantize every token, multiply by the dequantized weight.

    Buffers: `qweight` uint8 (out, ⌈in · bits / 8⌉), `scales` bfloat16 (out, groups), for asymmetric grids `zeros` uint8
    (out, groups). Codes of symmetric grids are stored with an offset of 2^(bits−1). With 16-bit weights there is a
    plain `weight` (out, in) instead.

    This is the reference: it unpacks the weight on first use and keeps it, trading memory for an exact and readable
    product.
    """

    qweight: Tensor
    scales: Tensor
    zeros: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool,
        weights: TensorSpec,
        activations: TensorSpec,
        rotation: Rotation | BlockRotation | None,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weights, self.activations, self.rotation = weights, activations, rotation
        self.weight: nn.Parameter | None = None
        if weights.quantizes:
            groups = 1 if weights.group is None else in_features // weights.group
            width = packed_width(in_features, weights.bits)
            self.register_buffer("qweight", torch.empty(out_features, width, dtype=torch.uint8))
            self.register_buffer("scales", torch.empty(out_features, groups, dtype=SCALE_DTYPE))
            if not weights.symmetric:
                self.register_buffer("zeros", torch.empty(out_features, groups, dtype=torch.uint8))
        else:
            self.weight = nn.Parameter(torch.empty(out_features, in_features, dtype=dtype), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(out_features, dtype=dtype), requires_grad=False) if bias else None
        self._unpacked: Tensor | None = None

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        return nn.functional.linear(self.prepared(x), self.dense_weight(x.dtype), self.bias)

    def prepared(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch in"]:
        """What the weight is multiplied by: the input rotated and quantized."""
        x = self.rotated(x)
        if self.activations.quantizes:
            assert self.activations.clip is not None, "activations have a fixed clip ratio"
            grid, granularity = self.activations.grid, self.activations.token_granularity
            q = fake_quantize(x.detach(), grid, granularity, self.activations.clip)
            x = x + (q - x).detach() if x.requires_grad else q  # rounding passes gradients straight through
        return x

    def rotated(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch in"]:
        """The input in the basis of the weight."""
        if self.rotation is None:
            return x
        return self.rotation(x) if isinstance(self.rotation, BlockRotation) else self.rotation.apply(x)

    def dense_weight(self, dtype: torch.dtype) -> Float[Tensor, "out in"]:
        """The weight that the integers stand for."""
        if self.weight is not None:
            return self.weight
        if self._unpacked is None or self._unpacked.dtype != dtype or self._unpacked.device != self.qweight.device:
            wide = torch.float64 if dtype == torch.float64 else torch.float32
            codes = unpack(self.qweight, self.weights.bits, self.in_features).to(torch.int16)
            if self.weights.symmetric:
                codes -= 2 ** (self.weights.bits - 1)
            zero = None if self.weights.symmetric else self.zeros.to(wide)
            qparams = QParams(self.scales.to(wide), zero)
            self._unpacked = dequantize(codes, self.weights.weight_granularity, qparams).to(dtype)
        return self._unpacked

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"w{self.weights.bits}a{self.activations.bits}, rotation={type(self.rotation).__name__}"
        )


def packed_tensors(codes: Tensor, qparams: QParams, spec: TensorSpec) -> dict[str, Tensor]:
    """The buffers of a `QuantLinear` for integers (out, in) and their scales."""
    if spec.symmetric:
        codes = (codes.to(torch.int16) + 2 ** (spec.bits - 1)).to(torch.uint8)
    tensors = {"qweight": pack(codes, spec.bits), "scales": qparams.scale.to(SCALE_DTYPE)}
    if qparams.zero is not None:
        tensors["zeros"] = qparams.zero.to(torch.uint8)
    return tensors
