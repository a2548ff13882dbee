"""DFRot: outlier-free and massive-activation-free rotated LLMs (Xiang, Zhang 2024, arXiv 2412.00648).

A random orthogonal rotation (RO) and a randomized Hadamard (RH) serve ordinary tokens equally well. They differ on the
few tokens with massive activations, whose error RH lowers a little and RO raises, and these tokens decide. So weight
them by γ and look for the rotation that is good for all tokens:

    min_R  Σ_{x ordinary} ‖xR − Q(xR)‖²  +  γ² Σ_{x massive} ‖xR − Q(xR)‖²,       R Rᵀ = I,

over x the outputs of all norms of all blocks (gains folded into their readers), from one sample of text.

**The paper's solver** (`procrustes`) alternates, from a random start:

    quantization step   B = Q(X R)                            R fixed; scales chosen anew for every token
    rotation step       R = U Vᵀ,  U Σ Vᵀ = svd(Xᵀ W B)       B fixed; orthogonal Procrustes, weights W

It moves little: with 4 bits the nearest grid point is always near, and every token votes to stay where it is. It
serves the few heavy tokens and leaves the ordinary ones almost as they were.

**Ours** (`descent`, the default) looks at where the error comes from. Rounding makes d s²/12 per token whatever the
direction, and the step s is proportional to the token's range, so what lowers the error is short ranges:

    min_R  Σ w r_τ(xR)²,     r_τ(v) = τ log Σ exp(vⱼ/τ) + τ log Σ exp(−vⱼ/τ)  →  max v − min v   as τ → 0

(for symmetric grids 2 τ log Σ exp(±vⱼ/τ) → 2 max |v|), a smooth function, over the orthogonal group: descent with
momentum along geodesics R exp(−η A), A antisymmetric, while τ and η fall. It lowers the error of ordinary tokens by a
third, several times what alternation reaches from the same start (dev/LOG.md).

Both judge every rotation on the objective above, with the quantizer in use, and return the best they met.

Divergences. The released code minimises a symmetric unclipped quantizer whatever is used afterwards; here Q is the
recipe's own activation quantizer, unless `objective="paper"`, which brings the paper's quantizer, solver and γ. The
paper refines on every token of its sample, and so does that objective; ours keeps a part of the ordinary ones, weighted
up by what was left out. Massive tokens are found by the same rule on every model, not by its name. γ may be chosen by
measurement.
"""

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from dfrot.linalg.procrustes import polar_factor
from dfrot.linalg.rotation import Dense, Identity, Rotation
from dfrot.methods.method import Context
from dfrot.methods.quarot import around, random_rotation
from dfrot.methods.sample import Sample, sample_norm_outputs
from dfrot.methods.sensitivity import kl_divergences
from dfrot.pipeline.recipe import DFRot
from dfrot.quant.affine import fake_quantize
from dfrot.quant.spec import TensorSpec
from dfrot.system.distributed import SINGLE_PROCESS, ProcessGroup
from dfrot.system.progress import track
from dfrot.transform.transforms import Transforms

PAPER_QUANTIZER = TensorSpec(bits=4, symmetric=True, clip=1.0)
PAPER_GAMMA = 100.0  # `alpha` of the released command
GAMMAS = (1.0, 10.0, 100.0, 1000.0)  # the paper's list, tried by "auto"
ORDINARY_TOKENS = 16384  # kept, from all norms together; the paper keeps all
HELD_BACK = 4  # one token in so many, the last of every sequence, is kept from refining and decides on γ

# Softness τ in units of the tokens' RMS, from the first step to the last.
TAU = (0.8, 0.2)
# Length of the first step along a geodesic, as the root mean square angle (radians) over the channels.
FIRST_STEP = 1 / 60
MOMENTUM = 0.9
# Refinement has converged when the best objective has not fallen by this much in so many steps.
CONVERGED, PATIENCE = 1e-4, 25
_PIECE_ENTRIES = 1 << 20  # of the products that exist at a time; these stay in the cache


