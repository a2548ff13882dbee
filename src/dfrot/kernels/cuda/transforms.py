"""Rotations of rows on a GPU: those that are small products from two sides of a row, and the rest.

A Hadamard matrix of n channels is a Kronecker product of two or three. So a row, seen as an array (L, R), is multiplied
from the left and from the right: tiles that fit into registers, and (L + R) / n of the whole matrix's cost. Of three
factors the first or the second, which is a power of two, is shared between the sides.
"""

import functools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from dfrot.kernels.lowering import BUTTERFLIES, DENSE, SUBTRACT
from dfrot.linalg.hadamard import hadamard_matrix

SHARED_MEMORY = 99 << 10  # bytes that a program can have on every GPU from Ampere on
LARGEST_TILE = 1 << 15  # numbers that its registers hold

_KEPT = WeakTensorKeyDictionary()  # first matrix of a transform → passes, width, dtype and device → its sides


class Group(NamedTuple):
    """A part of a side: channels `step` apart, and what multiplies them; None: nothing."""

    size: int
    step: int
    matrix: Tensor | None = None


class Sides(NamedTuple):
    """What multiplies a row (L, R) from both sides, padded with zeros to powers of two of 16 or more; None: nothing.

    Entry (l, r) is channel l // L₂ · s₁ + l % L₂ · s₂ + r // R₂ · s₃ + r % R₂.
    """

    left: Tensor | None  # transposed
    right: Tensor | None
    codes: Tensor | None  # right, its even columns first
    shape: tuple[int, int, int, int]  # L, L₂, R, R₂
    steps: tuple[int, int, int]

    @property
    def padded(self) -> tuple[int, int]:
        """L and R as powers of two."""
        return _padded(self.shape[0]), _padded(self.shape[2])


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
    axes: list[Group] = []
    for kind, size, after in zip(passes[::3], passes[1::3], passes[2::3], strict=True):
        if kind == SUBTRACT:
            continue
        if kind not in (BUTTERFLIES, DENSE) or behind % (size * after):
            return None  # a permutation, or axes that are not one behind the other
        matrix = hadamard_matrix(size).float() if kind == BUTTERFLIES else next(matrices).cpu()
        if ((matrix != 0) & (matrix.abs() != 1)).any():
            return None  # 16 bits would round it
        if behind > size * after:
            axes.append(Group(behind // (size * after), size * after))
        axes.append(Group(size, after, matrix))
        behind = after
    if behind > 1:
        axes.append(Group(behind, 1))
    if not axes or len(axes) > 3 or all(axis.matrix is None for axis in axes):
        return None
    limit = _shared_memory(device) // dtype.itemsize
    fits = (pair for pair in _layouts(axes) if math.prod(_sizes(*pair)) <= LARGEST_TILE)
    possible = [pair for pair in fits if _entries(*pair) <= limit]
    return _made_of(*min(possible, key=_cost), dtype, device) if possible else None


def _sizes(left: list[Group], right: list[Group]) -> tuple[int, int]:
    return _padded(math.prod(axis.size for axis in left)), _padded(math.prod(axis.size for axis in right))


def _entries(left: list[Group], right: list[Group]) -> int:
    """What a program keeps in shared memory: a row, and the matrices."""
    sizes = _sizes(left, right)
    there = (any(axis.matrix is not None for axis in side) for side in (left, right))
    return math.prod(sizes) + sum(size**2 for size, is_there in zip(sizes, there, strict=True) if is_there)


def _cost(pair: tuple[list[Group], list[Group]]) -> int:
    """Multiplications for a row."""
    sizes = _sizes(*pair)
    return math.prod(sizes) * sum(sizes)


def _layouts(axes: list[Group]) -> Iterator[tuple[list[Group], list[Group]]]:
    """Axes from the outermost on, shared between left and right."""
    if len(axes) < 3:
        yield axes[:-1] or [Group(1, 0)], axes[-1:]
        return
    outer, middle, inner = axes
    for one, two in _shares(outer):
        yield [one, middle], [two, inner]
    for one, two in _shares(middle):
        yield [outer, one], [two, inner]


def _shares(axis: Group) -> Iterator[tuple[Group, Group]]:
    """An axis as two, if it is a Hadamard matrix of a power of two, or one of them is all of it."""
    size, step, matrix = axis
    if matrix is None or size & (size - 1) or (matrix != hadamard_matrix(size)).any():
        yield Group(1, 0), axis
        yield axis, Group(1, 0)
        return
    for two in (2**n for n in range(size.bit_length())):
        parts = (None if n == 1 else hadamard_matrix(n).float() for n in (size // two, two))
        yield Group(size // two, step * two, next(parts)), Group(two, step, next(parts))


def _made_of(left: list[Group], right: list[Group], dtype: torch.dtype, device: torch.device) -> Sides:
    """Both sides; the last group of each is the inner one."""
    inner, outer = left[-1], right[0] if len(right) > 1 else Group(1, 0)
    sizes = math.prod(axis.size for axis in left), math.prod(axis.size for axis in right)
    first, last = _product(left), _product(right)
    even_first = None if last is None else last[:, [*range(0, sizes[1], 2), *range(1, sizes[1], 2)]]
    parts = None if first is None else first.T, last, even_first
    one, two, three = (_pad(part, dtype, device) for part in parts)
    return Sides(
        one, two, three, (sizes[0], inner.size, sizes[1], right[-1].size), (left[0].step, inner.step, outer.step)
    )


def _product(axes: list[Group]) -> Tensor | None:
    """The Kronecker product of what multiplies some axes."""
    if all(axis.matrix is None for axis in axes):
        return None
    return functools.reduce(torch.kron, [torch.eye(n) if matrix is None else matrix for n, _, matrix in axes])


def _shared_memory(device: torch.device) -> int:
    """Bytes that a program can have there."""
    if device.type != "cuda":
        return SHARED_MEMORY
    return int(getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", SHARED_MEMORY))


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
