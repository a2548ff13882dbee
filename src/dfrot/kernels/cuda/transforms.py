"""Rotations of rows on a GPU: those that are small products along the axes of a row, and the rest.

A Hadamard matrix of n channels is a Kronecker product of two or three, so a row, seen as an array (L, M, R), is
multiplied along each axis: tiles that fit into registers, and (L + M + R) / n of the whole matrix's cost.
"""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from dfrot.kernels.lowering import BUTTERFLIES, DENSE, SUBTRACT
from dfrot.linalg.hadamard import hadamard_matrix

LARGEST_SIDE, LARGEST_TILE = 256, 1 << 15  # entries

_KEPT = WeakTensorKeyDictionary()  # first matrix of a transform → passes, width, dtype and device → its sides


class Sides(NamedTuple):
    """What multiplies each axis of a row (L, M, R), padded with zeros to powers of two of 16 or more; None: nothing."""

    left: Tensor | None  # transposed
    middle: Tensor | None  # transposed
    right: Tensor | None
    shape: tuple[int, int, int]  # L, M, R

    @property
    def padded(self) -> tuple[int, int, int]:
        """The same in powers of two; without a middle M is 1."""
        left, middle, right = self.shape
        return _padded(left), 1 if middle == 1 else _padded(middle), _padded(right)


def sides(
    passes: Sequence[int], data: Sequence[Tensor], width: int, dtype: torch.dtype, device: torch.device
) -> Sides | None:
    """The sides of a transform but for SUBTRACT; None if it has no such form. Made once, and kept."""
    key, matrices = (tuple(passes), width, dtype, device), tuple(data)
    if DENSE not in passes[::3]:
        return _made(*key)
    kept = _KEPT.setdefault(matrices[0], {})
    if key not in kept:
        kept[key] = _sides(*key, matrices)
    return kept[key]


@functools.lru_cache(64)
def _made(passes: tuple[int, ...], width: int, dtype: torch.dtype, device: torch.device) -> Sides | None:
    return _sides(passes, width, dtype, device, ())


def _sides(
    passes: tuple[int, ...], width: int, dtype: torch.dtype, device: torch.device, data: tuple[Tensor, ...]
) -> Sides | None:
    matrices, behind = iter(data), width
    axes: list[tuple[int, Tensor | None]] = []
    for kind, size, after in zip(passes[::3], passes[1::3], passes[2::3], strict=True):
        if kind == SUBTRACT:
            continue
        if kind not in (BUTTERFLIES, DENSE) or behind % (size * after):
            return None  # a permutation, or axes that are not one behind the other
        matrix = hadamard_matrix(size).float() if kind == BUTTERFLIES else next(matrices).cpu()
        if ((matrix != 0) & (matrix.abs() != 1)).any():
            return None  # 16 bits would round it
        if behind > size * after:
            axes.append((behind // (size * after), None))
        axes.append((size, matrix))
        behind = after
    if behind > 1:
        axes.append((behind, None))
    if len(axes) == 1:
        axes.insert(0, (1, None))
    if not 2 <= len(axes) <= 3 or all(matrix is None for _, matrix in axes):
        return None
    if len(axes) == 2:
        axes.insert(1, (1, None))
    (left, first), (middle, second), (right, third) = axes
    parts = [_pad(part, dtype, device) for part in (_mT(first), _mT(second), third)]
    made = Sides(parts[0], parts[1], parts[2], (left, middle, right))
    fits = max(made.padded) <= LARGEST_SIDE and math.prod(made.padded) <= LARGEST_TILE
    return made if fits and not (middle > 1 and second is None) else None


def _mT(matrix: Tensor | None) -> Tensor | None:
    return None if matrix is None else matrix.T


def _padded(size: int) -> int:
    return max(16, 1 << (size - 1).bit_length())


def _pad(matrix: Tensor | None, dtype: torch.dtype, device: torch.device) -> Tensor | None:
    if matrix is None:
        return None
    more = _padded(len(matrix)) - len(matrix)
    return torch.nn.functional.pad(matrix, (0, more, 0, more)).to(device, dtype).contiguous()


def rotated(
    x: Float[Tensor, "rows width"], passes: Sequence[int], data: Sequence[Tensor], square: int
) -> Float[Tensor, "rows width"]:
    """Any transform, by torch, in float32."""
    y, tensors = x.float(), iter(data)
    offset = None
    for kind, size, after in zip(passes[::3], passes[1::3], passes[2::3], strict=True):
        matrix = _sylvester(size, y.device) if kind == BUTTERFLIES else next(tensors).to(y.device)
        if kind == SUBTRACT:
            offset = matrix
        elif kind in (BUTTERFLIES, DENSE):
            y = (y.unflatten(-1, (-1, size, after)).mT @ matrix).mT.flatten(-3)
        else:
            y = y[:, matrix]
    y = y * square**-0.5
    return y if offset is None else y - offset


@functools.lru_cache(16)
def _sylvester(size: int, device: torch.device) -> Tensor:
    return hadamard_matrix(size).float().to(device)
