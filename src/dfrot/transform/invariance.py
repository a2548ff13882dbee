"""Proof, during every run, that folding changed nothing.

With quantization off, a rotated model computes what the original does: in exact arithmetic equal, in floating point up
to rounding. A tolerance alone does not tell a mistake from rounding, so the error is measured in two precisions: it
must be tiny in float64 *and* fall by 10⁴ or more from float32 to float64. A wrong fold gives the same error in both.
"""

import copy
from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dfrot.linalg.rotation import Rotation
from dfrot.models.source import Source
from dfrot.models.stream import BlockRunner
from dfrot.transform.fold import Fold

PROBE_TOKENS = 16
FALL = 1e4  # by which the error must fall from float32 to float64
# float64 rounding through one block: its epsilon 2⁻⁵² times a few thousand additions in a row, with two digits to spare
FLOAT64_BOUND = 1e-10


class _Folded(nn.Module):
    """A linear layer whose weight is folded anew in every forward pass, in the dtype of its input.

    It keeps one float64 weight alive at a time, so that checking a block needs no float64 copy of it.
    """

    def __init__(self, linear: nn.Module, fold: Fold) -> None:
        super().__init__()
        self.linear, self.fold = linear, fold

    def forward(self, x: Tensor) -> Tensor:
        bias = self.linear.bias
        if self.fold.online is not None:
            x = self.fold.online.apply(x)
        return nn.functional.linear(
            x,
            self.fold.weight(self.linear.weight).to(x.dtype),  # type: ignore[arg-type]
            None if bias is None else self.fold.bias(bias).to(x.dtype),  # type: ignore[arg-type]
        )


class InvarianceError(AssertionError):
    """A fold changed what the model computes. It is a mistake in this package, never the user's."""


class InvarianceCheck:
    """Carries a few tokens through the original model, block by block, and the folded blocks beside it."""

    def __init__(self, source: Source, embedding: Float[Tensor, "vocabulary hidden"], seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        tokens = torch.randint(embedding.shape[0], (1, PROBE_TOKENS), generator=generator)
        self._hidden = embedding[tokens].double()  # what the original model computes, in float64
        self._source = source
        self._run = {dtype: BlockRunner(source, self._hidden.to(dtype)) for dtype in (torch.float64, torch.float32)}

    def block(self, index: int, block: nn.Module, folds: Mapping[str, Fold], residual: Rotation | None) -> float:
        """Check one block before it is folded; returns the float64 error.

        Args:
            block: the original block; it is left as it is.
            folds: what its linear layers are about to absorb.
            residual: R1.

        Raises:
            InvarianceError: the folded block computes something else.
        """
        before = {norm: folds[readers[0]] for norm, readers in self._source.graph.norms.items()}
        start = self._hidden if residual is None else residual.apply(self._hidden)
        self.advance(index, block)
        expected = self._hidden if residual is None else residual.apply(self._hidden)
        errors = {}
        for dtype, run in self._run.items():
            folded = _rebuilt(block, folds, before, dtype)
            errors[dtype] = _relative(run(folded, index, start.to(dtype)), expected)
        require_fall(f"block {index}", errors[torch.float32], errors[torch.float64])
        return errors[torch.float64]

    def advance(self, index: int, block: nn.Module) -> None:
        """Carry the original's hidden states through a block."""
        original = _rebuilt(block, {name: Fold() for name in self._source.graph.linears}, {}, torch.float64)
        self._hidden = self._run[torch.float64](original, index, self._hidden)

    def head(
        self,
        norm: nn.RMSNorm,
        head: Float[Tensor, "vocabulary hidden"],
        fold: Fold,
        residual: Rotation | None,
    ) -> float:
        """Check the logits after the last block, on a sample of the vocabulary; returns the float64 error.

        Raises:
            InvarianceError: the folded head computes something else.
        """
        head = head[:: max(1, head.shape[0] // 1024)]
        weight = fold.norm_gain(norm.weight)
        rotated = self._hidden if residual is None else residual.apply(self._hidden)
        shape, eps = norm.normalized_shape, norm.eps
        expected = nn.functional.rms_norm(self._hidden, shape, norm.weight.double(), eps) @ head.double().T
        errors = {}
        for dtype in (torch.float64, torch.float32):
            normed = nn.functional.rms_norm(rotated.to(dtype), shape, weight.to(dtype), eps)
            errors[dtype] = _relative(normed @ fold.weight(head).to(dtype).T, expected)
        require_fall("the head", errors[torch.float32], errors[torch.float64])
        return errors[torch.float64]


def _rebuilt(block: nn.Module, folds: Mapping[str, Fold], before: Mapping[str, Fold], dtype: torch.dtype) -> nn.Module:
    """A shallow copy of the block that folds as it runs; the weights are shared with the original."""
    memo = {id(parameter): parameter for parameter in block.parameters()}
    rebuilt = copy.deepcopy(block, memo)
    for name, fold in folds.items():
        rebuilt.set_submodule(name, _Folded(rebuilt.get_submodule(name), fold))
    for name in {*(n for n, m in block.named_modules() if isinstance(m, nn.RMSNorm))}:
        norm = copy.deepcopy(block.get_submodule(name)).to(dtype)
        if name in before:
            gain = before[name].norm_gain(block.get_submodule(name).weight)  # type: ignore[arg-type]
            norm.weight = nn.Parameter(gain.to(dtype), requires_grad=False)
        rebuilt.set_submodule(name, norm)
    return rebuilt


def _relative(got: Tensor, expected: Tensor) -> float:
    return float((got.double() - expected).norm() / expected.norm())


def require_fall(where: str, float32_error: float, float64_error: float) -> None:
    """Raise InvarianceError unless the error is at rounding level in float64."""
    if float64_error <= FLOAT64_BOUND and float64_error <= float32_error / FALL:
        return
    raise InvarianceError(
        f"folding changed what {where} computes: relative error {float32_error:.1e} in float32 and "
        f"{float64_error:.1e} in float64, which should be below {FLOAT64_BOUND:.0e} and 10⁴ times smaller than in "
        "float32. Nothing was written for it. This is a bug in dfrot: please report it with the model's config."
    )
