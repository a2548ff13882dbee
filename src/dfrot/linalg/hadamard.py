"""Hadamard matrices of (nearly) every size a transformer has, generated rather than typed out.

A Hadamard matrix of order n has entries ±1 and H Hᵀ = n I. Feed-forward widths are 2^k times an awkward number (11008 =
256 · 43), so powers of two are not enough. Four constructions and their Kronecker products cover real models:

* Sylvester: order 2, hence all powers of two.
* Paley I:  order q + 1 for a prime power q ≡ 3 (mod 4).
* Paley II: order 2 (q + 1) for a prime power q ≡ 1 (mod 4).
* Williamson: order 4 m from four symmetric circulant matrices of order m, for the m that Paley misses.

A large matrix is applied factor by factor: a size n = g₁ g₂ costs g₁ + g₂ multiplications per entry instead of n.
Factors between about 16 and 200 keep matrix products at full speed; a butterfly of 2 × 2 steps is many times slower.
"""

import functools
import itertools
import math
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

# First rows of Williamson's four circulants, entries 1 … (m − 1)/2. Entry 0 is +1, the rest follows by symmetry.
# m = 23: Baumert, Golomb, Hall 1962; m = 29: Baumert 1966; m = 43: Williamson 1944; m = 39: London 2013.
_WILLIAMSON = {
    23: ("+---+---+-+", "-++-++--+++", "++---++-+-+", "++-+++-+---"),
    29: ("++---++--+-+--", "-+---++--+-+++", "+++-++-+---+++", "+--+--+-+++-++"),
    39: ("++--+-+-----+--++--", "++--++-+---+-+--+--", "+++---+--++----+-+-", "---++-+-+-----+++-+"),
    43: ("+---++++-+--+--++----", "++-+-++--+-+-++++-+--", "+-++++++----+-+--++-+", "---++--++++-+-+++-++-"),
}

LARGEST = 2**20  # channels of a rotated axis


def prime_power(q: int) -> tuple[int, int] | None:
    """(p, k) with q = pᵏ and p prime, or None."""
    if q < 2:
        return None
    p = next((p for p in range(2, math.isqrt(q) + 1) if q % p == 0), q)
    k = round(math.log(q, p))
    return (p, k) if p**k == q else None


def _quadratic_character(p: int, k: int) -> NDArray[np.int8]:
    """χ on GF(pᵏ): 0 at 0, +1 at squares, −1 elsewhere; an element is indexed by its base-p digits."""
    q = p**k
    # Some monic polynomial of degree k makes x a generator: its powers reach all non-zero elements, even ones squares.
    for tail in itertools.product(range(p), repeat=k):  # xᵏ = Σ tail[i] xⁱ
        chi = np.zeros(q, np.int8)
        element = [1] + [0] * (k - 1)
        for exponent in range(q - 1):
            index = sum(digit * p**i for i, digit in enumerate(element))
            if index == 0 or chi[index] != 0:  # x is not a generator
                break
            chi[index] = 1 - 2 * (exponent % 2)
            carry, shifted = element[-1], [0, *element[:-1]]
            element = [(s + carry * t) % p for s, t in zip(shifted, tail, strict=True)]
        else:
            return chi
    raise AssertionError(f"every finite field has a generator, none found for {p}^{k}")


def _jacobsthal(p: int, k: int) -> NDArray[np.int8]:
    """Q[a, b] = χ(a − b) over GF(pᵏ), with Q Qᵀ = q I − J."""
    place = p ** np.arange(k)
    digits = np.arange(p**k)[:, None] // place % p
    difference = ((digits[:, None] - digits[None]) % p * place).sum(-1)
    return _quadratic_character(p, k)[difference]


def _bordered(core: NDArray[np.int8], column: int) -> NDArray[np.int8]:
    """[[0, 1ᵀ], [column·1, core]]: the conference matrix on which both Paley constructions rest."""
    q = len(core)
    conference = np.ones((q + 1, q + 1), np.int8)
    conference[0, 0], conference[1:, 0], conference[1:, 1:] = 0, column, core
    return conference


def _paley_one(p: int, k: int) -> NDArray[np.int8]:
    return _bordered(_jacobsthal(p, k), column=-1) + np.eye(p**k + 1, dtype=np.int8)


