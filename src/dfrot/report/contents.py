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

from dfrot.checkpoint.save import read_json
from dfrot.errors import UserError
from dfrot.results import is_number

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
            if tensor.shape != shape:
                raise ValueError(f"{shape[0]} norms × {shape[1]} tokens, but a tensor of shape {tensor.shape}")
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path} and {TENSORS_FILE} do not fit together: {error!r}. {again}") from error
    return inspection
