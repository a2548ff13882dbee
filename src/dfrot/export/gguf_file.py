"""GGUF, the single-file format of llama.cpp and everything built on it.

Symmetric integers go over as they are, so llama.cpp computes with what GPTQ on rotated weights chose. A block of Q4_0
is 32 integers q in 0 … 15 and a float16 scale d, and stands for d (q − 8); one of Q8_0 has q in −128 … 127 and stands
for d q. Any symmetric grid whose groups are multiples of 32 fits. Everything else is written as floats, from which
llama.cpp's own quantizers can start. Tensor names are the gguf package's.
"""

import contextlib
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from dfrot.export.checkpoint import Checkpoint, Layer
from dfrot.export.gguf_vocabulary import add_vocabulary
from dfrot.models.graph import Config, head_dim
from dfrot.system.errors import SetupError, UserError
from dfrot.system.files import atomically
from dfrot.system.progress import track
from dfrot.transform.transforms import input_widths

if TYPE_CHECKING:
    from gguf import GGUFWriter

# `model_type` of config.json → llama.cpp's architecture
ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "phi3": "phi3"}
INTEGER_BITS = {"q4_0": 4, "q8_0": 8}
FLOATS = {"f16": torch.float16, "bf16": torch.bfloat16, "f32": torch.float32}
BLOCK = 32  # integers with one scale
_HEADS = {"self_attn.q_proj": "num_attention_heads", "self_attn.k_proj": "num_key_value_heads"}


def to_gguf(checkpoint: Checkpoint, out: Path, kind: str | None = None) -> list[str]:
    """Write a checkpoint as a GGUF file. Returns and errors are those of `export`.

    Args:
        out: a file that does not exist yet.
        kind: type of the linear layers' weights; None: the integer type that fits the checkpoint's grid, else f16.
    """
    if importlib.util.find_spec("gguf") is None:
        raise SetupError("writing GGUF files needs the package gguf. Install it: pip install 'dfrot[gguf]'")
    from gguf import GGMLQuantizationType, GGUFWriter

    checkpoint.require_table("llama.cpp")
    checkpoint.refuse_rotations("llama.cpp")
    if problem := next(_problems(checkpoint.config), None):
        raise UserError(f"{problem} dfrot export --to huggingface keeps it.")
    kind = choose_type(checkpoint, kind)
    if out.exists():
        raise UserError(f"{out} is there already, and is not touched. Choose another -o file.")
    writer = GGUFWriter(None, ARCHITECTURES[checkpoint.config.model_type])
    _add_hyperparameters(writer, checkpoint, kind)
    rope = _add_rope(writer, checkpoint.config)
    add_vocabulary(writer, checkpoint.path, checkpoint.config.vocab_size)
    # The file begins with the shapes of all tensors. So all are made twice, one at a time: first for their shapes and
    # to refuse, before a file is begun, what cannot be written; then to write them.
    for name, stored, data in _tensors(checkpoint, rope, kind):
        writer.add_tensor_info(name, data.shape, data.dtype, data.nbytes, GGMLQuantizationType[stored.upper()])
    with atomically(out) as temporary, contextlib.closing(writer):
        writer.write_header_to_file(temporary)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for _, _, data in track(_tensors(checkpoint, rope, kind), "exporting", len(writer.tensors[0])):
            writer.write_tensor_data(data)
    return list(_differences(checkpoint, kind))


def _problems(config: Config) -> Iterator[str]:
    """What of a model llama.cpp does not compute. Each rule relies on those before it."""
    model, scaling = config.model_type, config.rope_parameters.get("rope_type", "default")
    if model not in ARCHITECTURES:
        yield f"the architecture '{model}' is not known as GGUF. Known: {', '.join(ARCHITECTURES)}."
    if config.hidden_act != "silu":
        yield f"llama.cpp computes {model} with the activation function silu, and this model has {config.hidden_act}."
    known = ["default", "linear", *{"llama": ["llama3"], "phi3": ["longrope"]}.get(ARCHITECTURES[model], [])]
    if scaling not in known:
        yield f"RoPE is scaled by '{scaling}', which is not known as GGUF for {model}. Known: {', '.join(known)}."


