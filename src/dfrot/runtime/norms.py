"""What a block computes between its products: norms, activation functions, rotations.

In float32 they compute in float64 and round once. So the reference and the kernels, which sum in other orders, hand the
same floats to the quantizers, nearly always to the last bit; it matters, because at 4 bits a float on the other side of
a tie changes everything behind it.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dfrot.kernels import linear
from dfrot.kernels.lowering import DENSE, NO_PASSES, PERMUTE, Lowered, lower
from dfrot.linalg.rotation import Rotation, block_rotation


def in_float64(compute: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """compute(x), for float32 in float64."""
    return compute(x.double()).float() if x.dtype == torch.float32 else compute(x)


def differentiated(*tensors: Tensor | None) -> bool:
    """Whether a gradient may be asked for of one of the tensors."""
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def wide(dtype: torch.dtype) -> torch.dtype:
    """Of the tensors of online transforms in a model of a dtype."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def straight_through(value: Tensor, graded: Tensor) -> Tensor:
    """The value, with the gradient of what it stands for."""
    return value.detach() + (graded - graded.detach()).to(value.dtype) if differentiated(graded) else value


class Float64SiLU(nn.SiLU):
    """x σ(x)."""

    def forward(self, x: Tensor) -> Tensor:
        return in_float64(super().forward, x)


class Float64RMSNorm(nn.RMSNorm):
    """x / √(mean x² + ε) · weight."""

    def __init__(self, norm: nn.RMSNorm) -> None:
        super().__init__(norm.normalized_shape, eps=norm.eps, device="meta")
        self.weight = norm.weight

    def forward(self, x: Float[Tensor, "*batch size"]) -> Float[Tensor, "*batch size"]:
        weight = self.weight.double() if x.dtype == torch.float32 else self.weight
        return in_float64(lambda y: nn.functional.rms_norm(y, self.normalized_shape, weight, self.eps), x)


class BlockRotation(nn.Module):
    """x ↦ x B₁ P₁ B₂ …, each B one block along the diagonal, each P a permutation.

    Buffers: `matrices` float32 (float64 in a float64 model) (count, block, block), `orders` int32 (count − 1, size).
    """

    matrices: Tensor
    orders: Tensor

    def __init__(self, size: int, block: int, count: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.register_buffer("matrices", torch.empty(count, block, block, dtype=wide(dtype)))
        self.register_buffer("orders", torch.empty(count - 1, size, dtype=torch.int32))

    @property
    def as_rotation(self) -> Rotation:
        return block_rotation(self.matrices, self.orders)

    @property
    def passes(self) -> Lowered:
        """The same as the kernels take it."""
        numbers, data = [DENSE, self.matrices.shape[-1], 1], [self.matrices[0].float()]
        for order, matrix in zip(self.orders, self.matrices[1:], strict=True):
            numbers += [PERMUTE, len(order), 1, DENSE, len(matrix), 1]
            data += [order, matrix.float()]
        return Lowered(tuple(numbers), tuple(data), 1)

    def forward(self, x: Float[Tensor, "*batch size"]) -> Float[Tensor, "*batch size"]:
        if linear.computable(x):
            return linear.rotate(x, *self.passes)
        return in_float64(self.as_rotation.apply, x)


class Transforming:
    """A module that rotates, and takes less an offset, what it reads or hands out: both as the kernels take them."""

    rotation: Rotation | BlockRotation | None
    offset: Tensor | None
    _lowered: tuple[Any, Lowered | None] = None, NO_PASSES  # a rotation and its passes, which are made once

    @property
    def passes(self) -> Lowered | None:
        """Rotation and offset as the kernels take them, if they can."""
        if isinstance(self.rotation, BlockRotation):
            return self.rotation.passes.less(self.offset)
        if self._lowered[0] is not self.rotation:
            self._lowered = self.rotation, NO_PASSES if self.rotation is None else lower(self.rotation)
        passes = self._lowered[1]
        return None if passes is None else passes.less(self.offset)


def transformed(
    x: Float[Tensor, "*batch size"],
    rotation: Rotation | BlockRotation | None,
    offset: Float[Tensor, " size"] | None,
) -> Float[Tensor, "*batch size"]:
    """x R − o, which is then quantized."""
    if isinstance(rotation, BlockRotation):
        if offset is None:
            return rotation(x)
        rotation = rotation.as_rotation
    if rotation is None and offset is None:
        return x
    return in_float64(functools.partial(_transform, rotation, offset), x)


def _transform(rotation: Rotation | None, offset: Tensor | None, x: Tensor) -> Tensor:
    x = x if rotation is None else rotation.apply(x)
    return x if offset is None else x - offset.to(x)


class TransformedNorm(Transforming, Float64RMSNorm):
    """A norm that hands its output out rotated, and less an offset, once for all layers that read it.

    Buffer, if there is an offset: `offset` float32 (float64 in a float64 model) (size,).
    """

    offset: Tensor | None

    def __init__(self, norm: nn.RMSNorm, rotation: Rotation | BlockRotation | None, offset: bool) -> None:
        super().__init__(norm)
        self.rotation = rotation
        weight = norm.weight
        self.register_buffer("offset", torch.empty(len(weight), dtype=wide(weight.dtype)) if offset else None)
        if isinstance(rotation, Rotation):  # now: what torch.compile traces finds it made
            self._lowered = rotation, lower(rotation)

    def forward(self, x: Float[Tensor, "*batch size"]) -> Float[Tensor, "*batch size"]:
        y = super().forward(x)
        if isinstance(self.rotation, Rotation) and linear.computable(y) and (passes := self.passes) is not None:
            return linear.rotate(y, *passes)
        return transformed(y, self.rotation, self.offset)
