"""The figures of an inspection: errors of tokens, norms, weights and cache, outlier channels, sensitivity, surfaces."""

import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
from jaxtyping import Float, Int

from dfrot.report.drawing import (
    Curves,
    Figure,
    digits,
    new_axis,
    new_plot,
    panels_over_blocks,
    plain,
    scatter,
    slug,
    style,
)
from dfrot.report.inspection import Inspection
from dfrot.report.words import mean, number

CURVE_POINTS = 600  # of one curve; a screen is not wider
MASSIVE_POINTS = 200  # marks of massive tokens on one curve
SURFACE_CELLS = (64, 192)  # tokens × channels; more is megabytes, and cannot be seen


def inspection_figures(inspection: Inspection) -> Iterator[Figure | None]:
    """All of them, in the page's order."""
    yield token_errors(inspection)
    yield token_errors(inspection, inspection.stats["surface"])
    yield norm_errors(inspection)
    yield kurtosis(inspection)
    yield channels(inspection)
    yield sensitivity(inspection)
    yield weight_errors(inspection)
    yield cache_errors(inspection)
    yield from surfaces(inspection)


def token_errors(inspection: Inspection, norm: str | None = None) -> Figure | None:
    """The relative error of every token, sorted, a curve per rotation (the figure of DFRot's motivation)."""
    norms = inspection.stats["norms"]
    if norm is not None and norm not in norms:
        return None
    which = slice(None) if norm is None else norms.index(norm)
    massive = inspection.is_massive[which].ravel()
    data, rows = [], []
    hover = "%{fullData.name}: token %{x} has %{y:.4f}"
    for rotation, errors in inspection.errors.items():
        error = errors[which].ravel()  # (tokens,), or (norms · tokens,)
        order = np.argsort(-error, kind="stable")
        falling = error[order]
        group = {"legendgroup": plain(rotation)}  # the legend switches curve and marks together
        ranks = sampled_ranks(len(error), CURVE_POINTS)
        x, y = (ranks + 1).tolist(), digits(falling[ranks].tolist())
        data.append(scatter(rotation, x, y, "lines", hover, **group))
        ranks = np.flatnonzero(massive[order])
        if len(ranks):
            ranks = ranks[sampled_ranks(len(ranks), MASSIVE_POINTS)]
            marker = {"symbol": f"{style(rotation).symbol}-open", "size": 6}
            words = {"name": f"{plain(rotation)}, massive", "showlegend": False, "marker": marker, **group}
            x, y = (ranks + 1).tolist(), digits(falling[ranks].tolist())
            data.append(scatter(rotation, x, y, "markers", hover, **words))
        means = [mean(error[~massive].tolist()), mean(error[massive].tolist())]
        rows.append([rotation, *means, *np.quantile(error, [1, 0.99, 0.9, 0.5, 0.1, 0]).tolist()])
    heads = ("rotation", "mean, ordinary", "mean, massive", "largest", "99 %", "90 %", "median", "10 %", "smallest")
    marks = f"Marks: massive tokens ({int(massive.sum())}). " if massive.any() else ""
    return Figure(
        "token-errors" if norm is None else "token-errors-at-norm",
        "rotations",
        f"error of each token at {norm or f'all {len(norms)} norms'}",
        f"Relative error of quantized norm outputs, sorted for each rotation. {marks}"
        f"Median: {_listed((row[0], row[6]) for row in rows)}.",
        new_plot(
            data,
            400,
            xaxis=new_axis("tokens, by falling error"),
            yaxis=new_axis("‖x − Q(x)‖ / ‖x‖", rangemode="tozero"),
        ),
        list(zip(heads, zip(*rows, strict=True), strict=True)),
        log_x=True,
    )


def norm_errors(inspection: Inspection) -> Figure:
    """The mean error of the tokens at every norm."""
    series = {rotation: errors.mean(axis=1).tolist() for rotation, errors in inspection.errors.items()}
    caption = f"Mean of all norms: {_listed((name, mean(values)) for name, values in series.items())}."
    return _by_norm(inspection, series, "norm-errors", "error at each norm", "mean ‖x − Q(x)‖ / ‖x‖", caption)


def kurtosis(inspection: Inspection) -> Figure:
    """Kurtosis of every norm output; three more than the excess that is recorded, so that it can be logarithmic."""
    series = {name: [excess + 3 for excess in values] for name, values in inspection.stats["kurtosis"].items()}
    medians = _listed((name, statistics.median(values)) for name, values in series.items())
    caption = f"A normal distribution has 3 (the dashed line). Median of the norms: {medians}."
    return _by_norm(inspection, series, "kurtosis", "kurtosis of norm outputs", "kurtosis", caption, reference=[3.0])


def channels(inspection: Inspection) -> Figure:
    """How far the largest channels stick out of the rest, before any rotation."""
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
    return _by_norm(inspection, series, "channels", "outlier channels of norm outputs", "max |x| of a channel", caption)


def sensitivity(inspection: Inspection) -> Figure | None:
    """KL divergence from the original when the norm outputs of one block are quantized."""
    series = inspection.stats["sensitivity"]
    sums = _listed((name, sum(values)) for name, values in series.items())
    caption = (
        "KL divergence of the model with only this block's norm outputs quantized, from the original. "
        f"Sum over blocks: {sums}."
    )
    return _by_block({"": series}, "sensitivity", "sensitivity of each block", "KL divergence, nats", caption)


