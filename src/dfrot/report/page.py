"""One HTML page from a directory of results: it works from a file, offline, and asks nobody for anything.

Its scripts are inlined, plotly.js among them (most of the page's 5 MB), and the page's Content-Security-Policy names
them by their hash: a script that somehow came in with a text would not run. Texts are escaped in the first place.
"""

import base64
import hashlib
import json
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from string import Template
from typing import Literal

from dfrot.evaluation.record import RESULTS_FILE, Record, read_records
from dfrot.report.contents import INSPECTION_FILE, Inspection, read_inspection
from dfrot.report.drawing import Figure, number
from dfrot.report.figures import figures
from dfrot.report.images import save_images
from dfrot.report.tables import MASSIVE_ROWS, choices, definitions, escaped, massive_table, named, results_table, table
from dfrot.system.errors import SetupError, UserError
from dfrot.system.files import write_text
from dfrot.version import __version__

PAGE_FILE = "report.html"
IMAGES = "figures"  # the directory of static images

HEADINGS = {
    "results": "Results",
    "rotations": "Quantization error under rotations",
    "blocks": "Block by block",
    "surfaces": "Activation surfaces",
    "massive": "Massive tokens",
    "conditions": "Conditions of the inspection",
}


def report(directory: Path, out: Path | None = None, *, images: Sequence[Literal["png", "svg"]] = ()) -> Path:
    """Write a directory's result records and inspection as one HTML page.

    Args:
        directory: what `dfrot compare` or `dfrot inspect` wrote.
        out: the page; None for `report.html` in the directory.
        images: also write every figure in these formats, into `figures` beside the page.

    Returns:
        Where the page is.

    Raises:
        UserError: there is nothing to report, or it cannot be read.
        SetupError: plotly, or for images kaleido or a browser, is missing; the page cannot be written.
    """
    records, inspection = read_records(directory / RESULTS_FILE), read_inspection(directory)
    if not records and inspection is None:
        raise UserError(
            f"a report is made from {RESULTS_FILE}, which `dfrot compare` writes, or {INSPECTION_FILE}, which "
            f"`dfrot inspect` writes; {directory} has no records in the one and lacks the other."
        )
    out = directory / PAGE_FILE if out is None else out
    drawn = figures(records, inspection)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SetupError(f"cannot make {out.parent}: {error}") from error
    write_text(out, page(records, inspection, drawn))
    if images:
        save_images(drawn, out.parent / IMAGES, images)
    return out


def page(records: Sequence[Record], inspection: Inspection | None, drawn: Sequence[Figure]) -> str:
    """The page as HTML."""
    sections = _sections(records, inspection, drawn)
    script, style = _data("page.js"), _data("page.css")
    plotly = _plotly_js()
    plots = json.dumps({f"plot-{figure.name}": figure.plot for figure in drawn}, separators=(",", ":"), allow_nan=False)
    models = list(dict.fromkeys([*(record.model for record in records), *([inspection.model] if inspection else [])]))
    title = f"dfrot: {', '.join(models[:3])}{' …' if len(models) > 3 else ''}"
    if len(title) > 160:
        title = f"{title[:159]}…"
    return Template(_data("page.html")).substitute(
        title=escaped(title),
        hashes=" ".join(map(_hash, (plotly, script))),
        style=style,
        summary=_summary(records, inspection),
        links="".join(f'<a href="#{name}">{HEADINGS[name]}</a>' for name in sections),
        sections="\n".join(
            f'<section id="{name}" aria-labelledby="{name}-heading"><h2 id="{name}-heading">{HEADINGS[name]}</h2>'
            f"{content}</section>"
            for name, content in sections.items()
        ),
        footer=f"Written by <code>dfrot report</code> {escaped(__version__)}.",
        plots=plots.replace("<", "\\u003c"),  # no tag, not even an end of this script, in what is data
        plotly=plotly,
        script=script,
    )


def _sections(records: Sequence[Record], inspection: Inspection | None, drawn: Sequence[Figure]) -> dict[str, str]:
    made: dict[str, str] = {}
    if records:
        made["results"] = _results(records)
    for name in ("results", "rotations", "blocks", "surfaces"):
        chosen = [_figure(figure) for figure in drawn if figure.section == name]
        if chosen:
            kind = "pair" if name == "surfaces" else ""
            made[name] = (
                f'{_INTRODUCTIONS.get(name, "")}{made.get(name, "")}<div class="{kind}">{"".join(chosen)}</div>'
            )
    if inspection is not None:
        made["massive"] = _massive(inspection)
        made["conditions"] = definitions({"model": inspection.model, **inspection.conditions})
    return made


