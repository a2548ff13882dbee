"""Proof, during every run, that folding changed nothing.

With quantization off, a rotated model computes the same function as the original, up to rounding. A tolerance alone
cannot tell a mistake from rounding, so the error is measured in two precisions: it must be tiny in float64 *and* fall
by 10⁴ or more from float32 to float64. A wrong fold gives the same error in both.

Every weight is folded once in float64, for the float64 pass, and cast for the float32 pass. The cast weight is handed
on to be quantized or stored, so the proof holds for the written weights. Embedding and head are written before and
after; they are compared with the proved tensors once they lie in the checkpoint.
"""

import copy
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dfrot.linalg.rotation import Rotation
from dfrot.models.experts import MixtureOfExperts
from dfrot.models.source import Source, loaded
from dfrot.models.stream import BlockRunner
from dfrot.transform.fold import Fold
from dfrot.transform.transforms import Transforms

PROBE_TOKENS = 16
HEAD_ROWS = 1024  # vocabulary rows, about, for the comparison of logits
FALL = 1e4  # least ratio of the float32 error to the float64 error
# Rounding through one block: epsilon 2⁻⁵² times a few thousand additions in a row, with two digits to spare.
FLOAT64_BOUND = 1e-10


class InvarianceError(AssertionError):
    """A fold changed what the model computes. It is a mistake in this package, never the user's."""


