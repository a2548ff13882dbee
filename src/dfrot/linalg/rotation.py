"""Rotations: orthogonal maps of the last axis, y = x Q with Q Qᵀ = I.

`as_matrix` is the specification, in float64; `apply` may be faster and works in the dtype of its input. A rotation with
equal diagonal blocks (R2, R3, DuQuant's) is a Kronecker product with the identity on the left; one that mixes heads has
the identity on the right.
"""

import abc
import math
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dfrot.linalg.hadamard import LARGEST, apply_hadamard, hadamard_matrix, kronecker_factors, require_hadamard_size


class Rotation(abc.ABC):
    """An orthogonal map of the last axis."""

    size: int

    @abc.abstractmethod
    def apply(self, x: Float[Tensor, "*batch size"]) -> Float[Tensor, "*batch size"]:
        """x Q, in the dtype and on the device of x."""

    @abc.abstractmethod
    def as_matrix(self) -> Float[Tensor, "size size"]:
        """Q in float64 on the CPU."""

    @property
    @abc.abstractmethod
    def T(self) -> "Rotation":
        """The inverse, Qᵀ."""

    def __matmul__(self, other: "Rotation") -> "Rotation":
        """First self, then other: x (self @ other) = (x self) other."""
        return Compose((self, other))

    def describe(self, tensors: dict[str, Tensor], name: str) -> dict[str, Any]:
        """JSON that `rotation_from` turns back into this rotation; its tensors are put into `tensors` under `name`."""
        kind = type(self).__name__.lower()
        record: dict[str, Any] = {"type": kind}
        for key in _DESCRIBED_BY[kind]:
            value = getattr(self, key)
            if isinstance(value, Tensor):
                tensors[name], record[key] = value, name
            elif isinstance(value, Rotation):
                record[key] = value.describe(tensors, f"{name}.{key}")
            elif key == "parts":
                record[key] = [part.describe(tensors, f"{name}.{index}") for index, part in enumerate(value)]
            elif value is not None:
                record[key] = list(value) if isinstance(value, tuple) else value
        return record


# What the JSON of a rotation holds beside its type, in the order in which it is written.
_DESCRIBED_BY = {
    "identity": ("size",),
    "hadamard": ("factors", "transposed", "signs"),
    "dense": ("matrix",),
    "permutation": ("order",),
    "kronecker": ("left", "right"),
    "compose": ("parts",),
}


@dataclass(frozen=True)
class Identity(Rotation):
    size: int

    def apply(self, x: Float[Tensor, "*batch size"]) -> Float[Tensor, "*batch size"]:
        return x

    def as_matrix(self) -> Float[Tensor, "size size"]:
        return torch.eye(self.size, dtype=torch.float64)

    @property
    def T(self) -> Rotation:
        return self


@dataclass(frozen=True, eq=False)
class Hadamard(Rotation):
    """diag(signs) H / √n; without signs the plain normalised Hadamard matrix.

    H is the Kronecker product of Hadamard matrices of sizes `factors`; by default the factors cheapest to apply.

    Raises:
        ValueError: no Hadamard matrix of this size, or of a factor's, is known; the factors' product is not the size.
    """

    size: int
    signs: Float[Tensor, " size"] | None = None
    transposed: bool = False
    factors: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        require_hadamard_size(self.size)
        factors = self.factors or kronecker_factors(self.size)
        for factor in factors:
            require_hadamard_size(factor)
        if math.prod(factors) != self.size:
            raise ValueError(f"the factors of a Hadamard rotation multiply to its size {self.size}, got {factors}")
        object.__setattr__(self, "factors", factors)

    def apply(self, x: Float[Tensor, "*batch size"]) -> Float[Tensor, "*batch size"]:
        signs = None if self.signs is None else self.signs.to(device=x.device, dtype=x.dtype)
        if signs is not None and not self.transposed:
            x = x * signs
        x = apply_hadamard(x, self.factors, transposed=self.transposed)
        return x * signs if signs is not None and self.transposed else x

    def as_matrix(self) -> Float[Tensor, "size size"]:
        matrix = torch.ones(1, 1, dtype=torch.float64)
        for factor in self.factors:
            matrix = torch.kron(matrix, hadamard_matrix(factor).double())
        matrix = matrix / self.size**0.5
        if self.signs is not None:
            matrix = self.signs.double().cpu()[:, None] * matrix
        return matrix.T.contiguous() if self.transposed else matrix

    @property
    def T(self) -> Rotation:
        return Hadamard(self.size, self.signs, not self.transposed, self.factors)


@dataclass(frozen=True, eq=False)
class Dense(Rotation):
    """An orthogonal matrix. The caller guarantees orthogonality."""

    matrix: Float[Tensor, "size size"]

    @property
    def size(self) -> int:  # type: ignore[override]
        return self.matrix.shape[0]

    def apply(self, x: Float[Tensor, "*batch size"]) -> Float[Tensor, "*batch size"]:
        return x @ self.matrix.to(device=x.device, dtype=x.dtype)

    def as_matrix(self) -> Float[Tensor, "size size"]:
        return self.matrix.double().cpu()

    @property
    def T(self) -> Rotation:
        return Dense(self.matrix.T)