_INTRODUCTIONS = {
    "surfaces": "<p>Absolute norm outputs of the first tokens where the largest channel is, before and after each "
    "rotation, on one scale; colours change faster where values are small. Drag a surface to turn it, or use "
    "the arrow keys.</p>",
}


def _summary(records: Sequence[Record], inspection: Inspection | None) -> str:
    lines = []
    if records:
        quantized = sum(record.recipe is not None for record in records)
        texts = sorted({metric.partition("/")[2] for record in records for metric in record.metrics} - {""})
        cells = f"{len(records)} cell{'s' if len(records) > 1 else ''}, {quantized} of them quantized"
        lines.append(f"{cells}, measured on {', '.join(map(named, texts))}.")
    if inspection is not None:
        lines.append(
            f"Outputs of {len(inspection.norms)} norms on {len(inspection.tokens)} tokens, "
            f"{len(inspection.massive)} of them massive, quantized by {named(inspection.conditions.get('spec', '–'))} "
            f"under {', '.join(map(named, inspection.rotations))}."
        )
    return "".join(f"<p>{line}</p>" for line in lines)


def _results(records: Sequence[Record]) -> str:
    selects = "".join(
        f'<label>{key}<select name="{key}"><option value="">all</option>{choices(records, key)}</select></label>'
        for key in ("method", "weights", "spec")
    )
    return (
        '<form id="controls" class="controls scripted" role="search" aria-label="Filter the results">'
        f'<label>filter<input type="search" name="needle" autocomplete="off"></label>{selects}'
        '<label class="check"><input type="checkbox" name="fold">fold seeds: mean (smallest … largest)</label></form>'
        '<div class="scroll" tabindex="0" role="region" aria-label="Results, scrollable">'
        f'{results_table(records)}</div><p class="status" id="status" role="status" aria-live="polite"></p>'
        "<p><small>Bold: best of the quantized models that were measured alike. A row opens to its recipe and "
        "conditions. ↓ less is better, ↑ more is better.</small></p>"
    )


def _figure(figure: Figure) -> str:
    name, title = figure.name, figure.title[:1].upper() + figure.title[1:]
    log = (
        f'<label class="tools scripted"><input type="checkbox" data-log="plot-{name}"> logarithmic ranks</label>'
        if figure.log_x
        else ""
    )
    return (
        f'<figure id="{name}">{log}<h3 id="{name}-title">{named(title)}</h3>'
        f'<div class="plot" id="plot-{name}" role="img" aria-labelledby="{name}-title" '
        f'aria-describedby="{name}-caption" style="min-height:{figure.plot["layout"]["height"]}px"></div>'
        f'<figcaption id="{name}-caption">{escaped(figure.caption)}</figcaption>'
        f'<details><summary>Data</summary><div class="scroll tall" tabindex="0" role="region" '
        f'aria-labelledby="{name}-title">{table(figure.columns, figure.rows, figure.title)}</div></details></figure>'
    )


def _massive(inspection: Inspection) -> str:
    count = len(inspection.massive)
    if not count:
        return "<p>None were found.</p>"
    top = max(inspection.massive, key=lambda entry: entry["peak_over_rms"])
    cut = f" The first {MASSIVE_ROWS} are shown." if count > MASSIVE_ROWS else ""
    errors = "; ".join(
        f"{named(name)} {number(error.get('massive'))} and {number(error.get('ordinary'))}"
        for name, error in inspection.error.items()
    )
    return (
        f"<p>{count} norm outputs are massive; the largest reaches {number(top['peak_over_rms'])} times its root mean "
        f"square in channel {escaped(top['channel'])} at {escaped(top['block'])}.{named(top['norm'])}, "
        f"position {escaped(top['position'])}.{cut} "
        f"Mean relative error of massive and of ordinary tokens: {errors}.</p>"
        '<div class="scroll tall" tabindex="0" role="region" aria-label="Massive tokens, scrollable">'
        f"{massive_table(inspection)}</div>"
    )


def _data(name: str) -> str:
    return resources.files("dfrot.report").joinpath(name).read_text(encoding="utf-8")


def _plotly_js() -> str:
    try:
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise SetupError("a report needs the package plotly. Install it: pip install 'dfrot[report]'") from error
    source: str = get_plotlyjs()
    return source


def _hash(script: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"
