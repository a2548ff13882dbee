import hashlib

import numpy as np
import pytest
import scipy.linalg
import torch

from dfrot.linalg.hadamard import (
    apply_hadamard,
    hadamard_matrix,
    is_hadamard_size,
    kronecker_factors,
    prime_power,
    require_hadamard_size,
)
from dfrot.linalg.rotation import Hadamard

# Widths of published models and, from 12 on, the orders that need a construction of their own.
MODEL_WIDTHS = [
    *(576, 1536, 4096, 5120, 8192, 11008, 13824, 14336, 18944, 28672, 29568, 9728, 17408, 25600, 21504, 8960, 3072),
]
ORDERS = [1, 2, 4, 12, 20, 28, 36, 68, 76, 84, 92, 100, 108, 116, 148, 156, 172, 344, 924]


@pytest.mark.parametrize("order", ORDERS)
def test_rows_are_orthogonal_and_entries_are_signs(order: int) -> None:
    matrix = hadamard_matrix(order).int()
    assert torch.equal(matrix @ matrix.T, order * torch.eye(order, dtype=torch.int32))
    assert set(matrix.unique().tolist()) <= {-1, 1}


@pytest.mark.parametrize("order", [2, 8, 64, 256])
def test_powers_of_two_are_scipys_matrices(order: int) -> None:
    assert np.array_equal(hadamard_matrix(order).numpy(), scipy.linalg.hadamard(order))
    expected = scipy.linalg.hadamard(order) / order**0.5
    np.testing.assert_allclose(Hadamard(order).as_matrix().numpy(), expected, rtol=1e-15)


def test_a_power_of_two_above_one_factor_is_still_scipys_matrix() -> None:
    assert len(kronecker_factors(1024)) > 1
    np.testing.assert_allclose(Hadamard(1024).as_matrix().numpy(), scipy.linalg.hadamard(1024) / 32, rtol=1e-15)


@pytest.mark.parametrize("width", MODEL_WIDTHS)
def test_every_model_width_is_applied_by_small_factors(width: int) -> None:
    factors = kronecker_factors(width)
    assert np.prod(factors) == width
    assert max(factors) <= 172
    x = torch.randn(2, width, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    y = apply_hadamard(x, factors)
    torch.testing.assert_close(y.norm(dim=-1), x.norm(dim=-1), rtol=1e-12, atol=0)
    torch.testing.assert_close(apply_hadamard(y, factors, transposed=True), x, rtol=0, atol=1e-12)


def test_prime_powers_are_told_apart() -> None:
    assert [q for q in range(2, 30) if prime_power(q)] == [2, 3, 4, 5, 7, 8, 9, 11, 13, 16, 17, 19, 23, 25, 27, 29]
    assert prime_power(343) == (7, 3)


@pytest.mark.parametrize(("size", "near"), [(9, "8 and 12"), (0, "1"), (668, "664 and 672"), (-4, "1")])
def test_an_impossible_size_names_its_neighbours(size: int, near: str) -> None:
    with pytest.raises(ValueError, match=f"no Hadamard matrix of size {size}.*nearest sizes are {near}"):
        require_hadamard_size(size)


def test_orders_of_no_known_matrix_are_not_claimed() -> None:
    assert not any(is_hadamard_size(n) for n in (3, 6, 10, 14, 668, 716))


def test_the_matrices_are_those_that_checkpoints_were_made_with() -> None:
    """A checkpoint names orders only; changing a construction would silently break it. Then raise the format."""
    orders = [n for n in range(1, 177) if is_hadamard_size(n)]
    assert len(orders) == 46
    digest = hashlib.sha256(b"".join(hadamard_matrix(n).numpy().tobytes() for n in orders)).hexdigest()
    assert digest[:16] == "8cf967a93ee797a3"
