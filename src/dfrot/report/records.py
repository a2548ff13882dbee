"""Result records in words, as the rows and columns of page.html's table of results, and as figures."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from dfrot.evaluation.record import AVERAGE, MASSIVE_UNQUANTIZED, Record, reported
from dfrot.methods import METHODS
from dfrot.report.drawing import STYLES, Figure, digits, new_axis, new_plot, plain, rule, scatter, slug, style
from dfrot.report.words import is_finite, mean, number, shorten
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
SETTING = ("text", "tokens", "seq_len", "examples", "dtype", "device", "backend")
BITS = "decoder_bits_per_weight"
WORDS = ("model", "method", "options", "weights", "spec", "seed")  # the columns before those of numbers
FILTERS = ("method", "weights", "spec")  # of the table's rows
# Columns of the table after those of metrics.
SIZES: dict[str, Callable[[Record], float | None]] = {
    "MB": lambda record: record.size["weight_bytes"] / 1e6 if "weight_bytes" in record.size else None,
    "bits per weight": lambda record: record.size.get(BITS),
    "KV bytes per token": lambda record: record.size.get("kv_bytes_per_token"),
    "seconds": lambda record: sum(record.timings_s.values()) or None,
    "peak memory, GB": lambda record: record.peak_rss_bytes / 1e9,
}


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
    """The options of method and rounding that are not their default, and tuning: "gamma 1, steps 50, biases tuned"."""
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
    tuned = recipe.get("tune")
    if isinstance(tuned, dict) and isinstance(parts := tuned.get("parts"), list) and parts:
        found.append(f"{' '.join(map(str, parts))} tuned")
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
            cells = [_cell([record.metrics.get(metric) for record in group]) for metric in metrics]
            for metric, cell in zip(metrics, cells, strict=True):
                cell |= {"best": place in best[metric], "published": _published(group[0], metric)}
            seeds = [_words(record)["seed"] for record in group]
            row = {
                "name": f"{kind}-{place}",
                "folded": kind == "fold",
                "words": _words(group[0]) | {"seed": ", ".join(seeds)},
                "cells": cells + [_cell(list(map(size, group))) for size in SIZES.values()],
                "details": _details(group[0]),
                "of_seed": seeds[0] if len(group) > 1 else None,  # the record whose details are shown
            }
            rows.append(row)
    choices = {key: sorted({_words(record)[key] for record in records}) for key in FILTERS}
    columns = [(shown(metric), " ↓" if lower_is_better(metric) else " ↑") for metric in metrics]
    return {"words": WORDS, "columns": columns + [(size, "") for size in SIZES], "rows": rows, "choices": choices}


def definitions(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Terms and texts: nested objects name their parts, the innermost stand on one line."""
    pairs = []
    for key, value in record.items():
        nested = isinstance(value, Mapping) and any(isinstance(part, Mapping) for part in value.values())
        pairs += [(f"{key} {name}", part) for name, part in value.items()] if nested else [(key, value)]
    return [(term, _on_a_line(value)) for term, value in pairs]


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


def _words(record: Record) -> dict[str, str]:
    """The cells before those of numbers."""
    recipe = {"method": "unquantized"} if record.recipe is None else record.recipe
    words = {key: str(recipe.get(key, "–")) for key in WORDS}
    return words | {"model": record.model, "options": deviations(recipe)}


def _cell(values: Sequence[int | float | None]) -> dict[str, Any]:
    """The mean of the seeds, and the smallest and largest if they differ."""
    known = [value for value in values if value is not None and is_finite(value)]
    spread = (min(known), max(known)) if known and min(known) < max(known) else None
    return {"value": mean(known) if known else values[0], "spread": spread, "best": False, "published": None}


def _published(record: Record, metric: str) -> tuple[str, Any] | None:
    """The number that a paper reports, and its source."""
    published = record.conditions.get("published")
    entry = published.get(metric) if isinstance(published, Mapping) else None
    return (str(entry.get("value")), entry.get("source")) if isinstance(entry, Mapping) else None


