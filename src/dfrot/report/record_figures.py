"""The figures of result records: by recipe, against bits, zero-shot tasks."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from dfrot.evaluation.record import AVERAGE, Record, reported
from dfrot.report.contents import is_finite
from dfrot.report.drawing import STYLES, Figure, digits, mean, new_axis, new_layout, number, plain, rule, slug, style
from dfrot.report.words import deviations, lower_is_better, metrics_of, recipe_label, shown, without_seed


def by_recipe(records: Sequence[Record], metric: str) -> Figure | None:
    """A metric of every cell: a line per spec and weight quantizer, a mark per method and seed."""
    cells = [record for record in records if record.recipe and is_finite(record.metrics.get(metric))]
    if not cells:
        return None
    lines = sorted({_line(record) for record in cells}, reverse=True)
    values = [record.metrics[metric] for record in cells]
    whole = _unquantized(records, metric)
    axis = new_axis(plain(shown(metric)), values + whole if lower_is_better(metric) else ())
    if "range" not in axis:
        margin = 0.06 * (max(values + whole) - min(values + whole)) or 0.5
        axis["range"] = [min(values + whole) - margin, max(values + whole) + margin]
    layout = new_layout(
        150 + 34 * len(lines),
        xaxis=axis,
        yaxis=new_axis("", type="category", categoryarray=lines, categoryorder="array", range=[-0.6, len(lines) - 0.4]),
        **_rules("x", whole, axis, "left" if lower_is_better(metric) else "right"),
    )
    data = [
        _marks(
            method,
            x=[record.metrics[metric] for record in chosen],
            y=[_line(record) for record in chosen],
            text=[plain(recipe_label(record)) for record in chosen],
            hovertemplate="%{text}<br>%{x}<extra></extra>",
        )
        for method, chosen in _by_method(cells)
    ]
    return Figure(
        slug(metric, "by-recipe"),
        "results",
        f"{shown(metric)} by recipe",
        _best_and_worst(cells, metric, whole),
        {"data": data, "layout": layout},
        ["recipe", "seed", shown(metric)],
        [[recipe_label(record), (record.recipe or {}).get("seed"), record.metrics[metric]] for record in cells],
    )


def against_bits(records: Sequence[Record], metric: str) -> Figure | None:
    """Perplexity against the bits that a weight of the decoder takes on disk."""
    bits = "decoder_bits_per_weight"
    cells = [
        record
        for record in records
        if record.recipe and is_finite(record.metrics.get(metric)) and is_finite(record.size.get(bits))
    ]
    if (
        len({round(record.size[bits], 1) for record in cells}) < 2
    ):  # a column of marks says nothing that `by_recipe` does not
        return None
    whole = _unquantized(records, metric)
    axis = new_axis(plain(shown(metric)), [record.metrics[metric] for record in cells] + whole)
    data = [
        _marks(
            method,
            x=[record.size[bits] for record in chosen],
            y=[record.metrics[metric] for record in chosen],
            text=[plain(recipe_label(record)) for record in chosen],
            hovertemplate="%{text}<br>%{x:.2f} bits, %{y}<extra></extra>",
        )
        for method, chosen in _by_method(cells)
    ]
    layout = new_layout(
        420,
        xaxis=new_axis("bits per weight of the decoder", rangemode="tozero"),
        yaxis=axis,
        **_rules("y", whole, axis),
    )
    fewest = min(cells, key=lambda record: (record.size[bits], record.metrics[metric]))
    return Figure(
        slug(metric, "against-bits"),
        "results",
        f"{shown(metric)} against bits per weight",
        f"At the fewest bits, {fewest.size[bits]:.2f}, the best is {number(fewest.metrics[metric])} "
        f"({recipe_label(fewest)}). " + _best_and_worst(cells, metric, whole),
        {"data": data, "layout": layout},
        ["recipe", "seed", "bits per weight", shown(metric)],
        [
            [recipe_label(record), (record.recipe or {}).get("seed"), record.size[bits], record.metrics[metric]]
            for record in cells
        ],
    )


def zero_shot(records: Sequence[Record]) -> Figure | None:
    """Accuracies that papers report: a bar per task and recipe, which is the mean of its seeds."""
    found = metrics_of(records)
    tasks = [metric for metric in reported(found) if metric.startswith(("acc/", "acc_norm/")) or metric == AVERAGE]
    cells = [record for record in records if record.recipe and any(task in record.metrics for task in tasks)]
    if not cells:
        return None
    names = [plain(shown(task) if task == AVERAGE else task.partition("/")[2]) for task in tasks]
    groups = {recipe_label(group[0]): group for group in by_seeds(cells)}
    means = {
        label: [mean(record.metrics.get(task) for record in group) for task in tasks] for label, group in groups.items()
    }
    data: list[dict[str, Any]] = []
    for method, of_method in _by_method([group[0] for group in groups.values()]):
        for place, label in enumerate(map(recipe_label, of_method)):
            shade = 1 - 0.7 * place / len(of_method)  # a method has one colour
            marker = {"color": style(method).colour, "opacity": shade}
            data.append(
                {
                    **{"type": "bar", "name": plain(label), "marker": marker, "x": names, "y": digits(means[label])},
                    "hovertemplate": "%{fullData.name}<br>%{x} %{y:.4f}<extra></extra>",
                }
            )
    whole = [_unquantized(records, task) for task in tasks]
    if any(whole):
        look = {"symbol": "line-ew-open", "size": 28, "color": style("unquantized").colour, "line": {"width": 2}}
        data.append(
            {
                **{"type": "scatter", "mode": "markers", "name": "unquantized", "marker": look},
                "x": [name for name, values in zip(names, whole, strict=True) for _ in values],
                "y": digits(value for values in whole for value in values),
                "hovertemplate": "unquantized<br>%{x} %{y:.4f}<extra></extra>",
            }
        )
    best = []
    for place, name in enumerate(names):
        if known := [(value, label) for label, values in means.items() if (value := values[place]) is not None]:
            value, label = max(known)
            best.append(f"{name} {number(value)} ({label})")
    layout = new_layout(
        420, xaxis=new_axis("", type="category"), yaxis=new_axis("accuracy", rangemode="tozero"), barmode="group"
    )
    return Figure(
        "zero-shot",
        "results",
        "zero-shot accuracy",
        f"Means of the seeds; acc_norm where a task has it, else acc. Best: {', '.join(best)}.",
        {"data": data, "layout": layout},
        ["recipe", *map(shown, tasks)],
        [[label, *values] for label, values in means.items()],
    )


def by_seeds(records: Iterable[Record]) -> Iterable[list[Record]]:
    """Records that differ in nothing but the seed, together, in the order of their first."""
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(without_seed(record), []).append(record)
    return groups.values()


def _method(record: Record) -> str:
    return str((record.recipe or {}).get("method", "unquantized"))


def _line(record: Record) -> str:
    """Spec and weight quantizer, and below them what is unusual."""
    recipe = record.recipe or {}
    name = plain(" ".join(str(recipe[key]) for key in ("spec", "weights") if key in recipe))
    unusual = plain(deviations(recipe), 28)
    return f"{name}<br><i>{unusual}</i>" if unusual else name


def _by_method(records: Sequence[Record]) -> list[tuple[str, list[Record]]]:
    names = dict.fromkeys(map(_method, records))
    known = [*(name for name in STYLES if name in names), *(name for name in names if name not in STYLES)]
    return [(name, [record for record in records if _method(record) == name]) for name in known]


def _unquantized(records: Sequence[Record], metric: str) -> list[float]:
    return sorted({r.metrics[metric] for r in records if r.recipe is None and is_finite(r.metrics.get(metric))})


def _best_and_worst(cells: Sequence[Record], metric: str, unquantized: Sequence[float]) -> str:
    ranked = sorted(cells, key=lambda record: record.metrics[metric], reverse=not lower_is_better(metric))
    best, worst = ranked[0], ranked[-1]
    whole = f" Unquantized: {', '.join(map(number, unquantized))}." if unquantized else ""
    if best is worst:
        return f"{recipe_label(best)}: {number(best.metrics[metric])}.{whole}"
    return (
        f"Best {number(best.metrics[metric])} ({recipe_label(best)}), "
        f"worst {number(worst.metrics[metric])} ({recipe_label(worst)}).{whole}"
    )


def _marks(method: str, **more: Any) -> dict[str, Any]:
    look = style(method)
    marker = {"color": look.colour, "symbol": look.symbol, "size": 9, "opacity": 0.9}
    return {"type": "scatter", "mode": "markers", "name": plain(method), "marker": marker, **more}


def _rules(axis: str, values: Sequence[float], scale: Mapping[str, Any], anchor: str = "left") -> dict[str, Any]:
    """Dashed lines where the unquantized models are, with their numbers beside them, on the side of the marks."""
    log = scale.get("type") == "log"
    seen = [value for value in values if value > 0 or not log]  # a divergence of 0 has no place on a logarithmic axis
    place = {
        "x": {"xref": "x", "y": 0, "yref": "paper", "xanchor": anchor, "yanchor": "bottom"},
        "y": {"yref": "y", "x": 0, "xref": "paper", "xanchor": "left", "yanchor": "bottom"},
    }[axis]
    return {
        "shapes": [rule(axis, value) for value in seen],
        "annotations": [
            {
                **{"text": f"unquantized {number(value)}", "showarrow": False, "font": {"size": 11}, **place},
                axis: math.log10(value) if log else value,  # annotations are placed in powers of ten
            }
            for value in seen
        ],
    }
