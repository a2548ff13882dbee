"""Tokens with massive activations, found on any model without a constant tuned to it.

In a few tokens (the first of a sequence, some delimiters) one or two channels of the residual stream are thousands of
times larger than the median (Sun et al. 2024, arXiv 2402.17762). After RMSNorm such a token is nearly one channel.

Both rules consider only tokens with a dominant channel, one that holds half of the token's energy. Without this
condition a plain Gaussian token would occasionally pass at small widths.

* `relative`: 4 symmetric bits represent the unrotated token almost exactly, with a relative error below 0.133. This is
  the released threshold, an error of 8.5 at the token norm √4096 = 64, rescaled to any width.
* `rotation`: a random orthogonal rotation makes the quantization error larger. It needs no threshold. The released
  code applies it to a single model, by name.
"""

from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from dfrot.linalg.rotation import random_orthogonal
from dfrot.quant.affine import fake_quantize
from dfrot.quant.grids import IntGrid, PerToken

Rule = Literal["relative", "rotation"]

RELATIVE_ERROR = 8.5 / 64
DOMINANT_SHARE = 0.5
_RULE_SEED = 0  # fixed: which tokens are massive must not depend on the seed of a run


def massive_tokens(tokens: Float[Tensor, "rows hidden"], rule: Rule = "relative") -> Bool[Tensor, " rows"]:
    """A mask of the (unrotated) norm outputs that belong to tokens with massive activations."""
    energy = tokens.square()
    dominated = energy.amax(-1) >= DOMINANT_SHARE * energy.sum(-1)
    found = torch.zeros_like(dominated)
    if dominated.any():
        x = tokens[dominated]
        if rule == "relative":
            found[dominated] = _error(x) < RELATIVE_ERROR * x.norm(dim=-1)
        else:
            rotation = random_orthogonal(x.shape[-1], torch.Generator().manual_seed(_RULE_SEED))
            found[dominated] = _error(rotation.apply(x)) > _error(x)
    return found


def _error(x: Float[Tensor, "rows hidden"]) -> Float[Tensor, " rows"]:
    return (x - fake_quantize(x, IntGrid(4), PerToken())).norm(dim=-1)


def describe_massive(
    tokens: Float[Tensor, "rows hidden"], positions: Tensor, token_ids: Tensor, block: int, norm: str
) -> list[dict[str, Any]]:
    """One entry per massive token: where it is and how large, in units of the token's RMS."""
    value, channel = tokens.abs().max(dim=-1)
    peaks = (value / tokens.square().mean(-1).sqrt()).tolist()
    rows = zip(positions.tolist(), token_ids.tolist(), channel.tolist(), peaks, strict=True)
    return [
        {"block": block, "norm": norm, "position": at, "token_id": token, "channel": j, "peak_over_rms": round(peak, 2)}
        for at, token, j, peak in rows
    ]
