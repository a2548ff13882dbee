"""DuQuant: distributing outliers via dual transformation (Lin et al. 2024, arXiv 2406.01721).

Outliers sit in few channels, and where they sit is known from a sample of text. So for the input x (tokens, in) of
every linear layer, first move part of the channels' sizes into the weight, then rotate so that the largest channel is
spread over its block, deal the channels to the blocks so that all blocks get their share, and rotate again (§3.2):

    x Wᵀ = (x Λ⁻¹ B₁ P B₂) (W Λ B₁ P B₂)ᵀ.

Λ        smoothing, s_j = max|x_j|^α / max|w_j|^(1−α), divided out by the norm or the layer before.
B₁, B₂   block-diagonal, one orthogonal matrix for all blocks, found greedily: again and again the channel with the
         largest entry is spread evenly over the block, at most 256 times; the steps up to the smallest peak are kept.
P        the zigzag permutation: channels sorted by their largest entry are dealt to blocks 1 … K, K … 1, 1 … K.

The rotations run online, once for the layers that read the same input. Smoothing costs nothing.

Divergences. The released code takes the token (row) of the largest entry for the channel to spread; the paper means the
channel (column), and so do we. It gives up on smoothing grouped-query values silently; here the heads that share a
value head share its s. Its online Hadamard of queries and keys mixes neighbouring tokens where heads are smaller than
128; ours is QuaRot's, per head. Everything is fitted to the first calibration sequence.
"""

import statistics
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dfrot.linalg.rotation import Dense, Identity, Rotation, block_diagonal, random_orthogonal
from dfrot.methods.method import Fit, FitContext, Look, Method
from dfrot.methods.quarot import hadamard, random_rotation, require_foldable
from dfrot.models.graph import head_dim, kv_heads
from dfrot.models.sizes import ModelSizes
from dfrot.models.stream import BlockRunner, captured_inputs
from dfrot.system.errors import UserError
from dfrot.system.papers import Paper
from dfrot.system.progress import track
from dfrot.transform.transforms import InputTransform, Transforms, fold_block_, input_widths

DUQUANT = Paper(
    "duquant",
    "2406.01721",
    "Lin, Haokun and others",
    "DuQuant: Distributing Outliers via Dual Transformation Makes Stronger Quantized LLMs",
)
SMALLEST = 1e-5  # of a smoothing factor: a channel that is never used


