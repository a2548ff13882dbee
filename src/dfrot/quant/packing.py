"""Integers of b bits in bytes, without a bit wasted.

A row is a little-endian stream of bits: at 4 bits the low nibble comes first, at 8 bits a code is a byte, eight 3-bit
codes fill three bytes. It equals `numpy.packbits` with `bitorder="little"` of the codes' binary digits.
"""

import torch
from jaxtyping import UInt8
from torch import Tensor


def packed_width(width: int, bits: int) -> int:
    """Bytes of a packed row of `width` codes."""
    return (width * bits + 7) // 8


def pack(codes: UInt8[Tensor, "*batch width"], bits: int) -> UInt8[Tensor, "*batch bytes"]:
    """Pack codes 0 … 2^bits − 1 along the last axis; the last byte is filled up with zero bits.

    Raises:
        ValueError: a code does not fit into `bits` bits.
    """
    if not torch.compiler.is_compiling() and codes.numel() and int(codes.max()) >= 2**bits:
        raise ValueError(f"codes of {bits} bits are below {2**bits}, got {int(codes.max())}")
    if bits == 8:
        return codes.contiguous()
    if bits == 4:
        if codes.shape[-1] % 2:
            codes = torch.nn.functional.pad(codes, (0, 1))
        return codes[..., ::2] | (codes[..., 1::2] << 4)
    digits = (codes.unsqueeze(-1) >> torch.arange(bits, device=codes.device)) & 1  # (…, width, bits)
    stream = torch.nn.functional.pad(digits.flatten(-2), (0, -codes.shape[-1] * bits % 8))
    place = 1 << torch.arange(8, device=codes.device)
    return (stream.unflatten(-1, (-1, 8)) * place).sum(-1).to(torch.uint8)


def unpack(packed: UInt8[Tensor, "*batch bytes"], bits: int, width: int) -> UInt8[Tensor, "*batch width"]:
    """The `width` codes that `pack` packed."""
    if bits == 8:
        return packed
    if bits == 4:
        return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)[..., :width]
    stream = ((packed.unsqueeze(-1) >> torch.arange(8, device=packed.device)) & 1).flatten(-2)
    digits = stream[..., : width * bits].unflatten(-1, (width, bits))
    place = 1 << torch.arange(bits, device=packed.device)
    return (digits * place).sum(-1).to(torch.uint8)
