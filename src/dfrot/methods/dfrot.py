"""DFRot: outlier-free and massive-activation-free rotated LLMs (Xiang, Zhang 2024, arXiv 2412.00648).

A random orthogonal rotation (RO) and a randomized Hadamard (RH) serve ordinary tokens equally well. They differ on the
few tokens with massive activations, whose error RH lowers a little and RO raises, and these tokens decide. So weight
them by γ and look for the rotation that is good for all tokens (the objective stands in refinement.py). From a random
start the paper alternates

    quantization step   B = Q(X R)                            R fixed; scales chosen anew for every token
    rotation step       R = U Vᵀ,  U Σ Vᵀ = svd(Xᵀ W B)       B fixed; orthogonal Procrustes, weights W

It moves little: with 4 bits the nearest grid point is always near, and every token votes to stay where it is. It
serves the few heavy tokens and leaves the ordinary ones almost as they were; rangerot.py goes further.

Divergences. The released code minimises a symmetric unclipped quantizer whatever is used afterwards; here Q is the
recipe's own activation quantizer, unless `objective="paper"`. The paper refines on every token of its sample, and so
does that objective; the other keeps a sample of the ordinary tokens, each weighted up by those left out. Massive
tokens are found by the same rule on every model, not by its name.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from dfrot.linalg.procrustes import polar_factor
from dfrot.methods.method import Look
from dfrot.methods.quarot import QUAROT
from dfrot.methods.refinement import PAPER_QUANTIZER, Refined, Walk, pieces
from dfrot.quant.spec import TensorSpec
from dfrot.system.distributed import ProcessGroup
from dfrot.system.papers import Paper

DFROT = Paper(
    "dfrot",
    "2412.00648",
    "Xiang, Jingyang and Zhang, Sai Qian",
    "DFRot: Achieving Outlier-Free and Massive Activation-Free for Rotated LLMs with Refined Rotation",
)


@dataclass(frozen=True)
class DFRot(Refined):
    """R1 refined by alternating quantization and Procrustes steps; everything else as QuaRot."""

    gamma: float | Literal["auto"] = 100.0  # `alpha` of the released command
    """Weight γ of the tokens with massive activations (`alpha` in the released code); "auto" tries the paper's list and
    keeps the one that changes the model least on held-back calibration tokens."""
    objective: Literal["recipe", "paper"] = "recipe"
    """Minimise the error of the recipe's activation quantizer, or, exactly as the paper does, of a symmetric, unclipped
    one in 4 bits on every token."""

    name = "dfrot"
    papers = (QUAROT, DFROT)
    look = Look("#009E73", "diamond", "solid")

    @property
    def ordinary_tokens(self) -> int | None:
        return None if self.objective == "paper" else super().ordinary_tokens

    def quantizer(self, activations: TensorSpec) -> TensorSpec:
        return PAPER_QUANTIZER if self.objective == "paper" else super().quantizer(activations)

    def walk(self, X: Tensor, w: Tensor, R: Tensor, quantizer: TensorSpec, processes: ProcessGroup) -> Walk:
        """The paper's algorithm: quantization step, rotation step."""
        while True:
            errors, XtWB = [], torch.zeros_like(R)
            for x, weight in pieces(X, w[:, None]):
                XR = x @ R
                B = quantizer.fake_quantize(XR)
                errors.append((XR - B).square_().sum(-1))
                XtWB += (x * weight).T @ B
            yield R, torch.cat(errors)
            # the released code takes the Q of a QR decomposition here, which flips signs
            R = polar_factor(self.within_blocks(processes.all_reduce_sum(XtWB))).to(X.dtype)
