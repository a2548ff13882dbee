"""Weights in safetensors files: headers and names. No tensor is read until it is asked for."""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dfrot.system.errors import SetupError, UserError
from dfrot.system.files import read_json

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
# The dtypes that dfrot reads, as safetensors names them.
_DTYPES = {
    **{"BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I32": torch.int32, "I64": torch.int64},
    **{"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64},
}


class StoredTensor(NamedTuple):
    """A tensor on disk, as the header of its safetensors file describes it."""

    file: Path
    name: str
    shape: torch.Size
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return self.shape.numel() * self.dtype.itemsize

    def read(self) -> Tensor:
        with open_safetensors(self.file) as file:
            return file.get_tensor(self.name)


def stored_tensors(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a directory with one safetensors file or many, by name. No tensor is read.

    Where there are both, transformers reads the one file, whatever the index says.

    Raises:
        UserError: there are no safetensors weights, or a shard is missing, truncated or outside the directory.
    """
    if (path / SINGLE_FILE).is_file():
        return tensors_in(path / SINGLE_FILE)
    if (names := weight_map(path)) is not None:
        present = {file.name for file in path.iterdir()}  # plain names, so no shard lies outside the directory
        if absent := set(names.values()) - present:
            raise UserError(f"{INDEX_FILE} names the shard '{min(absent)}', which is not a file in {path}.")
        found: dict[str, StoredTensor] = {}
        for shard in sorted(set(names.values())):
            held = tensors_in(path / shard)
            if lacking := {name for name, where in names.items() if where == shard} - held.keys():
                raise UserError(f"{INDEX_FILE} says that {shard} holds '{min(lacking)}', which it does not.")
            if twice := held.keys() & found.keys():
                first = found[min(twice)].file.name
                raise UserError(f"{path} has two tensors '{min(twice)}', in {first} and in {shard}.")
            found |= held
        return found
    if pickles := [p.name for p in path.glob("*") if p.suffix in (".bin", ".pt", ".pth", ".pkl", ".ckpt")]:
        raise UserError(
            f"{path} has its weights in pickle files ({pickles[0]}), which can run code when they are read and are "
            "refused. Convert them to safetensors on a machine you can lose, or take a revision that has safetensors."
        )
    raise UserError(f"{path} has no safetensors weights ({SINGLE_FILE} or {INDEX_FILE}).")


def weight_map(path: Path) -> dict[str, str] | None:
    """Which shard has which tensor, as an index says; None without one. Raises UserError if it is no index."""
    if not (path / INDEX_FILE).is_file():
        return None
    found = read_json(path / INDEX_FILE).get("weight_map")
    if not isinstance(found, dict) or not all(isinstance(shard, str) for shard in found.values()):
        raise UserError(f"{path / INDEX_FILE} is not an index of safetensors shards.")
    return found


def dtype_named(dtype: str, tensor: str, path: Path) -> torch.dtype:
    """The dtype that safetensors calls so. Raises UserError for one that dfrot does not read."""
    if dtype not in _DTYPES:
        raise UserError(f"the tensor '{tensor}' in {path} has the dtype {dtype}, which dfrot does not read.")
    return _DTYPES[dtype]


def tensors_in(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one safetensors file. Raises UserError for a dtype that dfrot does not read."""
    found = {}
    with open_safetensors(path) as file:
        for name in file.keys():  # noqa: SIM118 — safe_open is no mapping
            piece = file.get_slice(name)
            shape, dtype = piece.get_shape(), dtype_named(piece.get_dtype(), name, path)
            if max(shape, default=0) >= 2**63:  # possible if another dimension is 0; torch.Size would overflow
                raise UserError(f"the tensor '{name}' in {path} has the shape {tuple(shape)}.")
            found[name] = StoredTensor(path, name, torch.Size(shape), dtype)
    return found


def open_safetensors(path: Path) -> Any:
    """`safetensors.safe_open`, raising UserError for a broken file, SetupError for one that cannot be opened."""
    if not path.is_file():
        raise SetupError(f"{path} is not there, or not any more: has it been moved, or a disk been taken away?")
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{path} is not a complete safetensors file ({error}). It may be truncated: fetch it again."
        ) from error
    except RuntimeError as error:  # files are mapped whole, and the system may not promise so much at a time
        raise SetupError(f"{path} cannot be opened: {error}. A model in shards of some gigabytes can.") from error


# In the files of a `model_type` → here; GPT-NeoX, which has no experts, only calls its head otherwise.
_IN_FILES = {
    "mixtral": {
        ".block_sparse_moe.": ".mlp.",
        ".w1.weight": ".gate_proj.weight",
        ".w2.weight": ".down_proj.weight",
        ".w3.weight": ".up_proj.weight",
    },
    "gpt_neox": {"embed_out.": "lm_head."},
}


def of_module(model_type: str, name: str) -> str:
    """The name that a tensor of a file has here."""
    for theirs, ours in _IN_FILES.get(model_type, {}).items():
        name = name.replace(theirs, ours)
    return name


def in_file(model_type: str, name: str) -> str:
    """The inverse: the name that a tensor of a model has in files."""
    if ".mlp." in name:
        for theirs, ours in _IN_FILES.get(model_type, {}).items():
            name = name.replace(ours, theirs)
    return name
