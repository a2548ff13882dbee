"""The gradient through the quantization of tokens or heads, which training takes, in one pass over them."""

import ctypes

import torch
from jaxtyping import Float
from torch import Tensor

from dfrot.kernels.structures import Grid, computable, machine, native, pointer
from dfrot.quant.spec import TensorSpec


def supported(x: Tensor) -> bool:
    """Whether there is a kernel for such a tensor, of whose gradient no gradient is asked for."""
    return x.dtype == torch.float32 and computable(x)


def quantize_backward(
    groups: Float[Tensor, "*batch size"], upstream: Float[Tensor, "*batch size"], spec: TensorSpec, clip: float
) -> tuple[Float[Tensor, "*batch size"], Float[Tensor, "*batch"]]:
    """What x and the clip ratio get; each row of x, whose last axis shares a scale, has a part in the latter."""
    x, slope = groups.contiguous(), upstream.contiguous()
    of_x, of_clip = torch.empty_like(x), x.new_empty(x.shape[:-1])
    grid = Grid(spec.bits, spec.symmetric, clip)
    rows = pointer(x), pointer(slope), of_clip.numel(), x.shape[-1]
    native().dfrot_quantize_backward(*machine(), *rows, ctypes.byref(grid), pointer(of_x), pointer(of_clip))
    return of_x, of_clip
