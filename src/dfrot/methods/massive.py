"""Which tokens have massive activations: found, on any model, without a constant of any model.

In a few tokens (the first of a sequence, some delimiters) one or two channels of the residual stream are thousands of
times larger than the median (Sun et al. 2024, arXiv 2402.17762). After RMSNorm such a token is nearly one channel.

Both rules look only at tokens with a dominant channel, one that holds half of the token's energy: at
small widths a plain Gaussian token would otherwise pass now and then.

* `relative`: 4 symmetric bits represent the unrotated token almost exactly: relative error below 0.133. This is the
  released threshold, an error of 8.5 at the token norm √4096 = 64, as it holds for any width.
* `rotation`: a random orthogonal rotation makes the quantization error larger. No threshold; the released code uses it
  for one model, by that model's name.
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
_RULE_SEED = 0  # the rule's own rotation: which tokens are massive must not depend on the seed of a run


def massive_tokens(tokens: Float[Tensor, "rows hidden"], rule: Rule = "relative") -> Bool[Tensor, " rows"]:
    """Which of the (unrotated) norm outputs belong to tokens with massive activations."""
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
    """Which tokens, where, how large: one entry per massive token, values in units of the token's RMS."""
    value, channel = tokens.abs().max(dim=-1)
    rms = tokens.square().mean(-1).sqrt()
    return [
        {
            "block": block,
            "norm": norm,
            "position": int(positions[row]),
            "token_id": int(token_ids[row]),
            "channel": int(channel[row]),
            "peak_over_rms": round(float(value[row] / rms[row]), 2),
        }
        for row in range(len(tokens))
    ]