@dataclass(frozen=True)
class DuQuant(Method):
    """Smoothing and block rotations for the inputs of all linear layers, around QuaRot's R3."""

    block: int = 128
    """Size of the rotated blocks; where it does not divide, the largest power of two that does and is smaller."""
    greedy_steps: int = 256
    """Steps of the search for a rotation; the best prefix is kept."""
    permutations: int = 1
    """How often channels are permuted and rotated again; 0 rotates once."""
    order: Literal["zigzag", "random", "none"] = "zigzag"
    """How channels are dealt to the blocks: the largest in turn, at random, or left where they are."""
    smooth: bool = True
    """Move part of the channels' sizes into the weights first."""
    alpha: float | None = None
    """Strength of smoothing, s = max|x|^α / max|w|^(1 − α); 0.6 unless given, with learned clipping 0.5."""
    base: Literal["none", "quarot"] = "none"
    """Rotate the model unchanged, or on top of QuaRot's folded rotations R1 and R2."""

    name = "duquant"
    papers = (DUQUANT,)
    look = Look("#CC79A7", "cross", "dashdot")
    preset = "duquant"
    sequences_read = 1

    def __post_init__(self) -> None:
        if self.block < 2 or self.greedy_steps < 1 or self.permutations < 0:
            raise UserError(
                f"block is at least 2, greedy-steps at least 1 and permutations at least 0, got {self.block}, "
                f"{self.greedy_steps} and {self.permutations}."
            )
        if self.alpha is not None and not 0 <= self.alpha <= 1:
            raise UserError(f"alpha is between 0 and 1, got {self.alpha}.")

    def resolved(self, learned_clipping: bool) -> "DuQuant":
        # both values are the released command's, the second for "+LWC"
        return self if self.alpha is not None else replace(self, alpha=0.5 if learned_clipping else 0.6)

    def outline(self, on: FitContext) -> Transforms:
        config, inputs = on.source.config, {}
        widths = input_widths(on.source.graph, config)
        for stage, *_ in on.source.graph.stages:
            width, size = widths[stage], block_size(widths[stage], self.block)
            matrices = torch.empty(self.permutations + 1, size, size, dtype=torch.float64, device="meta")
            orders = torch.empty(self.permutations, width, dtype=torch.int64, device="meta")
            inputs[stage] = InputTransform(torch.empty(width, device="meta"), matrices, orders)
        base = self._base(on, Identity(config.hidden_size))
        return replace(base, inputs=(inputs,) * config.num_hidden_layers)

    def _base(self, on: FitContext, residual: Rotation) -> Transforms:
        """What the block rotations go around; `residual` is R1 if there is one."""
        head = hadamard("one head", head_dim(on.source.config))
        if self.base == "none":
            return Transforms(keys=head)
        require_foldable(on.source.graph, "--base none")
        return Transforms(residual, head, head)

    def fit(self, on: FitContext) -> Fit:
        source, graph, config, generator = on.source, on.source.graph, on.source.config, on.generator()
        how = "hadamard", "--base none"
        residual = random_rotation(on, *how) if self.base == "quarot" else Identity(config.hidden_size)
        base = self._base(on, residual)
        hidden = residual.apply(source.embedded(on.calibration()[:1]).double()).float().to(on.device)
        run = BlockRunner(source, hidden)
        inputs, peaks = [], []
        for index in track(range(source.num_blocks), "fitting rotations"):
            block = source.block(index).to(on.device)
            fold_block_(block, base.folds(index, graph, config, block), graph, torch.float32)
            layers = {stage[0]: block.get_submodule(stage[0]) for stage in graph.stages}
            if graph.router is not None:  # experts read what it does; the first of them some of it
                layers[graph.stages[2][0]] = block.get_submodule(graph.router)
            with captured_inputs(layers) as seen:
                hidden = run(block, index, hidden)
            transforms = {}
            for stage in graph.stages:
                own, missing = [each.flatten(0, -2) for each in seen[stage[0]]], 0  # (tokens, in)
                if graph.experts and stage[0] in graph.downs:
                    expert: Any = block.get_submodule(stage[0].rpartition(".")[0])
                    read = torch.cat(seen[graph.stages[2][0]]).flatten(0, -2)
                    missing = max(0, min(read.shape) - sum(map(len, own)))
                    own.append(expert.inner(read[torch.arange(missing) * len(read) // max(1, missing)]))
                x, smooth = torch.cat(own), None
                if self.smooth and graph.absorbs_scale(stage[0]):
                    w = torch.cat([block.get_submodule(name).weight for name in stage])  # type: ignore[misc]
                    shared = kv_heads(config) if stage[0] == graph.output else None
                    assert self.alpha is not None, "a recipe resolves its method"
                    smooth = smoothing(x, w, self.alpha, shared, head_dim(config))
                    x = x / smooth
                transform = transforms[stage[0]] = InputTransform(smooth, *block_rotations(x, self, generator))
                peak = {"block": index, "input": stage[0], "block_size": transform.matrices.shape[-1]}
                after = float(transform.rotation.apply(x).abs().max())
                few = {"filled": missing} if missing else {}
                peaks.append({**peak, "before": float(x.abs().max()), "after": after, **few})
            inputs.append(transforms)
        return Fit(replace(base, inputs=tuple(inputs)), {"peaks": peaks})

    def peak_bytes(self, sizes: ModelSizes, budget: int) -> int:
        block = sizes.block * (sizes.source + 4) + 4 * sizes.sequence
        outputs = 4 * sizes.seq_len * sum(width for _, width in sizes.stages)
        # rows are searched in float64 beside the layers that read them
        return block + outputs + 8 * sizes.seq_len * max(width for _, width in sizes.stages)

    def summary(self, notes: Mapping[str, Any]) -> list[str]:
        peaks = [peak["before"] / peak["after"] for peak in notes["peaks"] if peak["after"]]
        lowered = statistics.geometric_mean(peaks) if peaks else 1.0
        return [f"the largest entry of a layer's input is {lowered:.1f} times smaller (geometric mean)"]


def smoothing(
    x: Float[Tensor, "tokens in"], w: Float[Tensor, "out in"], alpha: float, groups: int | None, head: int
) -> Float[Tensor, " in"]:
    """s_j = max|x_j|^α / max|w_j|^(1−α) (SmoothQuant, arXiv 2211.10438, Eq. 4).

    If x are the outputs of heads, `groups` is how many value heads there are; heads that read the same share s.
    """
    of_x, of_w = x.abs().amax(0), w.abs().amax(0)
    if groups is not None:
        of_x, of_w = (peak.view(groups, -1, head).amax(1) for peak in (of_x, of_w))  # (groups, head)
    s = (of_x.clamp(min=SMALLEST) ** alpha / of_w.clamp(min=SMALLEST) ** (1 - alpha)).clamp(min=SMALLEST)
    return s if groups is None else s[:, None].expand(-1, x.shape[1] // s.numel(), -1).flatten()


def block_rotations(
    x: Float[Tensor, "tokens in"], options: DuQuant, generator: torch.Generator
) -> tuple[Float[Tensor, "count block block"], Int[Tensor, "between in"]]:
    """B₁, B₂, … and the permutations between them."""
    width = x.shape[1]
    size = block_size(width, options.block)
    matrices, orders = [], [torch.empty(0, width, dtype=torch.int64, device=x.device)]
    for number in range(options.permutations + 1):
        if number:
            match options.order:
                case "zigzag":
                    order = zigzag(x.abs().amax(0), width // size)
                case "random":
                    order = torch.randperm(width, generator=generator).to(x.device)
                case "none":
                    order = torch.arange(width, device=x.device)
            orders.append(order[None])
            x = x[:, order]
        matrices.append(greedy_rotation(x.unflatten(-1, (-1, size)).flatten(0, 1), options.greedy_steps, generator))
        x = block_diagonal(Dense(matrices[-1]), width // size).apply(x)
    return torch.stack(matrices), torch.cat(orders)


def block_size(width: int, wanted: int) -> int:
    """`wanted` if it divides the width, else the largest power of two that does and is smaller."""
    if width % wanted == 0:
        return wanted
    return min(width & -width, 1 << (wanted.bit_length() - 1))


def zigzag(peaks: Float[Tensor, " in"], blocks: int) -> Int[Tensor, " in"]:
    """The order that deals channels, largest first, to blocks 1 … K, K … 1, and so on; y[j] = x[order[j]]."""
    dealt = torch.argsort(peaks, descending=True, stable=True).view(-1, blocks)  # (round, block)
    dealt[1::2] = dealt[1::2].flip(1)
    return dealt.T.flatten()


def greedy_rotation(
    x: Float[Tensor, "rows block"], steps: int, generator: torch.Generator
) -> Float[Tensor, "block block"]:
    """The product of the first so many spreading steps that leaves the smallest max |x B|, in float64."""
    size = x.shape[1]
    best = product = torch.eye(size, dtype=torch.float64, device=x.device)
    # A rotated row has an entry of at least its norm / √size, so rows shorter than that of the longest never matter.
    lengths = x.norm(dim=1)
    channels = x[lengths >= lengths.max() / size**0.5 * (1 - 1e-6)].T.contiguous()  # (block, rows)
    peaks = torch.maximum(channels.amax(1), -channels.amin(1))
    least = peaks.max()
    spread = spreading(size, generator).to(x.device)
    for _ in range(steps):
        largest = int(peaks.argmax())
        step = spread.clone()
        step[[0, largest]] = step[[largest, 0]]
        step[:, [0, largest]] = step[:, [largest, 0]]
        channels, product = step.T.to(x.dtype) @ channels, product @ step
        peaks = torch.maximum(channels.amax(1), -channels.amin(1))
        if peaks.max() < least:
            best, least = product, peaks.max()
    return best


def spreading(size: int, generator: torch.Generator) -> Float[Tensor, "size size"]:
    """An orthogonal matrix whose first row is 1/√size everywhere, random otherwise; float64.

    The reflection that takes the first axis to the diagonal, after a random rotation of all the other axes.
    """
    normal = torch.full((size,), -(size**-0.5), dtype=torch.float64)
    normal[0] += 1
    reflection = torch.eye(size, dtype=torch.float64) - 2 * torch.outer(normal, normal) / normal.dot(normal)
    others = torch.eye(size, dtype=torch.float64)
    others[1:, 1:] = random_orthogonal(size - 1, generator).as_matrix()
    return others @ reflection
