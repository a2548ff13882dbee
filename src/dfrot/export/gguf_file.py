"""GGUF, the file that llama.cpp and all that is built on it run: one rotated, quantized model in one file.

The integers of a symmetric checkpoint go over as they are (gguf_types.py), so what llama.cpp computes with is what
dfrot chose: GPTQ on rotated weights, in a type that the fastest of its kernels are for. Anything else is written as
floats, which llama.cpp's own quantizers can start from. Names are the gguf package's. What it takes beyond names:

* llama.cpp's "llama" rotates neighbouring channels of a head where transformers rotates its two halves, so the rows of
  q_proj and k_proj change places: weights, codes, scales and biases alike. The other architectures rotate halves.
* Llama 3 lengthens some of RoPE's wavelengths; by how much is a tensor, `rope_freqs`, one factor a frequency.

All tensors are made twice: once for their shapes, which stand before the first of them, and to see that they can be
written; then to write them. So memory holds one, and what cannot be written is refused before a file is begun.
"""

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from dfrot.export.checkpoint import Checkpoint, Layer
from dfrot.export.gguf_types import FLOATS, INTEGER_BITS, as_array, choose_type, floats, packed
from dfrot.export.gguf_vocabulary import add_vocabulary
from dfrot.models.graph import Config, head_dim
from dfrot.system.errors import SetupError, UserError
from dfrot.system.files import atomically
from dfrot.system.progress import track

if TYPE_CHECKING:
    from gguf import GGUFWriter, TensorNameMap

# `model_type` of config.json → llama.cpp's architecture.
ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "phi3": "phi3"}
_QUERIES_AND_KEYS = {"self_attn.q_proj": "num_attention_heads", "self_attn.k_proj": "num_key_value_heads"}


def to_gguf(checkpoint: Checkpoint, out: Path, kind: str | None = None) -> list[str]:
    """Write a checkpoint as a GGUF file.

    Args:
        out: the file; it must not be there.
        kind: type of the linear layers' weights; None for the checkpoint's integers if GGUF has them, else f16.

    Returns:
        What is otherwise than in dfrot's runtime.

    Raises:
        UserError: llama.cpp would run it wrongly; the type does not hold the weights; something is in the way.
        SetupError: the package gguf is missing; the file cannot be written.
    """
    if importlib.util.find_spec("gguf") is None:
        raise SetupError("writing GGUF files needs the package gguf. Install it: pip install 'dfrot[gguf]'")
    from gguf import MODEL_ARCH, GGMLQuantizationType, GGUFWriter, get_tensor_name_map

    checkpoint.require_folded("llama.cpp")
    _require_known(checkpoint.config)
    kind = choose_type(checkpoint, kind)
    if out.exists():
        raise UserError(f"{out} is there already, and is not touched. Choose another -o file.")
    architecture = ARCHITECTURES[checkpoint.config.model_type]
    names = get_tensor_name_map(MODEL_ARCH[architecture.upper()], checkpoint.config.num_hidden_layers)
    writer = GGUFWriter(None, architecture)
    _add_hyperparameters(writer, checkpoint, kind)
    add_vocabulary(writer, checkpoint.path, checkpoint.tokenizer(), checkpoint.config.vocab_size)
    count = 0
    for name, stored, tensor in _tensors(checkpoint, names, kind):
        data = as_array(tensor)
        writer.add_tensor_info(name, data.shape, data.dtype, data.nbytes, GGMLQuantizationType[stored.upper()])
        count += 1
    with atomically(out) as temporary:
        try:
            writer.write_header_to_file(temporary)
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for _, _, tensor in track(_tensors(checkpoint, names, kind), "exporting", count):
                writer.write_tensor_data(as_array(tensor))
        finally:
            writer.close()
    return list(_differences(checkpoint, kind))


def _require_known(config: Config) -> None:
    """Raise UserError if llama.cpp has no such model."""
    if config.model_type not in ARCHITECTURES:
        raise UserError(
            f"the architecture '{config.model_type}' is not known as GGUF. Known: {', '.join(ARCHITECTURES)}. "
            "dfrot export --to huggingface writes any."
        )
    if config.hidden_act != "silu":
        raise UserError(
            f"llama.cpp computes {config.model_type} with the activation function silu, and this model has "
            f"{config.hidden_act}. dfrot export --to huggingface keeps it."
        )


def _differences(checkpoint: Checkpoint, kind: str) -> Iterator[str]:
    if kind in INTEGER_BITS:
        spec = checkpoint.recipe.spec.activations
        here = f"in {spec.bits} bits" if spec.enabled else "not quantized"
        yield (
            f"activations are {here} here, and rounded to 8 bits by llama.cpp where it multiplies them by {kind}, "
            "one scale for 32 channels."
        )
        yield from checkpoint.lost("llama.cpp", ("keys",))
    else:
        yield from checkpoint.lost("llama.cpp", ("activations", "keys"))
    if (window := getattr(checkpoint.config, "sliding_window", None)) is not None:
        yield f"attention is to the last {window} tokens here, and to all of them by llama.cpp."
    if checkpoint.config.rope_parameters.get("rope_type") == "longrope":
        yield "RoPE's long factors are for long texts here, and for all texts by llama.cpp if its context (-c) is long."