def _best(groups: Sequence[Sequence[Record]], metric: str) -> set[int]:
    """The places of the best quantized model of every setting, by the mean of its seeds."""
    sign = 1 if lower_is_better(metric) else -1  # so that the smallest is the best
    ranks: dict[str, list[tuple[float, int]]] = {}
    for place, group in enumerate(groups):
        value = mean(record.metrics.get(metric) for record in group)
        if group[0].recipe is not None and value is not None:
            ranks.setdefault(setting(group[0]), []).append((sign * value, place))
    return {min(of_setting)[1] for of_setting in ranks.values()}


def record_figures(records: Sequence[Record]) -> Iterator[Figure]:
    """All figures for which there is data, in the page's order."""
    metrics = metrics_of(records)
    for metric in metrics:
        if metric.startswith(("ppl/", "kl/", "top1/")):
            yield from metric_figures(records, metric)
    tasks = [task for task in reported(metrics) if task.startswith(("acc/", "acc_norm/")) or task == AVERAGE]
    if trials := [record for record in records if record.recipe and any(task in record.metrics for task in tasks)]:
        yield zero_shot(trials, tasks, {task: _unquantized(records, task) for task in tasks})


def metric_figures(records: Sequence[Record], metric: str) -> Iterator[Figure]:
    """A metric of every trial: a line per spec and rounding, a mark per method and seed.

    A perplexity also against the bits that a weight of the decoder takes on disk.
    """
    trials = [record for record in records if record.recipe and is_finite(record.metrics.get(metric))]
    if not trials:
        return
    values, lines = [record.metrics[metric] for record in trials], list(map(_line, trials))
    unquantized, lower = _unquantized(records, metric), lower_is_better(metric)
    ends = _best_and_worst(trials, metric, unquantized)
    axis = new_axis(plain(shown(metric)), values + unquantized, log=lower)
    order = sorted(set(lines), reverse=True)
    recipes = {"type": "category", "categoryorder": "array", "categoryarray": order, "range": [-0.6, len(order) - 0.4]}
    marks = _marks(trials, values, lines, "%{x}")
    shapes = _rules("x", unquantized, axis, "left" if lower else "right")
    yield Figure(
        slug(metric, "by-recipe"),
        "results",
        f"{shown(metric)} by recipe",
        ends,
        new_plot(marks, 150 + 34 * len(order), xaxis=axis, yaxis=recipes, shapes=shapes),
        [*_recipes(trials), (shown(metric), values)],
    )
    sized = [record for record in trials if is_finite(record.size.get(BITS))]
    values, bits = [record.metrics[metric] for record in sized], [record.size[BITS] for record in sized]
    if not metric.startswith("ppl/") or len({round(each, 1) for each in bits}) < 2:  # a single column of marks
        return
    fewest, value, place = min(zip(bits, values, range(len(sized)), strict=True))
    axes = {"xaxis": new_axis("bits per weight of the decoder", rangemode="tozero"), "yaxis": axis}
    marks = _marks(sized, bits, values, "%{x:.2f} bits, %{y}")
    yield Figure(
        slug(metric, "against-bits"),
        "results",
        f"{shown(metric)} against bits per weight",
        f"At the fewest bits, {fewest:.2f}, the best is {number(value)} ({recipe_label(sized[place])}). {ends}",
        new_plot(marks, 420, **axes, shapes=_rules("y", unquantized, axis, "left")),
        [*_recipes(sized), ("bits per weight", bits), (shown(metric), values)],
    )


