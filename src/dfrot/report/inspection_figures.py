"""The figures of an inspection: errors of tokens, norms, weights and cache, outlier channels, sensitivity, surfaces."""

import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from dfrot.report.drawing import Figure, digits, new_axis, new_plot, plain, rule, scatter, slug, style
from dfrot.report.inspection import Inspection
from dfrot.report.words import mean, number

CURVE_POINTS = 600  # of one curve; a screen is not wider
MASSIVE_POINTS = 200  # marks of massive tokens on one curve
SURFACE_CELLS = (64, 192)  # tokens × channels; more would add megabytes without being visible

Curves = Mapping[str, tuple[Sequence[Any], Sequence[float]]]  # name → blocks and values
Drawn = tuple[dict[str, Any], list[tuple[str, Sequence[Any]]]]  # plot, and columns of its data table


def inspection_figures(inspection: Inspection) -> Iterator[Figure | None]:
    """All figures, in the page's order; None where there is no data."""
    yield token_errors(inspection)
    if inspection.stats["surface"] in inspection.stats["norms"]:
        yield token_errors(inspection, inspection.stats["surface"])
    yield norm_errors(inspection)
    yield kurtosis(inspection)
    yield channels(inspection)
    yield sensitivity(inspection)
    yield weight_errors(inspection)
    yield cache_errors(inspection)
    yield from surfaces(inspection)


def token_errors(inspection: Inspection, norm: str | None = None) -> Figure:
    """The relative error of every token, sorted, a curve for each rotation (the figure of DFRot's motivation)."""
    norms = inspection.stats["norms"]
    which = slice(None) if norm is None else norms.index(norm)
    massive = inspection.is_massive[which].ravel()
    data, rows = [], []
    hover = "%{fullData.name}: token %{x} has %{y:.4f}"
    for rotation, errors in inspection.errors.items():
        error = errors[which].ravel()  # (tokens,), or (norms · tokens,)
        order = np.argsort(-error, kind="stable")
        marked = np.flatnonzero(massive[order])
        marker = {"symbol": f"{style(rotation).symbol}-open", "size": 6}
        marks = {"name": f"{plain(rotation)}, massive", "showlegend": False, "marker": marker}
        for mode, more, candidates, most in (
            ("lines", {}, np.arange(len(error)), CURVE_POINTS),
            ("markers", marks, marked, MASSIVE_POINTS),
        ):
            if len(candidates):
                ranks = candidates[sampled_ranks(len(candidates), most)]
                x, y = (ranks + 1).tolist(), digits(error[order][ranks].tolist())
                # the legend switches curve and marks together
                data.append(scatter(rotation, x, y, mode, hover, legendgroup=plain(rotation), **more))
        means = [mean(error[~massive].tolist()), mean(error[massive].tolist())]
        rows.append([rotation, *means, *np.quantile(error, [1, 0.99, 0.9, 0.5, 0.1, 0]).tolist()])
    heads = ("rotation", "mean, ordinary", "mean, massive", "largest", "99 %", "90 %", "median", "10 %", "smallest")
    found = f"Marks: massive tokens ({int(massive.sum())}). " if massive.any() else ""
    x_axis, y_axis = new_axis("tokens, by falling error"), new_axis("‖x − Q(x)‖ / ‖x‖", rangemode="tozero")
    return Figure(
        "token-errors" if norm is None else "token-errors-at-norm",
        "rotations",
        f"error of each token at {norm or f'all {len(norms)} norms'}",
        f"Relative error of quantized norm outputs, sorted for each rotation. {found}"
        f"Median: {_listed((row[0], row[6]) for row in rows)}.",
        new_plot(data, 400, xaxis=x_axis, yaxis=y_axis),
        list(zip(heads, zip(*rows, strict=True), strict=True)),
        log_x=True,
    )


def norm_errors(inspection: Inspection) -> Figure:
    """The mean error of the tokens at every norm."""
    series = {rotation: errors.mean(axis=1).tolist() for rotation, errors in inspection.errors.items()}
    caption = f"Mean of all norms: {_listed((name, mean(values)) for name, values in series.items())}."
    drawn = _by_norm(inspection, series, "mean ‖x − Q(x)‖ / ‖x‖")
    return Figure("norm-errors", "rotations", "error at each norm", caption, *drawn)


