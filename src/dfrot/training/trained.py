"""What training is made of: quantizers and rotations that let gradients through, and tensors that may move."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dfrot.kernels import training
from dfrot.linalg.rotation import Rotation
from dfrot.models.source import Source
from dfrot.models.stream import BlockRunner
from dfrot.quant.affine import choose_qparams, grouped
from dfrot.quant.spec import TensorSpec
from dfrot.runtime.norms import straight_through


class _Quantized(torch.autograd.Function):
    """Tokens or heads on their grid. The gradient passes straight through rounding, and through the range.

    With the range [l, h] = c · [min(x, 0), max(x, 0)] and the step s = (h − l) / (2ᵇ − 1), an entry that is rounded is
    off by s r, so a longer step moves it by r; an entry that is clipped is the end of the range. Both pull on the
    entries that span the range (as in LSQ, Esser et al. 2020, arXiv 1902.08153, whose step is a parameter), and on c.
    The scales of 4-bit floats have 8 bits and move in jumps: where there is no jump, their derivative is 0.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, spec: TensorSpec, scale_dtype: torch.dtype | None, clip: Tensor | float) -> Tensor:
        ctx.save_for_backward(x, *([clip] if isinstance(clip, Tensor) else []))
        ctx.spec, ctx.clip = spec, clip if isinstance(clip, float) else None
        return training.fake_quantize(x, spec, clip, scale_dtype)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        (x, *given), spec, grid = ctx.saved_tensors, ctx.spec, ctx.spec.grid
        clip, of_clip = given[0] if given else ctx.clip, None
        groups, slope = grouped(x, spec.token_granularity), grouped(upstream, spec.token_granularity)
        if not spec.integer:
            scale = choose_qparams(x, grid, spec.token_granularity, clip).scale.unsqueeze(-1)
            return (slope * (groups.abs() <= grid.highest * scale)).view_as(x), None, None, None
        if training.supported(x):
            of_x, of_ratio = training.quantize_backward(groups, slope, spec, clip)
            return of_x.view_as(x), None, None, of_ratio.sum().view_as(clip) if given else None
        least, low = groups.min(-1, keepdim=True)[::-1]
        most, high = (groups.abs() if grid.symmetric else groups).max(-1, keepdim=True)[::-1]
        low, high = low.clamp(max=0) * clip, high.clamp(min=0) * clip
        step = (high if grid.symmetric else high - low) / grid.highest
        step = torch.where(step == 0, 1, step)
        first = 0 if grid.symmetric else torch.round(low / step)  # what the lowest code stands for, in steps
        steps = groups / step
        rounded = steps.round()
        on_grid = rounded.clamp(first + grid.lowest, first + grid.highest)
        inside = slope * (on_grid == rounded)
        of_step = (inside * (on_grid - steps)).sum(-1, keepdim=True) / grid.highest
        clipped = slope - inside
        above = clipped.clone().masked_fill_(on_grid > rounded, 0).sum(-1, keepdim=True)
        below = clipped.sum(-1, keepdim=True) - above
        if grid.symmetric:
            of_high, of_low = of_step + above + below * (grid.lowest / grid.highest), None
            inside.scatter_add_(-1, most, clip * of_high * groups.gather(-1, most).sign())
        else:
            of_high, of_low = of_step + above, below - of_step
            inside.scatter_add_(-1, most, clip * of_high * (high > 0))
            inside.scatter_add_(-1, least, clip * of_low * (low < 0))
        if given:
            of_clip = (of_high * high if of_low is None else of_high * high + of_low * low).sum().view_as(clip) / clip
        return inside.view_as(x), None, None, of_clip


def quantized(
    x: Tensor, spec: TensorSpec, scale_dtype: torch.dtype | None = None, clip: Float[Tensor, "1"] | None = None
) -> Tensor:
    """x on the grid of `spec`, its scales of a narrower dtype if one is given, with another clip ratio if one is."""
    if not spec.enabled:
        return x
    return _Quantized.apply(x, spec, scale_dtype, spec.fixed_clip if clip is None else clip)


def less(x: Tensor, offset: Tensor | None) -> Tensor:
    """x − o."""
    return x if offset is None else x - offset


