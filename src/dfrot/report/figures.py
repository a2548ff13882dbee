"""The figures of a report: one function each, from records or an inspection to a plotly figure.

A figure is plotly's own JSON ({"data": […], "layout": {…}}), so that making one needs no plotly:
`plotly.graph_objects.Figure(figure.plot).show()` shows it. With it come a caption that says its main numbers and a
table of its data, for those who cannot see it. A rotation or method has the same colour, symbol and dash in all
figures, so that none of them has to be told by colour alone.
"""

import dataclasses
import html
import itertools
import math
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from dfrot.report.contents import Inspection, is_finite
from dfrot.report.words import deviations, lower_is_better, metrics_of, recipe_label, shorten, shown, without_seed
from dfrot.results import AVERAGE, Record, reported

CURVE_POINTS = 600  # of one curve; a screen is not wider
MASSIVE_POINTS = 200  # marks of massive tokens on one curve
SURFACE_CELLS = (64, 192)  # tokens × channels; more is megabytes, and not seen
LOG_SPREAD = 10  # a positive axis that spans more is logarithmic

TEXT, LINE, GRID = "#1c1c1c", "#767676", "#e2e2e2"  # in images; the page has its own, for light and for dark
# Cividis, dense where values are small: at the squares of even steps. What rotations leave would be one colour else.
COLOURS = [[0, "#00204d"], [0.0625, "#414d6b"], [0.25, "#7c7b78"], [0.5625, "#bcaf6f"], [1, "#ffea46"]]
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"


class Style(NamedTuple):
    colour: str
    symbol: str
    dash: str


# The palette of Okabe and Ito, told apart with any colour vision. QuaRot is RH, in all but its options.
STYLES = {
    "none": Style("#D55E00", "circle", "solid"),
    "plain": Style("#D55E00", "circle", "solid"),
    "RO": Style("#56B4E9", "triangle-up", "dot"),
    "RH": Style("#0072B2", "square", "dash"),
    "quarot": Style("#0072B2", "square", "dash"),
    "rotated": Style("#0072B2", "square", "dash"),
    "dfrot": Style("#009E73", "diamond", "solid"),
    "duquant": Style("#CC79A7", "cross", "dashdot"),
    "unquantized": Style("#8C8C8C", "star", "dot"),
    "largest channel": Style("#E69F00", "circle", "solid"),
    "last of those listed": Style("#0072B2", "square", "dash"),
    "median channel": Style("#8C8C8C", "diamond", "dot"),
}
OTHER_STYLES = (
    Style("#E69F00", "x", "longdash"),
    Style("#999999", "star", "longdashdot"),
    Style("#B8A800", "pentagon", "dot"),
)


@dataclass(frozen=True)
class Figure:
    """A figure and what says the same in words.

    Attributes:
        name: of its element and its file.
        section: of the page.
        title: plain text.
        caption: its main numbers in a sentence or two, plain text.
        plot: plotly's JSON.
        columns: of the table of its data.
        rows: of that table.
        log_x: whether the reader may switch the x axis to logarithmic.
    """

    name: str
    section: Literal["results", "rotations", "blocks", "surfaces"]
    title: str
    caption: str
    plot: dict[str, Any]
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    log_x: bool = False


def figures(records: Sequence[Record], inspection: Inspection | None) -> list[Figure]:
    """All figures that there is data for, in the page's order. Their names differ."""
    metrics = metrics_of(records)
    found: list[Figure | None] = []
    for metric in metrics:
        if metric.startswith(("ppl/", "kl/", "top1/")):
            found.append(by_recipe(records, metric))
        if metric.startswith("ppl/"):
            found.append(against_bits(records, metric))
    found.append(zero_shot(records))
    if inspection is not None:
        found += [
            token_errors(inspection),
            token_errors(inspection, inspection.surface_norm),
            norm_errors(inspection),
            kurtosis(inspection),
            channels(inspection),
            damage(inspection),
            weight_errors(inspection),
            cache_errors(inspection),
            *surfaces(inspection),
        ]
    named: dict[str, Figure] = {}
    for figure in found:
        if figure is not None:
            count = sum(name.rpartition("--")[0] == figure.name or name == figure.name for name in named)
            name = f"{figure.name}--{count + 1}" if count else figure.name  # metrics "a/b" and "a.b" have one slug
            named[name] = dataclasses.replace(figure, name=name)
    return list(named.values())