def _add_hyperparameters(writer: "GGUFWriter", checkpoint: Checkpoint, kind: str) -> None:
    """The metadata but for the vocabulary.

    Raises:
        UserError: RoPE is scaled in a way that llama.cpp does not know for this architecture.
    """
    from gguf import GGML_QUANT_VERSION, LlamaFileType, RopeScalingType

    config, rope = checkpoint.config, checkpoint.config.rope_parameters
    writer.add_description(f"{checkpoint.recipe.method_name} {checkpoint.recipe.weights_name} {checkpoint.recipe.spec}")
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
    writer.add_rope_dimension_count(2 * len(_inverse_frequencies(config)))
    writer.add_rope_freq_base(rope["rope_theta"])
    scaling = rope.get("rope_type", "default")
    known = {"llama": "llama3", "phi3": "longrope"}.get(writer.arch)
    if scaling not in ("default", "linear", known):
        raise UserError(
            f"RoPE is scaled by '{scaling}', which is not known as GGUF for {config.model_type}. Known: default, "
            f"linear{f', {known}' if known else ''}. dfrot export --to huggingface keeps it."
        )
    if scaling == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    elif scaling == "longrope":
        _, attention = ROPE_INIT_FUNCTIONS["longrope"](config, torch.device("cpu"))
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        writer.add_rope_scaling_attn_factors(attention)


def _inverse_frequencies(config: Config) -> Tensor:
    """Of RoPE without scaling."""
    rope = config.rope_parameters
    size = int(head_dim(config) * rope.get("partial_rotary_factor", 1.0))
    return rope["rope_theta"] ** (-torch.arange(0, size, 2, dtype=torch.float32) / size)


def _rope_tensors(config: Config) -> dict[str, Tensor]:
    """What every frequency is divided by, where it is not the same for all."""
    rope = config.rope_parameters
    if rope.get("rope_type") == "llama3":
        scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
        return {"rope_freqs.weight": _inverse_frequencies(config) / scaled}
    if rope.get("rope_type") == "longrope":
        return {f"rope_factors_{which}.weight": torch.tensor(rope[f"{which}_factor"]) for which in ("long", "short")}
    return {}


def _tensors(checkpoint: Checkpoint, names: "TensorNameMap", kind: str) -> Iterator[tuple[str, str, Tensor]]:
    """Name, type and contents of every tensor: what is no matrix in float32, matrices that are no linear layer's in
    16 bits or as `kind` says."""
    wide = kind if kind in FLOATS else "f16"

    def named(name: str, stored: str, tensor: Tensor) -> tuple[str, str, Tensor]:
        gguf_name = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if gguf_name is None:
            raise UserError(f"llama.cpp has no place for the tensor {name} of {checkpoint.path}.")
        return gguf_name, stored, tensor

    for name, tensor in checkpoint.ends().items():
        stored = "f32" if tensor.ndim == 1 else wide
        yield named(name, stored, floats(stored, tensor))
    for name, tensor in _rope_tensors(checkpoint.config).items():
        yield name, "f32", tensor.float()
    for index in range(checkpoint.config.num_hidden_layers):
        prefix = f"{checkpoint.graph.blocks}.{index}."
        for name, tensor in checkpoint.others(index).items():
            yield named(prefix + name, "f32", floats("f32", tensor))
        for linear in checkpoint.graph.linears:
            layer = checkpoint.layer(index, linear)
            rows = _row_order(checkpoint.config, linear, len(layer.weight))
            yield named(f"{prefix}{linear}.weight", kind, _weight(layer, kind, rows))
            if layer.bias is not None:
                yield named(f"{prefix}{linear}.bias", "f32", floats("f32", layer.bias[rows]))


def _weight(layer: Layer, kind: str, rows: Tensor) -> Tensor:
    if kind in INTEGER_BITS:
        assert layer.codes is not None, "choose_type has seen to it"
        assert layer.scales is not None, "choose_type has seen to it"
        return packed(kind, layer.codes[rows], layer.scales[rows])
    return floats(kind, layer.weight[rows])


def _row_order(config: Config, linear: str, count: int) -> Tensor:
    """Which row comes where: within every head of q_proj and k_proj the two halves in turns, for "llama" only."""
    rows = torch.arange(count)
    if ARCHITECTURES[config.model_type] != "llama" or linear not in _QUERIES_AND_KEYS:
        return rows
    heads = getattr(config, _QUERIES_AND_KEYS[linear])
    return rows.view(heads, 2, -1).transpose(1, 2).flatten()
