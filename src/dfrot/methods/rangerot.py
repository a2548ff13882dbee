"""RangeRot: a rotation that shortens the ranges of all tokens. Ours; it builds on DFRot, and no paper has it.

DFRot's objective (refinement.py) is the error of rounding. RangeRot looks at where that error comes from: rounding d
channels costs d s²/12 per token whatever the direction, and the step s is proportional to the token's range. What
lowers the error is short ranges,

    min_R  Σ w r_τ(xR)²,     r_τ(v) = τ log Σ exp(vⱼ/τ) + τ log Σ exp(−vⱼ/τ)  →  max v − min v   as τ → 0

(for symmetric grids 2 τ log Σ exp(±vⱼ/τ) → 2 max |v|; with a scale for a group r_τ² summed over the groups), a smooth
function over the orthogonal group. It is descended with momentum along geodesics R exp(−η A), A antisymmetric, while τ
and η fall. This lowers the error of ordinary tokens by a third, several times what alternation reaches from the same
start (dev/LOG.md).

On 4-bit floats short ranges do not pay (refinement.py says why). There the descent follows the error itself, whose
gradient is v − Q(v) as long as no v changes its grid point. DFRot's alternation, whose steps need no length, goes
further on such grids (docs/fp4.md): take that.

As in DFRot massive tokens are weighted by γ², every rotation met is judged by the error that the recipe's own quantizer
makes, and the best is kept. Differently from it γ is chosen by measurement unless given. SpinQuant (Liu et al. 2024,
arXiv 2405.16406) also descends on the orthogonal group, by the loss of the whole model: hours on a GPU where this takes
a minute on a CPU.
"""

import itertools
import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from dfrot.methods.dfrot import DFROT
from dfrot.methods.method import Look
from dfrot.methods.quarot import QUAROT
from dfrot.methods.refinement import Refined, Walk, pieces
from dfrot.quant.affine import grouped
from dfrot.quant.spec import TensorSpec
from dfrot.system.distributed import ProcessGroup
from dfrot.system.papers import Paper

SPINQUANT = Paper(
    "spinquant", "2405.16406", "Liu, Zechun and others", "SpinQuant: LLM Quantization with Learned Rotations"
)

# All constants below were tuned on smollm2-135m (dev/LOG.md).
# Softness τ in units of the tokens' RMS, from the first step to the last.
TAU = (0.8, 0.2)
# Length of the first step along a geodesic, as the root mean square angle (radians) over the channels.
FIRST_STEP = 1 / 60
MOMENTUM = 0.9


@dataclass(frozen=True)
class RangeRot(Refined):
    """R1 refined by descent on the ranges of the tokens; everything else as QuaRot."""

    name = "rangerot"
    papers: ClassVar[tuple[Paper, ...]] = (QUAROT, DFROT, SPINQUANT)
    look = Look("#882255", "star-diamond", "solid")

    def walk(self, X: Tensor, w: Tensor, R: Tensor, quantizer: TensorSpec, processes: ProcessGroup) -> Walk:
        """Riemannian descent on the weighted squared ranges, for floats on the weighted squared errors."""
        velocity = torch.zeros_like(R)
        for step in itertools.count():
            done = step / self.steps
            tau = TAU[0] * (TAU[1] / TAU[0]) ** done
            errors, gradient = [], torch.zeros_like(R)
            for x, weight in pieces(X, w[:, None]):
                XR = x @ R
                left = XR - quantizer.fake_quantize(XR)
                errors.append(left.square().sum(-1))
                if quantizer.integer:
                    r, slope = soft_range(grouped(XR, quantizer.token_granularity), tau, symmetric=quantizer.symmetric)
                    left = (slope * (r * weight[..., None])).flatten(1)
                else:
                    left *= weight
                gradient += x.T @ left
            yield R, torch.cat(errors)
            tangent = self.within_blocks(R.T @ processes.all_reduce_sum(gradient))
            velocity = MOMENTUM * velocity + (tangent - tangent.T)  # the gradient in the Lie algebra
            angle = FIRST_STEP * (1 - done) * math.sqrt(R.shape[0])
            R = R @ torch.matrix_exp(velocity * (-angle / velocity.norm().clamp(min=1e-30)))


def soft_range(
    v: Float[Tensor, "*rows hidden"], tau: float, *, symmetric: bool
) -> tuple[Float[Tensor, "*rows 1"], Float[Tensor, "*rows hidden"]]:
    """r_τ of every row, and its gradient with respect to v."""
    highest, up = _soft_maximum(v / tau)
    lowest, down = _soft_maximum(v / -tau)
    if symmetric:
        both = torch.logaddexp(highest, lowest)
        return 2 * tau * both, 2 * (up * (highest - both).exp() - down * (lowest - both).exp())
    return tau * (highest + lowest), up - down


def _soft_maximum(v: Tensor) -> tuple[Tensor, Tensor]:
    """log Σ exp(vⱼ) of every row, and its gradient; several times as fast as `logsumexp`."""
    p = v.softmax(-1)
    # log softmax at the maximum is v_max − log Σ exp(vⱼ)
    return v.amax(-1, keepdim=True) - p.amax(-1, keepdim=True).log(), p
