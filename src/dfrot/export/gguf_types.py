"""What a tensor of a GGUF file is kept in: floats, or blocks of integers that are a checkpoint's own.

A block of Q4_0 is 32 integers q in 0 … 15 and a scale d in float16, and stands for d (q − 8); one of Q8_0 has q in
−128 … 127 and stands for d q. A symmetric grid with groups of a multiple of 32 is that, so integers and scales go over
as they are and nothing is rounded a second time.
"""

from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dfrot.export.checkpoint import Checkpoint
from dfrot.quant.spec import TensorSpec
from dfrot.system.errors import UserError
from dfrot.transform.transforms import input_widths

if TYPE_CHECKING:
    import numpy as np

BLOCK = 32
INTEGER_BITS = {"q4_0": 4, "q8_0": 8}
FLOATS = {"f16": torch.float16, "bf16": torch.bfloat16, "f32": torch.float32}


def choose_type(checkpoint: Checkpoint, asked: str | None) -> str:
    """The type of the linear layers' weights: what is asked for, else the integers if they go over, else f16.

    Raises:
        UserError: integers are asked for that the checkpoint's are not.
    """
    widths = sorted(set(input_widths(checkpoint.graph, checkpoint.config).values()))
    fitting = _fitting(checkpoint.recipe.spec.weights, widths)
    if asked is None:
        return fitting[0] if fitting else "f16"
    if asked in INTEGER_BITS and asked not in fitting:
        spec = checkpoint.recipe.spec.weights
        have = "left alone" if not spec.enabled else f"in {spec.bits} bits"
        have += "" if spec.symmetric else ", asymmetric"
        have += "" if spec.group is None else f", in groups of {spec.group}"
        instead = f", or quantize with --preset deploy --spec w{INTEGER_BITS[asked]}g{BLOCK}a16kv16"
        instead = "" if any(width % BLOCK for width in widths) else instead
        raise UserError(
            f"{asked} holds symmetric integers of up to {INTEGER_BITS[asked]} bits, whose scale is that of {BLOCK} "
            f"channels or a multiple; the weights of {checkpoint.path} are {have}, for layers that read "
            f"{', '.join(map(str, widths))} channels. Take --type {' or '.join((*fitting, *FLOATS))}{instead}."
        )
    return asked


def _fitting(spec: TensorSpec, widths: list[int]) -> list[str]:
    """The types whose integers can be those of layers that read so many channels, the smallest first."""
    sizes = widths if spec.group is None else [spec.group]
    if not spec.enabled or not spec.symmetric or any(size % BLOCK for size in sizes):
        return []
    return [name for name, bits in INTEGER_BITS.items() if spec.bits <= bits]


def packed(name: str, codes: Int[Tensor, "out in"], scales: Float[Tensor, "out groups"]) -> Tensor:
    """Blocks of Q4_0 or Q8_0, uint8 (out, bytes).

    Args:
        name: of the type.
        codes: integers around 0.

    Raises:
        UserError: float16 does not have a scale.
    """
    blocks = codes.view(len(codes), -1, BLOCK)
    steps = scales.half()
    if not torch.equal(steps.float(), scales):
        lost = scales[steps.float() != scales]
        raise UserError(
            f"the scales of {name} are float16, which has no {float(lost[0]):g} ({lost.numel()} of {scales.numel()} "
            "scales of a layer). Take --type bf16 or f32."
        )
    steps = steps.repeat_interleave(blocks.shape[1] // scales.shape[1], dim=1)
    if name == "q4_0":  # the first half of a block in the low nibbles, the second in the high ones
        low, high = (blocks + 8).to(torch.uint8).chunk(2, dim=-1)
        blocks = low | high << 4
    else:
        blocks = blocks.to(torch.int8).view(torch.uint8)
    return torch.cat([steps.unsqueeze(-1).view(torch.uint8), blocks], dim=-1).view(len(codes), -1)


def floats(name: str, weight: Float[Tensor, "..."]) -> Tensor:
    """A tensor in one of `FLOATS`.

    Raises:
        UserError: it overflows.
    """
    narrow = weight.to(FLOATS[name])
    if not narrow.isfinite().all():
        raise UserError(f"{name} ends at {torch.finfo(FLOATS[name]).max:g}, which a weight exceeds. Take --type bf16.")
    return narrow


def as_array(tensor: Tensor) -> "np.ndarray":
    """The same bytes for numpy, which has no bfloat16."""
    contiguous = tensor.contiguous()
    return (contiguous.view(torch.int16) if tensor.dtype == torch.bfloat16 else contiguous).numpy()
