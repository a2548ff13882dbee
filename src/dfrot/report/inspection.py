"""An inspection as the report reads it, checked: some process wrote it, and its texts come from anyone's models."""

from collections.abc import Mapping, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float
from safetensors import SafetensorError
from safetensors.numpy import load_file
from typeguard import CollectionCheckStrategy, TypeCheckError, check_type

from dfrot.inspect.schema import SCHEMA, STATS_FILE, TENSORS_FILE, Stats
from dfrot.report.words import is_finite
from dfrot.system.errors import UserError
from dfrot.system.files import read_json


@dataclass(frozen=True, eq=False)
class Inspection:
    """What rotations do to the norm outputs of one model on one sequence.

    Attributes:
        stats: inspect.json.
        errors: rotation → relative error of every token at every norm.
        is_massive: which tokens are massive, at every norm.
        surfaces: rotation → |x R| of the first tokens, at the norm `stats["surface"]`.
    """

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
    return "" if isinstance(value, int | float) and not is_finite(value) else None


def _misfit(inspection: Inspection) -> str | None:
    """What the two files disagree in, if they do; the figures assume that they agree."""
    stats, surfaces = inspection.stats, inspection.surfaces.values()
    shape = norms, tokens = len(stats["norms"]), len(stats["tokens"])
    by_norm: tuple[Sized, ...] = (stats["channels"], *stats["kurtosis"].values())
    by_block = (*stats["sensitivity"].values(), *(errors for kind in stats["kv"].values() for errors in kind.values()))
    if not inspection.errors:
        return "there are no rotations"
    if any(each.shape != shape or not each.size for each in (inspection.is_massive, *inspection.errors.values())):
        return f"{norms} norms × {tokens} tokens, but a tensor of another shape"
    if any(surface.ndim != 2 or not surface.size for surface in surfaces):
        return "a surface is tokens × channels, but a tensor has another shape"
    if any(each.dtype.kind != "f" or not np.isfinite(each).all() for each in (*inspection.errors.values(), *surfaces)):
        return "a tensor has an entry that is not a finite number"
    if any(len(values) != norms for values in by_norm) or not all(entry["largest"] for entry in stats["channels"]):
        return f"{norms} norms, but another number of kurtoses or channels"
    if len(set(map(len, by_block))) > 1:
        return "sensitivities and errors of keys and values are of different numbers of blocks"
    return None
