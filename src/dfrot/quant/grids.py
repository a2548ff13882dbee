"""The vocabulary of quantization: the integers (grid) and the entries that share a scale (granularity).

A grid is a set of integers, a rule that rounds to them, a rule for the step between them, and a code for each in so
many bits. Floats of 4 bits are such a grid too: twice the values of E2M1 are integers, with gaps.

Throughout, a tensor is quantized along its last axis: activations are (…, tokens, channels), weights (out, in).
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float, Integer, UInt8
from torch import Tensor

# What clip search tries of an integer grid's range, GPTQ's and QuaRot's list, and of a float grid's, whose scales have
# steps of 1/16 and 1/8, or of 2. With E8M0 the range may also be longer: the rule cuts off values above 6/7 of it.
_FINE = tuple(1 - step * 0.01 for step in range(81))
_COARSE = tuple(2 ** (-step / 12) for step in range(28))
_DOUBLING = (2.0, 1.0, 0.5, 0.25)


@dataclass(frozen=True)
class IntGrid:
    """The integers of `bits` bits.

    Symmetric: −2^(b−1) … 2^(b−1) − 1, zero point 0. Asymmetric: 0 … 2^b − 1 with an integer zero point.

    Raises:
        ValueError: bits is not in 2 … 8.
    """

    bits: int
    symmetric: bool = True

    clips: ClassVar = _FINE

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise ValueError(f"an integer grid has 2 to 8 bits, got {self.bits}")

    @property
    def lowest(self) -> int:
        return -(2 ** (self.bits - 1)) if self.symmetric else 0

    @property
    def highest(self) -> int:
        return 2 ** (self.bits - 1) - 1 if self.symmetric else 2**self.bits - 1

    def nearest_(self, steps: Float[Tensor, "..."], zero: Tensor | None = None) -> Float[Tensor, "..."]:
        """The integers nearest to x / s, shifted by the zero point; in place."""
        steps.round_()
        if zero is not None:
            steps += zero
        return steps.clamp_(self.lowest, self.highest)

    def step(self, width: Float[Tensor, "..."], dtype: torch.dtype | None = None) -> Float[Tensor, "..."]:
        """The step of a range, rounded up to a narrower dtype if one is given; 1 for an empty range."""
        scale = width / width.new_full((), self.highest)  # a GPU multiplies by the reciprocal of a Python number
        if dtype is not None:
            scale = _rounded_up(scale, dtype)
        return torch.where(scale == 0, torch.ones_like(scale), scale)

    def encode(self, integers: Integer[Tensor, "..."]) -> UInt8[Tensor, "..."]:
        """Their codes: those of symmetric grids have an offset of 2^(b−1)."""
        return (integers.to(torch.int16) - min(self.lowest, 0)).to(torch.uint8)

    def decode(self, codes: UInt8[Tensor, "..."]) -> Integer[Tensor, "..."]:
        """The inverse of `encode`."""
        return codes.to(torch.int16) + min(self.lowest, 0)


@dataclass(frozen=True)
class FloatGrid:
    """The floats of E2M1, doubled: 0, ±1, ±2, ±3, ±4, ±6, ±8, ±12, with half of a shared scale as their step.

    Two ways to share one are standard. With E4M3 (NVFP4; groups of 16) a group's scale is a float of 8 bits, and one
    factor puts all of a tensor's scales into its range. Here this factor is a power of two. So a step has 4 significant
    bits, bfloat16 holds it exactly, and another factor changes nothing as long as no scale leaves the range. With E8M0
    (MXFP4; groups of 32; OCP Microscaling Formats 1.0) it is a power of two. We round it as compressed-tensors and vLLM
    do, up where the largest entry would otherwise be above 7 steps of the scale.
    """

    scale: Literal["e4m3", "e8m0"]
    largest: float | None = None
    """The largest magnitude that the tensor is to hold, from which E4M3's factor follows; None takes each row's."""

    bits: ClassVar = 4
    symmetric: ClassVar = True
    lowest: ClassVar = -12
    highest: ClassVar = 12

    @property
    def clips(self) -> tuple[float, ...]:
        return _COARSE if self.scale == "e4m3" else _DOUBLING

    def nearest_(self, steps: Float[Tensor, "..."], zero: Tensor | None = None) -> Float[Tensor, "..."]:
        """The integers of the grid nearest to x / s, ties to the even mantissa, as in hardware; in place."""
        size = steps.abs()
        apart = 1 + (size >= 4).to(steps.dtype) + 2 * (size >= 8).to(steps.dtype)  # of the integers around it
        return steps.div_(apart).round_().mul_(apart).clamp_(self.lowest, self.highest)

    def step(self, width: Float[Tensor, "*batch groups"], dtype: torch.dtype | None = None) -> Tensor:
        """Half of the scale that the format gives to groups with so large an entry.

        A scale of E4M3 that would round to 0 makes its group 0.
        """
        if self.scale == "e8m0":
            mantissa, exponent = torch.frexp(width)  # width = mantissa · 2^exponent, mantissa in [1/2, 1)
            exponent = (exponent - 4 + (mantissa >= 0.875).to(exponent.dtype)).clamp(-126, 126)
            power = torch.ldexp(torch.ones_like(width), torch.where(width > 0, exponent, -1))
            return torch.where(width.isfinite(), power, torch.nan)
        largest = width.amax(-1, keepdim=True) if self.largest is None else torch.full_like(width, self.largest)
        factor = tensor_factor(largest)
        scale = (width / 6 * factor).clamp(max=_E4M3.max).to(torch.float8_e4m3fn).to(width.dtype)
        return torch.where(width.isfinite(), torch.where(scale == 0, _ZERO_SCALE, scale) / (2 * factor), torch.nan)

    def encode(self, integers: Integer[Tensor, "..."]) -> UInt8[Tensor, "..."]:
        """Sign, exponent and mantissa, from the highest of 4 bits to the lowest."""
        size = integers.abs()
        magnitude = size.clamp(max=4) + (size >= 6).to(size.dtype) + (size >= 8) + (size >= 12)
        return (magnitude + 8 * (integers < 0)).to(torch.uint8)

    def decode(self, codes: UInt8[Tensor, "..."]) -> Integer[Tensor, "..."]:
        """The inverse of `encode`."""
        return torch.tensor(_E2M1_DOUBLED, dtype=torch.int16, device=codes.device)[codes.int()]


_E4M3 = torch.finfo(torch.float8_e4m3fn)
_ZERO_SCALE = 0.125  # in place of 0: every entry of the group is then below 1/21 of a step
_E2M1_DOUBLED = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)


def tensor_factor(largest: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """The largest power of two that takes the scale of a group with such a largest entry, largest / 6, into E4M3."""
    ratio = (6 * _E4M3.max) / largest.clamp(min=2.0**-90)
    return torch.ldexp(torch.ones_like(ratio), torch.frexp(ratio).exponent - 1)


def _rounded_up(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Numbers above 0, rounded up to those of a narrower dtype."""
    if x.dtype == torch.float32 and dtype == torch.bfloat16:
        # by their bits: torch.compile leaves out a cast there and back
        up = ((x.view(torch.int32) + 0xFFFF) & ~0xFFFF).view(torch.float32)
        return torch.where(x.isnan(), x, up)
    narrow = x.to(dtype)
    above = torch.nextafter(narrow, torch.full_like(narrow, torch.inf))
    return torch.where(narrow.to(x.dtype) < x, above, narrow).to(x.dtype)


Grid = IntGrid | FloatGrid


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
