"""The tables of a report as HTML. Every text passes through `escaped` or `named` on its way."""

import html
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dfrot.evaluation.record import Record, is_number
from dfrot.report.contents import Inspection, is_finite
from dfrot.report.drawing import mean, number
from dfrot.report.record_figures import by_seeds
from dfrot.report.words import deviations, lower_is_better, metrics_of, setting, shorten, shown

MASSIVE_ROWS = 200  # of the table of massive tokens; a model has more, and they repeat themselves


def escaped(text: Any) -> str:
    return html.escape(str(text))


def named(text: Any, most: int = 120) -> str:
    """A name of somebody else's: not endless, and its direction of writing stays its own."""
    return f"<bdi>{escaped(shorten(str(text), most))}</bdi>"


@dataclass(frozen=True)
class Column:
    """A column of numbers: its heading, and where a record has it."""

    heading: str
    of: tuple[str, str]  # part of the record, key; the part "total" sums one up
    scale: float = 1.0
    metric: bool = False

    def value(self, record: Record) -> float | None:
        part, key = self.of
        if part == "record":
            return getattr(record, key) / self.scale
        if part == "sum":
            return sum(getattr(record, key).values()) / self.scale or None
        value = getattr(record, part).get(key)
        return value / self.scale if is_finite(value) else value


SIZES = (
    Column("MB", ("size", "weight_bytes"), 1e6),
    Column("bits per weight", ("size", "decoder_bits_per_weight")),
    Column("KV bytes per token", ("size", "kv_bytes_per_token")),
    Column("seconds", ("sum", "timings_s")),
    Column("peak memory, GB", ("record", "peak_rss_bytes"), 1e9),
)


def results_table(records: Sequence[Record]) -> str:
    """A body per record: the row of its numbers, and one with its recipe and conditions. Seeds folded are there too,
    hidden; the page's script chooses."""
    metrics = metrics_of(records)
    columns = [*(Column(shown(metric), ("metrics", metric), metric=True) for metric in metrics), *SIZES]
    words = ("model", "method", "options", "weights", "spec", "seed")
    heads = "".join(f'<th scope="col" data-kind="{_kind(word)}">{word}</th>' for word in words)
    for column in columns:
        arrow = "" if not column.metric else " ↓" if lower_is_better(column.of[1]) else " ↑"
        heads += f'<th scope="col" class="number" data-kind="number">{named(column.heading)}{arrow}</th>'
    span = len(words) + len(columns)
    bodies = []
    for name, groups in (("record", [[record] for record in records]), ("fold", list(by_seeds(records)))):
        best = {(place, metric) for metric in metrics for place in _best(groups, metric)}
        for place, group in enumerate(groups):
            cells = "".join(_measured(group, column, (place, column.of[1]) in best) for column in columns)
            bodies.append(_body(f"{name}-{place}", group, cells, span, folded=name == "fold"))
    return (
        f'<table class="results" id="results-table"><caption class="unseen">Results. Best of the quantized models in '
        f"bold.</caption><thead><tr>{heads}</tr></thead>{''.join(bodies)}</table>"
    )


def choices(records: Sequence[Record], key: str) -> str:
    """The options of a select for one word of the recipe."""
    values = sorted({_word(record, key) for record in records})
    return "".join(f'<option value="{escaped(value)}">{escaped(shorten(value, 60))}</option>' for value in values)


def massive_table(inspection: Inspection) -> str:
    heads = ("block", "norm", "position", "token", "channel", "peak / RMS")
    rows = [
        [
            entry["block"],
            entry["norm"],
            entry["position"],
            repr(entry["token"]),
            entry["channel"],
            entry["peak_over_rms"],
        ]
        for entry in inspection.massive[:MASSIVE_ROWS]
    ]
    return table(heads, rows, "Massive tokens")


def table(heads: Sequence[str], rows: Sequence[Sequence[Any]], caption: str) -> str:
    """Texts to the left, numbers to the right, what is missing as a dash."""
    columns = zip(*rows, strict=True)
    sides = ["" if any(isinstance(value, str) for value in column) else ' class="number"' for column in columns]
    head = "".join(
        f'<th scope="col"{side}>{named(heading)}</th>' for heading, side in zip(heads, sides, strict=bool(rows))
    )
    body = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows)
    title = f'<caption class="unseen">{escaped(caption)}</caption>'
    return f"<table>{title}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def definitions(record: Mapping[str, Any]) -> str:
    """A definition list: nested objects name their parts, the innermost stand on one line."""
    pairs = []
    for key, value in record.items():
        if isinstance(value, Mapping) and any(isinstance(part, Mapping) for part in value.values()):
            pairs += [(f"{key} {name}", part) for name, part in value.items()]
        else:
            pairs.append((key, value))
    items = (f"<div><dt>{named(key)}</dt><dd>{named(_line(value), 2000)}</dd></div>" for key, value in pairs)
    return f"<dl>{''.join(items)}</dl>"


