"""The tables of a report as HTML. Every text passes through `escaped` or `named` on its way."""

import html
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dfrot.report.contents import Inspection, is_finite
from dfrot.report.figures import by_seeds, mean, number
from dfrot.report.words import deviations, lower_is_better, metrics_of, setting, shorten, shown
from dfrot.results import Record

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
    best = {(setting(records[i]), metric): records[i] for metric in metrics for i in _best(records, metric)}
    heads = "".join(f'<th scope="col" data-kind="{_kind(word)}">{word}</th>' for word in words)
    for column in columns:
        arrow = "" if not column.metric else " ↓" if lower_is_better(column.of[1]) else " ↑"
        heads += f'<th scope="col" class="number" data-kind="number">{named(column.heading)}{arrow}</th>'
    span = len(words) + len(columns)
    bodies = []
    for place, record in enumerate(records):
        cells = "".join(
            _number_cell(
                column.value(record), _notes(record, column, best.get((setting(record), column.of[1])) is record)
            )
            for column in columns
        )
        bodies.append(
            _body(f"record-{place}", record, cells, span, _details(record), (record.recipe or {}).get("seed"))
        )
    for place, group in enumerate(by_seeds(records)):
        cells = "".join(_folded_cell([column.value(record) for record in group]) for column in columns)
        details = (
            _details(group[0])
            if len(group) == 1
            else f"<p>Conditions of seed {_seeds(group[:1])}:</p>{_details(group[0])}"
        )
        bodies.append(_body(f"fold-{place}", group[0], cells, span, details, _seeds(group), folded=True))
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


def table(heads: Sequence[str], rows: Iterable[Sequence[Any]], caption: str) -> str:
    """Texts to the left, numbers to the right, what is missing as a dash."""
    head = "".join(f'<th scope="col">{named(heading)}</th>' for heading in heads)
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
    return _number_cell(value) if value is None or isinstance(value, int | float) else f"<td>{named(value)}</td>"


def _number_cell(value: Any, notes: tuple[str, str] = ("", "")) -> str:
    before, after = notes
    data = f' data-value="{float(value)!r}"' if is_finite(value) else ""
    return f'<td class="number"{data}>{before}{escaped(number(value))}{after}</td>'


def _folded_cell(values: Sequence[Any]) -> str:
    known = [value for value in values if is_finite(value)]
    if len(known) < 2 or min(known) == max(known):
        return _number_cell(known[0] if known else values[0])
    middle = mean(known)
    spread = f" <small>({number(min(known))} … {number(max(known))})</small>"
    return _number_cell(middle, ("", spread))


def _notes(record: Record, column: Column, best: bool) -> tuple[str, str]:
    """What stands before and after a number: whether it is the best, and what a paper has published."""
    before, after = ("<strong>", '</strong><span class="unseen"> best</span>') if best else ("", "")
    published = record.conditions.get("published")
    entry = published.get(column.of[1]) if column.metric and isinstance(published, Mapping) else None
    if isinstance(entry, Mapping):
        source = f" ({named(entry['source'])})" if entry.get("source") else ""
        after += f"<small>published {escaped(entry.get('value'))}{source}</small>"
    return before, after


def _best(records: Sequence[Record], metric: str) -> Iterable[int]:
    """The places of the best quantized record of every setting."""
    found: dict[str, int] = {}
    for place, record in enumerate(records):
        if record.recipe is None or not is_finite(record.metrics.get(metric)):
            continue
        rival = found.get(setting(record))
        sign = 1 if lower_is_better(metric) else -1
        if rival is None or sign * record.metrics[metric] < sign * records[rival].metrics[metric]:
            found[setting(record)] = place
    return found.values()


def _kind(word: str) -> str:
    return "number" if word == "seed" else "text"


def _word(record: Record, key: str) -> str:
    return "unquantized" if record.recipe is None and key == "method" else str((record.recipe or {}).get(key, "–"))


def _seeds(group: Sequence[Record]) -> str:
    return ", ".join(str((record.recipe or {}).get("seed", "–")) for record in group)


def _body(name: str, record: Record, cells: str, span: int, details: str, seed: Any, folded: bool = False) -> str:
    data = "".join(f' data-{key}="{escaped(_word(record, key))}"' for key in ("method", "weights", "spec"))
    seed_value = f' data-value="{seed}"' if isinstance(seed, int) else ""
    return (
        f'<tbody id="{name}"{data}{" class=folded hidden" if folded else ""}><tr class="row">'
        f'<th scope="row">{named(record.model, 48)}</th><td>{named(_word(record, "method"))}</td>'
        f"<td>{named(deviations(record.recipe or {}))}</td><td>{named(_word(record, 'weights'))}</td>"
        f"<td>{named(_word(record, 'spec'))}</td><td{seed_value}>{escaped('–' if seed is None else seed)}</td>{cells}"
        f'</tr><tr class="more"><td colspan="{span}"><details><summary>Recipe and conditions</summary>{details}'
        "</details></td></tr></tbody>"
    )


def _details(record: Record) -> str:
    recipe = "" if record.recipe is None else f"<h4>Recipe</h4>{definitions(record.recipe)}"
    measured = {"metrics": record.metrics, "size": record.size, "seconds": record.timings_s}
    return (
        f"{recipe}<h4>Conditions</h4>{definitions({'model': record.model, **record.conditions})}"
        f'<div class="measured"><h4>Measured</h4>'
        f"{definitions({**measured, 'peak_rss_bytes': record.peak_rss_bytes})}</div>"
    )
