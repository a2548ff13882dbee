"""compressed-tensors checkpoints, as vLLM runs them; transformers loads them too, if compressed-tensors is installed.

Our integers and scales go over as they are: nothing is rounded again. What vLLM would run wrongly, or otherwise without
a word, is refused here, since it says nothing there.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dfrot.errors import UserError
from dfrot.export.checkpoint import Checkpoint, Layer
from dfrot.export.directory import write_directory
from dfrot.spec import TensorSpec
from dfrot.transform.sites import input_widths

GROUPS = (32, 64, 128)  # of weights, beside one scale for a whole channel
# (bits of weights, of activations) → compressed-tensors' format
FORMATS = {(4, 16): "pack-quantized", (8, 16): "pack-quantized", (8, 8): "int-quantized", (4, 4): "pack-quantized"}


def to_vllm(checkpoint: Checkpoint, out: Path, device: str = "cpu") -> list[str]:
    """Write a checkpoint's integers in compressed-tensors' layout.

    Args:
        device: where vLLM is to run, cpu or cuda; they do not run the same.

    Returns:
        What is otherwise than in dfrot's runtime.

    Raises:
        UserError: vLLM would not compute what the checkpoint says; something is in the way.
        EnvironmentFault: it cannot be written.
    """
    check(checkpoint, device)
    spec = checkpoint.recipe.spec
    layout = FORMATS[spec.weights.bits, spec.activations.bits]
    config = {**checkpoint.record, "quantization_config": _quantization_config(spec.weights, spec.activations, layout)}
    write_directory(checkpoint, out, lambda layer: _weight(layer, spec.weights.bits, layout), config)
    different = checkpoint.lost("vLLM", ("keys",))
    if device == "cpu" and spec.activations.bits == 16 and spec.weights.bits == 4:
        different.append(
            "vLLM on a CPU quantizes activations to 8 bits beside 4-bit weights, unless VLLM_CPU_INT4_W4A8=0 is set."
        )
    if device == "cuda":
        different.append("nothing of this was verified on a GPU.")
    return different


def check(checkpoint: Checkpoint, device: str) -> None:
    """Raise UserError, with what to change, if vLLM would not compute what the checkpoint says."""
    checkpoint.require_folded("vLLM")
    spec = checkpoint.recipe.spec
    weights, activations = spec.weights, spec.activations
    if not weights.quantizes and not activations.quantizes:
        raise UserError("nothing is quantized: --to huggingface writes what vLLM loads as it is.")
    if (weights.bits, activations.bits) not in FORMATS:
        known = ", ".join(f"w{w}a{a}" for w, a in FORMATS)
        raise UserError(f"vLLM has no kernel for w{weights.bits}a{activations.bits}. Quantize with a spec of {known}.")
    if not weights.symmetric:
        raise UserError("weights are asymmetric; vLLM takes symmetric ones. Quantize with --weight-symmetric True.")
    if activations.quantizes:
        _check_activations(weights, activations, device)
    if weights.group is not None and weights.group not in GROUPS:
        sizes = ", ".join(map(str, GROUPS))
        raise UserError(f"weights are in groups of {weights.group}; vLLM takes {sizes}, or none (one scale a channel).")
    per_word = 32 // weights.bits
    for name, width in input_widths(checkpoint.graph, checkpoint.config).items():
        if width % per_word:
            raise UserError(
                f"{name} has {width} inputs; {weights.bits}-bit weights are packed {per_word} to a word, which must "
                "divide them. Quantize with --to huggingface, or weights of 8 bits."
            )


def _check_activations(weights: TensorSpec, activations: TensorSpec, device: str) -> None:
    if not activations.symmetric:
        raise UserError("activations are asymmetric, and vLLM's are symmetric. Quantize with --preset deploy.")
    if activations.clip != 1:
        raise UserError(
            f"activations are clipped at {activations.clip:g} of their range, and vLLM clips nothing. "
            "Quantize with --act-clip 1, as --preset deploy does."
        )
    if activations.bits == 8 and weights.group is not None:
        raise UserError(
            "vLLM multiplies 8-bit activations by weights of one scale a channel. Quantize without a group."
        )
    if activations.bits == 4 and device != "cuda":
        raise UserError(
            "vLLM on a CPU loads 4-bit activations and, without a word, leaves them unquantized. "
            "Give --device cuda for a GPU, or quantize with a spec of w4a16 or w8a8."
        )


def _quantization_config(weights: TensorSpec, activations: TensorSpec, layout: str) -> dict[str, Any]:
    strategy = {"strategy": "channel"} if weights.group is None else {"strategy": "group", "group_size": weights.group}
    of_weights = {"num_bits": weights.bits, "type": "int", "symmetric": True, "dynamic": False, **strategy}
    of_activations = {
        **{"num_bits": activations.bits, "type": "int", "symmetric": True, "dynamic": True, "strategy": "token"}
    }
    group = {
        "targets": ["Linear"],
        "weights": of_weights,
        "input_activations": of_activations if activations.quantizes else None,
        "output_activations": None,
        "format": layout,  # left to itself, compressed-tensors infers one byte a weight for w4a4
    }
    return {
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "format": layout,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
    }


def _weight(layer: Layer, bits: int, layout: str) -> dict[str, Tensor]:
    assert layer.codes is not None, "checked: weights are quantized"
    assert layer.scales is not None, "checked: weights are quantized"
    tensors = {"weight_scale": layer.scales.bfloat16()}  # as they are in the checkpoint
    if layout == "int-quantized":
        tensors["weight"] = layer.codes.to(torch.int8)
    else:
        tensors["weight_packed"] = packed_words(layer.codes, bits)
        tensors["weight_shape"] = torch.tensor(layer.codes.shape)
    return tensors


def packed_words(codes: Tensor, bits: int) -> Tensor:
    """int32 (out, in · bits / 32): codes with an offset of 2^(bits−1), the first in the lowest bits."""
    unsigned = (codes + 2 ** (bits - 1)).to(torch.uint8)
    if bits == 4:
        unsigned = unsigned[:, ::2] | (unsigned[:, 1::2] << 4)
    return unsigned.contiguous().view(torch.int32)  # on little-endian machines, as all that torch runs on
