"""Numbers that papers report, beside ours wherever model, measurement and whole recipe are theirs (published.json)."""

import json
from pathlib import Path
from typing import Any

from dfrot.evaluation.record import AVERAGE, MASSIVE_UNQUANTIZED, text_label
from dfrot.evaluation.run import Measurement
from dfrot.pipeline.recipe import Recipe

_TABLE = json.loads(Path(__file__).with_name("published.json").read_text(encoding="utf-8"))


def published(model: str, recipe: Recipe | None, measurement: Measurement) -> dict[str, dict[str, Any]]:
    """By metric, the `value` that a paper reports for a trial, and its `source`; usually nothing.

    Args:
        model: a hub id or path; its last part names the model.
        recipe: None for the unquantized model.
    """
    name = model.rstrip("/").rpartition("/")[2].lower().removesuffix("-hf")
    column = next((place for place, names in enumerate(_TABLE["models"].values()) if name in names), None)
    if column is None:
        return {}
    given = None if recipe is None else recipe.to_json()
    if given is not None and _is_wikitext2(given["calibration"]["text"], "train"):
        given["calibration"]["text"] = "wikitext2"  # wherever the file lies
    # Measured as the papers do: the whole test part in blocks of 2048 tokens, all examples of exactly their tasks.
    metrics: dict[str, str] = {}  # the table's name → ours
    for text in measurement.texts:
        if _is_wikitext2(text, "test") and measurement.seq_len == 2048 and measurement.max_tokens is None:
            metrics |= {kind: f"{kind}/{text_label(text)}" for kind in ("ppl", MASSIVE_UNQUANTIZED)}
    if set(measurement.tasks) == set(_TABLE["tasks"]) and measurement.limit is None:
        metrics[AVERAGE] = AVERAGE
    return {
        metrics[row["metric"]]: {"value": row["values"][column], "source": _TABLE["sources"][row["source"]]}
        for row in _TABLE["rows"]
        if row["metric"] in metrics and row["values"][column] is not None and is_recipe(given, row["recipe"])
    }


def is_recipe(given: dict[str, Any] | None, parts: list[str] | None) -> bool:
    """Whether a recipe (its JSON) has all that the named parts of published.json fix; None is the unquantized model.

    No paper tunes after rounding.
    """
    if given is None or parts is None:
        return given is None and parts is None
    return not given.get("tune", {}).get("parts") and all(_has(given, _TABLE["parts"][part]) for part in parts)


def _has(given: Any, wanted: Any) -> bool:
    if isinstance(wanted, dict):
        return all(name in given and _has(given[name], value) for name, value in wanted.items())
    return given in wanted if isinstance(wanted, list) else given == wanted


def _is_wikitext2(text: str, split: str) -> bool:
    return text == "wikitext2" or text_label(text) == f"wiki.{split}.raw"
