"""Checkpoints for vLLM, in compressed-tensors' format.

Integers and scales are copied; nothing is rounded again. (A float of 4 bits is written as its code, its scale as the
float of 8 bits that it is.) Online rotations become a `transform_config`. Where vLLM would silently compute something
else, `_problems` refuses, or `_differences` warns; some of it works with dfrot's plugin (vllm_plugin.py). transformers
loads the result too, with compressed-tensors, if no rotation is online.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dfrot.export.checkpoint import Checkpoint, Layer, write_directory
from dfrot.linalg.rotation import Rotation
from dfrot.quant.grids import tensor_factor
from dfrot.quant.packing import pack
from dfrot.quant.spec import TensorSpec
from dfrot.system.errors import UserError
from dfrot.transform.transforms import KEYS, VALUES, input_widths

# (grid of weights, of activations) → compressed-tensors' format
FORMATS = {
    ("16", "16"): "dense",
    ("4", "16"): "pack-quantized",
    ("8", "16"): "pack-quantized",
    ("8", "8"): "int-quantized",
    ("4", "8"): "pack-quantized",
    ("4", "4"): "pack-quantized",  # left to itself, compressed-tensors infers one byte a weight
    **{("nvfp4", activations): "nvfp4-pack-quantized" for activations in ("nvfp4", "16")},
    **{("mxfp4", activations): "mxfp4-pack-quantized" for activations in ("mxfp4", "16")},
}
GROUPS = (32, 64, 128)  # sizes that vLLM's kernels take, beside one scale per channel
CPU_TILE = 32  # inputs and outputs of a tile in vLLM's 4-bit kernel for CPUs
PLUGIN_METHOD = "dfrot-compressed-tensors"  # a `quant_method` that vLLM knows only if the plugin is installed
_ROWS = 1024  # of a rotation's matrix, made at a time in float64


def to_vllm(
    checkpoint: Checkpoint, out: Path, device: str = "cpu", plugin: bool = False, tensor_parallel: int = 1
) -> list[str]:
    """Write a checkpoint's integers in compressed-tensors' format. Returns and errors are those of `export`.

    Args:
        device: where vLLM will run, cpu or cuda; their kernels differ.
        plugin: dfrot will be installed beside vLLM. Without it vLLM then refuses the model.
        tensor_parallel: GPUs that share every layer.
    """
    checkpoint.require_table("vLLM")
    if problem := next(_problems(checkpoint, device, plugin, tensor_parallel), None):
        raise UserError(problem)
    weights, online = checkpoint.runtime.spec.weights, checkpoint.runtime.online
    matrices = {name: _matrix(rotation, checkpoint.config.dtype) for name, rotation in online.items()}

    def tensors(name: str, layer: Layer) -> dict[str, Tensor]:
        # vLLM wants the matrix in every block, though it is the same in all
        parts = {f"{name.replace('.', '_')}_input.weight": matrices[name]} if name in matrices else {}
        if layer.integers is None:
            return parts | {"weight": layer.weight}
        codes, scales = layer.integers
        if not weights.integer:
            return {"weight_packed": pack(weights.grid.encode(codes), 4), **_float_scales(checkpoint, name, layer)}
        parts["weight_scale"] = scales.bfloat16()  # exact: the checkpoint stores bfloat16
        if config["format"] == "int-quantized":
            return parts | {"weight": codes.to(torch.int8)}
        return parts | {"weight_packed": packed_words(codes, weights.bits), "weight_shape": torch.tensor(codes.shape)}

    config = _quantization_config(checkpoint, plugin)
    write_directory(checkpoint, out, tensors, checkpoint.config.to_dict() | {"quantization_config": config})
    matrix_bytes = checkpoint.config.num_hidden_layers * sum(matrix.nbytes for matrix in matrices.values())
    return list(_differences(checkpoint, device, plugin, tensor_parallel, matrix_bytes))


def _differences(checkpoint: Checkpoint, device: str, plugin: bool, gpus: int, matrix_bytes: int) -> Iterator[str]:
    weights, activations = checkpoint.runtime.spec.weights, checkpoint.runtime.spec.activations
    yield from checkpoint.lost("vLLM", "keys")
    if online := ", ".join(checkpoint.runtime.online):
        yield (
            f"the input of {online} is rotated by a dense matrix, {matrix_bytes / 1e6:.0f} MB in all; "
            "transformers leaves the rotation out and computes noise."
        )
    if not weights.integer:
        if activations.enabled:
            yield (
                f"only GPUs that multiply {weights.in_words} (Blackwell, and for MXFP4 MI350) compute with such "
                "activations; on others vLLM leaves them in 16 bits, and its log names the kernel that it took."
            )
    elif plugin:
        yield "vLLM loads this only with dfrot's plugin: pip install 'dfrot[vllm]' in the environment of vLLM."
    elif device == "cpu" and weights.bits == 4 and activations.bits == 8:
        yield (
            "vLLM on a CPU rounds activations to 8 bits of its own grid, which is asymmetric, where the processor has "
            "AMX and the model runs in bfloat16; elsewhere it silently leaves them in 16 bits. --plugin has this grid."
        )
    elif device == "cpu" and weights.bits == 4:
        yield "vLLM on a CPU rounds activations to 8 bits beside 4-bit weights, unless VLLM_CPU_INT4_W4A8=0 is set."
    elif activations.enabled and weights.bits == 4:
        yield (
            f"only vLLM's kernel Humming quantizes activations to {activations.bits} bits beside 4-bit weights, and "
            "vLLM may silently take another. Start it "
            "with --linear-backend humming and read in its log which it took, or export with --plugin, which insists."
        )
    if gpus > 1 and activations.enabled and activations.integer:
        yield "each GPU chooses the scales for its own part of the inputs of o_proj and down_proj."
    if device == "cuda":
        yield "none of this has been verified on a GPU."


def _problems(checkpoint: Checkpoint, device: str, plugin: bool, gpus: int) -> Iterator[str]:
    """Why vLLM would not compute what the checkpoint says, and what to change. Each rule relies on those before it."""
    weights, activations = checkpoint.runtime.spec.weights, checkpoint.runtime.spec.activations
    online = list(checkpoint.runtime.online)
    rotated = f"the input of {', '.join(online)} is rotated while the model runs"
    plain_cpu = device == "cpu" and not plugin
    if device not in ("cpu", "cuda"):
        yield f"vLLM runs on cpu or cuda, got '{device}'."
    if gpus < 1:
        yield f"--tensor-parallel is at least 1 GPU, got {gpus}."
    checkpoint.refuse_rotations("vLLM", alike=False)
    if not (weights.enabled or activations.enabled or online):
        yield "nothing is quantized: --to huggingface writes plain weights, which vLLM loads."
    if (str(weights), str(activations)) not in FORMATS:
        known = ", ".join(f"w{w}a{a}" for w, a in FORMATS if w != "16")
        yield f"vLLM has no kernel for w{weights}a{activations}. Quantize with a spec of {known}."
    if not weights.integer and (device == "cpu" or plugin):
        alone = "The plugin knows integers only: leave it out. " if plugin else ""
        yield f"vLLM has no kernel for {weights.in_words} on a CPU. {alone}Give --device cuda, or take w4a16/w8a8."
    if not weights.integer and online:
        yield f"{rotated}, which is not exported with {weights.in_words}. Quantize with --fold-only."
    if weights.enabled and not weights.symmetric:
        yield "weights are asymmetric, and vLLM's are symmetric. Quantize with --weight-symmetric True."
    if activations.enabled and not activations.symmetric:
        yield "activations are asymmetric, and vLLM's are symmetric. Quantize with --preset deploy."
    of_layers = [clips for site, clips in checkpoint.runtime.clips.items() if site not in (KEYS, VALUES)]
    clip = min(activations.fixed_clip, *(min(clips) for clips in of_layers), 1.0)
    if activations.enabled and clip != 1:
        what_to_do = "--act-clip 1" + (", and with --fold-only or without --tune clips" if of_layers else "")
        yield f"activations are clipped at {clip:g} of the range, and vLLM cannot. Quantize with {what_to_do}."
    if weights.bits == activations.bits == 8 and weights.group is not None:
        yield "vLLM multiplies 8-bit activations by 8-bit weights with one scale per channel. Quantize without a group."
    if activations.bits == 4 and plain_cpu:
        # it loads them, and logs nothing
        yield "vLLM on a CPU silently keeps activations in 16 bits. Give --plugin or --device cuda, or take w4a16/w8a8."
    if online and plain_cpu:
        yield f"{rotated}, which vLLM on a CPU cannot. Give --plugin, or --device cuda, or quantize with --fold-only."
    if online and gpus > 1:
        yield f"{rotated}, which vLLM supports on one GPU only. Quantize with --fold-only to split layers."
    if biased := [name for name in online if f"{checkpoint.graph.blocks}.0.{name}.bias" in checkpoint.stored]:
        without = "Quantize with --tune none, or --fold-only."
        yield f"{rotated}, and {biased[0]} has a bias, which vLLM cannot add then. {without}"
    if not weights.enabled:
        return
    if weights.integer and weights.group not in (None, *GROUPS):
        sizes = ", ".join(map(str, GROUPS))
        yield f"weights are in groups of {weights.group}; vLLM takes {sizes}, or no groups (one scale per channel)."
    if (weights.bits, activations.bits) == (8, 16) and device == "cpu":
        yield "vLLM on a CPU has no kernel for w8a16. Quantize with a spec of w8a8 or w4a16, or give --device cuda."
    heads, channels = checkpoint.config.num_attention_heads, checkpoint.config.intermediate_size
    if heads % gpus or channels % gpus:
        yield f"{gpus} GPUs cannot share {heads} heads and {channels} channels equally. Change --tensor-parallel."
    # 4-bit weights are packed 8 to a word, 8-bit ones 4, but 8-bit ones beside 8-bit activations are single bytes
    multiple = 1 if weights.bits == activations.bits == 8 else CPU_TILE if device == "cpu" else 32 // weights.bits
    for name, width in input_widths(checkpoint.graph, checkpoint.config).items():
        # among GPUs, layers that write the residual stream are split by inputs, those that read it by outputs
        split = gpus > 1 and name in checkpoint.graph.writers
        part = width // gpus if split else width
        inputs = f"{name} has {part} inputs{f' on each of {gpus} GPUs' if split else ''}"
        if weights.group is not None and part % weights.group:
            yield f"{inputs}, which groups of {weights.group} do not divide. Quantize with a smaller group, or none."
        if part % multiple:
            yield f"{inputs}; vLLM takes multiples of {multiple} for w{weights.bits}. Take w8a8, or --to huggingface."


def _quantization_config(checkpoint: Checkpoint, plugin: bool) -> dict[str, Any]:
    weights, activations = checkpoint.runtime.spec.weights, checkpoint.runtime.spec.activations
    layout = FORMATS[str(weights), str(activations)]
    # the factor of NVFP4's activations is in the checkpoint, their scales are not
    dynamic = "local" if activations.format == "nvfp4" else True
    group = {
        "targets": ["Linear"],
        "weights": _described(weights, "channel") | {"dynamic": False},
        "input_activations": _described(activations, "token") | {"dynamic": dynamic} if activations.enabled else None,
        "output_activations": None,
        "format": layout,
    }
    transforms = {}
    for name in checkpoint.runtime.online:
        target = {"targets": [f"re:.*{name.replace('.', '[.]')}$"], "location": "input"}
        # vLLM multiplies by the stored matrix for `random-hadamard`; for `hadamard` it applies its own fast transform
        transforms[name.replace(".", "_")] = {"type": "random-hadamard", "apply": [target]}
    return {
        "quant_method": PLUGIN_METHOD if plugin else "compressed-tensors",
        "quantization_status": "compressed",
        "format": layout,
        "config_groups": {"group_0": group} if weights.enabled else {},
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
    } | ({"transform_config": {"config_groups": transforms}} if transforms else {})


def _described(grid: TensorSpec, whole_rows: str) -> dict[str, Any]:
    """A grid in compressed-tensors' words; `whole_rows` is its word for one scale a row."""
    kind = {"num_bits": grid.bits, "symmetric": True, "type": "int" if grid.integer else "float"}
    if grid.group is None:
        return kind | {"strategy": whole_rows}
    kind |= {"strategy": "tensor_group" if grid.format == "nvfp4" else "group", "group_size": grid.group}
    scales = {"nvfp4": "torch.float8_e4m3fn", "mxfp4": "torch.uint8"}
    return kind if grid.integer else kind | {"scale_dtype": scales[grid.format], "zp_dtype": scales[grid.format]}