def zero_shot(trials: Sequence[Record], tasks: Sequence[str], unquantized: Mapping[str, Sequence[float]]) -> Figure:
    """Accuracies that papers report: a bar per task and recipe, which is the mean of its seeds."""
    names = [plain(shown(task) if task == AVERAGE else task.partition("/")[2]) for task in tasks]
    groups = {recipe_label(group[0]): group for group in by_seeds(trials)}
    means = {label: [mean(r.metrics.get(task) for r in group) for task in tasks] for label, group in groups.items()}
    hover = "%{fullData.name}<br>%{x} %{y:.4f}"
    data: list[dict[str, Any]] = []
    labels = list(means)
    for method, places in _by_method([group[0] for group in groups.values()]).items():
        for shade, label in enumerate(labels[place] for place in places):
            # a method has one colour, its recipes are shades of it
            marker = {"color": style(method).colour, "opacity": 1 - 0.7 * shade / len(places)}
            bar = {"type": "bar", "name": plain(label), "marker": marker, "x": names, "y": digits(means[label])}
            data.append({**bar, "hovertemplate": f"{hover}<extra></extra>"})
    whole = [(name, value) for name, task in zip(names, tasks, strict=True) for value in unquantized[task]]
    if whole:
        line = {"symbol": "line-ew-open", "size": 28, "line": {"width": 2}}
        x, y = zip(*whole, strict=True)
        data.append(scatter("unquantized", x, digits(y), "markers", hover, marker=line))
    best = []
    for place, name in enumerate(names):
        if known := [(values[place], label) for label, values in means.items() if values[place] is not None]:
            value, label = max(known)
            best.append(f"{name} {number(value)} ({label})")
    axes = {"xaxis": new_axis("", type="category"), "yaxis": new_axis("accuracy", rangemode="tozero")}
    return Figure(
        "zero-shot",
        "results",
        "zero-shot accuracy",
        f"Means of the seeds; acc_norm where a task has it, else acc. Best: {', '.join(best)}.",
        new_plot(data, 420, barmode="group", **axes),
        [("recipe", list(means)), *zip(map(shown, tasks), zip(*means.values(), strict=True), strict=True)],
    )


def _marks(trials: Sequence[Record], x: Sequence[Any], y: Sequence[Any], hover: str) -> list[dict[str, Any]]:
    """A trace for every method, with a mark for each of its records."""
    marker = {"size": 9, "opacity": 0.9}
    traces = []
    for method, places in _by_method(trials).items():
        text = [plain(recipe_label(trials[place])) for place in places]
        xs, ys = [x[place] for place in places], [y[place] for place in places]
        traces.append(scatter(method, xs, ys, "markers", "%{text}<br>" + hover, marker=marker, text=text))
    return traces


def _by_method(records: Sequence[Record]) -> dict[str, list[int]]:
    """The places of every method's records; the known methods first, in their usual order."""
    groups: dict[str, list[int]] = {}
    for place, record in enumerate(records):
        groups.setdefault(str((record.recipe or {}).get("method")), []).append(place)
    return dict(sorted(groups.items(), key=lambda group: (*STYLES, group[0]).index(group[0])))


def _recipes(trials: Sequence[Record]) -> list[tuple[str, list[Any]]]:
    """The first columns of a table of data."""
    seeds = [(record.recipe or {}).get("seed") for record in trials]
    return [("recipe", list(map(recipe_label, trials))), ("seed", seeds)]


def _line(record: Record) -> str:
    """Spec and rounding, and below them what is unusual."""
    recipe = record.recipe or {}
    name = plain(" ".join(str(recipe[key]) for key in ("spec", "weights") if key in recipe))
    unusual = plain(deviations(recipe), 28)
    return f"{name}<br><i>{unusual}</i>" if unusual else name


def _unquantized(records: Sequence[Record], metric: str) -> list[float]:
    return sorted({r.metrics[metric] for r in records if r.recipe is None and is_finite(r.metrics.get(metric))})


def _best_and_worst(trials: Sequence[Record], metric: str, unquantized: Sequence[float]) -> str:
    ranked = sorted(trials, key=lambda record: record.metrics[metric], reverse=not lower_is_better(metric))
    best, worst = ranked[0], ranked[-1]
    whole = f" Unquantized: {', '.join(map(number, unquantized))}." if unquantized else ""
    if best is worst:
        return f"{recipe_label(best)}: {number(best.metrics[metric])}.{whole}"
    ends = (f"{word} {number(r.metrics[metric])} ({recipe_label(r)})" for word, r in (("Best", best), ("worst", worst)))
    return f"{', '.join(ends)}.{whole}"


def _rules(axis: str, values: Sequence[float], scale: Mapping[str, Any], anchor: str) -> list[dict[str, Any]]:
    """Dashed lines at the unquantized models, with their numbers beside them, on the side of the marks."""
    place = {"textposition": "start", "textangle": 0, "xanchor": anchor, "yanchor": "bottom", "font": {"size": 11}}
    return [
        rule(value, axis, text=f"unquantized {number(value)}", **place)
        for value in values
        if value > 0 or scale.get("type") != "log"  # a logarithmic axis has no place for a divergence of 0
    ]