def dfrot(context: Context) -> Transforms:
    """R1 refined from a random rotation; everything else as QuaRot."""
    options = context.recipe.method
    assert isinstance(options, DFRot), "fitted with the options of another method"
    spec = context.recipe.spec.activations
    paper = options.objective == "paper"
    quantizer = PAPER_QUANTIZER if paper or not spec.enabled else spec
    solver = SOLVERS[options.solver or ("procrustes" if paper else "descent")]
    gamma = options.gamma if options.gamma is not None else (PAPER_GAMMA if paper else "auto")
    gammas = GAMMAS if gamma == "auto" else (float(gamma),)

    token_ids = context.calibration()[: options.samples]
    held_back = max(1, token_ids.shape[1] // HELD_BACK) if len(gammas) > 1 else 0
    refined_on = token_ids.shape[1] - held_back
    kept = None if paper else ORDINARY_TOKENS
    sample = sample_norm_outputs(context, token_ids[:, :refined_on], options.massive, kept)
    start = random_rotation(context, options.rotation)
    logs: list[list[dict[str, float]]] = [[] for _ in gammas]
    refined = [
        refine(start, sample, quantizer, gamma, solver, options.steps, log.append, context.processes)
        for gamma, log in zip(gammas, logs, strict=True)
    ]
    kl = [math.nan]
    if len(gammas) > 1:
        kl = kl_divergences(context, refined, quantizer, token_ids, refined_on)
    chosen = min(range(len(gammas)), key=lambda i: kl[i])
    context.notes.update(
        massive_tokens=sample.found,
        gamma=gammas[chosen],
        kl_by_gamma=dict(zip(map(str, gammas), kl, strict=True)) if len(gammas) > 1 else None,
        objective_by_step=logs[chosen],
        squared_error_by_rotation={
            name: class_errors(squared_errors(sample.tokens, rotation, quantizer), sample)
            for name, rotation in {
                "none": Identity(start.size),
                "RO": random_rotation(context, "orthogonal"),
                "start": start,
                "refined": refined[chosen],
            }.items()
        },
    )
    return around(refined[chosen], context, online=options.online)


# From tokens, weights, start, quantizer, number of steps, and what adds up sums over tokens that other processes have:
# the rotations met, and each row's ‖xR − Q(xR)‖² under each.
Sum = Callable[[Tensor], Tensor]
Solver = Callable[[Tensor, Tensor, Tensor, TensorSpec, int, Sum], Iterator[tuple[Tensor, Tensor]]]


def refine(
    start: Rotation,
    sample: Sample,
    quantizer: TensorSpec,
    gamma: float,
    solver: Solver,
    num_steps: int,
    log: Callable[[dict[str, float]], Any] = lambda entry: None,
    processes: ProcessGroup = SINGLE_PROCESS,
) -> Dense:
    """The best rotation that a solver meets on its way from `start`; never worse on the objective than that.

    Args:
        quantizer: what the objective measures.
        gamma: weight of massive tokens.
        num_steps: at most; fewer if the objective has converged.
        log: called with the mean squared error of both classes of tokens, and the objective, after every step.
        processes: share the tokens among them; each has the whole sample.

    Returns:
        A rotation orthogonal to 1e-9, on the CPU.
    """
    w, part = sample.weights(gamma), processes.shard
    X = sample.tokens[part]
    first = start.as_matrix().to(device=X.device, dtype=X.dtype)
    best, least, since = first, math.inf, 0
    met = itertools.islice(solver(X, w[part], first, quantizer, num_steps, processes.all_reduce_sum), num_steps + 1)
    for step, (R, error) in enumerate(track(met, "refining", num_steps + 1)):
        error = processes.all_gather(error, len(w))
        objective = float((error * w).sum(dtype=torch.float64))
        log({"step": step, "objective": objective, **class_errors(error, sample)})
        since = 0 if objective < least * (1 - CONVERGED) else since + 1
        if objective < least:
            best, least = R, objective
        if since == PATIENCE:
            break
    return Dense(start.as_matrix() if best is first else polar_factor(best).cpu())


def class_errors(error: Float[Tensor, " rows"], sample: Sample) -> dict[str, float]:
    """Mean squared error of the ordinary tokens, which stand for all of the text's, and of the massive ones."""
    ordinary = ~sample.massive
    return {
        "ordinary": float((error * sample.share)[ordinary].sum() / sample.share[ordinary].sum()),
        "massive": float(error[sample.massive].mean()) if sample.massive.any() else 0.0,
    }


def quantized(x: Float[Tensor, "rows hidden"], spec: TensorSpec) -> Float[Tensor, "rows hidden"]:
    assert spec.clip is not None, "activations have a fixed clip ratio"
    return fake_quantize(x, spec.grid, spec.token_granularity, spec.clip)


def squared_errors(X: Tensor, rotation: Rotation, quantizer: TensorSpec) -> Float[Tensor, " rows"]:
    """‖xR − Q(xR)‖² of every row: the paper's figure of errors by token, in numbers."""
    rotated = (rotation.apply(x) for x, _ in pieces(X, X[:, 0]))
    return torch.cat([(v - quantized(v, quantizer)).square_().sum(-1) for v in rotated])


def pieces(X: Tensor, w: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows and their weights (rows, 1) in pieces, so that products with a rotation never exist all at once."""
    rows = max(1, _PIECE_ENTRIES // X.shape[-1])
    return zip(X.split(rows), w[:, None].split(rows), strict=True)


def alternate(
    X: Tensor, w: Tensor, R: Tensor, quantizer: TensorSpec, num_steps: int, sum_: Sum = SINGLE_PROCESS.all_reduce_sum
) -> Iterator[tuple[Tensor, Tensor]]:
    """The paper's algorithm: quantization step, rotation step."""
    while True:
        errors, XtWB = [], torch.zeros_like(R)
        for x, weight in pieces(X, w):
            XR = x @ R
            B = quantized(XR, quantizer)
            errors.append((XR - B).square_().sum(-1))
            XtWB += (x * weight).T @ B
        yield R, torch.cat(errors)
        R = polar_factor(sum_(XtWB)).to(X.dtype)


def descend(
    X: Tensor, w: Tensor, R: Tensor, quantizer: TensorSpec, num_steps: int, sum_: Sum = SINGLE_PROCESS.all_reduce_sum
) -> Iterator[tuple[Tensor, Tensor]]:
    """Riemannian descent on the weighted squared ranges."""
    velocity = torch.zeros_like(R)
    for step in itertools.count():
        done = step / num_steps
        tau = TAU[0] * (TAU[1] / TAU[0]) ** done
        errors, gradient = [], torch.zeros_like(R)
        for x, weight in pieces(X, w):
            XR = x @ R
            errors.append((XR - quantized(XR, quantizer)).square_().sum(-1))
            r, slope = soft_range(XR, tau, symmetric=quantizer.symmetric)
            gradient += x.T @ (slope * (r * weight))
        yield R, torch.cat(errors)
        tangent = R.T @ sum_(gradient)
        velocity = MOMENTUM * velocity + (tangent - tangent.T)  # the gradient in the Lie algebra
        angle = FIRST_STEP * (1 - done) * math.sqrt(R.shape[0])
        R = R @ torch.matrix_exp(velocity * (-angle / velocity.norm().clamp(min=1e-30)))


def soft_range(
    v: Float[Tensor, "rows hidden"], tau: float, *, symmetric: bool
) -> tuple[Float[Tensor, "rows 1"], Float[Tensor, "rows hidden"]]:
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
    return v.amax(-1, keepdim=True) - p.amax(-1, keepdim=True).log(), p


SOLVERS: dict[str, Solver] = {"descent": descend, "procrustes": alternate}
