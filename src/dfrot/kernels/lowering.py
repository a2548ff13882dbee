"""What happens to an input before it is quantized, as the kernels take it: a sequence of passes over a row."""

from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor

from dfrot.linalg.hadamard import hadamard_matrix
from dfrot.linalg.rotation import Compose, Dense, Hadamard, Identity, Kronecker, Permutation, Rotation

BUTTERFLIES, DENSE, PERMUTE, SUBTRACT = range(4)  # of native/dfrot.h


class Lowered(NamedTuple):
    """A rotation, and an offset: passes one after the other, then division by the root of `square`."""

    passes: tuple[int, ...]  # three numbers each: the kind, and `size` and `after` of a row seen as (…, size, after)
    data: tuple[Tensor, ...]  # the matrices, orders and offsets of the passes that have one
    square: int

    def less(self, offset: Float[Tensor, " n"] | None) -> "Lowered":
        """The same, and then an offset subtracted."""
        if offset is None:
            return self
        data = offset.detach().float().contiguous()
        return Lowered((*self.passes, SUBTRACT, len(offset), 1), (*self.data, data), self.square)


NO_PASSES = Lowered((), (), 1)


def lower(rotation: Rotation, after: int = 1) -> Lowered | None:
    """The passes of a rotation of the second last axis of rows seen as (…, rotation.size, after).

    Returns:
        None if the kernels cannot do it: a permutation of an inner axis, a Hadamard matrix with random signs.
    """
    parts: list[Lowered | None] = []
    match rotation:
        case Identity():
            pass
        case Hadamard(signs=None):
            behind = rotation.size * after
            for factor in rotation.factors:
                behind //= factor
                if factor & (factor - 1):  # no power of two
                    matrix = hadamard_matrix(factor).float()
                    data = (matrix.T if rotation.transposed else matrix).contiguous()
                    parts.append(Lowered((DENSE, factor, behind), (data,), factor))
                else:
                    parts.append(Lowered((BUTTERFLIES, factor, behind), (), factor))
        case Dense():
            parts = [Lowered((DENSE, rotation.size, after), (rotation.matrix.float().contiguous(),), 1)]
        case Permutation() if after == 1:
            parts = [Lowered((PERMUTE, rotation.size, 1), (rotation.order.int().contiguous(),), 1)]
        case Kronecker():
            parts = [lower(rotation.left, after * rotation.right.size), lower(rotation.right, after)]
        case Compose():
            parts = [lower(part, after) for part in rotation.parts]
        case _:
            return None
    whole = NO_PASSES
    for part in parts:
        if part is None:
            return None
        whole = Lowered(whole.passes + part.passes, whole.data + part.data, whole.square * part.square)
    return whole
