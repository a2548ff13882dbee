"""The figures of an inspection: errors of tokens, norms, weights and cache, outlier channels, sensitivity, surfaces."""

import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from dfrot.inspect.inspection import Inspection
from dfrot.report.drawing import Figure, digits, new_axis, new_plot, plain, rule, scatter, slug, style
from dfrot.report.words import mean, number

CURVE_POINTS = 600  # of one curve; a screen is not wider
MASSIVE_POINTS = 200  # marks of massive tokens on one curve
QUANTILES = {"largest": 1, "99 %": 0.99, "90 %": 0.9, "median": 0.5, "10 %": 0.1, "smallest": 0}
SURFACE_CELLS = (64, 192)  # tokens × channels; more would add megabytes without being visible

# A panel: the blocks along its x axis, and a curve by its name.
Panel = tuple[Sequence[Any], Mapping[str, Sequence[float]]]


def inspection_figures(inspection: Inspection) -> Iterator[Figure]:
    """All figures for which there is data, in the page's order."""
    stats = inspection.stats
    yield token_errors(inspection)
    if stats["surface"] in stats["norms"]:
        yield token_errors(inspection, stats["surface"])
    yield from curves_by_norm(inspection)
    if series := stats["sensitivity"]:
        caption = (
            "KL divergence of the model with only this block's norm outputs quantized, from the original. "
            f"Sum over blocks: {_listed((name, sum(values)) for name, values in series.items())}."
        )
        yield _by_block("sensitivity", "sensitivity of each block", caption, "KL divergence, nats", {"": series})
    if stats["weights"]:
        yield weight_errors(inspection)
    kv = stats["kv"]
    if means := [(f"{kind} {how}", mean(ys)) for kind, by_how in kv.items() for how, ys in by_how.items()]:
        what = "Relative error of the quantized cache; keys after RoPE rotated by R3, values by R2."
        caption = f"{what} Mean of the blocks: {_listed(means)}."
        yield _by_block("cache-errors", "error of keys and values", caption, "relative error", kv)
    yield from surfaces(inspection)


def token_errors(inspection: Inspection, norm: str | None = None) -> Figure:
    """The relative error of every token, sorted, a curve for each rotation (the figure of DFRot's motivation)."""
    norms = inspection.stats["norms"]
    which = slice(None) if norm is None else norms.index(norm)
    massive = inspection.is_massive[which].ravel()
    data, table = [], {}
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
        table[rotation] = [*means, *np.quantile(error, list(QUANTILES.values())).tolist()]
    heads = ("mean, ordinary", "mean, massive", *QUANTILES)
    columns = dict(zip(heads, zip(*table.values(), strict=True), strict=True))
    found = f"Marks: massive tokens ({int(massive.sum())}). " if massive.any() else ""
    axes = {"xaxis": new_axis("tokens, by falling error"), "yaxis": new_axis("‖x − Q(x)‖ / ‖x‖", rangemode="tozero")}
    return Figure(
        "token-errors" if norm is None else "token-errors-at-norm",
        "rotations",
        f"error of each token at {norm or f'all {len(norms)} norms'}",
        f"Relative error of quantized norm outputs, sorted for each rotation. {found}"
        f"Median: {_listed(zip(table, columns['median'], strict=True))}.",
        new_plot(data, 400, **axes),
        [("rotation", list(table)), *columns.items()],
        log_x=True,
    )


def curves_by_norm(inspection: Inspection) -> Iterator[Figure]:
    """A number of every norm over the blocks: a panel for each kind of norm, a curve for each rotation."""
    norms, by_norm = inspection.stats["norms"], inspection.stats["channels"]
    errors = {rotation: errors.mean(axis=1).tolist() for rotation, errors in inspection.errors.items()}
    means = _listed((name, mean(values)) for name, values in errors.items())
    # the recorded excess plus 3, which suits a logarithmic axis
    kurtosis = {name: [excess + 3 for excess in values] for name, values in inspection.stats["kurtosis"].items()}
    medians = _listed((name, statistics.median(values)) for name, values in kurtosis.items())
    largest = [[channel["value"] for channel in entry["largest"]] for entry in by_norm]
    channels = {
        "largest channel": list(map(max, largest)),
        "last of those listed": list(map(min, largest)),
        "median channel": [entry["median"] for entry in by_norm],
    }
    norm, top = max(zip(norms, by_norm, strict=True), key=lambda pair: max(c["value"] for c in pair[1]["largest"]))
    peak = max(top["largest"], key=lambda channel: channel["value"])
    outlier = (
        f"Largest entry of a channel over the tokens, without the norm's gain: channel {peak['channel']} at "
        f"{norm} reaches {number(peak['value'])}, the median channel there {number(top['median'])}."
    )
    gaussian = "A normal distribution has 3 (the dashed line). Median of the norms:"
    for name, title, caption, unit, series, reference in (
        ("norm-errors", "error at each norm", f"Mean of all norms: {means}.", "mean ‖x − Q(x)‖ / ‖x‖", errors, []),
        ("kurtosis", "kurtosis of norm outputs", f"{gaussian} {medians}.", "kurtosis", kurtosis, [3.0]),
        ("channels", "outlier channels of norm outputs", outlier, "max |x| of a channel", channels, []),
    ):
        panels: dict[str, Panel] = {}
        for kind in dict.fromkeys(norm.partition(".")[2] for norm in norms):
            places = [place for place, norm in enumerate(norms) if norm.partition(".")[2] == kind]
            curves = {curve: [values[place] for place in places] for curve, values in series.items()}
            panels[kind] = [norms[place].partition(".")[0] for place in places], curves
        columns = [("norm", norms), *series.items()]
        yield Figure(name, "rotations", title, caption, _panels(unit, panels, reference), columns)


