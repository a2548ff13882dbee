"""Refining R1: what DFRot and RangeRot have in common.

Both look for the rotation that is good for all tokens, those with massive activations weighted by γ,

    min_R  Σ_{x ordinary} ‖xR − Q(xR)‖²  +  γ² Σ_{x massive} ‖xR − Q(xR)‖²,       R Rᵀ = I,

over x the outputs of all norms of all blocks (gains folded into their readers). Both start from a random rotation and
return the best rotation that they meet on their way. They differ in the way: each is a `walk` over rotations. With
`block` R is block-diagonal all the way, as in QuaRot.

Q is the quantizer that the model will have, whatever its grid. On integers the error is uniform, s²/12 per channel, so
shorter ranges are all that can lower it. On 4-bit floats it depends on the entry. Below a third of the group's largest
it is uniform; above, where most of the energy is, it grows with the square of the entry itself. The sum of all squares
is the same in any basis, so ranges explain little of the error, and a rotation that shortens them may even raise it.
What can still be lowered is how far entries lie from the values of the grid, gaps and rounded scales included. So for
floats both methods minimise the error of Q itself.
"""

import abc
import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from dfrot.linalg.procrustes import polar_factor
from dfrot.linalg.rotation import Dense, Identity, Rotation
from dfrot.methods.massive import Rule, Sample, sample_norm_outputs
from dfrot.methods.method import Fit, FitContext, Method
from dfrot.methods.quarot import around, random_rotation, require_block
from dfrot.methods.sensitivity import kl_divergences
from dfrot.methods.sensitivity import peak_bytes as sensitivity_bytes
from dfrot.models.sizes import ModelSizes
from dfrot.quant.spec import TensorSpec
from dfrot.system.distributed import ProcessGroup
from dfrot.system.errors import UserError
from dfrot.system.progress import track
from dfrot.transform.transforms import Transforms

PAPER_QUANTIZER = TensorSpec(bits=4, symmetric=True, clip_ratio=1.0)
GAMMAS = (1.0, 10.0, 100.0, 1000.0)  # the paper's list, tried by "auto"
ORDINARY_TOKENS = 16384  # kept, from all norms together; the paper keeps all
HELD_BACK = 4  # one token in so many, the last of every sequence, is kept from refining and decides on γ
# Refinement has converged when the best objective has not fallen by this much in so many steps.
CONVERGED, PATIENCE = 1e-4, 25
_PIECE_ENTRIES = 1 << 20  # of the products that exist at a time; these stay in the cache

Walk = Iterator[tuple[Tensor, Tensor]]  # the rotations met, each with the ‖xR − Q(xR)‖² of every token