def by_recipe(records: Sequence[Record], metric: str) -> Figure | None:
    """A metric of every cell: a line per spec and weight quantizer, a mark per method and seed."""
    cells = [record for record in records if record.recipe and is_finite(record.metrics.get(metric))]
    if not cells:
        return None
    lines = sorted({_line(record) for record in cells}, reverse=True)
    values = [record.metrics[metric] for record in cells]
    whole = _unquantized(records, metric)
    axis = _axis(plain(shown(metric)), values + whole if lower_is_better(metric) else ())
    if "range" not in axis:
        margin = 0.06 * (max(values + whole) - min(values + whole)) or 0.5
        axis["range"] = [min(values + whole) - margin, max(values + whole) + margin]
    layout = _layout(
        150 + 34 * len(lines),
        xaxis=axis,
        yaxis=_axis("", type="category", categoryarray=lines, categoryorder="array", range=[-0.6, len(lines) - 0.4]),
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
        _slug(metric, "by-recipe"),
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
    axis = _axis(plain(shown(metric)), [record.metrics[metric] for record in cells] + whole)
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
    layout = _layout(
        420,
        xaxis=_axis("bits per weight of the decoder", rangemode="tozero"),
        yaxis=axis,
        **_rules("y", whole, axis),
    )
    fewest = min(cells, key=lambda record: (record.size[bits], record.metrics[metric]))
    return Figure(
        _slug(metric, "against-bits"),
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
    layout = _layout(
        420, xaxis=_axis("", type="category"), yaxis=_axis("accuracy", rangemode="tozero"), barmode="group"
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


def token_errors(inspection: Inspection, norm: str | None = None) -> Figure | None:
    """The relative error of every token, sorted, a curve per rotation (the figure of DFRot's motivation)."""
    if norm is not None and norm not in inspection.norms:
        return None
    which = slice(None) if norm is None else inspection.norms.index(norm)
    massive = inspection.is_massive[which].ravel()
    data, rows, sentences = [], [], []
    for rotation, errors in inspection.errors.items():
        x = errors[which].ravel()
        order = np.argsort(-x, kind="stable")
        picks = sampled_ranks(len(x), CURVE_POINTS)
        look = style(rotation)
        line = {"color": look.colour, "dash": look.dash, "width": 1.75}
        data.append(
            {
                **{"type": "scatter", "mode": "lines", "name": plain(rotation), "legendgroup": plain(rotation)},
                **{"x": (picks + 1).tolist(), "y": digits(x[order[picks]].tolist()), "line": line},
                "hovertemplate": "%{fullData.name}: token %{x} has %{y:.4f}<extra></extra>",
            }
        )
        marked = np.flatnonzero(massive[order])
        marked = marked[sampled_ranks(len(marked), MASSIVE_POINTS)]
        if len(marked):
            marker = {"color": look.colour, "symbol": f"{look.symbol}-open", "size": 6}
            data.append(
                {
                    **{
                        "type": "scatter",
                        "mode": "markers",
                        "name": f"{plain(rotation)}, massive",
                        "showlegend": False,
                    },
                    **{"x": (marked + 1).tolist(), "y": digits(x[order[marked]].tolist()), "marker": marker},
                    "legendgroup": plain(rotation),
                    "hovertemplate": "%{fullData.name}: token %{x} has %{y:.4f}<extra></extra>",
                }
            )
        quantiles = np.quantile(x, [1, 0.99, 0.9, 0.5, 0.1, 0])
        mean_massive = float(x[massive].mean()) if massive.any() else None
        rows.append(
            [rotation, float(x[~massive].mean()) if (~massive).any() else None, mean_massive, *map(float, quantiles)]
        )
        sentences.append(f"{rotation} {number(float(quantiles[3]))}")
    where = f"at {norm}" if norm else f"at all {len(inspection.norms)} norms"
    marks = f"Marks: massive tokens ({int(massive.sum())}). " if massive.any() else ""
    layout = _layout(400, xaxis=_axis("tokens, by falling error"), yaxis=_axis("‖x − Q(x)‖ / ‖x‖", rangemode="tozero"))
    return Figure(
        "token-errors" if norm is None else "token-errors-at-norm",
        "rotations",
        f"error of each token {where}",
        f"Relative error of quantized norm outputs, sorted for each rotation. {marks}Median: {', '.join(sentences)}.",
        {"data": data, "layout": layout},
        ["rotation", "mean, ordinary", "mean, massive", "largest", "99 %", "90 %", "median", "10 %", "smallest"],
        rows,
        log_x=True,
    )


def norm_errors(inspection: Inspection) -> Figure | None:
    """The mean error of the tokens at every norm."""
    series = {rotation: errors.mean(axis=1).tolist() for rotation, errors in inspection.errors.items()}
    means = ", ".join(f"{name} {number(statistics.fmean(values))}" for name, values in series.items())
    return _by_norm(
        inspection, series, "norm-errors", "error at each norm", "mean ‖x − Q(x)‖ / ‖x‖", f"Mean of all norms: {means}."
    )


def kurtosis(inspection: Inspection) -> Figure | None:
    """Kurtosis of every norm output; three more than the excess that is recorded, so that it can be logarithmic."""
    series = {rotation: [value + 3 for value in values] for rotation, values in inspection.kurtosis.items()}
    medians = ", ".join(f"{name} {number(statistics.median(values))}" for name, values in series.items() if values)
    return _by_norm(
        *(inspection, series, "kurtosis", "kurtosis of norm outputs", "kurtosis"),
        f"A normal distribution has 3 (the dashed line). Median of the norms: {medians}.",
        reference=3.0,
    )


def channels(inspection: Inspection) -> Figure | None:
    """How far the largest channels stick out of the rest, before any rotation."""
    found = {f"{entry['block']}.{entry['norm']}": entry for entry in inspection.channels}
    if set(found) != set(inspection.norms) or not all(entry["largest"] for entry in found.values()):
        return None
    entries = [found[norm] for norm in inspection.norms]
    series = {
        "largest channel": [max(c["value"] for c in entry["largest"]) for entry in entries],
        "last of those listed": [min(c["value"] for c in entry["largest"]) for entry in entries],
        "median channel": [entry["median"] for entry in entries],
    }
    top = max(entries, key=lambda entry: max(c["value"] for c in entry["largest"]))
    peak = max(top["largest"], key=lambda c: c["value"])
    caption = (
        f"Largest entry of a channel over the tokens, without the norm's gain: channel {peak['channel']} at "
        f"{top['block']}.{top['norm']} reaches {number(peak['value'])}, "
        f"the median channel there {number(top['median'])}."
    )
    return _by_norm(inspection, series, "channels", "outlier channels of norm outputs", "max |x| of a channel", caption)


def damage(inspection: Inspection) -> Figure | None:
    """KL divergence from the original when the norm outputs of one block are quantized."""
    if not inspection.damage:
        return None
    series = inspection.damage
    layout = _layout(
        360,
        xaxis=_axis("block"),
        yaxis=_axis("KL divergence, nats", [value for values in series.values() for value in values]),
    )
    sums = ", ".join(f"{name} {number(sum(values))}" for name, values in series.items())
    blocks = max(map(len, series.values()))
    return Figure(
        "damage",
        "blocks",
        "damage of each block",
        "KL divergence of the model with only this block's norm outputs quantized, from the original. "
        f"Sum over blocks: {sums}.",
        {"data": [_curve(name, list(range(len(values))), values) for name, values in series.items()], "layout": layout},
        ["block", *series],
        [
            [block, *(values[block] if block < len(values) else None for values in series.values())]
            for block in range(blocks)
        ],
    )


def weight_errors(inspection: Inspection) -> Figure | None:
    """What rounding to nearest costs the weights: a box over the blocks for every kind of layer."""
    if not inspection.weights:
        return None
    rotations = list(dict.fromkeys(name for entry in inspection.weights for name in entry["error"]))
    data = []
    for name in rotations:
        entries = [entry for entry in inspection.weights if name in entry["error"]]
        data.append(
            {
                **{"type": "box", "name": plain(name), "boxpoints": "outliers", "line": {"width": 1.25}},
                **{"marker": {"color": style(name).colour, "symbol": style(name).symbol, "size": 4}},
                "x": [plain(entry["layer"].rpartition(".")[2]) for entry in entries],
                "y": digits(entry["error"][name] for entry in entries),
            }
        )
    means = ", ".join(
        f"{name} {number(mean([entry['error'].get(name) for entry in inspection.weights]))}" for name in rotations
    )
    return Figure(
        "weight-errors",
        "blocks",
        "error of the weights",
        f"Relative error of 4-bit weights rounded to nearest; a box spans the blocks. Mean of all layers: {means}.",
        {"data": data, "layout": _layout(400, boxmode="group", xaxis=_axis(""), yaxis=_axis("‖W − Q(W)‖ / ‖W‖"))},
        ["block", "layer", *rotations],
        [
            [entry["block"], entry["layer"], *(entry["error"].get(name) for name in rotations)]
            for entry in inspection.weights
        ],
    )


def cache_errors(inspection: Inspection) -> Figure | None:
    """The error of quantized keys and values, plain and rotated."""
    if not inspection.kv:
        return None
    blocks = [entry["block"] for entry in inspection.kv]
    series = {
        (kind, how): [entry[kind][how] for entry in inspection.kv]
        for kind in ("keys", "values")
        for how in ("plain", "rotated")
    }
    data = [_curve(how, blocks, values, panel=(kind == "values") + 1) for (kind, how), values in series.items()]
    layout = _panels(["keys", "values"], "relative error", itertools.chain(*series.values()))
    means = ", ".join(f"{kind} {how} {number(mean(values))}" for (kind, how), values in series.items())
    return Figure(
        "cache-errors",
        "blocks",
        "error of keys and values",
        "Relative error of the quantized cache; keys after RoPE rotated by R3, values by R2. "
        f"Mean of the blocks: {means}.",
        {"data": data, "layout": layout},
        ["block", *(f"{kind}, {how}" for kind, how in series)],
        [[block, *(values[place] for values in series.values())] for place, block in enumerate(blocks)],
    )


def surfaces(inspection: Inspection) -> list[Figure]:
    """|x R| over tokens and channels, on the same scale for all rotations."""
    pooled = {name: max_pooled(surface, SURFACE_CELLS) for name, surface in inspection.surfaces.items()}
    top = max((float(z.max()) for z, _, _ in pooled.values()), default=0.0)
    made = []
    for name, (z, tokens, places) in pooled.items():
        surface = inspection.surfaces[name]
        token, channel = (int(i) for i in np.unravel_index(int(surface.argmax()), surface.shape))
        peak, middle = float(surface.max()), float(np.median(surface))
        scene: dict[str, Any] = {
            "xaxis": _scene_axis("channel"),
            "yaxis": _scene_axis("token"),
            "zaxis": _scene_axis("|x R|", range=[0, 1.02 * top]),
            **{"aspectmode": "manual", "aspectratio": {"x": 1.5, "y": 1.0, "z": 0.75}},
            "camera": {"eye": {"x": -1.2, "y": -1.75, "z": 0.85}, "center": {"x": -0.06, "y": 0.04, "z": -0.2}},
        }
        data = {
            **{
                "type": "surface",
                "z": [digits(row, 3) for row in z.tolist()],
                "x": places.tolist(),
                "y": tokens.tolist(),
            },
            **{"colorscale": COLOURS, "cmin": 0, "cmax": top, "showscale": False},
            "lighting": {"ambient": 0.75, "diffuse": 0.5, "specular": 0.05},
            "hovertemplate": "token %{y}, channel %{x}: %{z}<extra></extra>",
        }
        pools = -(-surface.shape[0] // z.shape[0]), -(-surface.shape[1] // z.shape[1])
        cells = "" if pools == (1, 1) else f" A cell is the maximum of {pools[0]} × {pools[1]} entries."
        made.append(
            Figure(
                f"surface-{_slug(name)}",
                "surfaces",
                f"|x R| under {name}",
                f"At {inspection.surface_norm}: largest {number(peak)} at token {token}, channel {channel}; "
                f"median {number(middle)}.{cells}",
                {"data": [data], "layout": _layout(340, scene=scene, margin={"l": 0, "r": 0, "t": 0, "b": 0})},
                ["token", "largest", "in channel", "median"],
                [[i, float(row.max()), int(row.argmax()), float(np.median(row))] for i, row in enumerate(surface)],
            )
        )
    return made


def sampled_ranks(count: int, limit: int) -> Int[np.ndarray, " chosen"]:
    """At most `limit` of the ranks 0 … count − 1, both ends among them, half evenly and half by ratio."""
    if count <= limit:
        return np.arange(count)
    even = np.linspace(0, count - 1, limit - limit // 2)
    ratio = np.geomspace(1, count, limit // 2) - 1  # dense where a logarithmic axis is wide
    return np.unique(np.rint(np.concatenate([even, ratio])).astype(np.int64))


def max_pooled(
    surface: Float[np.ndarray, "rows columns"], limit: tuple[int, int]
) -> tuple[Float[np.ndarray, "cells more_cells"], Int[np.ndarray, " cells"], Int[np.ndarray, " more_cells"]]:
    """The largest entries of equal cells, at most `limit` of them each way, and where their rows and columns begin."""
    rows, columns = (np.arange(0, n, -(-n // most)) for n, most in zip(surface.shape, limit, strict=True))
    return np.maximum.reduceat(np.maximum.reduceat(surface, rows, axis=0), columns, axis=1), rows, columns


def by_seeds(records: Iterable[Record]) -> Iterable[list[Record]]:
    """Records that differ in nothing but the seed, together, in the order of their first."""
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(without_seed(record), []).append(record)
    return groups.values()


def mean(values: Iterable[Any]) -> float | None:
    """Of the numbers among the values."""
    known = [value for value in values if is_finite(value)]
    return statistics.fmean(known) if known else None


def number(value: Any) -> str:
    """As a reader wants it: about four digits."""
    if not is_finite(value):
        return "–" if value is None else str(value)
    if value == 0 or (isinstance(value, int) and abs(value) < 1e5):
        return str(int(value))
    size = abs(value)
    if size >= 1e5 or size < 1e-3:
        return f"{value:.2e}"
    return f"{value:.{0 if size >= 1000 else 2 if size >= 10 else 3 if size >= 1 else 4}f}"


def digits(values: Iterable[Any], count: int = 4) -> list[float | None]:
    """Values with so many digits, for the page to stay small; what is no number is missing."""
    return [float(f"{value:.{count}g}") if is_finite(value) else None for value in values]


def plain(text: Any, most: int = 60) -> str:
    """A text that plotly shows as it is, markup included, and not endlessly."""
    return html.escape(shorten(str(text), most), quote=False)


def style(name: str) -> Style:
    """The look of a rotation or method."""
    return STYLES.get(name) or OTHER_STYLES[sum(name.encode(errors="replace")) % len(OTHER_STYLES)]


def _slug(*names: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", "-".join(names).lower())[:60].strip("-")


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


def _layout(height: int, **more: Any) -> dict[str, Any]:
    return {
        "template": {"data": {}, "layout": {}},  # plotly's Python side would put one of its own here
        "height": height,
        "margin": {"l": 60, "r": 16, "t": 24, "b": 48},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"family": FONT, "size": 12, "color": TEXT},
        "legend": {
            "orientation": "h",
            "x": 0,
            "xanchor": "left",
            "y": 1,
            "yanchor": "bottom",
            "itemsizing": "constant",
        },
        "hovermode": "closest",
        "hoverlabel": {"font": {"family": FONT}},
        "showlegend": True,
        **more,
    }


def _axis(title: str, values: Sequence[float] = (), **more: Any) -> dict[str, Any]:
    """An axis; logarithmic if the values span much."""
    axis: dict[str, Any] = {
        **{"title": {"text": title, "standoff": 12}, "automargin": True, "zeroline": False},
        **{"showline": True, "linecolor": LINE, "gridcolor": GRID, "ticks": "outside", "tickcolor": LINE},
        **more,
    }
    positive = [value for value in values if is_finite(value) and value > 0]
    if positive and max(positive) > LOG_SPREAD * min(positive):
        low, high = (math.log10(value) for value in (min(positive), max(positive)))
        steps = (1, 2, 5) if high - low < 1.5 else (1, 3) if high - low < 3 else (1,)
        decades = range(math.floor(low) - 1, math.ceil(high) + 1)
        ticks = [float(f"{step}e{decade}") for decade in decades for step in steps]
        margin = 0.06 * (high - low)
        axis |= {"type": "log", "range": [low - margin, high + margin]}
        axis |= {"tickvals": ticks, "ticktext": [f"{tick:g}" for tick in ticks]}
    return axis


def _scene_axis(title: str, **more: Any) -> dict[str, Any]:
    return {"title": {"text": title}, "nticks": 5, "gridcolor": GRID, "linecolor": LINE, "zeroline": False, **more}


def _marks(method: str, **more: Any) -> dict[str, Any]:
    look = style(method)
    marker = {"color": look.colour, "symbol": look.symbol, "size": 9, "opacity": 0.9}
    return {"type": "scatter", "mode": "markers", "name": plain(method), "marker": marker, **more}


def _curve(name: str, x: Sequence[Any], y: Sequence[float], panel: int = 1) -> dict[str, Any]:
    look = style(name)
    return {
        **{"type": "scatter", "mode": "lines+markers", "name": plain(name), "legendgroup": plain(name)},
        **{"showlegend": panel == 1, "yaxis": _panel("y", panel)},
        **{"x": list(x), "y": digits(y), "line": {"color": look.colour, "dash": look.dash, "width": 1.5}},
        "marker": {"color": look.colour, "symbol": look.symbol, "size": 5},
        "hovertemplate": "%{fullData.name}: block %{x} has %{y}<extra></extra>",
    }


def _rule(axis: str, value: float) -> dict[str, Any]:
    """A dashed line across the plot."""
    other = "y" if axis == "x" else "x"
    ends = {f"{axis}0": value, f"{axis}1": value, f"{other}0": 0, f"{other}1": 1}
    refs = {f"{axis}ref": axis, f"{other}ref": "paper"}
    return {"type": "line", **ends, **refs, "line": {"dash": "dash", "width": 1.25, "color": LINE}}


def _rules(axis: str, values: Sequence[float], scale: Mapping[str, Any], anchor: str = "left") -> dict[str, Any]:
    """Dashed lines where the unquantized models are, with their numbers beside them, on the side of the marks."""
    log = scale.get("type") == "log"
    seen = [value for value in values if value > 0 or not log]  # a divergence of 0 has no place on a logarithmic axis
    place = {
        "x": {"xref": "x", "y": 0, "yref": "paper", "xanchor": anchor, "yanchor": "bottom"},
        "y": {"yref": "y", "x": 0, "xref": "paper", "xanchor": "left", "yanchor": "bottom"},
    }[axis]
    return {
        "shapes": [_rule(axis, value) for value in seen],
        "annotations": [
            {
                **{"text": f"unquantized {number(value)}", "showarrow": False, "font": {"size": 11}, **place},
                axis: math.log10(value) if log else value,  # annotations are placed in powers of ten
            }
            for value in seen
        ],
    }


def _panels(
    names: Sequence[str], title: str, values: Iterable[float | None], x: str = "block", **more: Any
) -> dict[str, Any]:
    """A layout of panels one below the other, sharing the x axis and the scale of the y axis."""
    gap = 0.1 / len(names) ** 0.5
    height = (1 - gap * (len(names) - 1)) / len(names)
    flat = [value for value in values if value is not None and math.isfinite(value)]
    scale = _axis("", flat)
    if "range" not in scale and flat:
        margin = 0.06 * (max(flat) - min(flat)) or 0.5
        scale["range"] = [min(flat) - margin if min(flat) else 0, max(flat) + margin]
    layout = _layout(110 + 220 * len(names), xaxis=_axis(x, anchor=_panel("y", len(names))), **more)
    for place, name in enumerate(names):
        upper = 1 - place * (height + gap)
        words = {"title": {"text": f"{plain(name)}<br>{title}"}, "domain": [max(0, upper - height), upper]}
        layout["yaxis" + _panel("y", place + 1)[1:]] = {**scale, **words}
    return layout


def _panel(axis: str, number: int) -> str:
    """Plotly's name of an axis: y, y2, …"""
    return axis if number == 1 else f"{axis}{number}"


def _by_norm(
    inspection: Inspection,
    series: Mapping[str, Sequence[float]],
    name: str,
    title: str,
    unit: str,
    caption: str,
    reference: float | None = None,
) -> Figure | None:
    """A number of every norm over the blocks: a panel for each kind of norm, a curve for each rotation."""
    if not series:
        return None
    places: dict[str, list[int]] = {}  # kind of norm → where it stands among the norms
    for place, norm in enumerate(inspection.norms):
        places.setdefault(norm.partition(".")[2], []).append(place)
    layout = _panels(list(places), unit, itertools.chain(*series.values(), [] if reference is None else [reference]))
    if reference is not None:
        layout["shapes"] = [
            {**_rule("y", reference), "yref": _panel("y", panel)} for panel in range(1, len(places) + 1)
        ]
    data = [
        _curve(rotation, [inspection.norms[i].partition(".")[0] for i in chosen], [values[i] for i in chosen], panel)
        for panel, chosen in enumerate(places.values(), start=1)
        for rotation, values in series.items()
    ]
    return Figure(
        name,
        "rotations",
        title,
        caption,
        {"data": data, "layout": layout},
        ["norm", *series],
        [[norm, *(values[place] for values in series.values())] for place, norm in enumerate(inspection.norms)],
    )
