"""The distance between two models, token by token: KL divergence, and whether their likeliest tokens agree.

Perplexity can stay the same while predictions change: some tokens gain what others lose. These two measures show it.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dfrot.evaluation.perplexity import logits_by_piece
from dfrot.system.progress import track


@dataclass(frozen=True, eq=False)
class Divergence:
    """Every prediction of every block.

    Attributes:
        nll, original_nll: negative log-likelihood of the token that came, in nats, by either model.
        kl: KL(original ‖ model), in nats.
        agrees: whether both have the same likeliest token.
    """

    nll: Float[Tensor, "blocks predictions"]
    original_nll: Float[Tensor, "blocks predictions"]
    kl: Float[Tensor, "blocks predictions"]
    agrees: Bool[Tensor, "blocks predictions"]


@torch.no_grad()
def divergence(
    model: Any, original: Any, blocks: Int[Tensor, "blocks seq_len"], description: str = "divergence"
) -> Divergence:
    """Compare two causal language models of transformers that have one vocabulary; blocks as for `perplexity`."""
    rows = [_of_block(model, original, block) for block in track(blocks, description)]
    return Divergence(*(torch.stack(column) for column in zip(*rows, strict=True)))


def _of_block(model: Any, original: Any, tokens: Int[Tensor, " seq_len"]) -> tuple[Tensor, ...]:
    pieces = []
    for (logits, targets), (others, _) in zip(
        logits_by_piece(model, tokens), logits_by_piece(original, tokens), strict=True
    ):
        own, wanted = logits.log_softmax(-1), others.to(logits.device).log_softmax(-1)
        nll, original_nll = (-each.gather(-1, targets[:, None])[:, 0] for each in (own, wanted))
        kl = torch.nn.functional.kl_div(own, wanted, reduction="none", log_target=True).sum(-1)
        pieces.append((nll, original_nll, kl, own.argmax(-1) == wanted.argmax(-1)))
    return tuple(torch.cat(column).cpu() for column in zip(*pieces, strict=True))
