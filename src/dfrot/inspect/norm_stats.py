"""What the readers of the residual stream see, in figures: massive tokens, outlier channels, kurtosis, error by token.

These are the pictures of the DFRot paper: ordinary tokens are equally easy under every random rotation, and the few
massive ones decide. Norm outputs x̂ are without gain, which is folded into the readers, and have RMS 1.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from dfrot.methods.dfrot import quantized
from dfrot.methods.massive import describe_massive, massive_tokens
from dfrot.quant.spec import TensorSpec
from dfrot.transform.transforms import Transforms

LARGEST = 8  # outlier channels that are listed of every norm
SURFACE_TOKENS = 64
_TINY = 1e-30  # keeps the figures of a token of zeros finite


@dataclass(frozen=True, eq=False)
class NormFigures:
    """One norm on one sequence.

    Attributes:
        block, norm: which.
        massive: which tokens have massive activations.
        found: these, as `describe_massive` describes them.
        median: over the channels, of the largest |x̂| that each has in any token.
        largest: the channels that have most, and how much.
        error: ‖x − Q(x)‖ / ‖x‖ of every token, x as each method rotates it.
        kurtosis: excess kurtosis of a token's entries, mean over the tokens; by method.
    """

    block: int
    norm: str
    massive: Bool[Tensor, " tokens"]
    found: list[dict[str, Any]]
    median: float
    largest: list[dict[str, Any]]
    error: dict[str, Float[Tensor, " tokens"]]
    kurtosis: dict[str, float]


@dataclass(frozen=True, eq=False)
class Surface:
    """A norm's output on the first tokens, as every method quantizes it: the papers' surfaces, token × channel.

    Attributes:
        norm: which, with its block.
        peak: the largest |x̂| of all tokens.
        by_rotation: |x R|, (tokens, hidden).
    """

    norm: str
    peak: float
    by_rotation: dict[str, Float[Tensor, "tokens hidden"]]

    @staticmethod
    def of(norm: str, x: Float[Tensor, "tokens hidden"], rotated: Mapping[str, Tensor]) -> "Surface":
        return Surface(norm, float(x.abs().max()), {name: y[:SURFACE_TOKENS].abs() for name, y in rotated.items()})

    def described(self) -> dict[str, Any]:
        tokens, channels = next(iter(self.by_rotation.values())).shape
        return {"norm": self.norm, "tokens": tokens, "channels": channels}


def norm_output(x: Float[Tensor, "... hidden"], norm: nn.RMSNorm) -> Float[Tensor, "... hidden"]:
    """x̂ of the norm's input."""
    return nn.functional.rms_norm(x, norm.normalized_shape, eps=norm.eps)


def as_quantized(
    x: Float[Tensor, "tokens hidden"], transforms: Transforms, index: int, reader: str, gain: Float[Tensor, " hidden"]
) -> Float[Tensor, "tokens hidden"]:
    """The norm output x̂ as it is when a method quantizes it.

    That is x̂ R; for DuQuant, which leaves the gain where it is and smooths, (x̂ g / s) R. Without rotation it is x̂, the
    same tokens as with one, as in the papers' figures, although the method `none` leaves the gain where it is, too.

    Args:
        index: of the block.
        reader: the first of the layers that read the norm.
        gain: g, of the norm.
    """
    if transforms.inputs:
        transform = transforms.inputs[index][reader]
        x = x * gain
        return transform.rotation.apply(x if transform.smooth is None else x / transform.smooth)
    return x if transforms.residual is None else transforms.residual.apply(x)


def norm_figures(
    x: Float[Tensor, "tokens hidden"],
    rotated: Mapping[str, Float[Tensor, "tokens hidden"]],
    quantizer: TensorSpec,
    block: int,
    norm: str,
    token_ids: Int[Tensor, " tokens"],
) -> NormFigures:
    """The figures of one norm.

    Args:
        x: its outputs x̂.
        rotated: method → these `as_quantized` by it.
    """
    massive = massive_tokens(x)
    which = torch.nonzero(massive).flatten()
    peaks = x.abs().amax(0)
    values, channels = peaks.topk(min(LARGEST, len(peaks)))
    return NormFigures(
        block=block,
        norm=norm,
        massive=massive.cpu(),
        found=describe_massive(x[which], which, token_ids.to(x.device)[which], block, norm),
        median=float(peaks.median()),
        largest=[{"channel": int(c), "value": float(v)} for c, v in zip(channels, values, strict=True)],
        error={name: relative_error(y, quantizer).cpu() for name, y in rotated.items()},
        kurtosis={name: float(excess_kurtosis(y).mean()) for name, y in rotated.items()},
    )


def relative_error(x: Float[Tensor, "*tokens channels"], quantizer: TensorSpec) -> Float[Tensor, "*tokens"]:
    """‖x − Q(x)‖ / ‖x‖ of every token."""
    return ratio(x - quantized(x, quantizer), x)


def ratio(error: Float[Tensor, "*tokens channels"], x: Float[Tensor, "*tokens channels"]) -> Float[Tensor, "*tokens"]:
    """‖error‖ / ‖x‖ of every token."""
    return error.norm(dim=-1) / x.norm(dim=-1).clamp(min=_TINY)


def excess_kurtosis(x: Float[Tensor, "*tokens channels"]) -> Float[Tensor, "*tokens"]:
    """How heavy the tails of every token's entries are: 0 for Gaussian ones, large where few channels stick out."""
    squared = (x - x.mean(-1, keepdim=True)).square()
    return squared.square().mean(-1) / squared.mean(-1).square().clamp(min=_TINY) - 3