@dataclass(frozen=True, eq=False)
class Permutation(Rotation):
    """y[j] = x[order[j]]."""

    order: Int[Tensor, " size"]

    @property
    def size(self) -> int:  # type: ignore[override]
        return self.order.shape[0]

    def apply(self, x: Float[Tensor, "*batch size"]) -> Float[Tensor, "*batch size"]:
        return x.index_select(-1, self.order.to(x.device))

    def as_matrix(self) -> Float[Tensor, "size size"]:
        return torch.eye(self.size, dtype=torch.float64)[:, self.order.cpu()]

    @property
    def T(self) -> Rotation:
        return Permutation(torch.argsort(self.order))


@dataclass(frozen=True, eq=False)
class Kronecker(Rotation):
    """left ⊗ right: channel i·right.size + j is row i of left's axis and column j of right's."""

    left: Rotation
    right: Rotation

    @property
    def size(self) -> int:  # type: ignore[override]
        return self.left.size * self.right.size

    def apply(self, x: Float[Tensor, "*batch size"]) -> Float[Tensor, "*batch size"]:
        x = self.right.apply(x.unflatten(-1, (self.left.size, self.right.size)))
        if not isinstance(self.left, Identity):
            x = self.left.apply(x.transpose(-1, -2)).transpose(-1, -2)
        return x.flatten(-2)

    def as_matrix(self) -> Float[Tensor, "size size"]:
        return torch.kron(self.left.as_matrix().contiguous(), self.right.as_matrix().contiguous())

    @property
    def T(self) -> Rotation:
        return Kronecker(self.left.T, self.right.T)


@dataclass(frozen=True, eq=False)
class Compose(Rotation):
    """The product of its parts, applied from first to last.

    Raises:
        ValueError: the parts differ in size, or there are none.
    """

    parts: tuple[Rotation, ...]

    def __post_init__(self) -> None:
        sizes = [part.size for part in self.parts]
        if len(set(sizes)) != 1:
            raise ValueError(f"the rotations of a product have one size, got sizes {sizes}")

    @property
    def size(self) -> int:  # type: ignore[override]
        return self.parts[0].size

    def apply(self, x: Float[Tensor, "*batch size"]) -> Float[Tensor, "*batch size"]:
        for part in self.parts:
            x = part.apply(x)
        return x

    def as_matrix(self) -> Float[Tensor, "size size"]:
        return self.apply(torch.eye(self.size, dtype=torch.float64))

    @property
    def T(self) -> Rotation:
        return Compose(tuple(part.T for part in reversed(self.parts)))


def block_diagonal(block: Rotation, count: int) -> Rotation:
    """`count` copies of one block along the diagonal: I ⊗ block."""
    return Kronecker(Identity(count), block)


def block_rotation(matrices: Float[Tensor, "count block block"], orders: Int[Tensor, "between size"]) -> Rotation:
    """B₁ P₁ B₂ P₂ … B_count: each B repeats one block along its diagonal, permutations stand between them."""
    count = orders.shape[-1] // matrices.shape[-1]
    parts: list[Rotation] = []
    for number, matrix in enumerate(matrices):
        parts += [Permutation(orders[number - 1])] if number else []
        parts.append(block_diagonal(Dense(matrix), count))
    return Compose(tuple(parts))


def rotation_from(description: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Rotation:
    """The inverse of `Rotation.describe`, whose tensors are taken as they are.

    Raises:
        ValueError: the type is unknown, a key does not belong to it, or a tensor is missing.
    """
    try:
        known = _DESCRIBED_BY.get(str(description.get("type")), ())
        if known and (unknown := description.keys() - {"type", *known}):
            raise ValueError(f"a rotation of type {description['type']} has no {min(unknown)!r}")
        match description:
            case {"type": "identity", "size": int(size)} if 1 <= size <= LARGEST:
                return Identity(size)
            case {"type": "hadamard", "factors": [*factors], "transposed": bool(transposed)}:
                if all(type(factor) is int and 1 <= factor <= LARGEST for factor in factors):
                    size = math.prod(factors)
                    signs = tensors[description["signs"]] if "signs" in description else None
                    return Hadamard(size, signs, transposed, tuple(factors))
            case {"type": "dense", "matrix": str(name)}:
                return Dense(tensors[name])
            case {"type": "permutation", "order": str(name)}:
                return Permutation(tensors[name])
            case {"type": "kronecker", "left": left, "right": right}:
                return Kronecker(rotation_from(left, tensors), rotation_from(right, tensors))
            case {"type": "compose", "parts": [*parts]}:
                return Compose(tuple(rotation_from(part, tensors) for part in parts))
    except (KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"not the description of a rotation: {reprlib.repr(description)}") from error
    raise ValueError(f"not the description of a rotation: {reprlib.repr(description)}")


def random_hadamard(size: int, generator: torch.Generator) -> Hadamard:
    """diag(±1) H / √n with signs drawn from the generator (on the CPU): QuaRot's R1, the papers' RH."""
    return Hadamard(size, torch.randint(0, 2, (size,), generator=generator).mul(2).sub(1).double())


def random_orthogonal(size: int, generator: torch.Generator) -> Dense:
    """A rotation uniform over the orthogonal group (the papers' RO).

    QR of a Gaussian matrix is uniform only once the signs of R's diagonal are moved into Q; without that the
    distribution depends on the QR routine (Mezzadri, Notices of the AMS 54, 2007).
    """
    q, r = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
    return Dense(q * torch.sign(torch.diagonal(r)))
