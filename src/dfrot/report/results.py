"""The rows and columns of the table of results, which page.html shows."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dfrot.evaluation.record import Record
from dfrot.report.words import by_seeds, deviations, is_finite, lower_is_better, mean, metrics_of, setting, shown

WORDS = ("model", "method", "options", "weights", "spec", "seed")  # the columns before those of numbers
FILTERS = ("method", "weights", "spec")


# The columns after those of metrics.
SIZES: dict[str, Callable[[Record], float | None]] = {
    "MB": lambda record: record.size["weight_bytes"] / 1e6 if "weight_bytes" in record.size else None,
    "bits per weight": lambda record: record.size.get("decoder_bits_per_weight"),
    "KV bytes per token": lambda record: record.size.get("kv_bytes_per_token"),
    "seconds": lambda record: sum(record.timings_s.values()) or None,
    "peak memory, GB": lambda record: record.peak_rss_bytes / 1e9,
}


def results_table(records: Sequence[Record]) -> dict[str, Any]:
    """The table for page.html: its columns, its rows, and the words by which the reader may filter.

    Every record is a row, and every group of records that differ only in the seed is a folded one, with their means.
    The page's script shows either kind.
    """
    metrics = metrics_of(records)
    rows = []
    for kind, groups in (("record", [[record] for record in records]), ("fold", list(by_seeds(records)))):
        best = {metric: _best(groups, metric) for metric in metrics}
        for place, group in enumerate(groups):
            seeds = [_word(record, "seed") for record in group]
            cells = [_cell([r.metrics.get(metric) for r in group], place in best[metric]) for metric in metrics]
            for metric, cell in zip(metrics, cells, strict=True):
                cell["published"] = _published(group[0], metric)
            row = {"name": f"{kind}-{place}", "folded": kind == "fold", "details": _details(group[0])}
            row["words"] = {**{word: _word(group[0], word) for word in WORDS}, "seed": ", ".join(seeds)}
            row["cells"] = cells + [_cell(list(map(size, group)), False) for size in SIZES.values()]
            row["of_seed"] = seeds[0] if len(group) > 1 else None  # the record whose details are shown
            rows.append(row)
    choices = {key: sorted({_word(record, key) for record in records}) for key in FILTERS}
    columns = [(shown(metric), " ↓" if lower_is_better(metric) else " ↑") for metric in metrics]
    columns += [(heading, "") for heading in SIZES]
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


def _cell(values: Sequence[int | float | None], best: bool) -> dict[str, Any]:
    """The mean of the seeds, and the smallest and largest if they differ."""
    known = [value for value in values if value is not None and is_finite(value)]
    spread = (min(known), max(known)) if known and min(known) < max(known) else None
    return {"value": mean(known) if known else values[0], "spread": spread, "best": best, "published": None}


def _published(record: Record, metric: str) -> tuple[str, Any] | None:
    """The number that a paper reports, and its source."""
    published = record.conditions.get("published")
    entry = published.get(metric) if isinstance(published, Mapping) else None
    return (str(entry.get("value")), entry.get("source")) if isinstance(entry, Mapping) else None


def _best(groups: Sequence[Sequence[Record]], metric: str) -> set[int]:
    """The places of the best quantized model of every setting, by the mean of its seeds."""
    sign = 1 if lower_is_better(metric) else -1  # so that the smallest is the best
    found: dict[str, tuple[float, int]] = {}
    for place, group in enumerate(groups):
        value = mean(record.metrics.get(metric) for record in group)
        if group[0].recipe is not None and value is not None:
            rank = (sign * value, place)
            found[setting(group[0])] = min(rank, found.get(setting(group[0]), rank))
    return {place for _, place in found.values()}
