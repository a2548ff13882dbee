"""DFRot: outlier-free and massive-activation-free rotated LLMs (Xiang, Zhang 2024, arXiv 2412.00648).

A random orthogonal rotation (RO) and a randomized Hadamard (RH) serve ordinary tokens equally well. They differ on the
few tokens with massive activations, whose error RH lowers a little and RO raises, and these tokens decide. So weight
them by γ and look for the rotation that is good for all tokens:

    min_R  Σ_{x ordinary} ‖xR − Q(xR)‖²  +  γ² Σ_{x massive} ‖xR − Q(xR)‖²,       R Rᵀ = I,

over x the outputs of all norms of all blocks (gains folded into their readers), from one sample of text. Alternate:

    quantization step   B = Q(X R)                            R fixed; scales chosen anew for every token
    rotation step       R = U Vᵀ,  U Σ Vᵀ = svd(Xᵀ W B)       B fixed; orthogonal Procrustes, weights W

Neither step can raise Σ w ‖xR − b‖² while the quantizer maps to the nearest grid point for fixed scales; because scales
move with R the objective may still rise a little now and then, so the best rotation seen is the one returned.

Divergences. The released code minimises a symmetric unclipped quantizer whatever is used afterwards; here Q is the
recipe's own activation quantizer unless `objective="paper"`. Ordinary tokens are sampled, and weighted up by what was
left out, so that the cost does not grow with the calibration text. The released code picks its rule for massive tokens
by the model's name; here it is the same relative rule for every model.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from dfrot.linalg.procrustes import procrustes
from dfrot.linalg.rotation import Dense, Rotation
from dfrot.methods.context import Context
from dfrot.methods.quarot import around, random_rotation
from dfrot.models.stream import BlockRunner, captured_inputs
from dfrot.progress import track
from dfrot.quant.affine import fake_quantize
from dfrot.quant.grids import IntGrid, PerToken
from dfrot.recipe import DFRot, TensorSpec
from dfrot.transform.sites import Transforms

PAPER_QUANTIZER = TensorSpec(bits=4, symmetric=True, clip=1.0)
# A token that one channel dominates quantizes almost exactly. The released threshold is an error of 8.5 at token norm
# √4096 = 64; as a relative error it holds at any width.
MASSIVE_BELOW = 8.5 / 64
ORDINARY_TOKENS = 16384  # sampled from all norms together


@dataclass(frozen=True, eq=False)
class Sample:
    """Norm outputs of a calibration text.

    Attributes:
        tokens: (rows, hidden), RMSNorm outputs without gain, unrotated.
        massive: which rows are tokens with massive activations.
        share: how many tokens of the text each row stands for; 1 for massive ones.
    """

    tokens: Float[Tensor, "rows hidden"]
    massive: Bool[Tensor, " rows"]
    share: Float[Tensor, " rows"]


def dfrot(context: Context) -> Transforms:
    """R1 refined from a random rotation; everything else as QuaRot."""
    options = context.recipe.method
    assert isinstance(options, DFRot), "fitted with the options of another method"
    spec = context.recipe.spec.activations
    quantizer = PAPER_QUANTIZER if options.objective == "paper" or not spec.quantizes else spec
    start = random_rotation(context, options.rotation)
    return around(refine(start, sample_norm_outputs(context), quantizer, options), context)


def refine(start: Rotation, sample: Sample, quantizer: TensorSpec, options: DFRot) -> Dense:
    """The best rotation met in `options.steps` alternations from `start`; never worse on the objective than that."""
    X = sample.tokens
    w = torch.where(sample.massive, torch.full_like(sample.share, options.gamma**2), sample.share)
    R = start.as_matrix().to(X.device)
    best, least = R, torch.inf
    for _ in track(range(options.steps + 1), "refining the rotation"):
        XR = X @ R.to(X.dtype)
        B = _quantize(XR, quantizer)  # quantization step
        objective = float(((XR - B).square().sum(-1) * w).sum(dtype=torch.float64))
        if objective < least:
            best, least = R, objective
        R = procrustes(X, B, w)  # rotation step
    return Dense(best.cpu())


def massive_tokens(tokens: Float[Tensor, "rows hidden"]) -> Bool[Tensor, " rows"]:
    """Which tokens have massive activations: those that 4 symmetric bits represent almost exactly, unrotated."""
    error = (tokens - _quantize(tokens, PAPER_QUANTIZER)).norm(dim=-1) / tokens.norm(dim=-1)
    return error < MASSIVE_BELOW


def _quantize(x: Float[Tensor, "rows hidden"], spec: TensorSpec) -> Float[Tensor, "rows hidden"]:
    assert spec.clip is not None, "activations have a fixed clip ratio"
    return fake_quantize(x, IntGrid(spec.bits, spec.symmetric), PerToken(), spec.clip)


def sample_norm_outputs(context: Context) -> Sample:
    """Stream the calibration text through the full-precision blocks; keep all massive tokens, sample the others."""
    source, device = context.source, context.device
    generator = context.generator()
    hidden = source.embedding()[context.calibration()].float().to(device)  # (sequences, seq_len, hidden)
    run = BlockRunner(source, hidden[:1])
    per_norm = max(1, ORDINARY_TOKENS // (len(source.graph.norms) * source.num_blocks))
    tokens: list[Tensor] = []
    massive: list[Tensor] = []
    share: list[Tensor] = []
    for index in track(range(source.num_blocks), "calibrating"):
        block = source.block(index).float().to(device)
        norms = {name: block.get_submodule(name) for name in source.graph.norms}
        with captured_inputs(norms) as seen:
            hidden = torch.cat([run(block, index, sequence) for sequence in hidden.split(1)])
        for name, norm in norms.items():
            x = torch.cat(seen[name]).flatten(0, -2)
            x = torch.nn.functional.rms_norm(x, x.shape[-1:], eps=norm.eps)  # type: ignore[arg-type]
            is_massive = massive_tokens(x)
            ordinary = torch.nonzero(~is_massive.cpu()).flatten()
            kept = ordinary[torch.randperm(len(ordinary), generator=generator)[:per_norm]].to(device)
            rows = torch.cat([torch.nonzero(is_massive).flatten(), kept])
            tokens.append(x[rows])
            massive.append(is_massive[rows])
            share.append(torch.where(is_massive[rows], 1.0, len(ordinary) / max(1, len(kept))))
    return Sample(torch.cat(tokens), torch.cat(massive), torch.cat(share))