@dataclass(frozen=True)
class Refined(Method):
    """R1 refined from a random rotation; everything else as QuaRot."""

    rotation: Literal["hadamard", "orthogonal"] = "hadamard"
    """Where refinement starts: a randomized Hadamard matrix or a random orthogonal one."""
    gamma: float | Literal["auto"] = "auto"
    """Weight γ of the tokens with massive activations; "auto" tries the paper's list and keeps the one that changes the
    model least on held-back calibration tokens."""
    steps: int = 100
    """Refinement steps at most."""
    massive: Rule = "relative"
    """The rule that finds massive tokens: a small relative error, or an error that a random rotation raises."""
    sequences: int = 1
    """Calibration sequences that the rotation is refined on, from the first; weights are fitted to all."""
    fold_only: bool = False
    """Leave out what is rotated while the model runs (R3, R4), for engines that cannot."""
    block: int | None = None
    """Rotate blocks of so many channels instead of the whole width; for grids of groups their size, or a multiple."""

    def __post_init__(self) -> None:
        if self.sequences < 1:
            raise UserError(f"sequences is at least 1, got {self.sequences}.")
        if self.gamma != "auto" and not (math.isfinite(self.gamma) and self.gamma > 0):
            raise UserError(f"gamma is a positive weight or 'auto', got {self.gamma}.")
        if self.steps < 1:
            raise UserError(f"steps is at least 1, got {self.steps}.")
        require_block(self.block)

    @abc.abstractmethod
    def walk(self, X: Tensor, w: Tensor, R: Tensor, quantizer: TensorSpec, processes: ProcessGroup) -> Walk:
        """From R to better rotations; sums over the tokens X, weighted by w, are reduced over the processes."""

    @property
    def ordinary_tokens(self) -> int | None:
        """How many ordinary tokens are kept; None keeps all."""
        return ORDINARY_TOKENS

    def within_blocks(self, matrix: Float[Tensor, "hidden hidden"]) -> Float[Tensor, "hidden hidden"]:
        """The diagonal blocks of a matrix, zeros elsewhere; without blocks the matrix."""
        if self.block is None:
            return matrix
        number = torch.arange(len(matrix), device=matrix.device) // self.block
        return matrix * (number[:, None] == number)

    def quantizer(self, activations: TensorSpec) -> TensorSpec:
        """Q of the objective: the recipe's own quantizer, or the paper's if the recipe leaves activations alone."""
        return activations if activations.enabled else PAPER_QUANTIZER

    @property
    def sequences_read(self) -> int:
        return self.sequences

    def outline(self, on: FitContext) -> Transforms:
        return around(Identity(on.source.config.hidden_size), on, self.fold_only, block=self.block)

    def fit(self, on: FitContext) -> Fit:
        quantizer = self.quantizer(on.activations)
        gammas = GAMMAS if self.gamma == "auto" else (float(self.gamma),)
        token_ids = on.calibration()[: self.sequences]
        held_back = max(1, token_ids.shape[1] // HELD_BACK) if len(gammas) > 1 else 0
        refined_on = token_ids.shape[1] - held_back
        sample, massive = sample_norm_outputs(on, token_ids[:, :refined_on], self.massive, self.ordinary_tokens)
        start = random_rotation(on, self.rotation, block=self.block)
        found = [self.refine(start, sample, quantizer, gamma, on.processes) for gamma in gammas]
        kl = [math.nan]  # with a single γ there is nothing to choose, and nothing was held back to choose by
        if len(gammas) > 1:
            candidates = [(rotation, range(on.source.num_blocks)) for rotation, _ in found]
            kl = kl_divergences(on, candidates, quantizer, token_ids, refined_on)
        chosen = min(range(len(gammas)), key=lambda i: kl[i])
        refined, steps = found[chosen]
        random = random_rotation(on, "orthogonal", block=self.block)
        rotations: dict[str, Rotation] = {"none": Identity(start.size), "RO": random}
        rotations |= {"start": start, "refined": refined}
        notes = {
            "massive_tokens": massive,
            "gamma": gammas[chosen],
            "kl_by_gamma": dict(zip(map(str, gammas), kl, strict=True)) if len(gammas) > 1 else None,
            "objective_by_step": steps,
            "squared_error_by_rotation": {
                name: class_errors(squared_errors(sample.tokens, rotation, quantizer), sample)
                for name, rotation in rotations.items()
            },
        }
        return Fit(around(refined, on, self.fold_only, block=self.block), notes)

    def refine(
        self, start: Rotation, sample: Sample, quantizer: TensorSpec, gamma: float, processes: ProcessGroup
    ) -> tuple[Dense, list[dict[str, Any]]]:
        """The best rotation on the walk from `start`, orthogonal to 1e-9, on the CPU; and a record of each step.

        It is never worse on the objective than the start. Processes share the tokens; each has the whole sample.
        """
        w, shard = sample.weights(gamma), processes.shard
        X = sample.tokens[shard]
        first = start.as_matrix().to(device=X.device, dtype=X.dtype)
        best, least, since, steps = first, math.inf, 0, []
        met = itertools.islice(self.walk(X, w[shard], first, quantizer, processes), self.steps + 1)
        for step, (R, error) in enumerate(track(met, "refining", self.steps + 1)):
            error = processes.all_gather(error, len(w))
            objective = float((error * w).sum(dtype=torch.float64))
            steps.append({"step": step, "objective": objective, **class_errors(error, sample)})
            since = 0 if objective < least * (1 - CONVERGED) else since + 1
            if objective < least:
                best, least = R, objective
            if since == PATIENCE:
                break
        # a hundred products in float32 leave R orthogonal to about 1e-5; the nearest orthogonal matrix mends that
        return Dense(start.as_matrix() if best is first else polar_factor(best).cpu()), steps

    def peak_bytes(self, sizes: ModelSizes, budget: int) -> int:
        tokens = self.sequences * sizes.seq_len
        block = sizes.block * (sizes.source + 4) + 4 * sizes.sequence
        outputs = 4 * tokens * sum(width for _, width in sizes.stages)
        every = tokens * 2 * sizes.num_blocks  # norm output
        rows = min(every, self.ordinary_tokens or every)
        refining = 3 * 4 * rows * sizes.hidden + 8 * 8 * sizes.hidden**2  # rows, twice while joined; matrices
        choosing = sensitivity_bytes(sizes, len(GAMMAS), tokens) if self.gamma == "auto" else 0
        return max(block + outputs + 4 * rows * sizes.hidden, refining, choosing)

    def summary(self, notes: Mapping[str, Any]) -> list[str]:
        massive = notes["massive_tokens"]
        where = f", the first in block {massive[0]['block']} at position {massive[0]['position']}" if massive else ""
        return [f"{len(massive)} norm outputs with massive activations{where}; gamma {notes['gamma']:g}"]


def class_errors(error: Float[Tensor, " rows"], sample: Sample) -> dict[str, float]:
    """Mean squared error of the ordinary tokens, which stand for all of the text's, and of the massive ones."""
    ordinary = ~sample.massive
    return {
        "ordinary": float((error * sample.multiplicity)[ordinary].sum() / sample.multiplicity[ordinary].sum()),
        "massive": float(error[sample.massive].mean()) if sample.massive.any() else 0.0,
    }


def squared_errors(X: Tensor, rotation: Rotation, quantizer: TensorSpec) -> Float[Tensor, " rows"]:
    """‖xR − Q(xR)‖² of every row: the errors that DFRot shows token by token, in numbers."""
    rotated = (rotation.apply(x) for (x,) in pieces(X))
    return torch.cat([(v - quantizer.fake_quantize(v)).square_().sum(-1) for v in rotated])


def pieces(X: Tensor, *beside: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Rows, and what stands beside them, in pieces, so that products with a rotation never exist all at once."""
    rows = max(1, _PIECE_ENTRIES // X.shape[-1])
    return zip(*(tensor.split(rows) for tensor in (X, *beside)), strict=True)
