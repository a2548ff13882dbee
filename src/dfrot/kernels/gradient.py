"""Quantization of tokens or heads as training meets it: on a GPU, and its gradient, each in one pass over them."""

import ctypes

import torch
from jaxtyping import Float
from torch import Tensor

from dfrot.kernels import cuda
from dfrot.kernels.structures import Grid, computable, machine, native, pointer
from dfrot.quant import affine
from dfrot.quant.spec import TensorSpec


def supported(x: Tensor) -> bool:
    """Whether there is a kernel for such a tensor, of whose gradient no gradient is asked for."""
    return x.dtype == torch.float32 and (cuda.computable(x) or computable(x))


def quantize_backward(
    groups: Float[Tensor, "*batch size"], upstream: Float[Tensor, "*batch size"], spec: TensorSpec, clip: Tensor | float
) -> tuple[Float[Tensor, "*batch size"], Float[Tensor, "*batch"]]:
    """What x and the clip ratio get; each row of x, whose last axis shares a scale, has a part in the latter."""
    if groups.is_cuda:
        from dfrot.kernels.cuda import training

        return training.quantize_backward(groups, upstream, spec, clip)
    x, slope = groups.contiguous(), upstream.contiguous()
    of_x, of_clip = torch.empty_like(x), x.new_empty(x.shape[:-1])
    grid = Grid(spec.bits, spec.symmetric, float(clip))
    rows = pointer(x), pointer(slope), of_clip.numel(), x.shape[-1]
    native().dfrot_quantize_backward(*machine(), *rows, ctypes.byref(grid), pointer(of_x), pointer(of_clip))
    return of_x, of_clip


def fake_quantize(
    x: Float[Tensor, "..."], spec: TensorSpec, clip: Tensor | float, scale_dtype: torch.dtype | None
) -> Float[Tensor, "..."]:
    """x quantized and dequantized, as `quant.affine.fake_quantize`; on a GPU in one pass, if there is a kernel."""
    if not (x.is_cuda and spec.integer and supported(x) and scale_dtype in (None, torch.bfloat16)):
        return affine.fake_quantize(x, spec.grid, spec.token_granularity, clip, scale_dtype)
    from dfrot.kernels.cuda import training

    groups = affine.grouped(x, spec.token_granularity)
    return training.on_grid(groups, spec, clip, scale_dtype is not None).view_as(x)
