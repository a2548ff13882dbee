"""What quantizing the norm outputs does to the model: KL divergence, measured.

Quantizing what the readers of the residual stream see, in the basis R, is x̂ ↦ Q(x̂ R) Rᵀ in the original basis. So no
weight has to be folded to compare rotations: the original blocks are streamed once, and each candidate carries its own
hidden states.
"""

import contextlib
from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from dfrot.linalg.rotation import Rotation
from dfrot.methods.context import Context
from dfrot.models.stream import BlockRunner
from dfrot.progress import track
from dfrot.quant.affine import fake_quantize
from dfrot.spec import TensorSpec

_LOGIT_POSITIONS = 256


@torch.no_grad()
def kl_divergences(
    context: Context,
    rotations: Sequence[Rotation],
    quantizer: TensorSpec,
    token_ids: Int[Tensor, "sequences seq_len"],
    first: int,
) -> list[float]:
    """Mean KL(original ‖ norm outputs quantized in the basis R) for every R, in nats, from position `first` on."""
    source, device = context.source, context.device
    embedded = source.embedding()[token_ids].float().to(device)
    states = [embedded] * (len(rotations) + 1)  # the original last
    run = BlockRunner(source, embedded[:1])
    for index in track(range(source.num_blocks), "comparing rotations"):
        block = source.block(index).float().to(device)
        norms = [block.get_submodule(name) for name in source.graph.norms]
        for candidate, rotation in enumerate([*rotations, None]):
            with _quantized(norms, rotation, quantizer):
                outs = [run(block, index, sequence) for sequence in states[candidate].split(1)]
            states[candidate] = torch.cat(outs)
    norm = source.final_norm().float().to(device)
    head = source.head().float().to(device)
    totals = [0.0] * len(rotations)
    positions = [norm(state[:, first:]).flatten(0, 1) for state in states]  # (positions, hidden)
    for pieces in zip(*(state.split(_LOGIT_POSITIONS) for state in positions), strict=True):
        original = (pieces[-1] @ head.T).log_softmax(-1)
        for candidate, piece in enumerate(pieces[:-1]):
            changed = (piece @ head.T).log_softmax(-1)
            totals[candidate] += float(nn.functional.kl_div(changed, original, reduction="sum", log_target=True))
    return [total / len(positions[-1]) for total in totals]


@contextlib.contextmanager
def _quantized(norms: Sequence[nn.Module], rotation: Rotation | None, quantizer: TensorSpec) -> Iterator[None]:
    """While open, the norms' outputs are quantized in the basis of the rotation; None leaves them alone."""

    def hook(norm: nn.RMSNorm, args: tuple[Tensor], output: Tensor) -> Float[Tensor, "..."]:
        assert rotation is not None, "registered for rotations only"
        assert quantizer.clip is not None, "activations have a fixed clip ratio"
        x = nn.functional.rms_norm(args[0], norm.normalized_shape, eps=norm.eps)
        q = fake_quantize(rotation.apply(x), quantizer.grid, quantizer.token_granularity, quantizer.clip)
        return rotation.T.apply(q) * norm.weight

    handles = [] if rotation is None else [norm.register_forward_hook(hook) for norm in norms]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
