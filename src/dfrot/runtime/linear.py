"""A linear layer with an online rotation and an offset, a quantized input and a packed weight, each of them optional.

A product is computed in one of four ways. In float32 the first three agree, nearly always to the last bit; the fourth
sums floats:

| way | when |
|---|---|
| fused block in C (fused/block.py) | the kernels know grids and input; nothing observes or differentiates it |
| one layer in C | the kernels know grids and input, but the block is not fused |
| exact integer product in torch | otherwise, in float32 or float64 with one scale per output channel |
| float product in torch | 16 bits, weight groups, unquantized tensors; the gradient of the integer product |

In C, inputs that are not quantized are multiplied by what the integers stand for, as floats: see native/floats.c.
"""

import torch
from jaxtyping import Float, Int, Num
from torch import Tensor, nn

from dfrot.kernels.linear import PackedWeight, linear, supported
from dfrot.kernels.lowering import NO_PASSES, lower
from dfrot.linalg.rotation import Rotation
from dfrot.quant.affine import SCALE_DTYPE, QParams, choose_qparams, dequantize, quantize
from dfrot.quant.packing import pack, packed_width, unpack
from dfrot.quant.spec import TensorSpec
from dfrot.runtime.norms import BlockRotation, Transforming, differentiated, straight_through, transformed, wide
from dfrot.system.kept import Kept


