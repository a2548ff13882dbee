"""The header of a GGUF file, read without trusting it, and one tensor of it."""

import math
import mmap
import os
import struct
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dfrot.system.errors import UserError

_PIECE = 1 << 22  # entries that are unpacked at a time


class PackedTensor(NamedTuple):
    """Where a tensor lies in a GGUF file, and how."""

    shape: torch.Size
    kind: int  # GGUF's number of the type
    offset: int  # in bytes, from the beginning of the file


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