class _Rotated(torch.autograd.Function):
    """x R; backward g Rᵀ, for which nothing is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rotation: Rotation) -> Tensor:
        ctx.rotation = rotation
        return rotation.apply(x)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        return ctx.rotation.T.apply(upstream), None


class Trained(nn.Module):
    """A tensor of the checkpoint that may be trained: start · eᵖ, or start + unit · p.

    Args:
        start: as the checkpoint has it, in the dtype in which it keeps it.
        dtype: of the computation.
        unit: by which p moves it; None: p moves its logarithm.
        rate: learning rate of p; None: it is not trained.
        most: what it never exceeds; only without a unit.
    """

    def __init__(
        self, start: Tensor, dtype: torch.dtype, unit: float | None, rate: float | None, most: float = math.inf
    ) -> None:
        super().__init__()
        self.stored, self.unit, self.rate, self.most = start.dtype, unit, rate, most
        self.start = start.to(dtype)
        self.parameter = None if rate is None else nn.Parameter(torch.zeros_like(self.start))

    @property
    def bound(self) -> float:
        """The largest p. A clamp of the value alone would leave what is beyond it without a gradient back."""
        return math.log(self.most / self.start.item()) if math.isfinite(self.most) else math.inf

    def forward(self) -> Tensor:
        if self.parameter is None:
            return self.start
        p, start = self.parameter, self.start
        moved = start * p.exp() if self.unit is None else start + self.unit * p
        return straight_through(moved.to(self.stored).to(moved.dtype).clamp(max=self.most), moved)


class TrainedIntegers(nn.Module):
    """Integers that may move on their grid: round(start + p), with gradients straight through rounding.

    p begins at 0, in the middle of what rounds to the start, so an integer moves once gradients that agree have carried
    p over half a step.

    Args:
        start: the integers.
        lowest, highest: ends of their grid.
        rate: learning rate of p, in steps of the grid.
    """

    bound = math.inf

    def __init__(self, start: Tensor, lowest: int, highest: int, rate: float) -> None:
        super().__init__()
        self.start, self.lowest, self.highest, self.rate = start, lowest, highest, rate
        self.parameter = nn.Parameter(torch.zeros(start.shape, device=start.device))

    @torch.no_grad()
    def forward(self) -> Tensor:
        """The integers, as floats; gradients are those of `parameter`."""
        return (self.parameter + self.start).round_().clamp_(self.lowest, self.highest)


def clip_ratio(trained: Trained | None) -> Float[Tensor, "1"] | None:
    """A clip ratio that may be trained."""
    return None if trained is None else trained()


class TrainedRotation(nn.Module):
    """An orthogonal matrix that may be trained: R₀ (I − A)⁻¹ (I + A), A antisymmetric, by Cayley.

    `refresh` makes the matrix of the parameters as they are, once for all that read it.

    Args:
        product: dtype of the products with it.
    """

    bound = math.inf  # of its parameters

    def __init__(self, start: Tensor, rate: float, product: torch.dtype) -> None:
        super().__init__()
        self.start, self.rate, self.product = start, rate, product
        self.parameter = nn.Parameter(torch.zeros_like(start))  # A is its antisymmetric part
        self.refresh()

    def refresh(self) -> None:
        antisymmetric = (self.parameter - self.parameter.T) / 2
        identity = torch.eye(len(self.start), dtype=self.start.dtype, device=self.start.device)
        self.matrix = self.start @ torch.linalg.solve(identity - antisymmetric, identity + antisymmetric)
        self.factor = self.matrix.to(self.product)


def _times(x: Tensor, factor: Tensor) -> Tensor:
    """x times a matrix, or each of x's heads, if that has the size of one."""
    return (x.unflatten(-1, (-1, len(factor))).to(factor.dtype) @ factor).to(x.dtype).flatten(-2)


def rotated(x: Tensor, rotation: TrainedRotation | Rotation | None) -> Tensor:
    """x R, or of each of x's heads, if R has the size of one and is trained."""
    if isinstance(rotation, TrainedRotation):
        return _times(x, rotation.factor)
    return x if rotation is None else _Rotated.apply(x, rotation)


def rotated_back(x: Tensor, rotation: TrainedRotation | Rotation | None) -> Tensor:
    """x Rᵀ, likewise."""
    if isinstance(rotation, TrainedRotation):
        return _times(x, rotation.factor.T)
    return x if rotation is None else _Rotated.apply(x, rotation.T)


class ThroughBlocks:
    """Hidden states through the blocks of a decoder; with `recompute` what a block computes is not kept, and computed
    again backward."""

    def __init__(self, source: Source, recompute: bool) -> None:
        self._source, self.recompute = source, recompute
        self._runners: dict[int, BlockRunner] = {}  # by the length of windows

    def __call__(
        self, hidden: Float[Tensor, "windows seq_len hidden"], blocks: Sequence[nn.Module]
    ) -> Float[Tensor, "windows seq_len hidden"]:
        if (length := hidden.shape[1]) not in self._runners:
            self._runners[length] = BlockRunner(self._source, hidden[:1])
        run = self._runners[length]
        for index, block in enumerate(blocks):
            if self.recompute and torch.is_grad_enabled():
                hidden = checkpoint(run, block, index, hidden, use_reentrant=False)
            else:
                hidden = run(block, index, hidden)
        return hidden
