"""What `dfrot inspect` saw.

It was written by some process, and its texts come from models and files of anyone: what is read is checked here, and
escaped where it is shown.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float
from safetensors import SafetensorError
from safetensors.numpy import load_file

from dfrot.evaluation.record import is_number
from dfrot.system.errors import UserError
from dfrot.system.files import read_json

INSPECTION_FILE = "inspect.json"
TENSORS_FILE = "inspect.safetensors"
INSPECTION_SCHEMA = 1


@dataclass(frozen=True)
class Inspection:
    """What rotations do to the norm outputs of one model on one sequence.

    Attributes:
        model: how the user called it.
        conditions: text, tokens, spec, clip, and what `results.conditions` gives.
        norms: "0.input_layernorm", …: what the rest counts by.
        tokens: the sequence, as texts.
        rotations: their names, in the order in which they are shown.
        massive: block, norm, position, token, channel and peak_over_rms of every massive token.
        channels: block, norm, median and largest of each norm's output: the channels' maxima over the tokens.
        kurtosis: rotation → excess kurtosis of every norm.
        error: rotation → mean relative error of ordinary and of massive tokens.
        damage: rotation → KL divergence in nats with one block's norm outputs quantized.
        weights: block, layer and error (rotation → relative error) of every linear layer.
        kv: block, and the errors of keys and values, plain and rotated.
        surface_norm: where `surfaces` was taken.
        errors: rotation → relative error of every token at every norm.
        is_massive: which tokens are massive, at every norm.
        surfaces: rotation → |x R| of the first tokens.
    """

    model: str
    conditions: Mapping[str, Any]
    norms: Sequence[str]
    tokens: Sequence[str]
    rotations: Sequence[str]
    massive: Sequence[Mapping[str, Any]]
    channels: Sequence[Mapping[str, Any]]
    kurtosis: Mapping[str, Sequence[float]]
    error: Mapping[str, Mapping[str, float]]
    damage: Mapping[str, Sequence[float]]
    weights: Sequence[Mapping[str, Any]]
    kv: Sequence[Mapping[str, Any]]
    surface_norm: str
    errors: Mapping[str, Float[np.ndarray, "norms tokens"]]
    is_massive: Bool[np.ndarray, "norms tokens"]
    surfaces: Mapping[str, Float[np.ndarray, "surface_tokens channels"]]


# What inspect.json holds: objects by their keys (`str` for any), lists by what every entry is, numbers as `float`.
_FORM: Any = {
    **{"model": str, "conditions": {str: object}, "norms": [str], "tokens": [str], "rotations": [str]},
    "massive": [
        {**{"block": int, "norm": str, "position": int}, **{"token": str, "channel": int, "peak_over_rms": float}}
    ],
    "channels": [{"block": int, "norm": str, "median": float, "largest": [{"channel": int, "value": float}]}],
    **{"kurtosis": {str: [float]}, "error": {str: {str: float | None}}, "damage": {str: [float]}},
    "weights": [{"block": int, "layer": str, "error": {str: float}}],
    "kv": [{"block": int, **{kind: {"plain": float, "rotated": float} for kind in ("keys", "values")}}],
    "surface": {"norm": str},
}


def misfit(value: Any, form: Any, place: str) -> str | None:
    """What is wrong with a value that should have a form, and where; None if it has it."""
    if isinstance(form, dict):
        if not isinstance(value, dict):
            return f"{place} is no object"
        if str in form:
            parts = {name: form[str] for name in value}
        elif absent := [name for name in form if name not in value]:
            return f"{place} lacks '{absent[0]}'"
        else:
            parts = form
        wrong = (misfit(value[name], part, f"{place}.{name}") for name, part in parts.items())
    elif isinstance(form, list):
        if not isinstance(value, list):
            return f"{place} is no list"
        wrong = (misfit(part, form[0], f"{place}[{number}]") for number, part in enumerate(value))
    elif form in (float, float | None):
        fits = isinstance(value, float) and math.isfinite(value)
        return None if fits or (value is None and form is not float) else f"{place} is no finite float"
    elif form is int:
        return None if type(value) is int and abs(value) < 2**63 else f"{place} is no integer"
    else:
        return None if isinstance(value, form) else f"{place} is no text"
    return next((each for each in wrong if each), None)


def is_finite(value: Any) -> bool:
    return is_number(value) and math.isfinite(value)


def read_inspection(directory: Path) -> Inspection | None:
    """What `dfrot inspect` wrote; None if it wrote nothing there.

    Raises:
        UserError: its files do not fit together.
    """
    path = directory / INSPECTION_FILE
    if not path.is_file():
        return None
    again = "Run `dfrot inspect` again."
    found = read_json(path)
    if found.get("schema") != INSPECTION_SCHEMA:
        raise UserError(f"{path} has schema {INSPECTION_SCHEMA}, got {found.get('schema')!r}. {again}")
    if wrong := misfit(found, _FORM, "it"):
        raise UserError(f"{path}: {wrong}. {again}")
    try:
        tensors = load_file(directory / TENSORS_FILE)
        inspection = Inspection(
            **{name: found[name] for name in ("model", "conditions", "norms", "tokens", "rotations", "massive")},
            **{name: found[name] for name in ("channels", "kurtosis", "error", "damage", "weights", "kv")},
            surface_norm=found["surface"]["norm"],
            errors={name: tensors[f"error/{name}"] for name in found["rotations"]},
            is_massive=tensors["massive"].astype(bool),
            surfaces={name: tensors[f"surface/{name}"] for name in found["rotations"]},
        )
        shape = (len(inspection.norms), len(inspection.tokens))
        for tensor in (inspection.is_massive, *inspection.errors.values()):
            if tensor.shape != shape or not all(shape):
                raise ValueError(f"{shape[0]} norms × {shape[1]} tokens, but a tensor of shape {tensor.shape}")
        for surface in inspection.surfaces.values():
            if surface.ndim != 2 or not surface.size:
                raise ValueError(f"a surface is tokens × channels, but a tensor has the shape {surface.shape}")
        for tensor in (*inspection.errors.values(), *inspection.surfaces.values()):
            if tensor.dtype.kind != "f" or not np.isfinite(tensor).all():
                raise ValueError("a tensor holds what is no finite number")
        if any(len(values) != shape[0] for values in inspection.kurtosis.values()):
            raise ValueError(f"{shape[0]} norms, but kurtosis of another number of them")
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path} and {TENSORS_FILE} do not fit together: {error!r}. {again}") from error
    return inspection
