"""Linear layers as single operators: inputs are rotated, quantized row by row, multiplied by packed
integers with exact sums, and scaled. Inputs that are not quantized are multiplied by what the integers stand for.

Weights stay packed as in the checkpoint; a few rows at a time are unpacked, in the processor's nearest cache.
"""

import ctypes
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from dfrot.kernels import cuda, library, structures
from dfrot.kernels.lowering import Lowered
from dfrot.kernels.structures import (
    DTYPES,
    Grid,
    Weights,
    instruction_set,
    machine,
    native,
    pointer,
    transform,
)
from dfrot.quant.packing import unpack
from dfrot.quant.spec import TensorSpec
from dfrot.system.kept import Kept

_SUMS = WeakTensorKeyDictionary()  # qweight → the kept sums of its codes


class PackedWeight(NamedTuple):
    """The tensors of a `QuantLinear`."""

    qweight: UInt8[Tensor, "out bytes"]
    scales: Float[Tensor, "out groups"]
    zeros: UInt8[Tensor, "out groups"] | None
    bias: Float[Tensor, " out"] | None

    def structure(self, bits: int, quantized: bool) -> tuple[Weights, list[Tensor | None]]:
        """The same for C, as long as the tensors beside it live: copies where the kernels do not know a dtype. Sums of
        codes are there for inputs that are `quantized`."""
        (out, groups), num_bytes = self.scales.shape, self.qweight.shape[1]
        width = num_bytes * 8 // bits
        codes, zeros = self.qweight.contiguous(), None if self.zeros is None else self.zeros.contiguous()
        scales = (self.scales if self.scales.dtype in DTYPES else self.scales.float()).contiguous()
        bias = None if self.bias is None else self.bias.float().contiguous()
        sums = self.code_sums(bits) if quantized else None
        made = Weights(
            *(out, width, width // groups, groups, bits, pointer(codes), num_bytes, pointer(scales)),
            *(DTYPES[scales.dtype], pointer(zeros), pointer(sums), pointer(bias)),
        )
        return made, [codes, scales, zeros, sums, bias]

    def code_sums(self, bits: int) -> Int[Tensor, "out groups"]:
        """Sums of the codes of every group, kept while the codes stay the same."""
        kept: Kept[Tensor] = _SUMS.setdefault(self.qweight, Kept())
        return kept.get(lambda: self._summed(bits), [self.qweight], bits, self.scales.shape[1])

    def _summed(self, bits: int) -> Int[Tensor, "out groups"]:
        (out, groups), codes = self.scales.shape, self.qweight.contiguous()
        width = codes.shape[1] * 8 // bits
        if codes.device.type != "cpu":
            return unpack(codes, bits, width).view(out, groups, -1).sum(-1, dtype=torch.int32)
        sums = torch.empty(out, groups, dtype=torch.int32)
        native().dfrot_code_sums(pointer(codes), out, width, bits, width // groups, pointer(sums))
        return sums


def computable(x: Tensor) -> bool:
    """Whether there are kernels for such a tensor, and nothing to differentiate."""
    return structures.computable(x) or cuda.computable(x)


def supported(x: Tensor, weights: TensorSpec, activations: TensorSpec) -> bool:
    """Whether there is a kernel for such grids and an input like x (…, in)."""
    integers = weights.integer and activations.integer
    if not (computable(x) and integers) or x.shape[-1] * weights.bits % 8:
        return False
    if x.is_cuda:
        from dfrot.kernels.cuda.linear import supported as supported_there

        return activations.enabled and supported_there(weights, activations, x.shape[-1])
    if not activations.enabled:
        return weights.enabled and (
            weights.group is None or (weights.group % 128 == 0 or weights.group in (8, 16, 32, 64))
        )
    if weights.bits not in (4, 8):
        return False
    if weights.group is None:
        return True
    group_bytes, rest = divmod(weights.group * weights.bits, 8)
    fits = not rest and group_bytes % 4 == 0 and (64 % group_bytes == 0 or group_bytes % 64 == 0)
    return fits and (instruction_set() >= library.AVX512 or group_bytes % 32 == 0)


def linear(
    x: Float[Tensor, "*batch in"],
    weights: Sequence[PackedWeight],
    rotation: Lowered,
    weight_spec: TensorSpec,
    activation_spec: TensorSpec,
) -> list[Tensor]:
    """Q(x R) Ŵᵀ + b, (…, out) in the dtype of x, for each of the weights that read x. To torch.compile, it is one
    operator."""
    parts = [part for weight in weights for part in weight]
    grid = activation_spec.bits, activation_spec.symmetric, activation_spec.fixed_clip
    return _linear(x, parts, *rotation, weight_spec.bits, *grid)


@torch.library.custom_op("dfrot::linear", mutates_args=())
def _linear(
    x: Tensor,
    parts: Sequence[Tensor | None],
    passes: Sequence[int],
    data: Sequence[Tensor],
    square: int,
    weight_bits: int,
    bits: int,
    symmetric: bool,
    clip: float,
) -> list[Tensor]:
    x, made = x.contiguous(), _products(x, parts)
    each = len(PackedWeight._fields)
    weights = [PackedWeight(*parts[at : at + each]) for at in range(0, len(parts), each)]  # type: ignore[arg-type]
    structures, kept = zip(*(weight.structure(weight_bits, bits <= 8) for weight in weights), strict=True)
    count = len(kept)
    native().dfrot_linear(
        *(*machine(), pointer(x), DTYPES[x.dtype], x.numel() // x.shape[-1]),
        *(transform(passes, data, square), Grid(bits, symmetric, clip), count),
        (Weights * count)(*structures),
        (ctypes.c_void_p * count)(*map(pointer, made)),
    )
    return made


@_linear.register_fake
def _products(x: Tensor, parts: Sequence[Tensor | None], *_: Any) -> list[Tensor]:
    qweights = parts[:: len(PackedWeight._fields)]
    return [x.new_empty((*x.shape[:-1], len(qweight))) for qweight in qweights if qweight is not None]


@torch.library.custom_op("dfrot::rotate", mutates_args=())
def rotate(x: Tensor, passes: Sequence[int], data: Sequence[Tensor], square: int) -> Tensor:
    """x R in the dtype of x (…, n), computed in float32, for float32 in float64. R is that of a `Lowered`."""
    x, width = x.contiguous(), x.shape[-1]
    y = torch.empty_like(x)
    sizes = DTYPES[x.dtype], x.numel() // width, width
    native().dfrot_rotate(*machine(), pointer(x), pointer(y), *sizes, transform(passes, data, square))
    return y


@rotate.register_fake
def _(x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


cuda.register(_linear, "linear", "products")
cuda.register(rotate, "rows", "rotate")