def choose_type(checkpoint: Checkpoint, asked: str | None) -> str:
    """The type of the linear layers' weights: the one asked for, else the smallest that keeps integers, else f16.
    UserError if it cannot hold the checkpoint's integers."""
    spec = checkpoint.runtime.spec.weights
    widths = sorted(set(input_widths(checkpoint.graph, checkpoint.config).values()))
    aligned = not any(width % BLOCK for width in widths)
    # a block must not reach over the end of a group, or of a row
    keeps = (
        spec.enabled
        and spec.integer
        and spec.symmetric
        and (aligned if spec.group is None else spec.group % BLOCK == 0)
    )
    types = [*(name for name, bits in INTEGER_BITS.items() if keeps and spec.bits <= bits), *FLOATS]
    if asked is None or asked in types:
        return asked or types[0]
    bits = INTEGER_BITS[asked]
    grid = f"in {spec.in_words}" if spec.enabled else "not quantized"
    grid += ("" if spec.symmetric else ", asymmetric") + (f", in groups of {spec.group}" if spec.group else "")
    again = f", or quantize with --preset deploy --spec w{bits}g{BLOCK}a16kv16" if aligned else ""
    raise UserError(
        f"{asked} holds symmetric integers of up to {bits} bits, with one scale for {BLOCK} channels or a multiple; "
        f"the weights of {checkpoint.path} are {grid}, for layers that read {', '.join(map(str, widths))} channels. "
        f"Take --type {' or '.join(types)}{again}."
    )


def _differences(checkpoint: Checkpoint, kind: str) -> Iterator[str]:
    activations, window = checkpoint.runtime.spec.activations, getattr(checkpoint.config, "sliding_window", None)
    if kind in INTEGER_BITS:
        here = f"in {activations.in_words}" if activations.enabled else "not quantized"
        yield (
            f"activations are {here} here, and rounded to 8 bits by llama.cpp where it multiplies them by {kind}, "
            "with one scale for 32 channels."
        )
    yield from checkpoint.lost("llama.cpp", *(["keys"] if kind in INTEGER_BITS else ["activations", "keys"]))
    if window is not None:
        yield f"attention is to the last {window} tokens here, and to all of them in llama.cpp."
    if checkpoint.config.rope_parameters.get("rope_type") == "longrope":
        yield "RoPE's long factors are for long texts here; llama.cpp takes them for all if its context (-c) is long."


def _add_hyperparameters(writer: "GGUFWriter", checkpoint: Checkpoint, kind: str) -> None:
    """The metadata but for the vocabulary."""
    from gguf import GGML_QUANT_VERSION, LlamaFileType

    config, recipe = checkpoint.config, checkpoint.recipe
    writer.add_description(f"{recipe.get('method')} {recipe.get('weights')} {checkpoint.runtime.spec}")
    writer.add_quantized_by("dfrot")
    writer.add_file_type(LlamaFileType.ALL_F32 if kind == "f32" else LlamaFileType[f"MOSTLY_{kind.upper()}"])
    writer.add_quantization_version(GGML_QUANT_VERSION)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim(config))
    writer.add_value_length(head_dim(config))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)


def _add_rope(writer: "GGUFWriter", config: Config) -> dict[str, Tensor]:
    """RoPE's metadata. Returns tensors of divisors of its frequencies, where these differ from one to the next."""
    from gguf import RopeScalingType

    rope = config.rope_parameters
    writer.add_rope_dimension_count(int(head_dim(config) * rope.get("partial_rotary_factor", 1.0)))
    writer.add_rope_freq_base(rope["rope_theta"])
    match rope.get("rope_type"):
        case "linear":
            writer.add_rope_scaling_type(RopeScalingType.LINEAR)
            writer.add_rope_scaling_factor(rope["factor"])
        case "llama3":
            scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
            unscaled = rope["rope_theta"] ** (-torch.arange(len(scaled), dtype=torch.float32) / len(scaled))
            return {"rope_freqs.weight": unscaled / scaled}
        case "longrope":
            _, attention = ROPE_INIT_FUNCTIONS["longrope"](config, torch.device("cpu"))
            writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
            writer.add_rope_scaling_attn_factors(attention)
            return {f"rope_factors_{term}.weight": torch.tensor(rope[f"{term}_factor"]) for term in ("long", "short")}
    return {}


