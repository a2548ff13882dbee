"""GPTQ: quantize column after column, each compensating for those before (Frantar et al. 2022, arXiv 2210.17323).

A layer's loss on its inputs X (tokens, in) is, for every row w of its weight and H = Xᵀ X,

    ‖X wᵀ − X ŵᵀ‖² = (w − ŵ) H (w − ŵ)ᵀ.

The paper rounds column after column and updates the columns still to come with the Cholesky factor of H⁻¹. The same
numbers come from H itself, with nothing inverted. Let H = M D Mᵀ, M unit upper triangular, D diagonal. Then

    (w − ŵ) H (w − ŵ)ᵀ = Σⱼ Dⱼ eⱼ²,      eⱼ = wⱼ − ŵⱼ + Σ_{i<j} (wᵢ − ŵᵢ) Mᵢⱼ,

so, going from the first column to the last, ŵⱼ = Q(wⱼ + Σ_{i<j} (wᵢ − ŵᵢ) Mᵢⱼ) makes one term after the other as small
as the grid allows. (That this is GPTQ, and Babai's nearest plane algorithm: Chen et al. 2025, arXiv 2507.18553.)

The grid is chosen before, by clip search on the unrounded weight; with groups too, so that with `act_order`, which
takes the columns with the largest Hᵢᵢ first, each column keeps the scale of the group it stands in ("static groups").

X are inputs that blocks rounded before have changed, and the paper's target X wᵀ repeats their errors. The output of
the original model, X₀ wᵀ, is another (GPTAQ, Li et al. 2025, arXiv 2504.02692, compensates for the difference column by
column). The unrounded row that comes closest to it,

    argmin_v ‖X₀ wᵀ − X vᵀ‖² + λ ‖v − w‖²  =  w (X₀ᵀ X + λ I) (H + λ I)⁻¹,

takes the place of w; what it leaves is orthogonal to X, so rounding it is the same problem as before.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float, Int, Integer
from torch import Tensor

from dfrot.kernels import cuda
from dfrot.kernels import rounding as kernels
from dfrot.models.sizes import ModelSizes
from dfrot.quant.affine import QParams, dequantize, quantize
from dfrot.quant.grids import Grid, IntGrid, PerGroup
from dfrot.quant.spec import TensorSpec
from dfrot.rounding.rounding import BlockTask, Rounded, Rounding
from dfrot.rounding.rtn import weight_qparams
from dfrot.system.errors import UserError
from dfrot.system.papers import Paper

# Columns whose updates are delayed and applied as one product: within the cache, and beyond it.
_INNER, _OUTER = 16, 512
# Factorised in float64 up to this width; beyond it that costs more than rounding the columns.
FLOAT64_UP_TO = 2048
_RAISE, _RAISES = 10.0, 6  # damping, when the Hessian is singular
RIDGE = 0.05  # λ as a share of the Hessian's mean diagonal
# Of a weight whose rows are rounded together; five times as much is needed beside it.
PIECE_ENTRIES = 1 << 25

GPTQ_PAPER = Paper(
    "gptq",
    "2210.17323",
    "Frantar, Elias and others",
    "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers",
)


@dataclass(frozen=True)
class GPTQ(Rounding):
    """Round column after column, each compensating for those before."""

    act_order: bool = True
    """Take the columns with the largest inputs first; the groups' scales stay where they are, so it costs nothing."""
    percdamp: float = 0.01
    """Added to the Hessian's diagonal, as a share of its mean."""
    target: Literal["inputs", "original"] = "inputs"
    """The output that a layer is rounded towards: W x for the inputs that arrive from rounded blocks (the paper), or
    that of the original model."""

    name = "gptq"
    papers = (GPTQ_PAPER,)
    shares_sequences = True

    @property
    def needs_teacher(self) -> bool:
        return self.target == "original"

    def __post_init__(self) -> None:
        if not (math.isfinite(self.percdamp) and self.percdamp >= 0):
            raise UserError(f"percdamp is a share of the mean diagonal, at least 0, got {self.percdamp}.")

    def round(self, task: BlockTask) -> Rounded:
        """Round the layers of a block in the order in which they run, on inputs from layers rounded before.

        Notes by stage: ‖XW − XŴ‖² / ‖XW‖², the same if rounded to nearest, the damping that was needed, and how many
        tokens of others an expert's Hessian has that few tokens chose.
        """
        rounded: dict[str, tuple[Tensor, QParams]] = {}
        notes = {}
        for stage in task.graph.rounded_together:
            try:
                layers, notes[" ".join(stage)] = self._round_stage(task, stage)
            except UserError as error:
                raise UserError(f"block {task.index}, {', '.join(stage)}: {error}") from error
            rounded |= layers
        return Rounded(rounded, {"stages": notes})

    def _round_stage(self, task: BlockTask, stage: tuple[str, ...]) -> Rounded:
        """The layers that read one input, as one weight: one Hessian, one factorisation, one pass."""
        assert task.stream is not None, "a rounding that needs data gets a stream"
        layers, processes, spec = [task.module.get_submodule(name) for name in stage], task.stream.processes, task.spec
        hessian, cross, filled = task.stream.hessian(task.index, task.module, stage[0])
        weight = torch.cat([layer.weight.data for layer in layers])  # type: ignore[misc]
        for layer in layers:
            layer.weight.data = weight[:0]  # they are all in `weight`, and need no room twice
        if cross is not None:
            weight = towards_original(weight, hessian, cross)
        factor = factorize(hessian, self.percdamp, self.act_order)
        qparams = weight_qparams(weight, spec)
        shard = processes.shard  # rows are independent of each other
        codes, losses = gptq_with_rtn_fallback(weight[shard], hessian, factor, qparams.rows(shard), spec)
        codes, losses = processes.all_gather(codes, len(weight)), processes.all_reduce_sum(losses)
        size = layer_loss(weight, hessian).sum().clamp(min=torch.finfo(weight.dtype).tiny)  # 0 for a layer of zeros
        loss, rtn_loss = (losses / size).tolist()
        rounded, stop = {}, 0
        for name, layer in zip(stage, layers, strict=True):
            rows = slice(stop, stop := stop + int(layer.out_features))  # type: ignore[arg-type]
            rounded[name] = codes[rows], qparams.rows(rows)
            # later layers of the block are to see what these leave
            layer.weight.data = dequantize(codes[rows], spec.weight_granularity, qparams.rows(rows))
        few = {"filled": filled} if filled else {}
        return Rounded(rounded, {"loss": loss, "rtn_loss": rtn_loss, "damping": factor.damping, **few})

    def peak_bytes(self, sizes: ModelSizes) -> int:
        # folded or rounded weights, the codes and what they are packed into, a sequence on its way
        held = sizes.block * (sizes.working * (1 + self.needs_teacher) + 2) + sizes.working * sizes.sequence
        return held + max(self._stage_bytes(sizes.working, *stage) for stage in sizes.stages)

    def _stage_bytes(self, working: int, rows: int, width: int) -> int:
        """The Hessian and its factorisation, or rounding with its factor: weights, sums, errors and codes."""
        wide = 8 if width <= FLOAT64_UP_TO else working
        factorising = width**2 * (working + max(2 * working + wide, 2 * wide))
        piece = min(rows * width, PIECE_ENTRIES)
        solving = (working + 3 * wide) * width**2 + 3 * wide * rows * width if self.needs_teacher else 0
        rounding = working * (2 * width**2 + rows * width + 5 * piece)
        return working * rows * width + max(factorising, solving, rounding)

    def state_bytes(self, sizes: ModelSizes) -> int:
        # attention is computed once, and its outputs kept, the teacher's too
        kept = sizes.heads + (sizes.hidden if sizes.experts else 0)  # what the experts read, likewise
        return sizes.working * (kept + (sizes.hidden + kept) * self.needs_teacher)

    def warning(self, sizes: ModelSizes) -> str | None:
        """A Hessian of fewer tokens than channels is singular: weights would be fitted to the calibration text."""
        name, width = max(((name, shape[1]) for name, shape in sizes.linears.items()), key=lambda item: item[1])
        if sizes.tokens >= width:
            return None
        return (
            f"{sizes.tokens} calibration tokens are few for GPTQ: {name} has {width} inputs. "
            f"Give --calib-tokens {-(-8 * width // sizes.seq_len) * sizes.seq_len} or more."
        )

    def summary(self, notes: Sequence[Mapping[str, Any]]) -> list[str]:
        stages = [stage for block in notes for stage in block["stages"].values()]
        found = []
        if ratios := [stage["loss"] / stage["rtn_loss"] for stage in stages if stage["loss"] > 0]:
            left = statistics.geometric_mean(ratios)
            found.append(f"gptq leaves {left:.0%} of rounding's squared error (geometric mean of layers)")
        if raised := [stage["damping"] for stage in stages if stage["damping"] > self.percdamp]:
            found.append(f"{len(raised)} singular Hessians, damped by up to {max(raised):g} of their mean diagonal")
        if few := [name for block in notes for name, stage in block["stages"].items() if "filled" in stage]:
            found.append(
                f"{len(few)} layers of experts that fewer tokens chose than they have channels were fitted to other "
                "tokens, too: more --calib-tokens would help them"
            )
        return found