class InvarianceCheck:
    """Carries a few tokens through the original model, block by block, and the folded blocks beside it.

    Args:
        embeddings: of the original model, as `Source.embeddings` has them.
        device: where to compute; blocks come there.
    """

    def __init__(self, source: Source, embeddings: Mapping[str, Tensor], seed: int, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(seed)
        vocabulary = len(embeddings[f"{source.graph.embedding}.weight"])
        tokens = torch.randint(vocabulary, (1, PROBE_TOKENS), generator=generator)
        # Hidden states of the original model, in float64.
        self._hidden = source.embedded(tokens, embeddings).double().to(device)
        # of each matrix as many rows
        self._chosen = {name: tokens[0] % len(matrix) for name, matrix in embeddings.items()}
        self._rows = {name: embeddings[name][rows].double().to(device) for name, rows in self._chosen.items()}
        self._source = source
        self._proved_head: tuple[slice, Tensor, Tensor] | None = None
        self._run = {dtype: BlockRunner(source, self._hidden.to(dtype)) for dtype in (torch.float64, torch.float32)}

    def embedding(self, written: Mapping[str, Tensor], residual: Rotation | None) -> None:
        """Compare the checkpoint's embeddings with the rotated ones; call before the first block.

        Raises:
            InvarianceError: they differ by more than rounding.
        """
        for name, rows in self._rows.items():
            rotated = rows if residual is None else residual.apply(rows)
            _require_written("the embedding", written[name][self._chosen[name]], rotated)

    def block(
        self, index: int, block: nn.Module, transforms: Transforms, dtype: torch.dtype
    ) -> tuple[float, dict[str, Tensor]]:
        """Fold one block and check it.

        Args:
            block: the original block; it stays unchanged.
            dtype: of the folded tensors.

        Returns:
            The relative error in float64, and the state of the folded block.

        Raises:
            InvarianceError: the folded block computes a different result.
        """
        graph, config = self._source.graph, self._source.config
        folds = transforms.folds(index, graph, config, block)
        start = self._rotated(transforms.residual)
        self.advance(index, block)
        expected = self._rotated(transforms.residual)

        layers: dict[str, _Folding] = {}
        folding = _in_float64(block, lambda name, linear: layers.setdefault(name, _Folding(linear, folds[name], dtype)))
        for name, readers in graph.norms.items():
            gain = folds[readers[0]].norm_gain(block.get_submodule(name).weight)  # type: ignore[arg-type]
            folding.get_submodule(name).weight = nn.Parameter(gain, requires_grad=False)
        float64_error = _relative(self._run[torch.float64](folding, index, start), expected)
        norms, ours = folding.state_dict().items(), tuple(f"{name}." for name in layers)
        state = {name: tensor.to(dtype) for name, tensor in norms if not name.startswith(ours)}
        for name, layer in layers.items():
            state |= {f"{name}.{key}": tensor for key, tensor in layer.folded.items()}

        folded = _with_all_experts(self._source.empty_block(index))
        for name, fold in folds.items():
            linear: Any = folded.get_submodule(name)
            linear.bias = nn.Parameter(layers[name].folded["bias"]) if "bias" in layers[name].folded else None
            linear.register_forward_pre_hook(lambda _, inputs, fold=fold: fold.arriving(*inputs))
        loaded(folded, {name: tensor.float() for name, tensor in state.items()})
        float32_error = _relative(self._run[torch.float32](folded, index, start.float()), expected)
        require_fall(f"block {index}", float32_error, float64_error)
        return float64_error, state

    def advance(self, index: int, block: nn.Module) -> None:
        """Carry the original's hidden states through a block."""
        original = _in_float64(block, lambda _, linear: _Folding(linear, Fold(), None))
        self._hidden = self._run[torch.float64](original, index, self._hidden)

    def head(self, norm: nn.RMSNorm, head: Float[Tensor, "vocabulary hidden"], transforms: Transforms) -> float:
        """Check the logits after the last block, on a sample of the vocabulary; returns the relative float64 error.

        Raises:
            InvarianceError: the folded head computes a different result.
        """
        rows = slice(None, None, max(1, head.shape[0] // HEAD_ROWS))
        device, shape, eps = self._hidden.device, norm.normalized_shape, norm.eps
        gain, sampled = norm.weight.to(device), head[rows].to(device)
        fold = transforms.head_fold(gain)
        folded, left = fold.weight(sampled), fold.norm_gain(gain)
        rotated = self._rotated(transforms.residual)
        expected = nn.functional.rms_norm(self._hidden, shape, gain.double(), eps) @ sampled.double().T
        errors = {}
        for dtype in (torch.float64, torch.float32):
            normed = nn.functional.rms_norm(rotated.to(dtype), shape, left.to(dtype), eps)
            errors[dtype] = _relative(normed @ folded.to(dtype).T, expected)
        require_fall("the head", errors[torch.float32], errors[torch.float64])
        self._proved_head = rows, left, folded
        return errors[torch.float64]

    def written_head(
        self,
        norm: Float[Tensor, " hidden"],
        head: Float[Tensor, "vocabulary hidden"],
        bias: Float[Tensor, " vocabulary"] | None = None,
    ) -> None:
        """Compare the last norm's gain and the head of the checkpoint (its embedding, if tied) with those proved, and
        the head's bias, which no fold changes, with the source's.

        Raises:
            InvarianceError: they differ by more than rounding.
        """
        assert self._proved_head is not None, "the head is proved before it is written"
        rows, left, folded = self._proved_head
        _require_written("the last norm", norm, left)
        _require_written("the head", head[rows], folded)
        if (expected := self._source.head_bias()) is not None:
            assert bias is not None, "a checkpoint has the bias of the source's head"
            _require_written("the head's bias", bias, expected)

    def _rotated(self, residual: Rotation | None) -> Float[Tensor, "1 tokens hidden"]:
        """The original's hidden states in the basis of the folded model."""
        return self._hidden if residual is None else residual.apply(self._hidden)


class _Folding(nn.Module):
    """A linear layer that folds its weight when it runs, in float64, and keeps it in `dtype`, if given.

    Thus only one float64 weight is alive at a time.
    """

    def __init__(self, linear: nn.Linear, fold: Fold, dtype: torch.dtype | None) -> None:
        super().__init__()
        self.linear, self.fold, self.dtype = linear, fold, dtype
        self.folded: dict[str, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        weight = self.fold.weight(self.linear.weight)
        bias = self.fold.bias(self.linear.bias, weight)
        if self.dtype is not None:
            self.folded = {"weight": weight.to(self.dtype)} | ({} if bias is None else {"bias": bias.to(self.dtype)})
        return nn.functional.linear(self.fold.arriving(x), weight, bias)


def _in_float64(block: nn.Module, linear: Callable[[str, nn.Linear], nn.Module]) -> nn.Module:
    """A copy of the block with shared weights, norms in float64 and `linear(name, layer)` for each linear layer."""
    copied = copy.deepcopy(block, {id(parameter): parameter for parameter in block.parameters()})
    for name, module in block.named_modules():
        if isinstance(module, nn.RMSNorm):
            copied.set_submodule(name, copy.deepcopy(module).double())
        elif isinstance(module, nn.Linear):
            copied.set_submodule(name, linear(name, module))
    return _with_all_experts(copied)


def _with_all_experts(block: nn.Module) -> nn.Module:
    """The block, in which every expert adds to what every token becomes: so a wrong fold of any is found."""
    for module in block.modules():
        if isinstance(module, MixtureOfExperts):
            module.everywhere = 1 / len(module.experts)
    return block


def _relative(got: Tensor, expected: Tensor) -> float:
    return float((got.double() - expected).norm() / expected.norm())


def require_fall(where: str, float32_error: float, float64_error: float) -> None:
    """Raise InvarianceError unless the error is at rounding level in float64 and falls. NaN and infinity raise."""
    if float64_error <= FLOAT64_BOUND and FALL * float64_error <= float32_error < math.inf:
        return
    raise InvarianceError(
        f"folding changed what {where} computes: relative error {float32_error:.1e} in float32 and "
        f"{float64_error:.1e} in float64, which should be below {FLOAT64_BOUND:.0e} and 10⁴ times smaller than in "
        "float32. Nothing was written for it. This is a bug in dfrot: please report it with the model's config."
    )


def _require_written(where: str, written: Tensor, proved: Tensor) -> None:
    """Raise InvarianceError unless a tensor of the checkpoint equals the proved one up to the rounding of its dtype."""
    limits = torch.finfo(written.dtype)
    rounding = max(limits.eps, FLOAT64_BOUND) * float(proved.norm()) + limits.tiny * limits.eps * proved.numel() ** 0.5
    error = float((written.to(proved) - proved).norm())
    if not error <= rounding:
        raise InvarianceError(
            f"{where} in the checkpoint is not the one that was checked: it is off by {error:.1e}, where rounding to "
            f"{written.dtype} explains {rounding:.1e}. This is a bug in dfrot: please report it with the config."
        )
