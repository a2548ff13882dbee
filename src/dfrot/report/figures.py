"""All figures of a report, from records and an inspection."""

import dataclasses
from collections import Counter
from collections.abc import Sequence

from dfrot.evaluation.record import Record
from dfrot.report.drawing import Figure
from dfrot.report.inspection import Inspection
from dfrot.report.inspection_figures import inspection_figures
from dfrot.report.record_figures import record_figures


def figures(records: Sequence[Record], inspection: Inspection | None) -> list[Figure]:
    """All figures that there is data for, in the page's order. Their names differ."""
    drawn = [*record_figures(records), *([] if inspection is None else inspection_figures(inspection))]
    found: list[Figure] = []
    seen: Counter[str] = Counter()
    for figure in filter(None, drawn):
        seen[figure.name] += 1
        if seen[figure.name] > 1:  # metrics "a/b" and "a.b" have one slug
            figure = dataclasses.replace(figure, name=f"{figure.name}--{seen[figure.name]}")
        found.append(figure)
    return found