def weight_errors(inspection: Inspection) -> Figure:
    """The error of weights rounded to nearest: a box over the blocks for every kind of layer."""
    layers = inspection.stats["weights"]
    kinds = [plain(layer["layer"].rpartition(".")[2]) for layer in layers]
    names = dict.fromkeys(name for layer in layers for name in layer["error"])
    errors = {name: [layer["error"].get(name) for layer in layers] for name in names}
    boxes = []
    for name, values in errors.items():
        marker = {"color": style(name).colour, "symbol": style(name).symbol, "size": 4}
        box = {"type": "box", "name": plain(name), "boxpoints": "outliers", "line": {"width": 1.25}, "marker": marker}
        boxes.append({**box, "x": kinds, "y": digits(values)})
    return Figure(
        "weight-errors",
        "blocks",
        "error of the weights",
        "Relative error of weights rounded to nearest; a box spans the blocks. "
        f"Mean of all layers: {_listed((name, mean(values)) for name, values in errors.items())}.",
        new_plot(boxes, 400, boxmode="group", xaxis=new_axis(""), yaxis=new_axis("‖W − Q(W)‖ / ‖W‖")),
        [*((key, [layer[key] for layer in layers]) for key in ("block", "layer")), *errors.items()],
    )


def surfaces(inspection: Inspection) -> Iterator[Figure]:
    """|x R| over tokens and channels, on the same scale for all rotations."""
    top = max(float(surface.max()) for surface in inspection.surfaces.values())
    z_axis = new_axis("|x R|", range=[0, 1.02 * top])
    scene = {"xaxis": new_axis("channel"), "yaxis": new_axis("token"), "zaxis": z_axis}
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


def _by_block(
    name: str, title: str, caption: str, unit: str, series: Mapping[str, Mapping[str, Sequence[float]]]
) -> Figure:
    """A number of every block: panels by their titles, with a curve for each series."""
    columns = [(f"{panel}, {key}" if panel else key, ys) for panel in series for key, ys in series[panel].items()]
    blocks = range(len(columns[0][1]))
    plot = _panels(unit, {panel: (list(blocks), curves) for panel, curves in series.items()})
    return Figure(name, "blocks", title, caption, plot, [("block", blocks), *columns])


def _panels(unit: str, panels: Mapping[str, Panel], reference: Sequence[float] = ()) -> dict[str, Any]:
    """Panels by their titles, one below the other, on common axes; dashed lines across them mark the references."""
    scale = new_axis("", [*reference, *(y for _, curves in panels.values() for ys in curves.values() for y in ys)])
    axes = [f"y{place or ''}" for place in (0, *range(2, len(panels) + 1))]  # plotly's names: y, y2, y3, …
    layout: dict[str, Any] = {"grid": {"rows": len(panels), "columns": 1, "xaxes": ["x"], "yaxes": axes, "ygap": 0.15}}
    data = []
    hover = "%{fullData.name}: block %{x} has %{y}"
    for axis, (title, (blocks, curves)) in zip(axes, panels.items(), strict=True):
        layout[f"yaxis{axis[1:]}"] = {**scale, "title": {"text": f"{plain(title)}<br>{unit}" if title else unit}}
        for name, values in curves.items():
            legend = {"legendgroup": plain(name), "showlegend": axis == "y"}  # the first panel's legend switches all
            data.append(scatter(name, blocks, digits(values), "lines+markers", hover, yaxis=axis, **legend))
    layout["xaxis"] = new_axis("block", anchor=axes[-1])
    layout["shapes"] = [rule(value, axis) for value in reference for axis in axes]
    return new_plot(data, 110 + 220 * len(panels), **layout)


def _listed(pairs: Iterable[tuple[str, float | None]]) -> str:
    return ", ".join(f"{name} {number(value)}" for name, value in pairs)
