"""What the kernels share: nibbles as integers, rounding, the grid of a range, products that the interpreter can do.

`NATIVE` is whether the kernel is compiled; Triton's interpreter, which the tests run, has no inline assembly, and
multiplies bfloat16 by their bits.
"""

from typing import no_type_check

import torch
import triton
import triton.language as tl

NATIVE = not triton.knobs.runtime.interpret
_COMPILED = tl.constexpr(NATIVE)

# Four bytes at a time: the nibbles' highest bits are flipped where they stand highest.
_LOW = tl.constexpr("{ .reg .b32 t; shl.b32 t, $1, 4; xor.b32 t, t, 0x80808080; and.b32 $0, t, 0xF0F0F0F0; }")
_HIGH = tl.constexpr("{ .reg .b32 t; xor.b32 t, $1, 0x80808080; and.b32 $0, t, 0xF0F0F0F0; }")


# A nibble n as the last bits of a float of 16 bits whose unit they are: 128 + n in bfloat16, 1024 + n in float16.
_FLOAT = "prmt.b32 $0, t, {0}, 0x4140; prmt.b32 $1, t, {0}, 0x4342;"
_FLOATS = tuple(
    tl.constexpr(f"{{ .reg .b32 t; {part} and.b32 t, t, 0x0F0F0F0F; {_FLOAT.format(base)} }}")
    for base in ("0x43434343", "0x64646464")
    for part in ("mov.b32 t, $2;", "shr.u32 t, $2, 4;")
)
_LOW_BFLOAT16, _HIGH_BFLOAT16, _LOW_FLOAT16, _HIGH_FLOAT16 = _FLOATS


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
def float_nibbles(codes, HIGH: tl.constexpr, TYPE: tl.constexpr, NATIVE: tl.constexpr):
    """128 + n in bfloat16, 1024 + n in float16, of the low or high nibbles n of bytes."""
    BASE: tl.constexpr = 128.0 if tl.bfloat16 == TYPE else 1024.0
    if not NATIVE:
        return ((codes >> 4 if HIGH else codes & 15).to(tl.float32) + BASE).to(TYPE)
    elif tl.bfloat16 == TYPE:
        return tl.inline_asm_elementwise(
            _HIGH_BFLOAT16 if HIGH else _LOW_BFLOAT16, "=r,=r,r", [codes], dtype=tl.bfloat16, is_pure=True, pack=4
        )
    else:
        return tl.inline_asm_elementwise(
            _HIGH_FLOAT16 if HIGH else _LOW_FLOAT16, "=r,=r,r", [codes], dtype=tl.float16, is_pure=True, pack=4
        )


@triton.jit
@no_type_check
def four_products(a, b, sums, NATIVE: tl.constexpr):
    """sums + the products of four int8 in each word."""
    if NATIVE:
        code: tl.constexpr = "dp4a.s32.s32 $0, $1, $2, $3;"
        return tl.inline_asm_elementwise(code, "=r,r,r,r", [a, b, sums], dtype=tl.int32, is_pure=True, pack=1)
    else:
        for i in tl.static_range(4):
            sums += ((a << (24 - 8 * i)) >> 24) * ((b << (24 - 8 * i)) >> 24)
        return sums


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
def quotient(x, scale):
    """x / scale, as IEEE rounds it, by a scale that many numbers share: one division, and three operations for each.

    The quotient by the rounded reciprocal, and the remainder's (Markstein, IBM J. Res. Dev. 34, 1990). It is off by one
    in the last place for scales with a significand of ones alone, and loses places below 2^-126.
    """
    if _COMPILED:
        inverse = tl.minimum(tl.div_rn(scale * 0 + 1.0, scale), 8.507059173023462e37)
        near = x * inverse
        return tl.fma(tl.fma(-near, scale, x), inverse, near)
    else:
        return tl.div_rn(x, scale)


@triton.jit
@no_type_check
def code_of(x, scale, zero, LOWEST: tl.constexpr, HIGHEST: tl.constexpr):
    """The code of x, still a float."""
    return tl.minimum(tl.maximum(rounded(quotient(x, scale)) + zero, LOWEST), HIGHEST)