def towards_original(
    weight: Float[Tensor, "out in"], hessian: Float[Tensor, "in in"], cross: Float[Tensor, "in in"]
) -> Float[Tensor, "out in"]:
    """W (X₀ᵀ X + λ I) (Xᵀ X + λ I)⁻¹, whose products with X come closest to those of W with X₀.

    Args:
        cross: X₀ᵀ X.

    Raises:
        UserError: the Hessian holds NaN or infinities, or is not positive semidefinite.
    """
    wide = torch.float64 if len(hessian) <= FLOAT64_UP_TO else hessian.dtype
    ridge = RIDGE * (float(hessian.diagonal().mean()) or 1.0)
    damped = hessian.to(wide, copy=True)
    damped.diagonal().add_(ridge)
    lower, failed = torch.linalg.cholesky_ex(damped)
    if failed:
        raise UserError("the Hessian is not positive semidefinite, or holds NaN or infinite values.")
    moved = torch.cholesky_solve((cross - hessian).to(wide).T @ weight.to(wide).T, lower).T  # what there is beyond W
    return weight + moved.to(weight)


class Factor(NamedTuple):
    """M D Mᵀ of a damped Hessian whose columns are taken in some order."""

    upper: Float[Tensor, "in in"]  # M, unit upper triangular
    diagonal: Float[Tensor, " in"]  # D
    order: Int[Tensor, " in"]  # position → column
    added: float  # to the Hessian's diagonal, by damping
    damping: float  # the same as a share of the diagonal's mean; more than `percdamp` if the Hessian was singular


