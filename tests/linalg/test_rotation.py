import json
from typing import Any

import pytest
import scipy.stats
import torch

from dfrot.linalg.procrustes import polar_factor
from dfrot.linalg.rotation import (
    Compose,
    Dense,
    Hadamard,
    Identity,
    Kronecker,
    Permutation,
    Rotation,
    block_diagonal,
    random_hadamard,
    random_orthogonal,
    rotation_from,
)

SEED = torch.Generator().manual_seed(3)
ROTATIONS: dict[str, Rotation] = {
    "identity": Identity(24),
    "hadamard": Hadamard(24),
    "transposed": Hadamard(24).T,
    "random hadamard": random_hadamard(24, SEED),
    "random hadamard transposed": random_hadamard(24, SEED).T,
    "dense": random_orthogonal(24, SEED),
    "permutation": Permutation(torch.randperm(24, generator=SEED)),
    "blocks": block_diagonal(random_orthogonal(8, SEED), 3),
    "heads": Kronecker(Hadamard(4), Identity(6)),
    "both": Kronecker(random_hadamard(4, SEED), random_orthogonal(6, SEED)),
    "product": random_hadamard(24, SEED) @ Permutation(torch.randperm(24, generator=SEED)),
}
every_rotation = pytest.mark.parametrize("rotation", ROTATIONS.values(), ids=ROTATIONS.keys())


@every_rotation
def test_apply_agrees_with_the_matrix(rotation: Rotation) -> None:
    x = torch.randn(3, 5, 24, dtype=torch.float64)
    torch.testing.assert_close(rotation.apply(x), x @ rotation.as_matrix(), rtol=0, atol=1e-13)


@every_rotation
def test_the_matrix_is_orthogonal_and_the_transpose_its_inverse(rotation: Rotation) -> None:
    matrix = rotation.as_matrix()
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(24, dtype=torch.float64), rtol=0, atol=1e-13)
    torch.testing.assert_close(rotation.T.as_matrix(), matrix.T, rtol=0, atol=1e-13)
    x = torch.randn(2, 24, dtype=torch.float64)
    torch.testing.assert_close(rotation.T.apply(rotation.apply(x)), x, rtol=0, atol=1e-13)


@every_rotation
def test_a_rotation_survives_json_and_tensors(rotation: Rotation) -> None:
    tensors: dict[str, torch.Tensor] = {}
    description = json.loads(json.dumps(rotation.describe(tensors, "r")))
    assert torch.equal(rotation_from(description, tensors).as_matrix(), rotation.as_matrix())


@pytest.mark.parametrize(
    "description",
    [
        {},
        {"type": "pickle"},
        {"type": "hadamard"},
        {"type": "hadamard", "factors": "x", "transposed": False},
        {"type": "dense", "matrix": "missing"},
        {"type": "kronecker", "left": 3, "right": {}},
    ],
)
def test_json_of_something_else_is_refused(description: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="not the description of a rotation"):
        rotation_from(description, {})


def test_a_hadamard_rotation_keeps_its_factors() -> None:
    """What a checkpoint means must not depend on which factors are the cheapest to apply today."""
    other = Hadamard(48, factors=(12, 4))
    assert not torch.equal(other.as_matrix(), Hadamard(48).as_matrix())
    assert torch.equal(rotation_from(other.describe({}, "h"), {}).as_matrix(), other.as_matrix())
    with pytest.raises(ValueError, match="multiply to its size"):
        Hadamard(48, factors=(8, 12))


def test_sixteen_bit_inputs_are_rotated_without_a_change_of_gain() -> None:
    x = torch.randn(64, 8960, generator=torch.Generator().manual_seed(0)).bfloat16()
    gain = Hadamard(8960).apply(x).float().norm() / x.float().norm()
    assert abs(gain - 1) < 1e-4  # rounding the output to 2⁻⁹ averages out over half a million entries


def test_a_product_of_different_sizes_is_refused() -> None:
    with pytest.raises(ValueError, match="one size, got sizes"):
        Compose((Identity(4), Identity(8)))


def test_the_same_generator_draws_the_same_rotation() -> None:
    def draw() -> torch.Tensor:
        generator = torch.Generator().manual_seed(5)
        return torch.cat(
            [random_orthogonal(6, generator).matrix, random_hadamard(4, generator).as_matrix()[:, [0] * 6]]
        )

    assert torch.equal(draw(), draw())


def test_random_orthogonal_is_uniform() -> None:
    """An entry of a uniform rotation of size 3 is uniform on [−1, 1] (Archimedes)."""
    generator = torch.Generator().manual_seed(0)
    entries = [random_orthogonal(3, generator).matrix[0, 0].item() for _ in range(500)]
    assert scipy.stats.kstest(entries, "uniform", args=(-1, 2)).pvalue > 0.01


def test_procrustes_agrees_with_scipy() -> None:
    a, b = torch.randn(2, 40, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected, _ = scipy.linalg.orthogonal_procrustes(a.numpy(), b.numpy())
    torch.testing.assert_close(polar_factor(a.T @ b), torch.from_numpy(expected), rtol=0, atol=1e-12)


def test_no_rotation_is_better_than_the_procrustes_solution() -> None:
    generator = torch.Generator().manual_seed(4)
    a, b = torch.randn(2, 30, 5, dtype=torch.float64, generator=generator)
    best = (a @ polar_factor(a.T @ b) - b).square().sum()
    others = [(a @ random_orthogonal(5, generator).matrix - b).square().sum() for _ in range(50)]
    assert best < min(others)


@pytest.mark.parametrize("size", [16, 2304])
def test_the_polar_factor_of_a_rotation_is_that_rotation(size: int) -> None:
    matrix = Dense(random_hadamard(size, torch.Generator().manual_seed(0)).as_matrix()).matrix
    polar = polar_factor(matrix)
    # above 2048 the SVD runs in float32; a Newton–Schulz step squares its 1e-5
    torch.testing.assert_close(polar, matrix, rtol=0, atol=1e-12 if size == 16 else 1e-6)
    torch.testing.assert_close(polar @ polar.T, torch.eye(size, dtype=torch.float64), rtol=0, atol=1e-9)
