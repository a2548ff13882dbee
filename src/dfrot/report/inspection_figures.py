"""The figures of an inspection: errors of tokens, norms, weights and the cache, channels, damage, surfaces."""

import itertools
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from dfrot.report.contents import Inspection
from dfrot.report.drawing import (
    Figure,
    axis_name,
    curve,
    digits,
    mean,
    new_axis,
    new_layout,
    new_scene_axis,
    number,
    panels,
    plain,
    rule,
    slug,
    style,
)

CURVE_POINTS = 600  # of one curve; a screen is not wider
MASSIVE_POINTS = 200  # marks of massive tokens on one curve
SURFACE_CELLS = (64, 192)  # tokens × channels; more is megabytes, and not seen
# Cividis, dense where values are small: at the squares of even steps. What rotations leave would be one colour else.
COLOURS = [[0, "#00204d"], [0.0625, "#414d6b"], [0.25, "#7c7b78"], [0.5625, "#bcaf6f"], [1, "#ffea46"]]


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
    layout = new_layout(
        400, xaxis=new_axis("tokens, by falling error"), yaxis=new_axis("‖x − Q(x)‖ / ‖x‖", rangemode="tozero")
    )
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
    layout = new_layout(
        360,
        xaxis=new_axis("block"),
        yaxis=new_axis("KL divergence, nats", [value for values in series.values() for value in values]),
    )
    sums = ", ".join(f"{name} {number(sum(values))}" for name, values in series.items())
    blocks = max(map(len, series.values()))
    return Figure(
        "damage",
        "blocks",
        "damage of each block",
        "KL divergence of the model with only this block's norm outputs quantized, from the original. "
        f"Sum over blocks: {sums}.",
        {"data": [curve(name, list(range(len(values))), values) for name, values in series.items()], "layout": layout},
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
        {
            "data": data,
            "layout": new_layout(400, boxmode="group", xaxis=new_axis(""), yaxis=new_axis("‖W − Q(W)‖ / ‖W‖")),
        },
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
    data = [curve(how, blocks, values, panel=(kind == "values") + 1) for (kind, how), values in series.items()]
    layout = panels(["keys", "values"], "relative error", itertools.chain(*series.values()))
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
            "xaxis": new_scene_axis("channel"),
            "yaxis": new_scene_axis("token"),
            "zaxis": new_scene_axis("|x R|", range=[0, 1.02 * top]),
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
                f"surface-{slug(name)}",
                "surfaces",
                f"|x R| under {name}",
                f"At {inspection.surface_norm}: largest {number(peak)} at token {token}, channel {channel}; "
                f"median {number(middle)}.{cells}",
                {"data": [data], "layout": new_layout(340, scene=scene, margin={"l": 0, "r": 0, "t": 0, "b": 0})},
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
    layout = panels(list(places), unit, itertools.chain(*series.values(), [] if reference is None else [reference]))
    if reference is not None:
        layout["shapes"] = [
            {**rule("y", reference), "yref": axis_name("y", panel)} for panel in range(1, len(places) + 1)
        ]
    data = [
        curve(rotation, [inspection.norms[i].partition(".")[0] for i in chosen], [values[i] for i in chosen], panel)
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
