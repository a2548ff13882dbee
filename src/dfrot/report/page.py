"""One HTML page from a directory of results: it works from a file, offline, and asks nobody for anything.

Its scripts are inlined, plotly.js among them (most of the page's 5 MB), and the page's Content-Security-Policy names
them by their hash: a script that somehow came in with a text would not run. Texts are escaped in the first place, by
Jinja, which fills page.html.
"""

import base64
import dataclasses
import hashlib
from collections import Counter
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from jinja2 import Environment, StrictUndefined, Template
from markupsafe import Markup

from dfrot.evaluation.record import RESULTS_FILE, Record, is_number, read_records
from dfrot.inspect.inspection import STATS_FILE, Inspection, read_inspection
from dfrot.report.drawing import Figure
from dfrot.report.inspection_figures import inspection_figures
from dfrot.report.records import definitions, record_figures, results_table
from dfrot.report.words import is_finite, number, shorten
from dfrot.system.errors import SetupError, UserError
from dfrot.system.files import translate_io_errors, write_text
from dfrot.version import __version__

PAGE_FILE = "report.html"
MASSIVE_ROWS = 200  # of the table of massive tokens; a model has more, and they repeat themselves
HEADINGS = {
    "results": "Results",
    "rotations": "Quantization error under rotations",
    "blocks": "Block by block",
    "surfaces": "Activation surfaces",
    "massive": "Massive tokens",
    "conditions": "Conditions of the inspection",
}


def report(directory: Path, out: Path | None = None) -> Path:
    """Write a directory's result records and inspection as one HTML page; returns where it is.

    Args:
        directory: what `dfrot compare` or `dfrot inspect` wrote.
        out: the page; None for `report.html` in the directory.

    Raises:
        UserError: there is nothing to report, or it cannot be read.
        SetupError: plotly is missing, or the page cannot be written.
    """
    if not directory.is_dir():
        raise UserError(f"there is no directory '{directory}'. Give one that `dfrot compare` or `dfrot inspect` wrote.")
    records, inspection = read_records(directory / RESULTS_FILE), read_inspection(directory)
    if not records and inspection is None:
        raise UserError(
            f"a report is made from {RESULTS_FILE}, which `dfrot compare` writes, or {STATS_FILE}, which "
            f"`dfrot inspect` writes; {directory} has no records in the one and lacks the other."
        )
    out = directory / PAGE_FILE if out is None else out
    text = page(records, inspection)
    with translate_io_errors(out.parent):
        out.parent.mkdir(parents=True, exist_ok=True)
    write_text(out, text)
    return out


def figures(records: Sequence[Record], inspection: Inspection | None) -> list[Figure]:
    """All figures for which there is data, in the page's order, with unique names."""
    drawn = [*record_figures(records), *(inspection_figures(inspection) if inspection else ())]
    seen: Counter[str] = Counter()
    for place, figure in enumerate(drawn):
        seen[figure.name] += 1
        if (times := seen[figure.name]) > 1:  # metrics "a/b" and "a.b" have one slug
            drawn[place] = dataclasses.replace(figure, name=f"{figure.name}--{times}")
    return drawn


def page(records: Sequence[Record], inspection: Inspection | None) -> str:
    """The page as HTML."""
    try:
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise SetupError("a report needs the package plotly. Install it: pip install 'dfrot[report]'") from error
    drawn, stats = figures(records, inspection), inspection and inspection.stats
    filled = {figure.section for figure in drawn} | ({"massive", "conditions"} if stats else set())
    filled |= {"results"} if records else set()
    models = list(dict.fromkeys([*(record.model for record in records), *([stats["model"]] if stats else [])]))
    script, plotly = _data("page.js"), get_plotlyjs()
    digests = [hashlib.sha256(text.encode()).digest() for text in (plotly, script)]
    # Markup is what Jinja does not escape: only our own files and plotly's.
    return _template().render(
        title=shorten(f"dfrot: {', '.join(models[:3])}{' …' if len(models) > 3 else ''}", 160),
        hashes=Markup(" ".join(f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests)),
        style=Markup(_data("page.css")),
        sections={name: heading for name, heading in HEADINGS.items() if name in filled},
        records=records,
        quantized=sum(record.recipe is not None for record in records),
        texts=sorted({metric.partition("/")[2] for record in records for metric in record.metrics} - {""}),
        results=results_table(records),
        figures=drawn,
        stats=stats,
        conditions=definitions({"model": stats["model"], **stats["conditions"]}) if stats else [],
        massive_rows=MASSIVE_ROWS,
        version=__version__,
        plots={f"plot-{figure.name}": figure.plot for figure in drawn},
        plotly=Markup(plotly),
        script=Markup(script),
    )


def _template() -> Template:
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "allow_nan": False}
    environment.filters |= {
        "named": lambda text, most=120: Markup("<bdi>{}</bdi>").format(shorten(str(text), most)),
        "number": number,
        "repr": repr,
        "rows": lambda columns: zip(*(entries for _, entries in columns), strict=True),
        "shorten": shorten,
    }
    environment.tests |= {
        "finite": is_finite,
        "measure": lambda value: value is None or is_number(value),
        "numbers": lambda entries: not any(isinstance(entry, str) for entry in entries),
    }
    return environment.from_string(_data("page.html"))


def _data(name: str) -> str:
    return resources.files("dfrot.report").joinpath(name).read_text(encoding="utf-8")