def kurtosis(inspection: Inspection) -> Figure:
    """Kurtosis of every norm output: the recorded excess plus 3, which suits a logarithmic axis."""
    series = {name: [excess + 3 for excess in values] for name, values in inspection.stats["kurtosis"].items()}
    medians = _listed((name, statistics.median(values)) for name, values in series.items())
    caption = f"A normal distribution has 3 (the dashed line). Median of the norms: {medians}."
    drawn = _by_norm(inspection, series, "kurtosis", reference=[3.0])
    return Figure("kurtosis", "rotations", "kurtosis of norm outputs", caption, *drawn)


def channels(inspection: Inspection) -> Figure:
    """How far the largest channels stand out before any rotation."""
    norms, by_norm = inspection.stats["norms"], inspection.stats["channels"]
    largest = [[channel["value"] for channel in entry["largest"]] for entry in by_norm]
    series = {
        "largest channel": [max(values) for values in largest],
        "last of those listed": [min(values) for values in largest],
        "median channel": [entry["median"] for entry in by_norm],
    }
    top = max(range(len(norms)), key=lambda place: max(largest[place]))
    peak = max(by_norm[top]["largest"], key=lambda channel: channel["value"])
    caption = (
        f"Largest entry of a channel over the tokens, without the norm's gain: channel {peak['channel']} at "
        f"{norms[top]} reaches {number(peak['value'])}, the median channel there {number(by_norm[top]['median'])}."
    )
    drawn = _by_norm(inspection, series, "max |x| of a channel")
    return Figure("channels", "rotations", "outlier channels of norm outputs", caption, *drawn)


def sensitivity(inspection: Inspection) -> Figure | None:
    """KL divergence from the original when the norm outputs of one block are quantized."""
    series = inspection.stats["sensitivity"]
    caption = (
        "KL divergence of the model with only this block's norm outputs quantized, from the original. "
        f"Sum over blocks: {_listed((name, sum(values)) for name, values in series.items())}."
    )
    drawn = _by_block({"": series}, "KL divergence, nats")
    return drawn and Figure("sensitivity", "blocks", "sensitivity of each block", caption, *drawn)


def weight_errors(inspection: Inspection) -> Figure | None:
    """The error of weights rounded to nearest: a box over the blocks for every kind of layer."""
    layers = inspection.stats["weights"]
    if not layers:
        return None
    kinds = [plain(layer["layer"].rpartition(".")[2]) for layer in layers]
    data, means = [], []
    columns: list[tuple[str, Sequence[Any]]]
    columns = [("block", [layer["block"] for layer in layers]), ("layer", [layer["layer"] for layer in layers])]
    for name in dict.fromkeys(name for layer in layers for name in layer["error"]):
        errors = [layer["error"].get(name) for layer in layers]
        marker = {"color": style(name).colour, "symbol": style(name).symbol, "size": 4}
        box = {"type": "box", "name": plain(name), "boxpoints": "outliers", "line": {"width": 1.25}, "marker": marker}
        data.append({**box, "x": kinds, "y": digits(errors)})
        means.append((name, mean(errors)))
        columns.append((name, errors))
    caption = (
        f"Relative error of weights rounded to nearest; a box spans the blocks. Mean of all layers: {_listed(means)}."
    )
    plot = new_plot(data, 400, boxmode="group", xaxis=new_axis(""), yaxis=new_axis("‖W − Q(W)‖ / ‖W‖"))
    return Figure("weight-errors", "blocks", "error of the weights", caption, plot, columns)


def cache_errors(inspection: Inspection) -> Figure | None:
    """The error of quantized keys and values, plain and rotated."""
    kv = inspection.stats["kv"]
    means = _listed((f"{kind} {how}", mean(values)) for kind, by_how in kv.items() for how, values in by_how.items())
    what = "Relative error of the quantized cache; keys after RoPE rotated by R3, values by R2."
    caption = f"{what} Mean of the blocks: {means}."
    drawn = _by_block(kv, "relative error")
    return drawn and Figure("cache-errors", "blocks", "error of keys and values", caption, *drawn)


