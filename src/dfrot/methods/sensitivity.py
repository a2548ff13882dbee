"""Layer sensitivity: the KL divergence that quantizing norm outputs causes, measured.

Quantizing the inputs of the residual stream's readers in the basis R is x̂ ↦ Q(x̂ R) Rᵀ in the original basis. So no
weight has to be folded to compare rotations: the original blocks are streamed once, and each candidate carries its own
hidden states. A candidate is a rotation for all blocks, or a rotation for one block and no other.
"""

import contextlib
from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from dfrot.linalg.rotation import Rotation
from dfrot.methods.method import FitContext
from dfrot.models.stream import BlockRunner
from dfrot.quant.spec import TensorSpec
from dfrot.system.progress import track

_LOGIT_POSITIONS = 256


@torch.no_grad()
def kl_divergences(
    on: FitContext,
    rotations: Sequence[Rotation],
    quantizer: TensorSpec,
    token_ids: Int[Tensor, "sequences seq_len"],
    first: int,
) -> list[float]:
    """Mean KL(original ‖ norm outputs quantized in the basis R) for every R, in nats, from position `first` on."""
    source, device = on.source, on.device
    embedded = source.embedding()[token_ids].float().to(device)
    states = [embedded] * (len(rotations) + 1)  # the original last
    run = BlockRunner(source, embedded[:1])
    for index in track(range(source.num_blocks), "comparing rotations"):
        block = source.block(index).float().to(device)
        norms = [block.get_submodule(name) for name in source.graph.norms]
        for candidate, rotation in enumerate([*rotations, None]):
            with _quantized(norms, rotation, quantizer):
                states[candidate] = _advanced(run, block, index, states[candidate])
    return _divergences(on, states[-1][:, first:], [state[:, first:] for state in states[:-1]])


@torch.no_grad()
def sensitivity_by_block(
    on: FitContext,
    rotations: Sequence[Rotation],
    quantizer: TensorSpec,
    token_ids: Int[Tensor, "sequences seq_len"],
) -> list[list[float]]:
    """Mean KL(original ‖ only this block's norm outputs quantized in the basis R), in nats: for every R, by block.

    Every R costs half the square of the number of blocks in runs of one block, and as many hidden states as there are
    blocks: meant for short texts.
    """
    source, device = on.source, on.device
    original = source.embedding()[token_ids].float().to(device)
    changed: list[Tensor] = []  # (sequences, seq_len, hidden), block by block; within a block by rotation
    run = BlockRunner(source, original[:1])
    for index in track(range(source.num_blocks), "sensitivity by block"):
        block = source.block(index).float().to(device)
        norms = [block.get_submodule(name) for name in source.graph.norms]
        changed = [_advanced(run, block, index, state) for state in changed]
        for rotation in rotations:
            with _quantized(norms, rotation, quantizer):
                changed.append(_advanced(run, block, index, original))
        original = _advanced(run, block, index, original)
    by_candidate = _divergences(on, original, changed)
    return [by_candidate[number :: len(rotations)] for number in range(len(rotations))]


def _advanced(
    run: BlockRunner, block: nn.Module, index: int, state: Float[Tensor, "sequences seq_len hidden"]
) -> Float[Tensor, "sequences seq_len hidden"]:
    return torch.cat([run(block, index, sequence) for sequence in state.split(1)])


def _divergences(
    on: FitContext,
    original: Float[Tensor, "sequences positions hidden"],
    changed: Sequence[Float[Tensor, "sequences positions hidden"]],
) -> list[float]:
    """Mean KL(original ‖ changed) of the predictions from each of the last block's outputs."""
    norm = on.source.final_norm().float().to(on.device)
    head = on.source.head().float().to(on.device)
    totals = [0.0] * len(changed)
    positions = [norm(state).flatten(0, 1) for state in (original, *changed)]  # (positions, hidden)
    for first, *others in zip(*(state.split(_LOGIT_POSITIONS) for state in positions), strict=True):
        expected = (first @ head.T).log_softmax(-1)
        for candidate, piece in enumerate(others):
            found = (piece @ head.T).log_softmax(-1)
            totals[candidate] += float(nn.functional.kl_div(found, expected, reduction="sum", log_target=True))
    return [total / len(positions[0]) for total in totals]


@contextlib.contextmanager
def _quantized(norms: Sequence[nn.Module], rotation: Rotation | None, quantizer: TensorSpec) -> Iterator[None]:
    """While open, the norms' outputs are quantized in the basis of the rotation; None leaves them alone."""

    def hook(norm: nn.RMSNorm, args: tuple[Tensor], output: Tensor) -> Float[Tensor, "..."]:
        assert rotation is not None, "registered for rotations only"
        x = nn.functional.rms_norm(args[0], norm.normalized_shape, eps=norm.eps)
        q = quantizer.fake_quantize(rotation.apply(x))
        return rotation.T.apply(q) * norm.weight

    handles = [] if rotation is None else [norm.register_forward_hook(hook) for norm in norms]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
