"""Linear layers: rows are rotated and quantized (rows.py), and multiplied by the checkpoint's own bytes, exactly.

With a′ and z′ of an input as in rows.py, q and v the codes and zero point of a weight, in b bits,

    w′ = q − 2^(b − 1),   v′ = v − 2^(b − 1), which is 0 on symmetric grids
    Σ (a − z)(q − v) = Σ a′w′ − v′ Σ a′ − z′ Σ w′ + n z′v′
"""

from collections.abc import Sequence
from typing import Any, no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from dfrot.kernels.cuda.primitives import NATIVE, four_products, nibbles
from dfrot.kernels.cuda.rows import Codes, given_or, quantize_rows
from dfrot.kernels.linear import PackedWeight
from dfrot.quant.grids import IntGrid
from dfrot.quant.spec import TensorSpec

VECTORS, FEW = 2, 16  # rows: at most, for the kernels without and with tensor cores

# The fastest on an H100 for layers of Llama-3-8B.
_VECTOR_TILE = {"BN": 8, "BW": 256, "num_warps": 4}
_FEW_TILE = {"BN": 32, "BK": 128, "SHARES": 4, "num_warps": 4, "num_stages": 3}
_BUSY = 100  # large tiles that are enough for all multiprocessors


@triton.jit
@no_type_check
def _added(sums, W, okw, C, okc, num_bytes, BITS: tl.constexpr, NATIVE: tl.constexpr):
    """sums + the products of bytes at W with codes at C: of 4 bits times 16, odd channels num_bytes behind."""
    w, even = tl.load(W, mask=okw, other=0), tl.load(C, mask=okc, other=0)
    if BITS == 4:
        odd = tl.load(C + num_bytes, mask=okc, other=0)
        sums = tl.dot(nibbles(w, False, NATIVE), even, acc=sums, out_dtype=tl.int32)
        return tl.dot(nibbles(w, True, NATIVE), odd, acc=sums, out_dtype=tl.int32)
    else:
        return tl.dot((w ^ 128).to(tl.int8, bitcast=True), even, acc=sums, out_dtype=tl.int32)


@triton.jit
@no_type_check
def _corrected(
    total,
    rn,
    rm,
    okn,
    okm,
    V,
    SUMS,
    Z,
    WSUMS,
    group,
    groups,
    size,
    VARIED: tl.constexpr,
    SHIFTED: tl.constexpr,
    HALF: tl.constexpr,
):
    """Σ a′w′ of a group to Σ (a − z)(q − v), int32; channels rn, rows rm and groups broadcast to the sums."""
    if VARIED:
        v = tl.load(V + rn * groups + group, mask=okn, other=0).to(tl.int32) - HALF
        total -= v * tl.load(SUMS + rm * groups + group, mask=okm, other=0)
    if SHIFTED:
        z = tl.load(Z + rm, mask=okm, other=0.0).to(tl.int32)
        w = tl.load(WSUMS + rn * groups + group, mask=okn, other=0)
        if VARIED:
            w -= v * size
        total -= w * z
    return total


@triton.jit
@no_type_check
def _store_product(y, rn, rm, okn, okm, S, BIAS, Y, out, BIASED: tl.constexpr):
    """Scale float32 sums (rn, rm) by the rows' scales, add the bias, and store them."""
    y = y * tl.load(S + rm, mask=okm, other=0.0)[None, :]
    if BIASED:
        y += tl.load(BIAS + rn, mask=okn, other=0.0).to(tl.float32)[:, None]
    at = rm.to(tl.int64)[None, :] * out + rn[:, None]
    tl.store(Y + at, y.to(Y.dtype.element_ty), mask=okn[:, None] & okm[None, :])


