"""The vocabulary of quantization: the integers (grid) and the entries that share a scale (granularity).

Throughout, a tensor is quantized along its last axis: activations are (…, tokens, channels), weights (out, in).
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class IntGrid:
    """The integers of `bits` bits.

    Symmetric: −2^(b−1) … 2^(b−1) − 1, zero point 0. Asymmetric: 0 … 2^b − 1 with an integer zero point.

    Raises:
        ValueError: bits is not in 2 … 8.
    """

    bits: int
    symmetric: bool = True

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise ValueError(f"an integer grid has 2 to 8 bits, got {self.bits}")

    @property
    def lowest(self) -> int:
        return -(2 ** (self.bits - 1)) if self.symmetric else 0

    @property
    def highest(self) -> int:
        return 2 ** (self.bits - 1) - 1 if self.symmetric else 2**self.bits - 1


@dataclass(frozen=True)
class PerToken:
    """One scale per token: activations of shape (8, 64) have scales of shape (8, 1)."""


@dataclass(frozen=True)
class PerChannel:
    """One scale per output channel: a weight of shape (out, in) has scales of shape (out, 1)."""


@dataclass(frozen=True)
class PerGroup:
    """One scale per `size` consecutive entries of the last axis: (8, 64) with size 16 has scales of shape (8, 4).

    Raises:
        ValueError: size is not positive.
    """

    size: int

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"group_size must be positive, got {self.size}")


Granularity = PerToken | PerChannel | PerGroup