def _line(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_line(part)}" for key, part in value.items()) or "–"
    if isinstance(value, list):
        return ", ".join(map(_line, value)) or "–"
    return "–" if value is None else {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)


def _cell(value: Any) -> str:
    return _number_cell(value) if value is None or is_number(value) else f"<td>{named(value)}</td>"


def _number_cell(value: Any, before: str = "", after: str = "") -> str:
    data = f' data-value="{float(value)!r}"' if is_finite(value) else ""
    return f'<td class="number"{data}>{before}{escaped(number(value))}{after}</td>'


def _measured(group: Sequence[Record], column: Column, best: bool) -> str:
    """A number: the mean of the seeds and their range, whether it is the best, and what a paper has published."""
    values = [column.value(record) for record in group]
    known = [value for value in values if value is not None and is_finite(value)]
    before, after = ("<strong>", '</strong><span class="unseen"> best</span>') if best else ("", "")
    if known and min(known) < max(known):
        after += f" <small>({number(min(known))} … {number(max(known))})</small>"
    published = group[0].conditions.get("published")
    entry = published.get(column.of[1]) if column.metric and isinstance(published, Mapping) else None
    if isinstance(entry, Mapping):
        source = f" ({named(entry['source'])})" if entry.get("source") else ""
        after += f" <small>published {escaped(shorten(str(entry.get('value'))))}{source}</small>"
    return _number_cell(mean(known) if known else values[0], before, after)


def _best(groups: Sequence[Sequence[Record]], metric: str) -> Iterable[int]:
    """The places of the best quantized model of every setting, by the mean of its seeds."""
    found: dict[str, tuple[float, int]] = {}
    for place, group in enumerate(groups):
        value = mean(record.metrics.get(metric) for record in group)
        if group[0].recipe is not None and value is not None:
            rank = (value if lower_is_better(metric) else -value, place)
            found[setting(group[0])] = min(rank, found.get(setting(group[0]), rank))
    return [place for _, place in found.values()]


def _kind(word: str) -> str:
    return "number" if word == "seed" else "text"


def _word(record: Record, key: str) -> str:
    return "unquantized" if record.recipe is None and key == "method" else str((record.recipe or {}).get(key, "–"))


def _seeds(group: Sequence[Record]) -> str:
    return ", ".join(str((record.recipe or {}).get("seed", "–")) for record in group)


def _body(name: str, group: Sequence[Record], cells: str, span: int, folded: bool) -> str:
    record = group[0]
    data = "".join(f' data-{key}="{escaped(_word(record, key))}"' for key in ("method", "weights", "spec"))
    hidden = " class=folded hidden" if folded else ""
    whose = f"<p>Of seed {escaped(_seeds(group[:1]))}:</p>" if len(group) > 1 else ""
    return (
        f'<tbody id="{name}"{data}{hidden}><tr class="row"><th scope="row">{named(record.model, 48)}</th>'
        f"<td>{named(_word(record, 'method'))}</td><td>{named(deviations(record.recipe or {}))}</td>"
        f"<td>{named(_word(record, 'weights'))}</td><td>{named(_word(record, 'spec'))}</td>"
        f"<td>{named(_seeds(group))}</td>{cells}</tr>"
        f'<tr class="more"><td colspan="{span}"><details><summary>Recipe and conditions</summary>{whose}'
        f"{_details(record)}</details></td></tr></tbody>"
    )


def _details(record: Record) -> str:
    recipe = "" if record.recipe is None else f"<h4>Recipe</h4>{definitions(record.recipe)}"
    measured = {"metrics": record.metrics, "size": record.size, "seconds": record.timings_s}
    return (
        f"{recipe}<h4>Conditions</h4>{definitions({'model': record.model, **record.conditions})}"
        f'<div class="measured"><h4>Measured</h4>'
        f"{definitions({**measured, 'peak_rss_bytes': record.peak_rss_bytes})}</div>"
    )