@triton.jit(do_not_specialize=["rows"])
@no_type_check
def product_kernel(
    C,
    S,
    Z,
    SUMS,
    W,
    WS,
    V,
    WSUMS,
    BIAS,
    Y,
    rows,
    out,
    num_bytes,
    groups,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GM: tl.constexpr,
    GROUP_BYTES: tl.constexpr,
    BITS: tl.constexpr,
    VARIED: tl.constexpr,
    SHIFTED: tl.constexpr,
    BIASED: tl.constexpr,
    NATIVE: tl.constexpr,
):
    """Y (rows, out) of codes (rows, in) and bytes (out, num_bytes), a tile (BN, BM) a program; BK counts bytes.

    The product is transposed, so that the weight, unpacked in registers, is the operand that Hopper takes from there.
    GROUP_BYTES is a multiple of BK, or 0 for one scale a row.
    """
    HALF: tl.constexpr = 2 ** (BITS - 1)
    CODES: tl.constexpr = 8 // BITS
    size: tl.constexpr = GROUP_BYTES * CODES
    pid = tl.program_id(0)
    num_m, num_n = tl.cdiv(rows, BM), tl.cdiv(out, BN)
    first = (pid // (GM * num_n)) * GM
    height = tl.minimum(num_m - first, GM)
    within = pid % (GM * num_n)
    rm = (first + within % height) * BM + tl.arange(0, BM)
    rn = (within // height) * BN + tl.arange(0, BN)
    rk = tl.arange(0, BK)
    okm, okn = rm < rows, rn < out
    n, m, inn, inm = rn[:, None], rm[None, :], okn[:, None], okm[None, :]
    width = num_bytes * CODES
    w_at = W + rn.to(tl.int64)[:, None] * num_bytes + rk[None, :]
    c_at = C + rm.to(tl.int64)[None, :] * width + rk[:, None]
    sums = tl.zeros([BN, BM], tl.int32)
    y = tl.zeros([BN, BM], tl.float32)
    for k in range(0, num_bytes, BK):
        here = rk + k < num_bytes
        okw, okc = okn[:, None] & here[None, :], here[:, None] & okm[None, :]
        sums = _added(sums, w_at + k, okw, c_at + k, okc, num_bytes, BITS, NATIVE)
        if GROUP_BYTES > 0:  # noqa: SIM102 (one of them is known when it is compiled)
            if (k + BK) % GROUP_BYTES == 0:
                group = k // GROUP_BYTES
                part = sums >> 4 if BITS == 4 else sums
                part = _corrected(part, n, m, inn, inm, V, SUMS, Z, WSUMS, group, groups, size, VARIED, SHIFTED, HALF)
                y += part.to(tl.float32) * tl.load(WS + n * groups + group, mask=inn, other=0.0).to(tl.float32)
                sums = tl.zeros([BN, BM], tl.int32)
    if GROUP_BYTES == 0:
        part = sums >> 4 if BITS == 4 else sums
        part = _corrected(part, n, m, inn, inm, V, SUMS, Z, WSUMS, 0, 1, width, VARIED, SHIFTED, HALF)
        y = part.to(tl.float32) * tl.load(WS + n, mask=inn, other=0.0).to(tl.float32)
    _store_product(y, rn, rm, okn, okm, S, BIAS, Y, out, BIASED)


@triton.jit(do_not_specialize=["rows"])
@no_type_check
def few_kernel(
    C,
    S,
    Z,
    SUMS,
    W,
    WS,
    V,
    WSUMS,
    BIAS,
    Y,
    rows,
    out,
    num_bytes: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    SHARES: tl.constexpr,
    BITS: tl.constexpr,
    VARIED: tl.constexpr,
    SHIFTED: tl.constexpr,
    BIASED: tl.constexpr,
    NATIVE: tl.constexpr,
):
    """The same for at most 16 rows and one scale a row: warps share the channels among them, and add up at the end."""
    HALF: tl.constexpr = 2 ** (BITS - 1)
    width: tl.constexpr = num_bytes * 8 // BITS
    SHARE: tl.constexpr = ((num_bytes + SHARES * BK - 1) // (SHARES * BK)) * BK
    rn, rm, rk = tl.program_id(0) * BN + tl.arange(0, BN), tl.arange(0, 16), tl.arange(0, BK)
    okm, okn = rm < rows, rn < out
    start = tl.arange(0, SHARES)[:, None, None] * SHARE
    w_at = start + rk[None, None, :]
    c_at = start + rk[None, :, None]
    wp = W + rn.to(tl.int64)[None, :, None] * num_bytes
    cp = C + rm[None, None, :] * width
    sums = tl.zeros([SHARES, BN, 16], tl.int32)
    for k in range(0, SHARE, BK):
        okw = okn[None, :, None] & (w_at + k < num_bytes)
        okc = okm[None, None, :] & (c_at + k < num_bytes)
        sums = _added(sums, wp + (w_at + k), okw, cp + (c_at + k), okc, num_bytes, BITS, NATIVE)
    total = tl.sum(sums, 0)
    total = total >> 4 if BITS == 4 else total
    n, m, inn, inm = rn[:, None], rm[None, :], okn[:, None], okm[None, :]
    total = _corrected(total, n, m, inn, inm, V, SUMS, Z, WSUMS, 0, 1, width, VARIED, SHIFTED, HALF)
    y = total.to(tl.float32) * tl.load(WS + rn, mask=okn, other=0.0).to(tl.float32)[:, None]
    _store_product(y, rn, rm, okn, okm, S, BIAS, Y, out, BIASED)


@triton.jit(do_not_specialize=["rows"])
@no_type_check
def vector_kernel(
    C,
    S,
    Z,
    SUMS,
    W,
    WS,
    V,
    WSUMS,
    BIAS,
    Y,
    rows,
    out,
    words: tl.constexpr,
    groups: tl.constexpr,
    ROWS: tl.constexpr,
    BN: tl.constexpr,
    BW: tl.constexpr,
    GROUP_WORDS: tl.constexpr,
    BITS: tl.constexpr,
    VARIED: tl.constexpr,
    SHIFTED: tl.constexpr,
    BIASED: tl.constexpr,
    NATIVE: tl.constexpr,
):
    """The same for at most ROWS rows, four products an instruction: C and W are int32, four codes or bytes a word.

    GROUP_WORDS divides BW, or is 0 for one scale a row.
    """
    HALF: tl.constexpr = 2 ** (BITS - 1)
    CODES: tl.constexpr = 32 // BITS  # of a word
    size: tl.constexpr = GROUP_WORDS * CODES
    rn, rm = tl.program_id(0) * BN + tl.arange(0, BN), tl.arange(0, ROWS)
    okm, okn = rm < rows, rn < out
    w_at, c_at = W + rn.to(tl.int64)[:, None] * words, C + rm[:, None] * (words * CODES // 4)
    sums = tl.zeros([BN, ROWS, BW], tl.int32)
    if GROUP_WORDS > 0:
        scaled = tl.zeros([BN, ROWS, BW // GROUP_WORDS], tl.float32)
    for step in tl.static_range((words + BW - 1) // BW):
        at = step * BW + tl.arange(0, BW)[None, :]
        w = tl.load(w_at + at, mask=okn[:, None] & (at < words), other=0)
        c = tl.load(c_at + at, mask=okm[:, None] & (at < words), other=0)
        if BITS == 4:
            odd = tl.load(c_at + words + at, mask=okm[:, None] & (at < words), other=0)
            low, high = ((w << 4) ^ -2139062144) & -252645136, (w ^ -2139062144) & -252645136
            sums = four_products(low[:, None, :], c[None, :, :], sums, NATIVE)
            sums = four_products(high[:, None, :], odd[None, :, :], sums, NATIVE)
        else:
            sums = four_products((w ^ -2139062144)[:, None, :], c[None, :, :], sums, NATIVE)
        if GROUP_WORDS > 0:
            part = tl.sum(tl.reshape(sums, (BN, ROWS, BW // GROUP_WORDS, GROUP_WORDS)), 3)
            part = part >> 4 if BITS == 4 else part
            group = (step * (BW // GROUP_WORDS) + tl.arange(0, BW // GROUP_WORDS))[None, None, :]
            n, m = rn[:, None, None], rm[None, :, None]
            inn, inm = (n < out) & (group < groups), (m < rows) & (group < groups)
            part = _corrected(part, n, m, inn, inm, V, SUMS, Z, WSUMS, group, groups, size, VARIED, SHIFTED, HALF)
            scaled += part.to(tl.float32) * tl.load(WS + n * groups + group, mask=inn, other=0.0).to(tl.float32)
            sums = tl.zeros([BN, ROWS, BW], tl.int32)
    if GROUP_WORDS > 0:
        y = tl.sum(scaled, 2)
    else:
        total = tl.sum(sums, 2)
        total = total >> 4 if BITS == 4 else total
        n, m, inn, inm = rn[:, None], rm[None, :], okn[:, None], okm[None, :]
        total = _corrected(total, n, m, inn, inm, V, SUMS, Z, WSUMS, 0, 1, words * CODES, VARIED, SHIFTED, HALF)
        y = total.to(tl.float32) * tl.load(WS + rn, mask=okn, other=0.0).to(tl.float32)[:, None]
    _store_product(y, rn, rm, okn, okm, S, BIAS, Y, out, BIASED)


def products(
    x: Tensor,
    parts: Sequence[Tensor | None],
    passes: Sequence[int],
    data: Sequence[Tensor],
    square: int,
    weight_bits: int,
    bits: int,
    symmetric: bool,
    clip: float,
) -> list[Tensor]:
    """`dfrot::linear` on a GPU."""
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    weights = [PackedWeight(*parts[at : at + 4]) for at in range(0, len(parts), 4)]  # type: ignore[arg-type]
    groups = max((weight.scales.shape[1] for weight in weights if weight.zeros is not None), default=0)
    grid = IntGrid(bits, symmetric)
    codes = quantize_rows(rows, passes, data, square, grid, clip, evens_first=weight_bits == 4, groups=groups)
    return [_product(codes, weight, weight_bits, x.dtype).view(*x.shape[:-1], -1) for weight in weights]


def _product(codes: Codes, weight: PackedWeight, bits: int, dtype: torch.dtype) -> Tensor:
    """Scaled products of codes with a weight, (rows, out)."""
    rows, (out, num_bytes), groups = len(codes.codes), weight.qweight.shape, weight.scales.shape[1]
    y = codes.codes.new_empty(rows, out, dtype=dtype)
    wsums = None if codes.shift is None else weight.code_sums(bits) - codes.codes.shape[1] // groups * 2 ** (bits - 1)
    shift, sums = given_or(codes.shift, codes.scale), given_or(codes.sums, codes.codes)
    arguments: list[Any] = [codes.codes, codes.scale, shift, sums]
    arguments += weight.qweight, weight.scales, given_or(weight.zeros, weight.qweight), given_or(wsums, codes.codes)
    arguments += given_or(weight.bias, codes.scale), y, rows, out, num_bytes
    how = {"BITS": bits, "VARIED": weight.zeros is not None, "SHIFTED": codes.shift is not None, "NATIVE": NATIVE}
    how["BIASED"] = weight.bias is not None
    words, group_words = num_bytes // 4, 0 if groups == 1 else num_bytes // groups // 4
    if rows <= VECTORS and num_bytes % (4 * groups) == 0 and group_words in (0, 1, 2, 4, 8, 16, 32, 64):
        arguments[0], arguments[4] = codes.codes.view(torch.int32), weight.qweight.view(torch.int32)
        tile = {"ROWS": triton.next_power_of_2(rows), **_VECTOR_TILE}
        vector_kernel[(triton.cdiv(out, tile["BN"]),)](
            *(*arguments[:-1], words, groups), **tile, GROUP_WORDS=group_words, **how
        )
        return y
    if rows <= FEW and groups == 1:
        few_kernel[(triton.cdiv(out, _FEW_TILE["BN"]),)](*arguments, **_FEW_TILE, **how)
        return y
    group_bytes = num_bytes // groups if groups > 1 else 0
    bm, bn, bk, warps, stages = _tile(rows, out, group_bytes)
    bk = min(bk, group_bytes or bk)
    tiles = triton.cdiv(rows, bm) * triton.cdiv(out, bn)
    tile = {"BM": bm, "BN": bn, "BK": bk, "GM": 8, "GROUP_BYTES": group_bytes}
    product_kernel[(tiles,)](*arguments, groups, **tile, **how, num_warps=warps, num_stages=stages)
    return y


def _tile(rows: int, out: int, group_bytes: int) -> tuple[int, int, int, int, int]:
    """BM, BN, BK, warps and stages of `product_kernel`."""
    if rows <= FEW:
        return 16, 64, 64, 4, 4
    if group_bytes or triton.cdiv(rows, 128) * triton.cdiv(out, 128) < _BUSY:  # of groups there are two sums
        return 64, 64, 64, 4, 4
    return 128, 128, 64, 8, 4


def supported(weights: TensorSpec, activations: TensorSpec, width: int) -> bool:
    """Whether there is a kernel for such grids."""
    if weights.bits not in (4, 8) or width * weights.bits % 8:
        return False
    group_bytes = 0 if weights.group is None else weights.group * weights.bits // 8
    return group_bytes == 0 or (group_bytes in (32, 64) or group_bytes % 64 == 0)
