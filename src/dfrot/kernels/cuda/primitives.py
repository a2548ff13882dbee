"""What the kernels share: nibbles as integers, rounding, the grid of a range, products that the interpreter can do.

`NATIVE` is whether the kernel is compiled; Triton's interpreter, which the tests run, has no inline assembly, and
multiplies bfloat16 by their bits.
"""

from typing import no_type_check

import torch
import triton
import triton.language as tl

NATIVE = not triton.knobs.runtime.interpret

# Four bytes at a time: the nibbles' highest bits are flipped where they stand highest.
_LOW = tl.constexpr("{ .reg .b32 t; shl.b32 t, $1, 4; xor.b32 t, t, 0x80808080; and.b32 $0, t, 0xF0F0F0F0; }")
_HIGH = tl.constexpr("{ .reg .b32 t; xor.b32 t, $1, 0x80808080; and.b32 $0, t, 0xF0F0F0F0; }")


def element_type(dtype: torch.dtype) -> tl.dtype:
    """Triton's name of a dtype of torch."""
    return getattr(tl, str(dtype).removeprefix("torch."))


@triton.jit
@no_type_check
def nibbles(codes, HIGH: tl.constexpr, NATIVE: tl.constexpr):
    """int8: 16 (q − 8) of the low or high nibbles q of bytes."""
    if NATIVE:
        return tl.inline_asm_elementwise(_HIGH if HIGH else _LOW, "=r,r", [codes], dtype=tl.int8, is_pure=True, pack=4)
    else:
        return ((codes & 240 if HIGH else (codes & 15) << 4) ^ 128).to(tl.int8, bitcast=True)


@triton.jit
@no_type_check
def dot(a, b, NATIVE: tl.constexpr):
    """a b in float32, of float32 or 16 bits."""
    if NATIVE:
        return tl.dot(a, b, input_precision="ieee")
    else:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")


@triton.jit
@no_type_check
def dot_in_two(h, y, TYPE: tl.constexpr, NATIVE: tl.constexpr):
    """h y for entries of h that 16 bits hold: y is float32, and in 16 bits the sum of two numbers."""
    if tl.float32 == TYPE:
        return dot(h, y, NATIVE)
    else:
        high = y.to(TYPE)
        return dot(h, high, NATIVE) + dot(h, (y - high.to(tl.float32)).to(TYPE), NATIVE)


@triton.jit
@no_type_check
def rounded(x):
    """To the nearest integer, ties to even, for |x| < 2^22; NaN stays."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
@no_type_check
def grid_of(low, high, clip, LOWEST: tl.constexpr, HIGHEST: tl.constexpr, NARROW: tl.constexpr):
    """Scale and zero point of ranges that contain 0, bit by bit those of quant/affine.py; symmetric for LOWEST < 0.

    NARROW scales are rounded up to bfloat16.
    """
    low = low * clip
    length = tl.maximum(-low, high * clip) if LOWEST < 0 else high * clip - low
    scale = tl.div_rn(length, low * 0 + HIGHEST)
    if NARROW:
        scale = ((scale.to(tl.int32, bitcast=True) + 0xFFFF) & -65536).to(tl.float32, bitcast=True)
    scale = tl.where(scale == 0, 1.0, scale)
    if LOWEST < 0:
        return scale, scale * 0
    else:
        return scale, zero_of(low, scale, HIGHEST)


@triton.jit
@no_type_check
def zero_of(low, scale, HIGHEST: tl.constexpr):
    """The zero point of a range that begins at `low`."""
    return tl.minimum(tl.maximum(rounded(tl.div_rn(-low, scale)), 0.0), HIGHEST)


@triton.jit
@no_type_check
def code_of(x, scale, zero, LOWEST: tl.constexpr, HIGHEST: tl.constexpr):
    """The code of x, still a float."""
    return tl.minimum(tl.maximum(rounded(tl.div_rn(x, scale)) + zero, LOWEST), HIGHEST)