def weight_errors(inspection: Inspection) -> Figure | None:
    """What rounding to nearest costs the weights: a box over the blocks for every kind of layer."""
    layers = inspection.stats["weights"]
    if not layers:
        return None
    rotations = dict.fromkeys(name for layer in layers for name in layer["error"])
    series = {name: [layer["error"].get(name) for layer in layers] for name in rotations}
    data = [
        {
            "type": "box",
            "name": plain(name),
            "boxpoints": "outliers",
            "line": {"width": 1.25},
            "marker": {"color": style(name).colour, "symbol": style(name).symbol, "size": 4},
            "x": [plain(layer["layer"].rpartition(".")[2]) for layer in layers],
            "y": digits(values),
        }
        for name, values in series.items()
    ]
    return Figure(
        "weight-errors",
        "blocks",
        "error of the weights",
        "Relative error of weights rounded to nearest; a box spans the blocks. "
        f"Mean of all layers: {_listed((name, mean(values)) for name, values in series.items())}.",
        new_plot(data, 400, boxmode="group", xaxis=new_axis(""), yaxis=new_axis("‖W − Q(W)‖ / ‖W‖")),
        [
            ("block", [layer["block"] for layer in layers]),
            ("layer", [layer["layer"] for layer in layers]),
            *series.items(),
        ],
    )


def cache_errors(inspection: Inspection) -> Figure | None:
    """The error of quantized keys and values, plain and rotated."""
    kv = inspection.stats["kv"]
    means = _listed((f"{kind} {how}", mean(values)) for kind, by_how in kv.items() for how, values in by_how.items())
    caption = (
        "Relative error of the quantized cache; keys after RoPE rotated by R3, values by R2. "
        f"Mean of the blocks: {means}."
    )
    return _by_block(kv, "cache-errors", "error of keys and values", "relative error", caption)


def surfaces(inspection: Inspection) -> Iterator[Figure]:
    """|x R| over tokens and channels, on the same scale for all rotations."""
    top = max(float(surface.max()) for surface in inspection.surfaces.values())
    for name, surface in inspection.surfaces.items():
        z, tokens, places = max_pooled(surface, SURFACE_CELLS)
        token, channel = (int(i) for i in np.unravel_index(int(surface.argmax()), surface.shape))
        scene = {
            "xaxis": {"title": {"text": "channel"}},
            "yaxis": {"title": {"text": "token"}},
            "zaxis": {"title": {"text": "|x R|"}, "range": [0, 1.02 * top]},
        }
        data = {
            "type": "surface",
            "x": places.tolist(),
            "y": tokens.tolist(),
            "z": [digits(row, 3) for row in z.tolist()],
            "cmin": 0,
            "cmax": top,
            "hovertemplate": "token %{y}, channel %{x}: %{z}<extra></extra>",
        }
        pools = -(-surface.shape[0] // z.shape[0]), -(-surface.shape[1] // z.shape[1])
        cells = "" if pools == (1, 1) else f" A cell is the maximum of {pools[0]} × {pools[1]} entries."
        yield Figure(
            f"surface-{slug(name)}",
            "surfaces",
            f"|x R| under {name}",
            f"At {inspection.stats['surface']}: largest {number(float(surface.max()))} at token {token}, channel "
            f"{channel}; median {number(float(np.median(surface)))}.{cells}",
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
    inspection: Inspection,
    series: Mapping[str, Sequence[float]],
    name: str,
    title: str,
    unit: str,
    caption: str,
    reference: Sequence[float] = (),
) -> Figure:
    """A number of every norm over the blocks: a panel for each kind of norm, a curve for each rotation."""
    norms = inspection.stats["norms"]
    panels: dict[str, Curves] = {}
    for kind in dict.fromkeys(norm.partition(".")[2] for norm in norms):
        places = [place for place, norm in enumerate(norms) if norm.partition(".")[2] == kind]
        blocks = [norms[place].partition(".")[0] for place in places]
        panels[kind] = {curve: (blocks, [values[place] for place in places]) for curve, values in series.items()}
    plot = panels_over_blocks(unit, panels, reference)
    return Figure(name, "rotations", title, caption, plot, [("norm", norms), *series.items()])


def _by_block(
    panels: Mapping[str, Mapping[str, Sequence[float]]], name: str, title: str, unit: str, caption: str
) -> Figure | None:
    """Numbers of every block: panels by their titles, in each of them series of numbers by their names."""
    columns = [(f"{panel}, {key}" if panel else key, ys) for panel in panels for key, ys in panels[panel].items()]
    if not columns:
        return None
    blocks = list(range(len(columns[0][1])))
    curves = {panel: {key: (blocks, ys) for key, ys in series.items()} for panel, series in panels.items()}
    return Figure(name, "blocks", title, caption, panels_over_blocks(unit, curves), [("block", blocks), *columns])


def _listed(pairs: Iterable[tuple[str, float | None]]) -> str:
    return ", ".join(f"{name} {number(value)}" for name, value in pairs)