def _float_scales(checkpoint: Checkpoint, name: str, layer: Layer) -> dict[str, Tensor]:
    """The scales of a layer in 4-bit floats, E4M3 with a factor or E8M0, and the factor of its input's scales.

    vLLM fuses the layers of a stage and takes the largest of their factors for all, so they get the same one.
    """
    graph, runtime = checkpoint.graph, checkpoint.runtime
    assert layer.integers is not None, "the weight is quantized"
    scales = 2 * layer.integers[1]
    if runtime.spec.weights.format == "mxfp4":
        return {"weight_scale": (torch.frexp(scales).exponent - 1 + 127).to(torch.uint8)}
    (stage,) = (stage for stage in graph.rounded_together if name in stage)
    fused = [checkpoint.tensor(f"{graph.blocks}.{layer.block}.{each}.scales").max() for each in stage]
    factor = tensor_factor(12 * torch.stack(fused).max().float())
    stored = {"weight_scale": (scales * factor).to(torch.float8_e4m3fn), "weight_global_scale": factor[None]}
    if (largest := runtime.activations(graph.norm_before(name) or name, layer.block).largest) is None:
        return stored  # activations are left alone
    return stored | {"input_global_scale": tensor_factor(torch.tensor([largest]))}


def _matrix(rotation: Rotation, dtype: torch.dtype) -> Tensor:
    """Q √n (n, n): vLLM divides by √n once it is loaded. For a Hadamard matrix that is ±1, stored as int8."""
    size, pieces = rotation.size, []
    for start in range(0, size, _ROWS):
        units = torch.eye(min(_ROWS, size - start), size, dtype=torch.float64).roll(start, dims=1)
        rows = rotation.apply(units) * size**0.5
        nearest = rows.round()
        whole = nearest.abs().max() < 128 and torch.allclose(rows, nearest, rtol=0, atol=1e-9)
        pieces.append(nearest.to(torch.int8) if whole else rows.to(dtype))
    return torch.cat(pieces)


def packed_words(codes: Tensor, bits: int) -> Tensor:
    """int32 (out, in · bits / 32): codes with an offset of 2^(bits−1), the first in the lowest bits."""
    return pack((codes + 2 ** (bits - 1)).to(torch.uint8), bits).view(torch.int32)  # torch is little-endian everywhere
