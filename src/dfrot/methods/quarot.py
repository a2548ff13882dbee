"""QuaRot: outlier-free 4-bit inference in rotated LLMs (Ashkboos et al. 2024, arXiv 2404.00456).

Outliers sit in few channels of the residual stream; a random rotation Q spreads them over all channels. In §4 a
randomized Hadamard matrix works best for the stream ("Stage 1a", R1). A Hadamard matrix per head makes the values easy
to quantize ("Stage 1c", R2), one applied online before down_proj the feed-forward activations ("Stage 1b", R4), and one
after RoPE the keys ("Stage 1d", R3).

Divergences. The released code mixes the heads by an online Hadamard matrix before o_proj; DFRot leaves that out, and
so do we unless `head_mixing` is set. It computes head_dim as hidden_size / num_attention_heads; we read the config.
Where a norm stands between a writer and the stream (Gemma 3, OLMo 2) no R1 can be folded past its gain: there what
reads the stream is rotated online, by a plain Hadamard matrix.

With `block` R1, R2 and R4 are block-diagonal. That is for grids with a scale for each group of entries: in blocks of
the group's size, or of a multiple, an outlier stays among its neighbours, and the other groups keep their short ranges.
A rotation across the whole width takes that from MXFP4 (arXiv 2511.04214).
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from dfrot.linalg.rotation import (
    Dense,
    Hadamard,
    Identity,
    Rotation,
    block_diagonal,
    random_hadamard,
    random_orthogonal,
)
from dfrot.methods.method import Fit, FitContext, Look, Method
from dfrot.models.graph import ModelGraph, ffn_width, head_dim
from dfrot.system.errors import UserError
from dfrot.system.papers import Paper
from dfrot.transform.transforms import Transforms

QUAROT = Paper(
    "quarot", "2404.00456", "Ashkboos, Saleh and others", "QuaRot: Outlier-Free 4-Bit Inference in Rotated LLMs"
)


@dataclass(frozen=True)
class QuaRot(Method):
    """R1 random, R2, R3 and R4 Hadamard."""

    rotation: Literal["hadamard", "orthogonal"] = "hadamard"
    """R1: a randomized Hadamard matrix (the papers' RH) or a random orthogonal one (RO)."""
    head_mixing: bool = False
    """Also mix the heads by an online Hadamard before o_proj, as QuaRot does and DFRot does not."""
    fold_only: bool = False
    """Leave out the online rotations (R3, R4), for engines that cannot apply them."""
    block: int | None = None
    """Rotate blocks of so many channels instead of the whole width; for grids of groups their size, or a multiple."""

    name = "quarot"
    papers = (QUAROT,)
    look = Look("#0072B2", "square", "dash")
    variants: ClassVar = {"RO": {"rotation": "orthogonal"}, "RH": {"rotation": "hadamard"}}

    def __post_init__(self) -> None:
        if self.head_mixing and self.fold_only:
            raise UserError("head-mixing is an online rotation and --fold-only excludes those. Drop one of the two.")
        require_block(self.block)

    def fit(self, on: FitContext) -> Fit:
        rotates = on.source.graph.rotates_stream
        residual = random_rotation(on, self.rotation, block=self.block) if rotates else None
        return Fit(around(residual, on, self.fold_only, self.head_mixing, self.block), {})

    def outline(self, on: FitContext) -> Transforms:
        width = on.source.config.hidden_size
        _blocks("the residual stream", width, self.block)
        residual = Identity(width) if on.source.graph.rotates_stream else None
        return around(residual, on, self.fold_only, self.head_mixing, self.block)


def require_block(block: int | None) -> None:
    """Raise UserError if no rotation has blocks of that size."""
    if block is not None and block < 2:
        raise UserError(f"a block that is rotated has two channels at least, got {block}.")


def random_rotation(
    on: FitContext, kind: str, instead: str = "--rotation orthogonal", block: int | None = None
) -> Rotation:
    """R1 unrefined: RO ("orthogonal") or RH ("hadamard"; raises UserError if none of the model's width is known), or
    one of a block's size for every block, each drawn on its own."""
    width, generator = on.source.config.hidden_size, on.generator()
    size, count = _blocks("the residual stream", width, block)
    draw = random_orthogonal if kind == "orthogonal" else random_hadamard
    try:
        drawn = [draw(size, generator) for _ in range(count)]
    except ValueError as error:
        channels = "has" if count == 1 else "is rotated in blocks of"
        raise UserError(f"the residual stream {channels} {size} channels: {error} Use {instead}.") from error
    return drawn[0] if count == 1 else Dense(torch.block_diag(*(each.as_matrix() for each in drawn)))


def _blocks(site: str, size: int, block: int | None) -> tuple[int, int]:
    """Size and number of the blocks at a site, which is one block if it is no larger."""
    if block is None or block >= size:
        return size, 1
    if size % block:
        divisors = [power for power in (16, 32, 64, 128, 256) if power < size and size % power == 0]
        raise UserError(
            f"{site} has {size} channels, which blocks of {block} do not divide. Those that do: {divisors}."
        )
    return block, size // block


def require_foldable(graph: ModelGraph, instead: str) -> None:
    """Raise UserError if R1 cannot be folded into the model's weights."""
    if not graph.rotates_stream:
        raise UserError(
            f"in {graph.name} the norm '{graph.norms_behind[0]}' stands between layers and the residual stream, whose "
            f"rotation (R1) cannot be folded past its gain. Use {instead}."
        )


def around(
    residual: Rotation | None, on: FitContext, fold_only: bool, head_mixing: bool = False, block: int | None = None
) -> Transforms:
    """A given R1 with QuaRot's other rotations; with `fold_only` just those that cost nothing at run time, with `block`
    R2 and R4 in blocks.

    Without R1 what reads the stream is rotated at run time. Raises UserError if R1 cannot be folded.
    """
    config = on.source.config
    if residual is not None:
        require_foldable(
            on.source.graph, "--method quarot, which rotates what reads the stream at run time, or duquant"
        )
    online = residual is None and not fold_only
    readers = hadamard("the residual stream", config.hidden_size, block=block) if online else None
    head = hadamard("one head", head_dim(config))
    values = hadamard("one head", head_dim(config), block=block)
    mixing = hadamard("head mixing", config.num_attention_heads, "Leave out --head-mixing.") if head_mixing else None
    ffn = None if fold_only else hadamard("the input of down_proj", ffn_width(config), "Use --fold-only.", block)
    return Transforms(residual, values, None if fold_only else head, ffn, mixing, readers)


def hadamard(
    site: str, size: int, instead: str = "Use --method none, which rotates nothing.", block: int | None = None
) -> Rotation:
    """The plain Hadamard matrix of a site, or of its blocks; if none of that size is known, raises UserError that says
    what to do."""
    size, count = _blocks(site, size, block)
    try:
        return Hadamard(size) if count == 1 else block_diagonal(Hadamard(size), count)
    except ValueError as error:
        raise UserError(f"{site} has size {size}: {error} {instead}") from error
