"""What the figures of a report have in common: looks, axes, panels, numbers in words.

A rotation or method has the same colour, symbol and dash in all figures, so that none of them has to be told by colour
alone.
"""

import html
import math
import re
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from dfrot.report.contents import is_finite
from dfrot.report.words import shorten

LOG_SPREAD = 10  # a positive axis that spans more is logarithmic
TEXT, LINE, GRID = "#1c1c1c", "#767676", "#e2e2e2"  # in images; the page has its own, for light and for dark
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


def style(name: str) -> Style:
    """The look of a rotation or method."""
    return STYLES.get(name) or OTHER_STYLES[sum(name.encode(errors="replace")) % len(OTHER_STYLES)]


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


def slug(*names: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", "-".join(names).lower())[:60].strip("-")


def new_layout(height: int, **more: Any) -> dict[str, Any]:
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


def new_axis(title: str, values: Sequence[float] = (), **more: Any) -> dict[str, Any]:
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


def new_scene_axis(title: str, **more: Any) -> dict[str, Any]:
    return {"title": {"text": title}, "nticks": 5, "gridcolor": GRID, "linecolor": LINE, "zeroline": False, **more}


def curve(name: str, x: Sequence[Any], y: Sequence[float], panel: int = 1) -> dict[str, Any]:
    look = style(name)
    return {
        **{"type": "scatter", "mode": "lines+markers", "name": plain(name), "legendgroup": plain(name)},
        **{"showlegend": panel == 1, "yaxis": axis_name("y", panel)},
        **{"x": list(x), "y": digits(y), "line": {"color": look.colour, "dash": look.dash, "width": 1.5}},
        "marker": {"color": look.colour, "symbol": look.symbol, "size": 5},
        "hovertemplate": "%{fullData.name}: block %{x} has %{y}<extra></extra>",
    }


def rule(axis: str, value: float) -> dict[str, Any]:
    """A dashed line across the plot."""
    other = "y" if axis == "x" else "x"
    ends = {f"{axis}0": value, f"{axis}1": value, f"{other}0": 0, f"{other}1": 1}
    refs = {f"{axis}ref": axis, f"{other}ref": "paper"}
    return {"type": "line", **ends, **refs, "line": {"dash": "dash", "width": 1.25, "color": LINE}}


def panels(
    names: Sequence[str], title: str, values: Iterable[float | None], x: str = "block", **more: Any
) -> dict[str, Any]:
    """A layout of panels one below the other, sharing the x axis and the scale of the y axis."""
    gap = 0.1 / len(names) ** 0.5
    height = (1 - gap * (len(names) - 1)) / len(names)
    flat = [value for value in values if value is not None and math.isfinite(value)]
    scale = new_axis("", flat)
    if "range" not in scale and flat:
        margin = 0.06 * (max(flat) - min(flat)) or 0.5
        scale["range"] = [min(flat) - margin if min(flat) else 0, max(flat) + margin]
    layout = new_layout(110 + 220 * len(names), xaxis=new_axis(x, anchor=axis_name("y", len(names))), **more)
    for place, name in enumerate(names):
        upper = 1 - place * (height + gap)
        words = {"title": {"text": f"{plain(name)}<br>{title}"}, "domain": [max(0, upper - height), upper]}
        layout["yaxis" + axis_name("y", place + 1)[1:]] = {**scale, **words}
    return layout


def axis_name(axis: str, number: int) -> str:
    """Plotly's name of an axis: y, y2, …"""
    return axis if number == 1 else f"{axis}{number}"
