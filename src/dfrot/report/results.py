"""The table of results, which page.html shows: which rows and columns it has, and what stands in them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dfrot.evaluation.record import Record
from dfrot.report.words import by_seeds, deviations, is_finite, lower_is_better, mean, metrics_of, setting, shown

WORDS = ("model", "method", "options", "weights", "spec", "seed")  # the columns before those of numbers
FILTERS = ("method", "weights", "spec")


@dataclass(frozen=True)
class Column:
    """A column of numbers.

    Attributes:
        heading: plain text.
        of: its number in a record; None if the record lacks it.
        metric: which metric this is, if it is one: these have a best, and numbers in papers.
    """

    heading: str
    of: Callable[[Record], float | None]
    metric: str | None = None

    @property
    def arrow(self) -> str:
        return "" if self.metric is None else " ↓" if lower_is_better(self.metric) else " ↑"


def _size(heading: str, key: str, unit: float = 1.0) -> Column:
    return Column(heading, lambda record: None if (value := record.size.get(key)) is None else value / unit)


SIZES = (
    _size("MB", "weight_bytes", 1e6),
    _size("bits per weight", "decoder_bits_per_weight"),
    _size("KV bytes per token", "kv_bytes_per_token"),
    Column("seconds", lambda record: sum(record.timings_s.values()) or None),
    Column("peak memory, GB", lambda record: record.peak_rss_bytes / 1e9),
)


def results_table(records: Sequence[Record]) -> dict[str, Any]:
    """The table for page.html: its columns, its rows, and the words by which the reader may filter.

    Every record is a row, and every group of records that differ only in the seed is a folded one, with their means.
    The page's script shows either kind.
    """
    metrics = [
        Column(shown(metric), lambda record, metric=metric: record.metrics.get(metric), metric)  # type: ignore[misc]
        for metric in metrics_of(records)
    ]
    columns = [*metrics, *SIZES]
    rows = []
    for kind, groups in (("record", [[record] for record in records]), ("fold", list(by_seeds(records)))):
        best = {column: _best(groups, column) for column in metrics}
        for place, group in enumerate(groups):
            seeds = [_word(record, "seed") for record in group]
            rows.append(
                {
                    "name": f"{kind}-{place}",
                    "folded": kind == "fold",
                    "words": {**{word: _word(group[0], word) for word in WORDS}, "seed": ", ".join(seeds)},
                    "cells": [_cell(group, column, place in best.get(column, ())) for column in columns],
                    "of_seed": seeds[0] if len(group) > 1 else None,  # whose details are shown
                    "details": _details(group[0]),
                }
            )
    choices = {key: sorted({_word(record, key) for record in records}) for key in FILTERS}
    return {"words": WORDS, "columns": columns, "rows": rows, "choices": choices}


def definitions(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Terms and texts: nested objects name their parts, the innermost stand on one line."""
    pairs = []
    for key, value in record.items():
        if isinstance(value, Mapping) and any(isinstance(part, Mapping) for part in value.values()):
            pairs += [(f"{key} {name}", _on_a_line(part)) for name, part in value.items()]
        else:
            pairs.append((key, _on_a_line(value)))
    return pairs


def _on_a_line(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_on_a_line(part)}" for key, part in value.items()) or "–"
    if isinstance(value, list):
        return ", ".join(map(_on_a_line, value)) or "–"
    return "–" if value is None else {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)


def _details(record: Record) -> list[tuple[str, list[tuple[str, str]]]]:
    measured = {"metrics": record.metrics, "size": record.size, "seconds": record.timings_s}
    parts = {
        "Recipe": record.recipe,
        "Conditions": {"model": record.model, **record.conditions},
        "Measured": {**measured, "peak_rss_bytes": record.peak_rss_bytes},
    }
    return [(heading, definitions(part)) for heading, part in parts.items() if part is not None]


def _word(record: Record, key: str) -> str:
    recipe = record.recipe or {}
    if key == "model":
        return record.model
    if key == "options":
        return deviations(recipe)
    return "unquantized" if record.recipe is None and key == "method" else str(recipe.get(key, "–"))


def _cell(group: Sequence[Record], column: Column, best: bool) -> dict[str, Any]:
    """The mean of the seeds, the smallest and the largest if they differ, and a paper's number with its source."""
    values = [column.of(record) for record in group]
    known = [value for value in values if value is not None and is_finite(value)]
    published = group[0].conditions.get("published")
    entry = published.get(column.metric) if isinstance(published, Mapping) else None
    return {
        "value": mean(known) if known else values[0],
        "spread": (min(known), max(known)) if known and min(known) < max(known) else None,
        "best": best,
        "published": (str(entry.get("value")), entry.get("source")) if isinstance(entry, Mapping) else None,
    }


def _best(groups: Sequence[Sequence[Record]], column: Column) -> set[int]:
    """The places of the best quantized model of every setting, by the mean of its seeds."""
    sign = 1 if lower_is_better(str(column.metric)) else -1  # the smallest is the best of all that follows
    found: dict[str, tuple[float, int]] = {}
    for place, group in enumerate(groups):
        value = mean(map(column.of, group))
        if group[0].recipe is not None and value is not None:
            rank = (sign * value, place)
            found[setting(group[0])] = min(rank, found.get(setting(group[0]), rank))
    return {place for _, place in found.values()}
