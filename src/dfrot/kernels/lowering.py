"""Online rotations as the kernels take them: a sequence of passes over a row."""

import functools
from typing import NamedTuple

from torch import Tensor

from dfrot.linalg.hadamard import hadamard_matrix
from dfrot.linalg.rotation import Compose, Dense, Hadamard, Identity, Kronecker, Permutation, Rotation

BUTTERFLIES, DENSE, PERMUTE = range(3)  # of native/dfrot.h


class Pass(NamedTuple):
    """One pass over a row, seen as (…, size, after); `data` is the matrix, or the order of a permutation."""

    kind: int
    size: int
    after: int
    data: Tensor | None


class Lowered(NamedTuple):
    """A rotation: passes one after the other, then division by the root of `square`."""

    passes: tuple[Pass, ...]
    square: float


NO_PASSES = Lowered((), 1.0)


def lower(rotation: Rotation, after: int = 1) -> Lowered | None:
    """The passes of a rotation of the second last axis of rows seen as (…, rotation.size, after).

    Returns:
        None if the kernels cannot do it: a permutation of an inner axis, a Hadamard matrix with random signs.
    """
    match rotation:
        case Identity():
            return NO_PASSES
        case Hadamard(signs=None):
            passes: list[Pass] = []
            behind = rotation.size * after
            for factor in rotation.factors:
                behind //= factor
                passes.append(_hadamard(factor, behind, rotation.transposed))
            return Lowered(tuple(passes), float(rotation.size))
        case Dense():
            return Lowered((Pass(DENSE, rotation.size, after, rotation.matrix.float().contiguous()),), 1.0)
        case Permutation() if after == 1:
            return Lowered((Pass(PERMUTE, rotation.size, 1, rotation.order.int().contiguous()),), 1.0)
        case Kronecker():
            return _joined(lower(rotation.left, after * rotation.right.size), lower(rotation.right, after))
        case Compose():
            return functools.reduce(_joined, (lower(part, after) for part in rotation.parts))
    return None


def _joined(first: Lowered | None, second: Lowered | None) -> Lowered | None:
    if first is None or second is None:
        return None
    return Lowered(first.passes + second.passes, first.square * second.square)


def _hadamard(size: int, after: int, transposed: bool) -> Pass:
    """Multiplication by the Hadamard matrix of one factor, entries ±1."""
    if size & (size - 1):
        matrix = hadamard_matrix(size).float()
        return Pass(DENSE, size, after, (matrix.T if transposed else matrix).contiguous())
    return Pass(BUTTERFLIES, size, after, None)


def flatten(rotation: Lowered) -> tuple[list[int], list[Tensor], float]:
    """The same as operators take it: three numbers per pass, the tensors of those that have one, `square`."""
    numbers = [number for each in rotation.passes for number in each[:3]]
    return numbers, [each.data for each in rotation.passes if each.data is not None], rotation.square
