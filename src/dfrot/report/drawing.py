"""What the figures of a report share: styles of methods, axes, traces.

A figure is plotly's own JSON ({"data": […], "layout": {…}}), so drawing needs no plotly:
`plotly.graph_objects.Figure(figure.plot).show()` shows it. The page adds fonts and colours (page.js). A caption with
the main numbers and a table of the data go with every figure, for readers who cannot see it.
"""

import html
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from dfrot.methods import METHODS
from dfrot.methods.method import Look
from dfrot.report.words import is_finite, shorten

LOG_SPREAD = 10  # an axis of positive values with a larger ratio is logarithmic
MARGIN = 0.06  # of an axis beyond its values, as a share of their range
GREY = "#8C8C8C"

# The palette of Okabe and Ito, told apart with any colour vision. Methods bring their looks; RH is plain QuaRot.
STYLES = {name: kind.look for name, kind in METHODS.items() if kind.look is not None}
STYLES |= dict.fromkeys(("RH", "rotated", "last of those listed"), STYLES["quarot"]) | {"plain": STYLES["none"]}
STYLES |= {"unquantized": Look(GREY, "star", "dot"), "median channel": Look(GREY, "diamond", "dot")}
STYLES |= {"RO": Look("#56B4E9", "triangle-up", "dot"), "largest channel": Look("#E69F00", "circle", "solid")}
OTHERS = (Look("#E69F00", "x", "longdash"), Look("#999999", "star", "longdashdot"), Look("#B8A800", "pentagon", "dot"))


def style(name: str) -> Look:
    """The look of a rotation or method. An unknown name always gets the same one of the others."""
    return STYLES.get(name) or OTHERS[sum(name.encode(errors="replace")) % len(OTHERS)]


@dataclass(frozen=True)
class Figure:
    """A figure and its main content in words; title and caption are plain text."""

    name: str  # id of its HTML element
    section: Literal["results", "rotations", "blocks", "surfaces"]
    title: str
    caption: str  # its main numbers in a sentence or two
    plot: dict[str, Any]  # plotly's JSON
    columns: Sequence[tuple[str, Sequence[Any]]]  # of the data table: heading and entries
    log_x: bool = False  # whether the reader may switch the x axis to logarithmic


def digits(values: Iterable[Any], count: int = 4) -> list[float | None]:
    """Values with few digits, to keep the page small; None for those that are not finite numbers."""
    return [float(f"{value:.{count}g}") if is_finite(value) else None for value in values]


def plain(text: Any, most: int = 60) -> str:
    """A short text that plotly shows unchanged, markup included."""
    return html.escape(shorten(str(text), most), quote=False)


def slug(*names: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", "-".join(names).lower())[:60].strip("-")


def new_plot(data: Sequence[dict[str, Any]], height: int, **layout: Any) -> dict[str, Any]:
    return {"data": list(data), "layout": {"height": height, **layout}}


def new_axis(title: str, values: Iterable[Any] = (), log: bool = True, **more: Any) -> dict[str, Any]:
    """An axis over all values; if `log` and they span much, a logarithmic one with round ticks.

    Plotly would choose the range by the traces alone and put dashed rules at the very edge.
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
    """A trace of points, a line through them, or both, named and styled after a rotation or method."""
    colour, symbol, dash = style(look)
    trace: dict[str, Any] = {"type": "scatter", "mode": mode, "name": plain(look), "x": x, "y": y}
    trace |= {"hovertemplate": f"{hover}<extra></extra>", "line": {"color": colour, "dash": dash, "width": 1.5}, **more}
    return trace | {"marker": {"color": colour, "symbol": symbol, "size": 5, **more.get("marker", {})}}


def rule(value: float, axis: str, **label: Any) -> dict[str, Any]:
    """A dashed line across the plot at a value of an axis, with an optional label."""
    along, across = axis[0], "y" if axis[0] == "x" else "x"
    ends = {f"{along}ref": axis, f"{along}0": value, f"{along}1": value}
    ends |= {f"{across}ref": "paper", f"{across}0": 0, f"{across}1": 1}
    # this grey is legible in light and in dark
    return {"type": "line", **ends, "line": {"dash": "dash", "width": 1.25, "color": "#767676"}, "label": label}
