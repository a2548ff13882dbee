"""compressed-tensors checkpoints, as vLLM runs them; transformers too, with compressed-tensors, if nothing is online.

Our integers and scales go over as they are: nothing is rounded again. What is rotated while the model runs becomes a
`transform_config`. What vLLM would run wrongly, or otherwise without a word, is refused here, since it says nothing
there; some of it dfrot's plugin (vllm_plugin.py) makes vLLM compute.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dfrot.export.checkpoint import Checkpoint, Layer
from dfrot.export.directory import write_directory
from dfrot.linalg.rotation import Rotation
from dfrot.quant.spec import TensorSpec
from dfrot.system.errors import UserError
from dfrot.transform.transforms import input_widths

GROUPS = (32, 64, 128)  # of weights, beside one scale for a whole channel
# (bits of weights, of activations) → compressed-tensors' format
FORMATS = {
    (16, 16): "dense",
    (4, 16): "pack-quantized",
    (8, 16): "pack-quantized",
    (8, 8): "int-quantized",
    (4, 4): "pack-quantized",  # left to itself, compressed-tensors infers one byte a weight
}
PLUGIN_METHOD = "dfrot-compressed-tensors"  # what vLLM knows only if the plugin is there
_ROWS = 1024  # of a matrix that are made at a time
CPU_TILE = 32  # its 4-bit kernel computes in tiles of as many inputs and outputs


def to_vllm(
    checkpoint: Checkpoint, out: Path, device: str = "cpu", plugin: bool = False, tensor_parallel: int = 1
) -> list[str]:
    """Write a checkpoint's integers in compressed-tensors' layout.

    Args:
        device: where vLLM is to run, cpu or cuda; they do not run the same.
        plugin: whether dfrot is to be installed beside vLLM. Without it vLLM then refuses the model.
        tensor_parallel: GPUs that every layer is split among.

    Returns:
        What is otherwise than in dfrot's runtime.

    Raises:
        UserError: vLLM would not compute what the checkpoint says; something is in the way.
        SetupError: it cannot be written.
    """
    check(checkpoint, device, plugin, tensor_parallel)
    spec, rotations = checkpoint.recipe.spec, checkpoint.plan.online
    layout = FORMATS[spec.weights.bits, spec.activations.bits]
    matrices = {name: _matrix(rotation, checkpoint.dtype) for name, rotation in rotations.items()}

    def tensors(name: str, layer: Layer) -> dict[str, Tensor]:
        kept = _weight(layer, spec.weights.bits, layout)
        return kept | ({f"{_scheme(name)}_input.weight": matrices[name]} if name in matrices else {})

    record = _quantization_config(checkpoint, layout)
    if plugin:
        record["quant_method"] = PLUGIN_METHOD
    write_directory(checkpoint, out, tensors, {**checkpoint.record, "quantization_config": record})
    return _different(checkpoint, device, plugin, tensor_parallel, sum(matrix.nbytes for matrix in matrices.values()))


def _different(checkpoint: Checkpoint, device: str, plugin: bool, tensor_parallel: int, matrices: int) -> list[str]:
    """Sentences for the user of an export.

    Args:
        matrices: bytes of the online rotations of one block.
    """
    weights, activations = checkpoint.recipe.spec.weights, checkpoint.recipe.spec.activations
    different = checkpoint.lost("vLLM", ("keys",))
    if matrices:
        size = checkpoint.config.num_hidden_layers * matrices / 1e6
        different.append(
            f"the input of {', '.join(checkpoint.plan.online)} is rotated by a dense matrix, {size:.0f} MB in all; "
            "transformers leaves the rotation out and computes noise."
        )
    if plugin:
        different.append(
            "vLLM loads this only with dfrot's plugin: pip install 'dfrot[vllm]' in the environment of vLLM."
        )
    elif device == "cpu" and weights.bits == 4:
        different.append(
            "vLLM on a CPU quantizes activations to 8 bits beside 4-bit weights, unless VLLM_CPU_INT4_W4A8=0 is set."
        )
    elif activations.bits == 4:
        different.append(
            "vLLM quantizes activations to 4 bits in its kernel Humming alone and takes another without a word: start "
            "it with --linear-backend humming and read which its log names, or give --plugin, which insists."
        )
    if tensor_parallel > 1 and activations.enabled:
        different.append("every GPU has scales of its own for its part of what o_proj and down_proj read.")
    if device == "cuda":
        different.append("nothing of this was verified on a GPU.")
    return different


def check(checkpoint: Checkpoint, device: str, plugin: bool, tensor_parallel: int) -> None:
    """Raise UserError, with what to change, if vLLM would not compute what the checkpoint says."""
    if device not in ("cpu", "cuda"):
        raise UserError(f"vLLM runs on cpu or cuda, got '{device}'.")
    if tensor_parallel < 1:
        raise UserError(f"a layer is split among at least 1 GPU, got {tensor_parallel}.")
    checkpoint.require_shared("vLLM")
    spec, online = checkpoint.recipe.spec, bool(checkpoint.plan.online)
    weights, activations = spec.weights, spec.activations
    if not weights.enabled and not activations.enabled and not online:
        raise UserError("nothing is quantized: --to huggingface writes what vLLM loads as it is.")
    if (weights.bits, activations.bits) not in FORMATS:
        known = ", ".join(f"w{w}a{a}" for w, a in FORMATS if w != 16)
        raise UserError(f"vLLM has no kernel for w{weights.bits}a{activations.bits}. Quantize with a spec of {known}.")
    if not weights.symmetric and weights.enabled:
        raise UserError("weights are asymmetric; vLLM takes symmetric ones. Quantize with --weight-symmetric True.")
    if activations.enabled:
        _check_activations(weights, activations, device, plugin)
    if online:
        _check_rotations(checkpoint, device, plugin, tensor_parallel)
    if weights.enabled:
        _check_widths(checkpoint, device, tensor_parallel)


def _check_activations(weights: TensorSpec, activations: TensorSpec, device: str, plugin: bool) -> None:
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
    if activations.bits == 4 and device == "cpu" and not plugin:
        raise UserError(
            "vLLM on a CPU loads 4-bit activations and, without a word, leaves them unquantized. "
            "Give --plugin, or --device cuda for a GPU, or quantize with a spec of w4a16 or w8a8."
        )


def _check_rotations(checkpoint: Checkpoint, device: str, plugin: bool, tensor_parallel: int) -> None:
    online = checkpoint.plan.online
    inputs = f"the input of {', '.join(online)} is rotated while the model runs"
    if device == "cpu" and not plugin:
        raise UserError(
            f"{inputs}, which vLLM on a CPU cannot. Give --plugin, or --device cuda for a GPU, or quantize with "
            "--online False, which folds everything."
        )
    if tensor_parallel > 1:
        raise UserError(f"{inputs}, which vLLM does on one GPU only. Quantize with --online False to split layers.")
    biases = [name for name in online if f"{checkpoint.graph.blocks}.0.{name}.bias" in checkpoint.files]
    if biases:
        raise UserError(
            f"{inputs}, and {biases[0]} has a bias, which vLLM cannot add then. Quantize with --online False."
        )


def _check_widths(checkpoint: Checkpoint, device: str, parts: int) -> None:
    weights, config, graph = checkpoint.recipe.spec.weights, checkpoint.config, checkpoint.graph
    if weights.group is not None and weights.group not in GROUPS:
        sizes = ", ".join(map(str, GROUPS))
        raise UserError(f"weights are in groups of {weights.group}; vLLM takes {sizes}, or none (one scale a channel).")
    if weights.bits == 8 and device == "cpu" and not checkpoint.recipe.spec.activations.enabled:
        raise UserError(
            "vLLM on a CPU has no kernel for 8-bit weights beside 16-bit activations. Quantize with a spec of w8a8 or "
            "w4a16, or give --device cuda for a GPU."
        )
    if config.num_attention_heads % parts or config.intermediate_size % parts:
        raise UserError(
            f"{parts} GPUs cannot share {config.num_attention_heads} heads and {config.intermediate_size} "
            "channels equally. Choose another --tensor-parallel."
        )
    per_word = 32 // weights.bits
    for name, width in input_widths(graph, config).items():
        part = width // parts if name in graph.writers else width
        on = f" on each of {parts} GPUs" if part != width else ""
        if weights.group is not None and part % weights.group:
            raise UserError(
                f"{name} has {part} inputs{on}, which groups of {weights.group} do not divide. Quantize with a smaller "
                "group, or none."
            )
        if part % per_word and checkpoint.recipe.spec.activations.bits != 8:  # whose weights are bytes
            raise UserError(
                f"{name} has {part} inputs{on}; {weights.bits}-bit weights are packed {per_word} to a word, which must "
                "divide them. Quantize with a spec of w8a8, or use --to huggingface."
            )
        if device == "cpu" and weights.bits == 4 and part % CPU_TILE:
            raise UserError(
                f"{name} has {part} inputs; vLLM's 4-bit kernel for CPUs takes multiples of {CPU_TILE}. "
                "Quantize with a spec of w8a8, or use --to huggingface."
            )


def _quantization_config(checkpoint: Checkpoint, layout: str) -> dict[str, Any]:
    weights, activations = checkpoint.recipe.spec.weights, checkpoint.recipe.spec.activations
    record: dict[str, Any] = {
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "format": layout,
        "config_groups": {},
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
    }
    if weights.enabled:
        record["config_groups"]["group_0"] = _group(weights, activations, layout)
    if checkpoint.plan.online:
        record["transform_config"] = {
            "config_groups": {_scheme(name): _rotation(name) for name in checkpoint.plan.online}
        }
    return record


def _group(weights: TensorSpec, activations: TensorSpec, layout: str) -> dict[str, Any]:
    strategy = {"strategy": "channel"} if weights.group is None else {"strategy": "group", "group_size": weights.group}
    integers = {"type": "int", "symmetric": True}
    of_weights = {**integers, "num_bits": weights.bits, "dynamic": False, **strategy}
    of_activations = {**integers, "num_bits": activations.bits, "dynamic": True, "strategy": "token"}
    return {
        "targets": ["Linear"],
        "weights": of_weights,
        "input_activations": of_activations if activations.enabled else None,
        "output_activations": None,
        "format": layout,
    }


def _matrix(rotation: Rotation, dtype: torch.dtype) -> Tensor:
    """Q √n (n, n), which vLLM divides by √n when it has loaded it: of a Hadamard matrix ±1, in a byte each."""
    size, pieces = rotation.size, []
    for start in range(0, size, _ROWS):
        units = torch.zeros(min(_ROWS, size - start), size, dtype=torch.float64)
        units.diagonal(start).fill_(1)
        rows = rotation.apply(units) * size**0.5
        nearest = rows.round()
        whole = nearest.abs().max() < 128 and torch.allclose(rows, nearest, rtol=0, atol=1e-9)
        pieces.append(nearest.to(torch.int8) if whole else rows.to(dtype))
    return torch.cat(pieces)


def _scheme(linear: str) -> str:
    """What the rotation of a layer's input is called there."""
    return linear.replace(".", "_")


def _rotation(linear: str) -> dict[str, Any]:
    """The transform that multiplies a layer's input by its matrix; vLLM applies the type `hadamard` its own way."""
    target = f"re:.*{linear.replace('.', '[.]')}$"
    return {"type": "random-hadamard", "apply": [{"targets": [target], "location": "input"}]}


def _weight(layer: Layer, bits: int, layout: str) -> dict[str, Tensor]:
    if layout == "dense":
        return {"weight": layer.weight}
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