def factorize(hessian: Float[Tensor, "in in"], percdamp: float, act_order: bool) -> Factor:
    """Decompose H + δ I, δ the share `percdamp` of the mean diagonal, raised tenfold until that is positive definite.

    With `act_order` in the order of falling Hᵢᵢ. Raises UserError if H holds NaN or infinities, or no damping helps.
    """
    diagonal = hessian.diagonal()  # Σ x², so a NaN anywhere is here too
    if not torch.isfinite(diagonal).all():
        raise UserError("the Hessian holds NaN or infinite values: the model's activations overflowed.")
    in_turn = torch.arange(len(diagonal), device=hessian.device)
    order = torch.argsort(diagonal, descending=True, stable=True) if act_order else in_turn
    wide = torch.float64 if len(diagonal) <= FLOAT64_UP_TO else hessian.dtype
    mean = float(diagonal.mean()) or 1.0  # a layer that saw nothing but zeros is rounded to nearest
    damping = percdamp
    for _ in range(_RAISES):
        # H = V Vᵀ with V upper triangular is the usual factorisation read from the last row and column to the first
        backwards = order.flip(0)
        damped = (hessian[backwards][:, backwards] if act_order else hessian.flip(0, 1)).to(wide)
        added = damping * mean
        damped.diagonal().add_(added)
        lower, failed = torch.linalg.cholesky_ex(damped)
        del damped
        if not failed:
            break
        damping = max(damping * _RAISE, torch.finfo(hessian.dtype).eps)
    else:
        raise UserError(f"the Hessian is not positive semidefinite: damping it by {damping / _RAISE:g} did not help.")
    roots = lower.diagonal().flip(0).clone()
    upper = lower.to(hessian.dtype).flip(0, 1)
    return Factor(upper.div_(roots.to(upper)), roots.square().to(upper), order, added, damping)


