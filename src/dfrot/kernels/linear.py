"""Linear layers as single operators: inputs are rotated, quantized row by row, multiplied by packed
integers with exact sums, and scaled.

Weights stay packed as in the checkpoint; a few rows at a time are unpacked, in the processor's nearest cache.
"""

import ctypes
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from dfrot.kernels.library import AVX2, instruction_set
from dfrot.kernels.lowering import Lowered, flatten
from dfrot.kernels.structures import DTYPES, Grid, check, computable, native, pointer, size, transform, weights_of
from dfrot.quant.spec import TensorSpec


class PackedWeight(NamedTuple):
    """The tensors of a `QuantLinear`, and the sums of its codes."""

    qweight: UInt8[Tensor, "out bytes"]
    scales: Float[Tensor, "out groups"]
    zeros: UInt8[Tensor, "out groups"] | None
    sums: Int[Tensor, "out groups"]
    bias: Float[Tensor, " out"] | None

    @staticmethod
    def of(
        qweight: Tensor, scales: Tensor, zeros: Tensor | None, bias: Tensor | None, spec: TensorSpec
    ) -> "PackedWeight":
        """From the tensors of a checkpoint; none is copied unless the kernels do not know its dtype."""
        groups = scales.shape[1]
        sums = torch.empty(len(qweight), groups, dtype=torch.int32)
        in_features = qweight.shape[1] * 8 // spec.bits
        native().dfrot_code_sums(
            *(pointer(qweight), size(len(qweight)), size(in_features)),
            *(spec.bits, size(in_features // groups), pointer(sums)),
        )
        scales = (scales if scales.dtype in DTYPES else scales.float()).contiguous()
        return PackedWeight(qweight.contiguous(), scales, zeros, sums, None if bias is None else bias.float())


def supported(x: Tensor, weights: TensorSpec, activations: TensorSpec) -> bool:
    """Whether there is a kernel for such grids and an input like x (…, in)."""
    if not computable(x):
        return False
    if weights.bits not in (4, 8) or not activations.enabled or x.shape[-1] * weights.bits % 8:
        return False
    if (isa := instruction_set()) < AVX2 or weights.group is None:
        return isa >= AVX2
    group_bytes, rest = divmod(weights.group * weights.bits, 8)
    fits = not rest and group_bytes % 4 == 0 and (64 % group_bytes == 0 or group_bytes % 64 == 0)
    return fits and (isa > AVX2 or group_bytes % 32 == 0)


def linear(
    x: Float[Tensor, "*batch in"],
    weights: Sequence[PackedWeight],
    rotation: Lowered,
    weight_spec: TensorSpec,
    activation_spec: TensorSpec,
) -> list[Tensor]:
    """Q(x R) Ŵᵀ + b, (…, out) in the dtype of x, for each of the weights that read x."""
    return bound(weights, rotation, weight_spec, activation_spec)(x)


def bound(
    weights: Sequence[PackedWeight], rotation: Lowered, weight_spec: TensorSpec, activation_spec: TensorSpec
) -> Callable[[Tensor], list[Tensor]]:
    """`linear` as a function of x alone, that torch.compile takes for one operator."""
    rest = *_columns(weights), *flatten(rotation), *_grids(weight_spec, activation_spec), instruction_set()
    return lambda x: _linear(x, *rest)


def _columns(
    weights: Sequence[PackedWeight],
) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor], list[Tensor | None]]:
    qweights, scales, zeros, sums, biases = (list(column) for column in zip(*weights, strict=True))
    return qweights, scales, [] if zeros[0] is None else zeros, sums, biases


def _grids(weights: TensorSpec, activations: TensorSpec) -> tuple[int, int, int, bool, float]:
    return weights.bits, weights.group or 0, activations.bits, activations.symmetric, activations.fixed_clip


def rotatable(x: Tensor) -> bool:
    """Whether the kernels can rotate rows like those of x (…, n)."""
    return computable(x) and instruction_set() >= AVX2


def rotate(x: Float[Tensor, "*batch n"], rotation: Lowered) -> Float[Tensor, "*batch n"]:
    """x R in the dtype of x, computed in float32, for float32 in float64."""
    return _rotate(x, *flatten(rotation), instruction_set())


# ---- The operators ---------------------------------------------------------------------------------------------------


@torch.library.custom_op("dfrot::linear", mutates_args=())
def _linear(
    x: Tensor,
    qweights: Sequence[Tensor],
    scales: Sequence[Tensor],
    zeros: Sequence[Tensor],
    sums: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    passes: Sequence[int],
    pass_data: Sequence[Tensor],
    square: float,
    weight_bits: int,
    group: int,
    bits: int,
    symmetric: bool,
    clip: float,
    isa: int,
) -> list[Tensor]:
    x = x.contiguous()
    made = [x.new_empty((*x.shape[:-1], len(qweight))) for qweight in qweights]
    weights = weights_of(qweights, scales, zeros, sums, biases, weight_bits, group)
    pointers = (ctypes.c_void_p * len(made))(*(y.data_ptr() for y in made))
    grid = Grid(bits, symmetric, clip)
    rotation = transform(passes, pass_data, square)
    check(
        native().dfrot_linear(
            *(isa, torch.get_num_threads(), pointer(x), DTYPES[x.dtype], size(x.numel() // x.shape[-1])),
            *(ctypes.byref(rotation), ctypes.byref(grid), len(made), weights, pointers),
        )
    )
    return made


@_linear.register_fake
def _(x: Tensor, qweights: Sequence[Tensor], *_: Any) -> list[Tensor]:
    return [x.new_empty((*x.shape[:-1], len(qweight))) for qweight in qweights]


@torch.library.custom_op("dfrot::rotate", mutates_args=())
def _rotate(x: Tensor, passes: Sequence[int], pass_data: Sequence[Tensor], square: float, isa: int) -> Tensor:
    x = x.contiguous()
    y = torch.empty_like(x)
    width, rotation = x.shape[-1], transform(passes, pass_data, square)
    check(
        native().dfrot_rotate(
            *(isa, torch.get_num_threads(), pointer(x), pointer(y), DTYPES[x.dtype], size(x.numel() // width)),
            *(size(width), ctypes.byref(rotation)),
        )
    )
    return y


@_rotate.register_fake
def _(x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x)