class QuantLinear(Transforming, nn.Module):
    """y = Q_a(x R − o) Ŵᵀ + b: rotate, quantize every token, multiply by the dequantized weight.

    Buffers: `qweight` uint8 (out, ⌈in · bits / 8⌉), `scales` bfloat16 (out, groups), for asymmetric grids `zeros` uint8
    (out, groups), and if there is one the `offset` o, float32 (float64 in a float64 model) (in,). Codes of symmetric
    grids are stored with 2^(bits−1) added, floats of 4 bits as sign, exponent and mantissa. With 16-bit weights there
    is a plain `weight` (out, in) instead.

    A layer that `leaves_out` something lets others add its bias; or the buffer `apart`, if it has one, float32 (float64
    in a float64 model) (out,), which it takes from what it puts out: see runtime/key_bias.py.

    The kernels leave the weight packed. The reference unpacks it on first use and keeps it, trading memory for a
    readable product.
    """

    qweight: Tensor
    scales: Tensor
    zeros: Tensor
    offset: Tensor | None
    apart: Tensor | None
    by_reference = False  # whether torch computes it, whatever kernels there are

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
        leaves_out: bool = False,
        offset: bool = False,
        apart: bool = False,
    ) -> None:
        super().__init__()
        self.leaves_out = leaves_out
        self.in_features, self.out_features = in_features, out_features
        self.weights, self.activations, self.rotation = weights, activations, rotation
        self.weight: nn.Parameter | None = None
        if weights.enabled:
            groups = 1 if weights.group is None else in_features // weights.group
            width = packed_width(in_features, weights.bits)
            self.register_buffer("qweight", torch.empty(out_features, width, dtype=torch.uint8))
            self.register_buffer("scales", torch.empty(out_features, groups, dtype=SCALE_DTYPE))
            if not weights.symmetric:
                self.register_buffer("zeros", torch.empty(out_features, groups, dtype=torch.uint8))
        else:
            self.weight = nn.Parameter(torch.empty(out_features, in_features, dtype=dtype), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(out_features, dtype=dtype), requires_grad=False) if bias else None
        self.register_buffer("offset", torch.empty(in_features, dtype=wide(dtype)) if offset else None)
        self.register_buffer("apart", torch.empty(out_features, dtype=wide(dtype)) if apart else None)
        self._added: Kept[Tensor] = Kept()
        self._dense: Kept[Tensor] = Kept()
        self._integers: Kept[Tensor] = Kept()
        if isinstance(rotation, Rotation):  # now: what torch.compile traces finds it made
            self._lowered = rotation, lower(rotation)

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        if self.native(x):
            if (passes := self.passes) is None:
                x, passes = self.transformed(x), NO_PASSES
            return linear(x, [self.packed], passes, self.weights, self.activations)[0]
        if not self.exact(x):
            return self.float_product(x)
        y = self.integer_product(x.detach())
        return straight_through(y, self.float_product(x)) if differentiated(x, *self._graded) else y

    def float_product(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        """Q(x R − o) Ŵᵀ + b, a product of what the integers stand for; gradients pass straight through Q."""
        return nn.functional.linear(self.quantize_input(x), self.dense_weight(x.dtype), self.added)

    def exact(self, x: Tensor) -> bool:
        """Whether the reference multiplies integers; in 16 bits a product of floats is faster on a GPU."""
        quantizes = self.weight is None and self.activations.enabled
        whole_rows = self.weights.group is None and self.activations.group is None
        return quantizes and whole_rows and x.dtype in (torch.float32, torch.float64)

    def integer_product(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        """s t Σ (a − z)(w − v) + b as the kernels compute it: an exact sum of integers, then the scales."""
        x, spec = self.transformed(x), self.activations
        qparams = choose_qparams(x, spec.grid, spec.token_granularity, spec.fixed_clip)
        codes = quantize(x, spec.grid, spec.token_granularity, qparams)
        fits = self.in_features * 2 ** (spec.bits + self.weights.bits) <= 2**24  # integers that float32 has
        weight = self.integer_weight(x.dtype if fits else torch.float64)
        centred = codes.to(weight.dtype) - (0 if qparams.zero is None else qparams.zero.to(weight.dtype))
        sums = nn.functional.linear(centred, weight).to(x.dtype)
        y = sums * self.scales[:, 0].to(x.dtype) * qparams.scale
        return y if self.added is None else y + self.added

    def native(self, x: Tensor) -> bool:
        """Whether the kernels can compute the layer for such an input."""
        fits = self.weight is None and not self.by_reference and supported(x, self.weights, self.activations)
        return fits and not self.qweight.is_meta and not differentiated(*self._graded)

    @property
    def _graded(self) -> tuple[Tensor | None, ...]:
        """What gradients may be asked for of, beside the input."""
        return self.scales, self.added, self.offset

    @property
    def added(self) -> Float[Tensor, " out"] | None:
        """b, less what others add."""
        bias, apart = self.bias, self.apart
        if not self.leaves_out or apart is None:
            return None if self.leaves_out else bias
        return self._added.get(lambda: -apart if bias is None else (bias - apart).to(bias), [bias, apart])

    @property
    def left_out(self) -> Float[Tensor, " out"] | None:
        """What others add."""
        left = self.bias if self.apart is None else self.apart
        return left if self.leaves_out else None

    @property
    def packed(self) -> PackedWeight:
        """The weight as the kernels take it."""
        return PackedWeight(self.qweight, self.scales, None if self.weights.symmetric else self.zeros, self.added)

    def quantize_input(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch in"]:
        """What the weight is multiplied by: the input rotated, less the offset, and quantized."""
        x = self.transformed(x)
        return straight_through(self.activations.fake_quantize(x.detach()), x) if self.activations.enabled else x

    def transformed(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch in"]:
        """The input in the basis of the weight, less the offset."""
        return transformed(x, self.rotation, self.offset)

    def dense_weight(self, dtype: torch.dtype) -> Float[Tensor, "out in"]:
        """The weight that the integers stand for."""
        if self.weight is not None:
            return self.weight
        return self._dense.get(lambda: self._dequantized(dtype), self.packed[:3], dtype)

    def _dequantized(self, dtype: torch.dtype) -> Float[Tensor, "out in"]:
        scales, zeros = self.scales.to(wide(dtype)), None if self.weights.symmetric else self.zeros.to(wide(dtype))
        return dequantize(self.codes(), self.weights.weight_granularity, QParams(scales, zeros)).to(dtype)

    def integer_weight(self, dtype: torch.dtype, keep: bool = True) -> Float[Tensor, "out in"]:
        """The integers w − v themselves, as floats; made anew each time unless they are kept."""
        if keep:
            return self._integers.get(lambda: self.integer_weight(dtype, keep=False), self.packed[:3], dtype)
        return self.centred(self.codes()).to(dtype)

    def centred(self, codes: Num[Tensor, "out in"]) -> Num[Tensor, "out in"]:
        """Codes less the zero points of their groups."""
        if self.weights.symmetric:
            return codes
        return codes - self.zeros.repeat_interleave(self.in_features // self.scales.shape[1], 1)

    def codes(self) -> Int[Tensor, "out in"]:
        """The integers w that the checkpoint keeps packed."""
        return self.weights.grid.decode(unpack(self.qweight, self.weights.bits, self.in_features))

    def kept_tensors(self) -> list[Tensor]:
        """All tensors that the layer keeps in memory: the checkpoint's, and those derived from them."""
        unpacked = [kept.value for kept in (self._dense, self._integers) if kept.value is not None]
        return [*self.parameters(), *self.buffers(), *unpacked]

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"w{self.weights}a{self.activations}, rotation={type(self.rotation).__name__}"
        )


def packed_tensors(codes: Tensor, qparams: QParams, spec: TensorSpec) -> dict[str, Tensor]:
    """The buffers of a `QuantLinear` for integers (out, in) and their scales."""
    tensors = {"qweight": pack(spec.grid.encode(codes), spec.bits), "scales": qparams.scale.to(SCALE_DTYPE)}
    if qparams.zero is not None:
        tensors["zeros"] = qparams.zero.to(torch.uint8)
    return tensors
