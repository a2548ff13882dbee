"""Records and numbers in words, for tables, figures and captions."""

import json
import statistics
from collections.abc import Iterable, Mapping
from typing import Any

from dfrot.evaluation.record import AVERAGE, MASSIVE_UNQUANTIZED, Record, is_number
from dfrot.methods import METHODS
from dfrot.rounding import ROUNDINGS

# Kinds of metrics in the order in which they are shown.
METRICS = {
    "ppl": "perplexity",
    MASSIVE_UNQUANTIZED: "perplexity, massive tokens unquantized,",
    "kl": "KL divergence",
    "top1": "top-1 agreement",
    AVERAGE: "zero-shot average",
    "acc": "acc",
    "acc_norm": "acc norm",
}
# Conditions that two records must share for their numbers to be comparable, beside model and recipe.
SETTING = ("text", "tokens", "seq_len", "limit", "num_fewshot", "dtype", "device", "backend")


def shown(metric: str) -> str:
    """A metric's name for readers: "ppl/wikitext2" → "perplexity wikitext2"."""
    kind, _, what = metric.partition("/")
    return shorten(f"{METRICS.get(kind, kind)} {what}".strip())


def metrics_of(records: Iterable[Record]) -> list[str]:
    """All metrics of the records, in the order in which they are shown."""
    place = {kind: place for place, kind in enumerate(METRICS)}
    found = sorted({metric for record in records for metric in record.metrics})
    return sorted(found, key=lambda metric: place.get(metric.partition("/")[0], len(place)))


def lower_is_better(metric: str) -> bool:
    return metric.startswith(("ppl/", f"{MASSIVE_UNQUANTIZED}/", "kl/"))


def recipe_label(record: Record) -> str:
    """Method, rounding, spec and options that are not the default."""
    if record.recipe is None:
        return "unquantized"
    names = (record.recipe.get(key) for key in ("method", "weights", "spec"))
    return " ".join(shorten(str(word)) for word in (*names, deviations(record.recipe)) if word)


def deviations(recipe: Mapping[str, Any]) -> str:
    """The options of method and rounding that are not their default: "gamma 1, steps 50"."""
    method, rounding = METHODS.get(str(recipe.get("method"))), ROUNDINGS.get(str(recipe.get("weights")))
    usual = {
        "options": method and method().resolved(rounding is not None and rounding.learns_clipping),
        "weight_options": rounding and rounding(),
    }
    found = []
    for part, defaults in usual.items():
        given = recipe.get(part)
        for option, value in given.items() if isinstance(given, dict) else ():
            if getattr(defaults, option, ...) != value:
                found.append(f"{option.replace('_', ' ')} {f'{value:g}' if isinstance(value, float) else value}")
    return shorten(", ".join(found))


def setting(record: Record) -> str:
    """Equal for records whose metrics can be compared: one model, measured alike."""
    return json.dumps([record.model, {key: record.conditions.get(key) for key in SETTING}], sort_keys=True)


def by_seeds(records: Iterable[Record]) -> Iterable[list[Record]]:
    """Records that differ only in the seed, together, in the order of their first."""
    groups: dict[str, list[Record]] = {}
    for record in records:
        recipe = {key: value for key, value in (record.recipe or {}).items() if key != "seed"}
        groups.setdefault(setting(record) + json.dumps(recipe, sort_keys=True), []).append(record)
    return groups.values()


def is_finite(value: Any) -> bool:
    """Whether this is a number, and small enough for sums and differences of such to be finite too."""
    return is_number(value) and abs(value) < 1e300


def mean(values: Iterable[Any]) -> float | None:
    """Of the finite numbers among the values."""
    known = [value for value in values if is_finite(value)]
    return statistics.fmean(known) if known else None


def number(value: Any) -> str:
    """A number with about four digits; a dash for None."""
    if not is_finite(value):
        return "–" if value is None else str(value)
    if value == 0 or (isinstance(value, int) and abs(value) < 1e5):
        return str(int(value))
    size = abs(value)
    if size >= 1e5 or size < 1e-3:
        return f"{value:.2e}"
    return f"{value:.{0 if size >= 1000 else 2 if size >= 10 else 3 if size >= 1 else 4}f}"


def shorten(text: str, most: int = 120) -> str:
    """A text of at most so many characters; what is cut out of its middle is marked."""
    half = (most - 1) // 2
    return text if len(text) <= most else f"{text[:half]}…{text[-half:]}"
