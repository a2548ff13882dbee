"""Numbers that papers report, beside ours wherever model, measurement and whole recipe are theirs (published.json)."""

import functools
import json
from importlib import resources
from typing import Any

from dfrot.evaluation.record import AVERAGE, MASSIVE_UNQUANTIZED
from dfrot.evaluation.run import Measurement
from dfrot.models.texts import text_label
from dfrot.pipeline.recipe import Recipe


def published(model: str, recipe: Recipe | None, measurement: Measurement) -> dict[str, dict[str, Any]]:
    """By metric, the `value` that a paper reports for a trial, and its `source`; usually nothing.

    Args:
        model: a hub id or path; its last part names the model.
        recipe: None for the unquantized model.
    """
    table = _table()
    name = model.rstrip("/").rpartition("/")[2].lower().removesuffix("-hf")
    column = next((place for place, names in enumerate(table["models"].values()) if name in names), None)
    if column is None:
        return {}
    given = None if recipe is None else recipe.to_json()
    if given is not None and _is_wikitext2(given["calibration"]["text"], "train"):
        given["calibration"]["text"] = "wikitext2"  # wherever the file lies
    metrics = _metrics(measurement)
    return {
        metrics[row["metric"]]: {"value": row["values"][column], "source": table["sources"][row["source"]]}
        for row in table["rows"]
        if row["metric"] in metrics and row["values"][column] is not None and is_recipe(given, row["recipe"])
    }


def is_recipe(given: dict[str, Any] | None, parts: list[str] | None) -> bool:
    """Whether a recipe (its JSON) has all that the named parts of published.json fix; None is the unquantized model."""
    if given is None or parts is None:
        return given is None and parts is None
    return all(_has(given, _table()["parts"][part]) for part in parts)


def _has(given: Any, wanted: Any) -> bool:
    if isinstance(wanted, dict):
        return all(name in given and _has(given[name], value) for name, value in wanted.items())
    return given in wanted if isinstance(wanted, list) else given == wanted


def _metrics(measurement: Measurement) -> dict[str, str]:
    """Our names of the metrics that are measured as the papers do: on the whole test part in blocks of 2048 tokens, and
    on all examples of exactly their tasks."""
    texts = [text_label(text) for text in measurement.texts if _is_wikitext2(text, "test")]
    if measurement.seq_len != 2048 or measurement.max_tokens is not None:
        texts = []
    metrics = {kind: f"{kind}/{text}" for text in texts for kind in ("ppl", MASSIVE_UNQUANTIZED)}
    if set(measurement.tasks) == set(_table()["tasks"]) and measurement.limit is None:
        metrics[AVERAGE] = AVERAGE
    return metrics


def _is_wikitext2(text: str, split: str) -> bool:
    return text == "wikitext2" or text_label(text) == f"wiki.{split}.raw"


@functools.cache
def _table() -> dict[str, Any]:
    return json.loads((resources.files("dfrot.compare") / "published.json").read_text(encoding="utf-8"))
