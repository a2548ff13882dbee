"""What the figures of a report share: styles of methods, axes, traces, panels.

A figure is plotly's own JSON ({"data": […], "layout": {…}}), so that making one needs no plotly:
`plotly.graph_objects.Figure(figure.plot).show()` shows it. The page adds its fonts and colours (page.js). With a figure
come a caption that says its main numbers and a table of its data, for those who cannot see it.
"""

import html
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from dfrot.report.words import is_finite, shorten

LOG_SPREAD = 10  # an axis of positive values that spans more is logarithmic
MARGIN = 0.06  # of an axis beyond its values, as a share of what they span
LINE = "#767676"  # of lines across a plot, in light and in dark


class Style(NamedTuple):
    """A rotation or method has one look in all figures; symbol and dash tell it apart where colour cannot."""

    colour: str
    symbol: str
    dash: str


# The palette of Okabe and Ito, told apart with any colour vision. RH is QuaRot with its default options.
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


def style(name: str) -> Style:
    """The look of a rotation or method; one that is not known here always gets the same of the others."""
    return STYLES.get(name) or OTHER_STYLES[sum(name.encode(errors="replace")) % len(OTHER_STYLES)]


@dataclass(frozen=True)
class Figure:
    """A figure and what says the same in words.

    Attributes:
        name: of its element.
        section: of the page.
        title: plain text.
        caption: its main numbers in a sentence or two, plain text.
        plot: plotly's JSON.
        columns: of the table of its data: heading and entries.
        log_x: whether the reader may switch the x axis to logarithmic.
    """

    name: str
    section: Literal["results", "rotations", "blocks", "surfaces"]
    title: str
    caption: str
    plot: dict[str, Any]
    columns: Sequence[tuple[str, Sequence[Any]]]
    log_x: bool = False


def digits(values: Iterable[Any], count: int = 4) -> list[float | None]:
    """Values with so many digits, for the page to stay small; what is not a finite number is missing."""
    return [float(f"{value:.{count}g}") if is_finite(value) else None for value in values]


def plain(text: Any, most: int = 60) -> str:
    """A text that plotly shows unchanged, markup included, and not endlessly."""
    return html.escape(shorten(str(text), most), quote=False)


def slug(*names: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", "-".join(names).lower())[:60].strip("-")


def new_plot(data: Sequence[dict[str, Any]], height: int, **layout: Any) -> dict[str, Any]:
    return {"data": list(data), "layout": {"height": height, **layout}}


def new_axis(title: str, values: Iterable[Any] = (), log: bool = True, **more: Any) -> dict[str, Any]:
    """An axis that shows the values, if there are any: logarithmic, with round ticks, if they span much and it may be.

    Plotly would choose the range by the traces alone, and put a rule beyond them at the very edge.
    """
    axis = {"title": {"text": title}, **more}
    known = [value for value in values if is_finite(value)]
    positive = [value for value in known if value > 0]
    if log and positive and max(positive) > LOG_SPREAD * min(positive):
        known = [math.log10(value) for value in positive]
        low, high = min(known), max(known)
        steps = (1, 2, 5) if high - low < 1.5 else (1, 3) if high - low < 3 else (1,)
        decades = range(math.floor(low) - 1, math.ceil(high) + 1)
        ticks = [float(f"{step}e{decade}") for decade in decades for step in steps]
        axis |= {"type": "log", "tickvals": ticks, "ticktext": [f"{tick:g}" for tick in ticks]}
    if known:
        margin = MARGIN * (max(known) - min(known)) or 0.5
        axis["range"] = [min(known) - margin, max(known) + margin]
    return axis


def scatter(look: str, x: Sequence[Any], y: Sequence[Any], mode: str, hover: str, **more: Any) -> dict[str, Any]:
    """A trace of points, a line through them, or both, in the look of a rotation or method, which is also its name."""
    colour, symbol, dash = style(look)
    marker = {"color": colour, "symbol": symbol, "size": 5} | more.pop("marker", {})
    return {
        "type": "scatter",
        "mode": mode,
        "name": plain(look),
        "x": x,
        "y": y,
        "line": {"color": colour, "dash": dash, "width": 1.5},
        "marker": marker,
        "hovertemplate": f"{hover}<extra></extra>",
        **more,
    }


def rule(value: float, axis: str, across: str, **label: Any) -> dict[str, Any]:
    """A dashed line at a value of an axis, across the whole plot, with a label if one is given."""
    return {
        "type": "line",
        f"{axis[0]}ref": axis,
        f"{axis[0]}0": value,
        f"{axis[0]}1": value,
        f"{across}ref": "paper",
        f"{across}0": 0,
        f"{across}1": 1,
        "line": {"dash": "dash", "width": 1.25, "color": LINE},
        "label": label,
    }


Curves = Mapping[str, tuple[Sequence[Any], Sequence[float]]]  # name → blocks and values


def panels_over_blocks(unit: str, panels: Mapping[str, Curves], reference: Sequence[float] = ()) -> dict[str, Any]:
    """A plot of panels one below the other, which share the x axis and the scale of the y axis.

    Args:
        panels: by their titles.
        reference: values that are marked by a dashed line across each panel.
    """
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
    layout["shapes"] = [rule(value, axis, "x") for value in reference for axis in axes]
    return new_plot(data, 110 + 220 * len(panels), **layout)
