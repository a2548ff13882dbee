"""The two files of an inspection: `inspect` writes them by these types, and `report` reads and checks them.

inspect.json holds `Stats`. inspect.safetensors holds what is too large for JSON:

    error/<rotation>     float (norms, tokens)     relative error of every token
    massive              uint8 (norms, tokens)     1 where a token has massive activations
    surface/<rotation>   float (tokens, channels)  |x R| of the first tokens at one norm
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
from jaxtyping import Bool, Float
from safetensors import SafetensorError
from safetensors.numpy import load_file
from typeguard import CollectionCheckStrategy, TypeCheckError, check_type

from dfrot.evaluation.record import is_number
from dfrot.system.errors import UserError
from dfrot.system.files import read_json

SCHEMA = 2
STATS_FILE, TENSORS_FILE = "inspect.json", "inspect.safetensors"


class MassiveToken(TypedDict):
    block: int
    norm: str
    position: int
    token: str
    token_id: int
    channel: int
    peak_over_rms: float


class Channel(TypedDict):
    channel: int
    value: float


class NormChannels(TypedDict):  # of the largest |x̂| that each channel has in any token
    median: float
    largest: list[Channel]


class TokenErrors(TypedDict):  # mean relative errors; null where there are no such tokens
    ordinary: float | None
    massive: float | None


class LayerErrors(TypedDict):
    block: int
    layer: str
    error: dict[str, float]


class Stats(TypedDict):
    """What rotations do to the norm outputs of one model on one sequence. `norms` and `rotations` give the order."""

    schema: int
    model: str  # as the user called it
    conditions: dict[str, Any]
    tokens: list[str]
    norms: list[str]  # "0.input_layernorm", …
    massive: list[MassiveToken]
    channels: list[NormChannels]  # by norm
    rotations: list[str]
    kurtosis: dict[str, list[float]]  # excess kurtosis, by rotation and norm
    error: dict[str, TokenErrors]  # by rotation
    weights: list[LayerErrors]
    kv: dict[str, dict[str, list[float]]]  # relative errors: keys and values → plain and rotated → by block
    surface: str  # the norm that the surfaces show
    sensitivity: dict[str, list[float]]  # KL in nats with one block's norm outputs quantized, by rotation and block


@dataclass(frozen=True, eq=False)
class Inspection:
    """Both files, with the tensors by rotation. Some process wrote them, and their texts come from anyone's models."""

    stats: Stats
    errors: Mapping[str, Float[np.ndarray, "norms tokens"]]
    is_massive: Bool[np.ndarray, "norms tokens"]
    surfaces: Mapping[str, Float[np.ndarray, "surface_tokens channels"]]


def read_inspection(directory: Path) -> Inspection | None:
    """What `dfrot inspect` wrote; None if it wrote nothing there.

    Raises:
        UserError: a file is broken, or the two do not fit together.
    """
    path = directory / STATS_FILE
    if not path.is_file():
        return None
    record, again = read_json(path), "Run `dfrot inspect` again."
    if record.get("schema") != SCHEMA:
        raise UserError(f"{path} has schema {SCHEMA}, got {record.get('schema')!r}. {again}")
    try:
        stats = check_type(record, Stats, collection_check_strategy=CollectionCheckStrategy.ALL_ITEMS)
    except TypeCheckError as error:
        raise UserError(f"{path}: {error}. {again}") from error
    if place := _bad_number({**stats, "conditions": None}):
        raise UserError(f"{path}: {place} is not a finite number. {again}")
    try:
        tensors = load_file(directory / TENSORS_FILE)
        errors = {name: tensors[f"error/{name}"] for name in stats["rotations"]}
        surfaces = {name: tensors[f"surface/{name}"] for name in stats["rotations"]}
        inspection = Inspection(stats, errors, tensors["massive"].astype(bool), surfaces)
        if wrong := _misfit(inspection):
            raise ValueError(wrong)
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path} and {TENSORS_FILE} do not fit together: {error!r}. {again}") from error
    return inspection


def _bad_number(value: Any) -> str | None:
    """The place of the first number that is not finite, or is a truth value, which Python takes for an integer."""
    if isinstance(value, dict | list):
        for key, part in value.items() if isinstance(value, dict) else enumerate(value):
            if (place := _bad_number(part)) is not None:
                return f"[{key!r}]{place}"
    is_bad = isinstance(value, int | float) and not (is_number(value) and math.isfinite(value))
    return "" if is_bad else None


def _misfit(inspection: Inspection) -> str | None:
    """What the two files disagree in, if they do; the figures assume that they agree."""
    stats, errors, surfaces = inspection.stats, inspection.errors.values(), inspection.surfaces.values()
    shape = norms, tokens = len(stats["norms"]), len(stats["tokens"])
    sizes_by_norm = {len(stats["channels"]), *map(len, stats["kurtosis"].values())}
    of_cache = [values for by_how in stats["kv"].values() for values in by_how.values()]
    if not errors:
        return "there are no rotations"
    if any(each.shape != shape or not each.size for each in (inspection.is_massive, *errors)):
        return f"{norms} norms × {tokens} tokens, but a tensor of another shape"
    if any(each.ndim != 2 or not each.size for each in surfaces):
        return "a surface is tokens × channels, but a tensor has another shape"
    if any(each.dtype.kind != "f" or not np.isfinite(each).all() for each in (*errors, *surfaces)):
        return "a tensor has an entry that is not a finite number"
    if sizes_by_norm != {norms} or not all(entry["largest"] for entry in stats["channels"]):
        return f"{norms} norms, but another number of kurtoses or channels"
    if len(set(map(len, (*stats["sensitivity"].values(), *of_cache)))) > 1:
        return "sensitivities and errors of keys and values are of different numbers of blocks"
    return None
