"""GPTQ's columns on a GPU: `COLUMNS` of them in one launch, where torch takes ten launches for every column."""

from typing import no_type_check

import triton
import triton.language as tl
from torch import Tensor

from dfrot.kernels.cuda.primitives import code_of
from dfrot.kernels.cuda.rows import given_or
from dfrot.quant.grids import Grid

COLUMNS = 64  # of one launch
_OUTPUTS = 32  # of one program, which has all of its columns' errors in registers


@triton.jit(do_not_specialize=["first", "count"])
@no_type_check
def columns_kernel(
    WANTED,
    ERROR,
    CODES,
    M,
    GROUP,
    SCALE,
    ZERO,
    out,
    first,
    count,
    COLUMNS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    VARIED: tl.constexpr,
    LOWEST: tl.constexpr,
    HIGHEST: tl.constexpr,
):
    """Round columns first … first + count of (in, out) arrays; M (count, count): in row j what column j takes."""
    n = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    before, ok = tl.arange(0, COLUMNS), n < out
    errors = tl.zeros([COLUMNS, OUTPUTS], tl.float32)
    for j in range(count):
        at = (first + j).to(tl.int64) * out + n
        taken = tl.load(M + j * count + before, mask=before < j, other=0.0)
        wanted = tl.load(WANTED + at, mask=ok, other=0.0) + tl.sum(errors * taken[:, None], 0)
        of_group = tl.load(GROUP + first + j) * out + n
        scale = tl.load(SCALE + of_group, mask=ok, other=1.0)
        zero = scale * 0
        if VARIED:
            zero = tl.load(ZERO + of_group, mask=ok, other=0.0)
        code = code_of(wanted, scale, zero, LOWEST, HIGHEST)
        value = (code - zero) * scale
        error = tl.load(ERROR + at, mask=ok, other=0.0) - value
        tl.store(CODES + at, code, mask=ok)
        tl.store(ERROR + at, error, mask=ok)
        tl.store(WANTED + at, wanted - value, mask=ok)
        errors = tl.where((before == j)[:, None], error[None, :], errors)


def round_columns(
    wanted: Tensor,
    error: Tensor,
    codes: Tensor,
    upper: Tensor,
    group: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    columns: slice,
    grid: Grid,
) -> None:
    """What `rounding.gptq.round_columns` does, for at most `COLUMNS` columns."""
    taken = upper[columns, columns].T.contiguous()
    out = wanted.shape[1]
    columns_kernel[(triton.cdiv(out, _OUTPUTS),)](
        *(wanted, error, codes, taken, group, scale, given_or(zero, scale), out, columns.start, len(taken)),
        **{"COLUMNS": COLUMNS, "OUTPUTS": _OUTPUTS, "VARIED": zero is not None},
        **{"LOWEST": grid.lowest, "HIGHEST": grid.highest, "num_warps": 4},
        enable_fp_fusion=False,
    )