def surfaces(inspection: Inspection) -> Iterator[Figure]:
    """|x R| over tokens and channels, on the same scale for all rotations."""
    top = max(float(surface.max()) for surface in inspection.surfaces.values())
    titles = {"xaxis": "channel", "yaxis": "token", "zaxis": "|x R|"}
    scene: dict[str, Any] = {axis: {"title": {"text": title}} for axis, title in titles.items()}
    scene["zaxis"]["range"] = [0, 1.02 * top]
    look = {"type": "surface", "cmin": 0, "cmax": top}
    look |= {"hovertemplate": "token %{y}, channel %{x}: %{z}<extra></extra>"}
    for name, surface in inspection.surfaces.items():
        z, tokens, places = max_pooled(surface, SURFACE_CELLS)
        token, channel = (int(i) for i in np.unravel_index(int(surface.argmax()), surface.shape))
        data = {**look, "x": places.tolist(), "y": tokens.tolist(), "z": [digits(row, 3) for row in z.tolist()]}
        pools = -(-surface.shape[0] // z.shape[0]), -(-surface.shape[1] // z.shape[1])
        pooled = "" if pools == (1, 1) else f" Each point is the maximum of {pools[0]} × {pools[1]} entries."
        yield Figure(
            f"surface-{slug(name)}",
            "surfaces",
            f"|x R| under {name}",
            f"At {inspection.stats['surface']}: largest {number(float(surface.max()))} at token {token}, channel "
            f"{channel}; median {number(float(np.median(surface)))}.{pooled}",
            new_plot([data], 340, scene=scene, margin={"l": 0, "r": 0, "t": 0, "b": 0}),
            [
                ("token", range(len(surface))),
                ("largest", surface.max(axis=1).tolist()),
                ("in channel", surface.argmax(axis=1).tolist()),
                ("median", np.median(surface, axis=1).tolist()),
            ],
        )


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


def _by_norm(
    inspection: Inspection, series: Mapping[str, Sequence[float]], unit: str, reference: Sequence[float] = ()
) -> Drawn:
    """A number of every norm over the blocks: a panel for each kind of norm, a curve for each rotation."""
    norms = inspection.stats["norms"]
    panels: dict[str, Curves] = {}
    for kind in dict.fromkeys(norm.partition(".")[2] for norm in norms):
        places = [place for place, norm in enumerate(norms) if norm.partition(".")[2] == kind]
        blocks = [norms[place].partition(".")[0] for place in places]
        panels[kind] = {curve: (blocks, [values[place] for place in places]) for curve, values in series.items()}
    return _panels(unit, panels, reference), [("norm", norms), *series.items()]


def _by_block(panels: Mapping[str, Mapping[str, Sequence[float]]], unit: str) -> Drawn | None:
    """A number of every block: panels by their titles, with a curve for each series; None if there are none."""
    columns = [(f"{panel}, {key}" if panel else key, ys) for panel in panels for key, ys in panels[panel].items()]
    if not columns:
        return None
    blocks = list(range(len(columns[0][1])))
    curves = {panel: {key: (blocks, ys) for key, ys in series.items()} for panel, series in panels.items()}
    return _panels(unit, curves), [("block", blocks), *columns]


def _panels(unit: str, panels: Mapping[str, Curves], reference: Sequence[float] = ()) -> dict[str, Any]:
    """Panels by their titles, one below the other, on common axes; dashed lines across them mark the references."""
    scale = new_axis("", [*reference, *(y for curves in panels.values() for _, ys in curves.values() for y in ys)])
    axes = [f"y{place or ''}" for place in (0, *range(2, len(panels) + 1))]  # plotly's names: y, y2, y3, …
    layout: dict[str, Any] = {"grid": {"rows": len(panels), "columns": 1, "xaxes": ["x"], "yaxes": axes, "ygap": 0.15}}
    data = []
    for axis, (title, curves) in zip(axes, panels.items(), strict=True):
        words = {"title": {"text": f"{plain(title)}<br>{unit}" if title else unit}}
        layout[f"yaxis{axis[1:]}"] = {**scale, **words}
        for name, (x, y) in curves.items():
            hover = "%{fullData.name}: block %{x} has %{y}"
            legend = {"legendgroup": plain(name), "showlegend": axis == "y"}  # the first panel's legend switches all
            data.append(scatter(name, x, digits(y), "lines+markers", hover, yaxis=axis, **legend))
    layout["xaxis"] = new_axis("block", anchor=axes[-1])
    layout["shapes"] = [rule(value, axis) for value in reference for axis in axes]
    return new_plot(data, 110 + 220 * len(panels), **layout)


def _listed(pairs: Iterable[tuple[str, float | None]]) -> str:
    return ", ".join(f"{name} {number(value)}" for name, value in pairs)
