"""All figures of a report, from records and an inspection.

A figure is plotly's own JSON ({"data": […], "layout": {…}}), so that making one needs no plotly:
`plotly.graph_objects.Figure(figure.plot).show()` shows it. With it come a caption that says its main numbers and a
table of its data, for those who cannot see it.
"""

import dataclasses
from collections.abc import Sequence

from dfrot.evaluation.record import Record
from dfrot.report.contents import Inspection
from dfrot.report.drawing import Figure
from dfrot.report.inspection_figures import (
    cache_errors,
    channels,
    damage,
    kurtosis,
    norm_errors,
    surfaces,
    token_errors,
    weight_errors,
)
from dfrot.report.record_figures import against_bits, by_recipe, zero_shot
from dfrot.report.words import metrics_of


def figures(records: Sequence[Record], inspection: Inspection | None) -> list[Figure]:
    """All figures that there is data for, in the page's order. Their names differ."""
    metrics = metrics_of(records)
    found: list[Figure | None] = []
    for metric in metrics:
        if metric.startswith(("ppl/", "kl/", "top1/")):
            found.append(by_recipe(records, metric))
        if metric.startswith("ppl/"):
            found.append(against_bits(records, metric))
    found.append(zero_shot(records))
    if inspection is not None:
        found += [
            token_errors(inspection),
            token_errors(inspection, inspection.surface_norm),
            norm_errors(inspection),
            kurtosis(inspection),
            channels(inspection),
            damage(inspection),
            weight_errors(inspection),
            cache_errors(inspection),
            *surfaces(inspection),
        ]
    named: dict[str, Figure] = {}
    for figure in found:
        if figure is not None:
            count = sum(name.rpartition("--")[0] == figure.name or name == figure.name for name in named)
            name = f"{figure.name}--{count + 1}" if count else figure.name  # metrics "a/b" and "a.b" have one slug
            named[name] = dataclasses.replace(figure, name=name)
    return list(named.values())