def _tensors(checkpoint: Checkpoint, rope: dict[str, Tensor], kind: str) -> Iterator[tuple[str, str, np.ndarray]]:
    """Name, type and contents of every tensor: linear layers in `kind`, the other matrices too if it is a float type,
    else in f16; vectors in f32."""
    from gguf import MODEL_ARCH, get_tensor_name_map

    config = checkpoint.config
    names = get_tensor_name_map(MODEL_ARCH[ARCHITECTURES[config.model_type].upper()], config.num_hidden_layers)

    def weight(_: str, layer: Layer) -> dict[str, Tensor]:
        return {"weight": layer.weight if kind in FLOATS or layer.integers is None else packed(kind, *layer.integers)}

    for index in checkpoint.shards:
        for name, tensor in checkpoint.tensors(index, weight):
            gguf_name = names.get_name(name, try_suffixes=(".weight", ".bias"))
            if gguf_name is None:
                raise UserError(f"llama.cpp has no place for the tensor {name} of {checkpoint.path}.")
            stored = kind
            if tensor.dtype != torch.uint8:
                stored = "f32" if tensor.ndim == 1 else kind if kind in FLOATS else "f16"
                tensor = tensor.to(FLOATS[stored])
                if not tensor.isfinite().all():
                    most = torch.finfo(tensor.dtype).max
                    raise UserError(f"{stored} ends at {most:g}, which a weight exceeds. Take --type bf16.")
                tensor = tensor.view(torch.int16) if stored == "bf16" else tensor  # numpy has no bfloat16
            yield gguf_name, stored, _in_order(config, name, tensor).contiguous().numpy()
        if index is None:
            for name, tensor in rope.items():
                yield name, "f32", tensor.float().numpy()


def _in_order(config: Config, name: str, tensor: Tensor) -> Tensor:
    """A tensor, its rows in the order of llama.cpp. For "llama", RoPE rotates neighbouring channels of a head there, in
    transformers one half against the other; so channels of queries and keys take turns. Others rotate halves too."""
    for linear, heads in _HEADS.items():
        if ARCHITECTURES[config.model_type] == "llama" and f".{linear}." in name:
            return tensor.unflatten(0, (getattr(config, heads), 2, -1)).transpose(1, 2).flatten(0, 2)
    return tensor


def packed(kind: str, codes: Int[Tensor, "out in"], scales: Float[Tensor, "out groups"]) -> Tensor:
    """Blocks of q4_0 or q8_0, uint8 (out, bytes), from integers around 0; UserError if a scale is not a float16."""
    blocks = codes.view(len(codes), -1, BLOCK)
    steps = scales.half()
    if len(lost := scales[steps.float() != scales]):
        raise UserError(
            f"the scales of {kind} are float16, which has no {float(lost[0]):g} ({lost.numel()} of {scales.numel()} "
            "scales of a layer). Take --type bf16 or f32."
        )
    steps = steps.repeat_interleave(blocks.shape[1] // scales.shape[1], dim=1)  # (out, blocks)
    if kind == "q4_0":  # the first half of a block in the low nibbles, the second in the high ones
        low, high = (blocks + 8).to(torch.uint8).chunk(2, dim=-1)
        blocks = low | high << 4
    else:
        blocks = blocks.to(torch.int8).view(torch.uint8)
    return torch.cat([steps.unsqueeze(-1).view(torch.uint8), blocks], dim=-1).view(len(codes), -1)
