"""Layer sensitivity: the KL divergence that quantizing norm outputs causes, measured.

Quantizing the inputs of the residual stream's readers in the basis R is x̂ ↦ Q(x̂ R) Rᵀ in the original basis. So no
weight has to be folded to compare rotations: the original blocks are streamed once, and each candidate carries its own
hidden states.
"""

import contextlib
from collections.abc import Sequence
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from dfrot.linalg.rotation import Rotation
from dfrot.methods.method import FitContext
from dfrot.models.sizes import ModelSizes
from dfrot.models.stream import BlockRunner
from dfrot.quant.spec import TensorSpec
from dfrot.system.progress import track
from dfrot.training.teacher import LOGITS


@torch.no_grad()
def kl_divergences(
    on: FitContext,
    candidates: Sequence[tuple[Rotation, range]],
    quantizer: TensorSpec,
    token_ids: Int[Tensor, "sequences seq_len"],
    first: int = 0,
) -> list[float]:
    """Mean KL(original ‖ candidate) of every candidate, in nats, from position `first` on.

    A candidate is a basis, and the blocks whose norm outputs are quantized in it.
    """
    source, device = on.source, on.device
    original = source.embedded(token_ids).float().to(device)
    states: dict[int, Tensor] = {}  # (sequences, seq_len, hidden), of the candidates whose first block was reached
    run = BlockRunner(source, original[:1])
    for index in track(range(source.num_blocks), "comparing rotations"):
        block = source.block(index).float().to(device)
        for number, (rotation, blocks) in enumerate(candidates):
            if index < blocks.start:
                continue
            with contextlib.ExitStack() as hooks:
                for name in source.graph.norms if index in blocks else ():
                    hook = partial(_quantized_output, rotation, quantizer)
                    hooks.enter_context(block.get_submodule(name).register_forward_hook(hook))
                states[number] = _advanced(run, block, index, states.get(number, original))
        original = _advanced(run, block, index, original)
    norm, head = source.final_norm().float().to(device), source.head().float().to(device)
    bias = source.head_bias()
    added = None if bias is None else bias.float().to(device)
    totals = [0.0] * len(candidates)
    ends = [original, *(states[number] for number in range(len(candidates)))]
    positions = [norm(end[:, first:]).flatten(0, 1) for end in ends]  # (positions, hidden)
    together = max(1, LOGITS // len(head))
    for exact, *changed in zip(*(state.split(together) for state in positions), strict=True):
        expected = nn.functional.linear(exact, head, added).log_softmax(-1)
        for number, piece in enumerate(changed):
            found = nn.functional.linear(piece, head, added).log_softmax(-1)
            totals[number] += float(nn.functional.kl_div(found, expected, reduction="sum", log_target=True))
    return [total / len(positions[0]) for total in totals]


def peak_bytes(sizes: ModelSizes, candidates: int, tokens: int) -> int:
    """Memory that `kl_divergences` takes for so many tokens."""
    states = 2 * 4 * (1 + candidates) * tokens * sizes.hidden  # and what the last norm makes of them
    head = sizes.vocabulary * sizes.hidden * (sizes.source + 4) + 4 * 4 * max(LOGITS, sizes.vocabulary)
    return states + sizes.block * (sizes.source + 4) + max(head, 4 * sizes.sequence)


def _advanced(
    run: BlockRunner, block: nn.Module, index: int, state: Float[Tensor, "sequences seq_len hidden"]
) -> Float[Tensor, "sequences seq_len hidden"]:
    return torch.cat([run(block, index, sequence) for sequence in state.split(1)])


def _quantized_output(
    rotation: Rotation, quantizer: TensorSpec, norm: nn.RMSNorm, args: tuple[Tensor], output: Tensor
) -> Float[Tensor, "..."]:
    """A hook: the norm's output, quantized in the basis of the rotation."""
    x = nn.functional.rms_norm(args[0], norm.normalized_shape, eps=norm.eps)
    return rotation.T.apply(quantizer.fake_quantize(rotation.apply(x))) * norm.weight
