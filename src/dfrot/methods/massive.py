"""Tokens with massive activations, found on any model without a constant tuned to it.

In a few tokens (the first of a sequence, some delimiters) one or two channels of the residual stream are thousands of
times larger than the median (Sun et al. 2024, arXiv 2402.17762). After RMSNorm such a token is nearly one channel.

Both rules consider only tokens with a dominant channel, one that holds half of the token's energy. Without this
condition a plain Gaussian token would occasionally pass at small widths.

* `relative`: 4 symmetric bits represent the unrotated token almost exactly, with a relative error below 0.133. This is
  the released threshold, an error of 8.5 at the token norm √4096 = 64, rescaled to any width.
* `rotation`: a random orthogonal rotation makes the quantization error larger. It needs no threshold. The released
  code applies it to a single model, by name.

A text of N tokens has 2 L N norm outputs, without the norms' gains, which are folded into their readers. The ordinary
ones are so many and so alike that a sample stands for all, each sampled token counting for those left out. So the cost
of refining does not grow with the text.
"""

from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dfrot.linalg.rotation import random_orthogonal
from dfrot.methods.method import FitContext
from dfrot.models.stream import BlockRunner, captured_inputs
from dfrot.quant.affine import fake_quantize
from dfrot.quant.grids import IntGrid, PerToken
from dfrot.system.progress import track

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
    tokens: Float[Tensor, "rows hidden"], massive: Bool[Tensor, " rows"], token_ids: Tensor, block: int, norm: str
) -> list[dict[str, Any]]:
    """Where every massive token is in `token_ids` (sequences, seq_len), and how large, in units of the token's RMS."""
    x, rows = tokens[massive], torch.nonzero(massive).flatten().to(token_ids.device)
    value, channel = x.abs().max(dim=-1)
    peaks = value / x.square().mean(-1).sqrt()
    columns = (rows % token_ids.shape[1], token_ids.flatten()[rows], channel, peaks)
    return [
        {"block": block, "norm": norm, "position": at, "token_id": token, "channel": j, "peak_over_rms": round(peak, 2)}
        for at, token, j, peak in zip(*(column.tolist() for column in columns), strict=True)
    ]


class Sample(NamedTuple):
    """Norm outputs to refine a rotation on."""

    tokens: Float[Tensor, "rows hidden"]  # unrotated, RMS 1
    massive: Bool[Tensor, " rows"]
    multiplicity: Float[Tensor, " rows"]  # how many tokens of the text a row stands for; 1 for massive ones

    def weights(self, gamma: float) -> Float[Tensor, " rows"]:
        """Weights of the squared errors: γ² for massive tokens, the multiplicity for ordinary ones; their sum is 1."""
        w = torch.where(self.massive, torch.full_like(self.multiplicity, gamma**2), self.multiplicity)
        return w / w.sum()

    @staticmethod
    def joined(samples: list["Sample"]) -> "Sample":
        return Sample(*(torch.cat(parts) for parts in zip(*samples, strict=True)))


def drawn(
    tokens: Float[Tensor, "rows hidden"], massive: Bool[Tensor, " rows"], kept: int | None, generator: torch.Generator
) -> Sample:
    """All massive tokens, and so many of the ordinary ones; None keeps all of these, too."""
    ordinary = torch.nonzero(~massive).flatten().cpu()
    few = ordinary[torch.randperm(len(ordinary), generator=generator)[:kept]]
    rows = torch.cat([torch.nonzero(massive).flatten(), few.to(massive.device)])
    multiplicity = torch.where(massive[rows], 1.0, len(ordinary) / max(1, len(few)))
    return Sample(tokens[rows], massive[rows], multiplicity.to(tokens.dtype))


def sample_norm_outputs(
    on: FitContext, token_ids: Int[Tensor, "sequences seq_len"], rule: Rule, kept: int | None
) -> tuple[Sample, list[dict[str, Any]]]:
    """Stream text through the full-precision blocks and sample the outputs of all their norms.

    Of the ordinary tokens so many are `kept` in all; None keeps every one. The massive ones are described beside.
    """
    source, device, generator = on.source, on.device, on.generator()
    per_piece = None if kept is None else max(1, kept // (len(source.graph.norms) * source.num_blocks))
    samples: list[Sample] = []
    found: list[dict[str, Any]] = []
    hidden = source.embedded(token_ids).float().to(device)  # (sequences, seq_len, hidden)
    run = BlockRunner(source, hidden[:1])
    for index in track(range(source.num_blocks), "calibrating"):
        block = source.block(index).float().to(device)
        norms = {name: block.get_submodule(name) for name in source.graph.norms}
        with captured_inputs(norms) as seen:
            hidden = torch.cat([run(block, index, sequence) for sequence in hidden.split(1)])
        for name, norm in norms.items():
            x = torch.cat(seen[name]).flatten(0, -2)
            x = torch.nn.functional.rms_norm(x, x.shape[-1:], eps=norm.eps)  # type: ignore[arg-type]
            massive = massive_tokens(x, rule)
            found += describe_massive(x, massive, token_ids, index, name)
            samples.append(drawn(x, massive, per_piece, generator))
    return Sample.joined(samples), found
