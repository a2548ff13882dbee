"""What training computes around its products, each in one pass: quantization of tokens or heads, and its gradient;
scales and biases of what products put out; the KL divergence of next-token distributions, and its slope."""

import ctypes

import torch
from jaxtyping import Float
from torch import Tensor

from dfrot.kernels import cuda
from dfrot.kernels.structures import DTYPES, Grid, computable, machine, native, pointer
from dfrot.quant import affine
from dfrot.quant.spec import TensorSpec


def supported(x: Tensor) -> bool:
    """Whether there is a kernel that quantizes such a tensor, of whose gradient no gradient is asked for."""
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
    """x quantized and dequantized, as `quant.affine.fake_quantize`; in one pass, if there is a kernel."""
    if not (spec.integer and supported(x) and scale_dtype in (None, torch.bfloat16)):
        return affine.fake_quantize(x, spec.grid, spec.token_granularity, clip, scale_dtype)
    groups = affine.grouped(x, spec.token_granularity)
    if x.is_cuda:
        from dfrot.kernels.cuda import training

        return training.on_grid(groups, spec, clip, scale_dtype is not None).view_as(x)
    groups = groups.contiguous()
    made, grid = torch.empty_like(groups), Grid(spec.bits, spec.symmetric, float(clip))
    rows = pointer(groups), groups.shape[:-1].numel(), groups.shape[-1]
    native().dfrot_fake_quantize(*machine(), *rows, ctypes.byref(grid), scale_dtype is not None, pointer(made))
    return made.view_as(x)


def scaled(
    x: Float[Tensor, "*batch channels"],
    scale: Float[Tensor, " channels"],
    bias: Float[Tensor, " channels"] | None,
    dtype: torch.dtype,
) -> Float[Tensor, "*batch channels"]:
    """x · scale + bias as a tensor of a dtype, computed in that of the scales; in one pass, if there is a kernel."""
    if not (computable(x) and scale.dtype == torch.float32 and dtype in DTYPES):
        y = x.to(scale.dtype) * scale
        return (y if bias is None else y + bias).to(dtype)
    x, made = x.contiguous(), torch.empty(x.shape, dtype=dtype)
    rows = pointer(x), DTYPES[x.dtype], x.shape[:-1].numel(), x.shape[-1]
    factors = scale.contiguous(), None if bias is None else bias.contiguous()
    native().dfrot_scale(*machine(), *rows, *map(pointer, factors), pointer(made), DTYPES[dtype])
    return made


def divergence(
    student: Float[Tensor, "tokens vocabulary"], teacher: Float[Tensor, "tokens vocabulary"], share: float | None = None
) -> tuple[Float[Tensor, ""], Float[Tensor, "tokens vocabulary"] | None]:
    """Sum over tokens of KL(teacher ‖ student) of two tensors of logits, in nats, and, if a share is given, so much of
    its gradient in the student's logits: share · (softmax(student) − softmax(teacher)), which may take their place."""
    if not computable(student):
        wide = torch.promote_types(student.dtype, torch.float32)
        found, wanted = student.to(wide).log_softmax(-1), teacher.to(wide).log_softmax(-1)
        chances = wanted.exp()
        value = wanted.sub_(found).mul_(chances).sum()
        return value, None if share is None else found.exp_().sub_(chances).mul_(share)
    assert student.dtype == teacher.dtype, "they come from one head"
    assert all(logits.is_contiguous() for logits in (student, teacher)), "they are made by a product"
    values = torch.empty(len(student), dtype=torch.float64)
    size = DTYPES[student.dtype], *student.shape
    how = *machine(), pointer(student), pointer(teacher), *size, share is not None, share or 0.0
    native().dfrot_divergence(*how, pointer(values))
    return values.sum(), None if share is None else student
