"""Numbers that papers report, to be shown beside ours. The file published.json has them, with their sources."""

import functools
import json
from importlib import resources
from typing import Any, TypedDict

from dfrot.evaluation.record import AVERAGE
from dfrot.models.texts import text_label
from dfrot.pipeline.recipe import Recipe


class Value(TypedDict):
    """A published number and the paper that has it."""

    value: float
    source: str


def published(model: str, recipe: Recipe | None, text: str | None = "wikitext2") -> dict[str, Value]:
    """By metric, what papers report for a model, method, weight quantizer and spec; usually nothing.

    Args:
        model: a hub id or path; its last part names the model.
        recipe: None for the unquantized model.
        text: which of our texts is WikiText-2, whose perplexity the papers report; None if none is.
    """
    record = _record()
    name = model.rstrip("/").rpartition("/")[2].lower().removesuffix("-hf")
    column = next((key for key, names in record["models"].items() if name in names), None)
    if column is None:
        return {}
    place = record["columns"].index(column)
    cell = (None, None, None) if recipe is None else (recipe.method_name, recipe.weights_name, str(recipe.spec))
    found: dict[str, Value] = {}
    for table, metric, unit in (
        ("perplexity", text and f"ppl/{text_label(text)}", 1),
        ("zero_shot_average", AVERAGE, 100),
    ):
        for row in record[table]:
            value = row["values"][place]
            if metric and value is not None and (row["method"], row["weights"], row["spec"]) == cell:
                found[metric] = {"value": round(value / unit, 4), "source": record["sources"][row["source"]]}
    return found


@functools.cache
def _record() -> dict[str, Any]:
    return json.loads((resources.files("dfrot.compare") / "published.json").read_text(encoding="utf-8"))