def gptq(
    weight: Float[Tensor, "out in"], factor: Factor, qparams: QParams, spec: TensorSpec
) -> tuple[Integer[Tensor, "out in"], Float[Tensor, " out"]]:
    """Integers on the grid of `qparams` (out, groups); each row's loss (w − ŵ) H (w − ŵ)ᵀ without the damping."""
    grid, granularity = spec.grid, spec.weight_granularity
    in_features = weight.shape[1]
    size = granularity.size if isinstance(granularity, PerGroup) else in_features
    group = factor.order // size
    scale = qparams.scale.T.contiguous()  # (groups, out): all that follows has a column of the weight as one row
    zero = None if qparams.zero is None else qparams.zero.T.contiguous()
    error = weight.T[factor.order].contiguous()  # w, and from the top w − ŵ; (in, out)
    wanted = error.clone()  # w + Σ (w − ŵ) M, and from the top e
    codes = torch.empty_like(error)
    inner, together = _INNER, round_columns
    if weight.dtype == torch.float32 and isinstance(grid, IntGrid) and cuda.computable(weight):
        from dfrot.kernels.cuda.gptq import COLUMNS as inner
        from dfrot.kernels.cuda.gptq import round_columns as together
    elif kernels.supported(weight, grid):
        inner, together = kernels.COLUMNS, kernels.round_columns
    for start in range(0, in_features, _OUTER):
        stop = min(start + _OUTER, in_features)
        for first in range(start, stop, inner):
            last = min(first + inner, stop)
            together(wanted, error, codes, factor.upper, group, scale, zero, slice(first, last), grid)
            wanted[last:stop].addmm_(factor.upper[first:last, last:stop].T, error[first:last])
        wanted[stop:].addmm_(factor.upper[start:stop, stop:].T, error[start:stop])
    loss = factor.diagonal @ wanted.square_() - factor.added * error.square_().sum(0)
    loss.clamp_(min=0)  # a difference of rounded sums
    return codes[torch.argsort(factor.order)].T.to(torch.int8 if grid.symmetric else torch.uint8), loss


def round_columns(
    wanted: Float[Tensor, "in out"],
    error: Float[Tensor, "in out"],
    codes: Float[Tensor, "in out"],
    upper: Float[Tensor, "in in"],
    group: Int[Tensor, " in"],
    scale: Float[Tensor, "groups out"],
    zero: Float[Tensor, "groups out"] | None,
    columns: slice,
    grid: Grid,
) -> None:
    """Round columns one after the other, into `codes`; each changes what is wanted of those after it among them.

    Args:
        wanted: w + Σ (w − ŵ) M; becomes e.
        error: w; becomes w − ŵ.
        upper: M.
    """
    for j, of_group in zip(range(columns.start, columns.stop), group[columns].tolist(), strict=True):
        step = scale[of_group]
        steps, shift = torch.div(wanted[j], step, out=codes[j]), None if zero is None else zero[of_group]
        code = grid.nearest_(steps, shift)
        rounded = code * step if shift is None else (code - shift).mul_(step)
        error[j] -= rounded
        wanted[j] -= rounded
        after = slice(j + 1, columns.stop)
        wanted[after].addr_(upper[j, after], error[j])


def layer_loss(error: Float[Tensor, "out in"], hessian: Float[Tensor, "in in"]) -> Float[Tensor, " out"]:
    """(w − ŵ) H (w − ŵ)ᵀ of every row."""
    return (error @ hessian).mul_(error).sum(-1)


def gptq_with_rtn_fallback(
    weight: Float[Tensor, "out in"], hessian: Float[Tensor, "in in"], factor: Factor, qparams: QParams, spec: TensorSpec
) -> tuple[Integer[Tensor, "out in"], Float[Tensor, "2"]]:
    """GPTQ's integers, but rounded to nearest in rows where greed does not pay; the losses of this and of RTN."""
    codes, losses = [], []
    for start in range(0, len(weight), step := max(1, PIECE_ENTRIES // weight.shape[1])):
        rows = slice(start, start + step)
        greedy, loss = gptq(weight[rows], factor, qparams.rows(rows), spec)
        nearest = quantize(weight[rows], spec.grid, spec.weight_granularity, qparams.rows(rows))
        restored = dequantize(nearest, spec.weight_granularity, qparams.rows(rows))
        rtn_loss = layer_loss(weight[rows] - restored, hessian)
        codes.append(torch.where((loss <= rtn_loss)[:, None], greedy, nearest))
        losses.append(torch.stack([torch.minimum(loss, rtn_loss), rtn_loss]).sum(1))
    return torch.cat(codes), torch.stack(losses).sum(0)
