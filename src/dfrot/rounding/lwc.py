"""Learnable weight clipping (OmniQuant, Shao et al. 2023, arXiv 2308.13137; DuQuant's "+LWC").

Every channel (or group) of a weight keeps a share of its range, σ(u) max(w, 0) and σ(l) min(w, 0), on symmetric grids
σ(u) max |w|, and weights are rounded to nearest. The shares of all layers of a block are learned together, so that the
block's output comes close to that of the original model:

    min_{u, l}  Σ_tokens ‖B(x; Ŵ(u, l), Q_a) − B₀(x₀)‖²,

x what the quantized-so-far model feeds the block, x₀ what the original does, Q_a the activation quantizers (on).
Rounding passes gradients straight through, so that the gradient of ŵ = s (clamp(round(w/s) + z) − z) is, per entry,

    ∂ŵ/∂s = clamp(…) − z − [not clamped] w/s,      ∂ŵ/∂z = −[clamped] s.

The papers start from σ = 0.982; here the shares start from the clip search, and the grid that is trained on is the grid
that is stored, its scales rounded as they will be.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dfrot.models.sizes import ModelSizes
from dfrot.quant.affine import SCALE_DTYPE, QParams, grouped, qparams_of_range, quantize, value_range
from dfrot.quant.grids import IntGrid
from dfrot.quant.spec import TensorSpec
from dfrot.rounding.rounding import BlockTask, Rounded, Rounding
from dfrot.rounding.rtn import weight_qparams
from dfrot.system.errors import UserError
from dfrot.system.papers import Paper

OMNIQUANT = Paper(
    "omniquant",
    "2308.13137",
    "Shao, Wenqi and others",
    "OmniQuant: Omnidirectionally Calibrated Quantization for Large Language Models",
)
LARGEST_START = 0.98  # of a clip factor: beyond, the sigmoid hardly moves


class _FakeQuantized(torch.autograd.Function):
    """ŵ of groups (…, size), differentiable in scale and zero point (…, 1)."""

    @staticmethod
    def forward(ctx: Any, groups: Tensor, scale: Tensor, zero: Tensor | None, grid: IntGrid) -> Tensor:
        ratio = groups / scale
        code = ratio.round() if zero is None else ratio.round().add_(zero)
        clamped = (code < grid.lowest) | (code > grid.highest)
        code.clamp_(grid.lowest, grid.highest)
        if zero is not None:
            code -= zero
        ctx.save_for_backward(code - ratio.masked_fill_(clamped, 0), clamped, scale)
        return code.mul_(scale)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        by_scale, clamped, scale = ctx.saved_tensors
        to_zero = None
        if ctx.needs_input_grad[2]:
            to_zero = -scale * gradient.masked_fill(~clamped, 0).sum(-1, keepdim=True)
        return None, (gradient * by_scale).sum(-1, keepdim=True), to_zero, None


class ClippedWeight(nn.Module):
    """A weight (out, in) whose grid has learnable shares of its range: for each group one, or two if asymmetric."""

    def __init__(self, weight: Float[Tensor, "out in"], spec: TensorSpec) -> None:
        super().__init__()
        self.spec, self.weight = spec, weight
        self.low, self.high = value_range(weight, spec.grid, spec.weight_granularity)
        whole = qparams_of_range(self.low, self.high, spec.grid)
        clip_factor = (weight_qparams(weight, spec).scale / whole.scale).clamp(max=LARGEST_START)
        self.upper = nn.Parameter(clip_factor.logit())
        self.lower = None if self.low is None else nn.Parameter(clip_factor.logit())

    def qparams(self) -> QParams:
        """The grid as it would be stored, with gradients as if nothing in it were rounded."""
        high = self.high * self.upper.sigmoid()
        low = None if self.low is None or self.lower is None else self.low * self.lower.sigmoid()
        stored = qparams_of_range(low, high, self.spec.grid, SCALE_DTYPE)
        exact = (high if low is None else high - low) / self.spec.grid.highest
        scale = exact + (stored.scale - exact).detach()
        if low is None or stored.zero is None:
            return QParams(scale, None)
        exact = -low / scale
        return QParams(scale, exact + (stored.zero - exact).detach())

    def forward(self) -> Float[Tensor, "out in"]:
        scale, zero = self.qparams()
        groups = grouped(self.weight, self.spec.weight_granularity)
        zero = None if zero is None else zero[..., None]
        return _FakeQuantized.apply(groups, scale[..., None], zero, self.spec.grid).reshape(self.weight.shape)

    @torch.no_grad()
    def quantized(self) -> tuple[Tensor, QParams]:
        """Integers and grid in their stored form."""
        qparams = self.qparams()
        return quantize(self.weight, self.spec.grid, self.spec.weight_granularity, qparams), qparams


@dataclass(frozen=True)
class LWC(Rounding):
    """Learn the clip factors of all layers of a block together, then round to nearest."""

    epochs: int = 20
    """Passes over the calibration text for every block."""
    learning_rate: float = 0.05
    """Learning rate of Adam at the start; it falls to 0."""

    name = "lwc"
    papers = (OMNIQUANT,)
    quantizes_activations = True
    learns_clipping = True

    @property
    def needs_teacher(self) -> bool:
        return True

    def __post_init__(self) -> None:
        if self.epochs < 1:
            raise UserError(f"epochs is at least 1, got {self.epochs}.")
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            raise UserError(f"a learning rate is positive, got {self.learning_rate}.")

    def round(self, task: BlockTask) -> Rounded:
        stream = task.stream
        assert stream is not None, "a rounding that needs data gets a stream"
        targets = stream.advance_teacher()
        student = stream.block(task.index, task.module.state_dict(), stream.runtime.without("weights"))
        clipped = {
            name: ClippedWeight(student.get_submodule(name).weight, task.spec)  # type: ignore[arg-type]
            for name in task.graph.linears
        }
        optimizer = torch.optim.Adam(nn.ModuleList(clipped.values()).parameters(), self.learning_rate)
        steps = self.epochs * len(stream)
        decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
        generator = torch.Generator().manual_seed(task.seed)
        # the loss is relative to the size of the output
        unit = targets.norm().item() ** 2 / targets.numel()
        losses = []
        for _ in range(self.epochs):
            total = 0.0
            for number in torch.randperm(len(stream), generator=generator).tolist():
                weights = {f"{name}.weight": weight() for name, weight in clipped.items()}
                output = stream.run(partial(_call, student, weights), task.index, stream[number : number + 1])
                loss = (output - targets[number].to(stream.device)).square().mean() / unit
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                decay.step()
                total += loss.item()
            losses.append(total / len(stream))
        return Rounded({name: weight.quantized() for name, weight in clipped.items()}, {"loss_by_epoch": losses})

    def peak_bytes(self, sizes: ModelSizes) -> int:
        # folded; rounded, with gradients; the codes and what they are packed into; a sequence's states
        return sizes.block * (sizes.working + 3 * sizes.working + 1 + 2) + 3 * sizes.working * sizes.sequence

    def state_bytes(self, sizes: ModelSizes) -> int:
        return sizes.working * sizes.hidden  # the teacher's


def _call(block: nn.Module, weights: dict[str, Tensor], *args: Tensor, **kwargs: Any) -> Any:
    return torch.func.functional_call(block, weights, args, kwargs)