def _paley_two(p: int, k: int) -> NDArray[np.int8]:
    n = 2 * (p**k + 1)
    conference = _bordered(_jacobsthal(p, k), column=1)
    identity = np.eye(n // 2, dtype=np.int8)
    off_diagonal, diagonal = np.array([[[1, 1], [1, -1]], [[1, -1], [-1, -1]]], np.int8)
    return np.kron(conference, off_diagonal) + np.kron(identity, diagonal)


def _williamson(m: int) -> NDArray[np.int8]:
    index = np.arange(m)
    circulants = []
    for half in _WILLIAMSON[m]:
        row = np.array([1 if sign == "+" else -1 for sign in "+" + half + half[::-1]], np.int8)
        circulants.append(row[(index[None] - index[:, None]) % m])
    a, b, c, d = circulants
    blocks = [[a, b, c, d], [-b, a, -d, c], [-c, d, a, -b], [-d, -c, b, a]]
    return np.block(blocks)


def _construction(n: int) -> Callable[[], NDArray[np.int8]] | None:
    """A constructor for order n that needs no product. It builds nothing yet: a file may ask for any size."""
    if n <= 2:
        return lambda: np.array([[1, 1], [1, -1]], np.int8)[:n, :n].copy()
    if n & (n - 1) == 0 or n % 4:  # powers of two stay Sylvester's: exported models rely on that order
        return None
    if (field := prime_power(n - 1)) is not None:
        return functools.partial(_paley_one, *field)
    if n % 8 == 4 and (field := prime_power(n // 2 - 1)) is not None:
        return functools.partial(_paley_two, *field)
    return functools.partial(_williamson, n // 4) if n // 4 in _WILLIAMSON else None


@functools.cache
def is_hadamard_size(n: int) -> bool:
    """Whether this module can build a Hadamard matrix of order n."""
    if n > 2 and n % 4:
        return False
    if (n % 2 == 0 and n > 2 and is_hadamard_size(n // 2)) or _construction(n) is not None:
        return True
    divisors = (a for a in range(4, math.isqrt(n) + 1, 4) if n % a == 0)
    return any(is_hadamard_size(a) and is_hadamard_size(n // a) for a in divisors)


def require_hadamard_size(n: int) -> None:
    """Raise ValueError, with the nearest sizes, if this module has no Hadamard matrix of order n."""
    if n > LARGEST:
        raise ValueError(f"no Hadamard matrix of size {n}: sizes are at most {LARGEST}, far more than models have.")
    if n >= 1 and is_hadamard_size(n):
        return
    below = next((m for m in range(n - 1, 0, -1) if is_hadamard_size(m)), None)
    above = next(m for m in itertools.count(max(n + 1, 1)) if is_hadamard_size(m))
    near = " and ".join(str(m) for m in (below, above) if m is not None)
    rule = "no construction here (Sylvester, Paley I and II, Williamson, products) gives this order"
    if n > 2 and n % 4:
        rule = "a Hadamard matrix has order 1, 2 or a multiple of 4"
    raise ValueError(f"no Hadamard matrix of size {n}: {rule}. The nearest sizes are {near}.")


def hadamard_matrix(n: int) -> Tensor:
    """A Hadamard matrix of order n: int8 (n, n), entries ±1, H Hᵀ = n I. Treat it as read-only.

    Powers of two are in Sylvester's order (scipy.linalg.hadamard's).

    Raises:
        ValueError: no construction gives order n; the message names the nearest sizes that work.
    """
    return torch.from_numpy(_entries(n))


@functools.cache
def _entries(n: int) -> NDArray[np.int8]:
    """As numpy has them: a kept tensor might have been made while torch traces, or in inference mode."""
    require_hadamard_size(n)
    if (construct := _construction(n)) is not None:
        return construct()
    for a in itertools.chain([2], range(4, n, 4)):
        if n % a == 0 and is_hadamard_size(a) and is_hadamard_size(n // a):
            return np.kron(_entries(n // a), _entries(a))
    raise AssertionError(f"{n} is a Hadamard size but has no factors")


# Cost of one more pass over the data, in multiplications per entry. Measured on AVX512 and AMX: two factors of 64 beat
# three of 16, and one of 576 loses to 36 · 16.
_PASS_COST = 120


@functools.cache
def kronecker_factors(n: int) -> tuple[int, ...]:
    """Sizes (g₁, …, gₖ) with product n and a Hadamard matrix of each, cheapest to apply one after the other."""
    require_hadamard_size(n)

    @functools.cache
    def cheapest(m: int) -> tuple[float, tuple[int, ...]]:
        best: tuple[float, tuple[int, ...]] = (float(m + _PASS_COST), (m,)) if is_hadamard_size(m) else (math.inf, (m,))
        for g in range(2, m // 2 + 1):
            if m % g == 0 and is_hadamard_size(g):
                cost, rest = cheapest(m // g)
                best = min(best, (cost + g + _PASS_COST, (g, *rest)))
        return best

    return cheapest(n)[1]


def scaled_factor(n: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """H / √n as a dense (n, n) tensor, kept for repeated use."""
    return _traced_factor(n, dtype, device) if torch.compiler.is_compiling() else _kept_factor(n, dtype, device)


@functools.lru_cache(maxsize=64)
def _kept_factor(n: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    # a tensor that is kept is a plain one, whatever goes on around its first use
    with torch.inference_mode(False), _disable_current_modes():
        return (hadamard_matrix(n).to(torch.float64) / math.sqrt(n)).to(device=device, dtype=dtype)


@torch.library.custom_op("dfrot::scaled_factor", mutates_args=())
def _traced_factor(n: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return _kept_factor(n, dtype, device).clone()


@_traced_factor.register_fake
def _(n: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.empty(n, n, dtype=dtype, device=device)


def apply_hadamard(x: Tensor, factors: tuple[int, ...], *, transposed: bool = False) -> Tensor:
    """x H / √n (or x Hᵀ / √n) along the last axis of x (…, n), H = H_{g₁} ⊗ … ⊗ H_{gₖ} for factors g₁ … gₖ.

    16-bit inputs are rotated in float32: 1 / √g rounded to bfloat16 would change the gain by up to 0.3 %.
    """
    y = x.float() if x.dtype.itemsize == 2 else x
    after = x.shape[-1]  # y is viewed as (rows and earlier factors, g, later factors)
    for g in factors:
        after //= g
        factor = scaled_factor(g, y.dtype, y.device)
        factor = factor.T if transposed else factor
        y = y.reshape(-1, g) @ factor if after == 1 else factor.T @ y.reshape(-1, g, after)
    return y.reshape(x.shape).to(x.dtype)
