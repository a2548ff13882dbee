"""Norm outputs of a calibration text: every massive token, a weighted sample of the others.

The readers of the residual stream see the RMSNorm output x̂ without its gain, which is folded into them. A text of N
tokens has 2 L N such outputs. The ordinary ones are so many and so alike that a sample stands for all, each sampled
token counting for those left out. So the cost of refining does not grow with the text.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from dfrot.methods.massive import Rule, describe_massive, massive_tokens
from dfrot.methods.method import FitContext
from dfrot.models.stream import BlockRunner, captured_inputs
from dfrot.system.progress import track


@dataclass(frozen=True, eq=False)
class Sample:
    """Norm outputs to refine a rotation on.

    Attributes:
        tokens: (rows, hidden), unrotated, RMS 1.
        massive: which rows are tokens with massive activations.
        multiplicity: how many tokens of the text each row stands for; 1 for massive ones.
        found: the massive tokens, as `describe_massive` describes them.
    """

    tokens: Float[Tensor, "rows hidden"]
    massive: Bool[Tensor, " rows"]
    multiplicity: Float[Tensor, " rows"]
    found: list[dict[str, Any]]

    def weights(self, gamma: float) -> Float[Tensor, " rows"]:
        """Weights of the squared errors: γ² for massive tokens, the multiplicity for ordinary ones; their sum is 1."""
        w = torch.where(self.massive, torch.full_like(self.multiplicity, gamma**2), self.multiplicity)
        return w / w.sum()


@dataclass
class Sampler:
    """Collects a `Sample` from norm outputs that come piece by piece.

    Args:
        per_piece: ordinary tokens that are kept of each piece; None keeps every one.
        rule: which tokens are massive.
    """

    per_piece: int | None
    rule: Rule
    generator: torch.Generator
    _parts: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)
    _found: list[dict[str, Any]] = field(default_factory=list)

    def add(self, tokens: Float[Tensor, "rows hidden"], token_ids: Tensor, block: int, norm: str, length: int) -> None:
        """Sample one piece.

        Args:
            tokens: norm outputs of consecutive tokens, whole sequences one after the other.
            token_ids: (rows,).
            length: tokens of one sequence.
        """
        massive = massive_tokens(tokens, self.rule)
        which = torch.nonzero(massive).flatten()
        ids = token_ids.to(which.device)
        self._found += describe_massive(tokens[which], which % length, ids[which], block, norm)
        ordinary = torch.nonzero(~massive).flatten().cpu()
        kept = ordinary[torch.randperm(len(ordinary), generator=self.generator)[: self.per_piece]]
        rows = torch.cat([which, kept.to(which.device)])
        multiplicity = torch.where(massive[rows], 1.0, len(ordinary) / max(1, len(kept)))
        self._parts.append((tokens[rows], massive[rows], multiplicity.to(tokens.dtype)))

    def sample(self) -> Sample:
        tokens, massive, multiplicity = (torch.cat(parts) for parts in zip(*self._parts, strict=True))
        return Sample(tokens, massive, multiplicity, self._found)


def sample_norm_outputs(on: FitContext, token_ids: Tensor, rule: Rule, kept: int | None) -> Sample:
    """Stream text through the full-precision blocks and sample the outputs of all their norms.

    Args:
        token_ids: (sequences, seq_len).
        kept: ordinary tokens to keep in all; None keeps every one.
    """
    source, device = on.source, on.device
    per_piece = None if kept is None else max(1, kept // (len(source.graph.norms) * source.num_blocks))
    sampler = Sampler(per_piece, rule, on.generator())
    hidden = source.embedding()[token_ids].float().to(device)  # (sequences, seq_len, hidden)
    run = BlockRunner(source, hidden[:1])
    for index in track(range(source.num_blocks), "calibrating"):
        block = source.block(index).float().to(device)
        norms = {name: block.get_submodule(name) for name in source.graph.norms}
        with captured_inputs(norms) as seen:
            hidden = torch.cat([run(block, index, sequence) for sequence in hidden.split(1)])
        for name, norm in norms.items():
            x = torch.cat(seen[name]).flatten(0, -2)
            x = torch.nn.functional.rms_norm(x, x.shape[-1:], eps=norm.eps)  # type: ignore[arg-type]
            sampler.add(x, token_ids.flatten(), index, name, token_ids.shape[1])
    return sampler.sample()
