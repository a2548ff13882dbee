"""What the rotation is worth: perplexity of a quantized model, by method and seed.

    python benchmarks/dfrot_table.py OUT --calib TEXT --ppl TEXT [TEXT ...] [--rows paper|released]

Rows `paper`: none, RO, RH, DFRot with γ = 1, 10, 100 and chosen by measurement, at w16a4kv16, preset paper.
Rows `released`: the settings of the released scripts, at the numbers of tokens they were run on: clip ratios 1;
activations asymmetric, w4a4kv4 by RTN, and activations symmetric. Finished cells are lines of OUT/results.jsonl and are
not measured again. The gap is that of the RH row with the same grids to the unquantized model.
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import dfrot
from dfrot.evaluation.run import evaluate
from dfrot.results import Record, append_records
from dfrot.texts import text_label

Words = dict[str, Any]
RO: Words = {"method": "quarot", "rotation": "orthogonal"}
RH: Words = {"method": "quarot"}
DFROT: Words = {"method": "dfrot"}
UNCLIPPED: Words = {"act_clip": 1.0, "kv_clip": 1.0}
SYMMETRIC: Words = {"act_symmetric": True, **UNCLIPPED}

# Each table has its number of tokens and its rows.
TABLES: dict[str, list[tuple[int, dict[str, Words]]]] = {
    "paper": [
        (
            40960,
            {
                "none": {"method": "none"},
                "RO": RO,
                "RH": RH,
                "DFRot auto": DFROT,
                "DFRot γ=1": DFROT | {"gamma": 1.0},
                "DFRot γ=10": DFROT | {"gamma": 10.0},
                "DFRot γ=100": DFROT | {"gamma": 100.0},
            },
        )
    ],
    "released": [
        (
            20480,
            {
                "RO": RO | UNCLIPPED,
                "RH": RH | UNCLIPPED,
                "DFRot": DFROT | UNCLIPPED,
                "RH w4a4kv4": RH | UNCLIPPED | {"spec": "w4a4kv4", "weights": "rtn"},
                "DFRot w4a4kv4": DFROT | UNCLIPPED | {"spec": "w4a4kv4", "weights": "rtn"},
            },
        ),
        (
            10240,
            {
                "RH asymmetric": RH | UNCLIPPED,
                "RO symmetric": RO | SYMMETRIC,
                "RH symmetric": RH | SYMMETRIC,
                "DFRot symmetric": DFROT | SYMMETRIC,
            },
        ),
    ],
}


class Cells:
    """Measurements by row, seed and number of tokens, kept as lines of a file."""

    def __init__(self, out: Path, model: str, calib: str, texts: list[str]) -> None:
        out.mkdir(parents=True, exist_ok=True)
        self.out, self.model, self.calib, self.texts = out, model, calib, texts
        self.results = out / "results.jsonl"
        self.done: dict[tuple[str, int, int], Record] = {}
        for line in self.results.read_text().splitlines() if self.results.is_file() else []:
            self._keep(Record.from_json(json.loads(line)))

    def _keep(self, record: Record) -> None:
        self.done[record.conditions["row"], record.conditions["seed"], record.conditions["max_tokens"]] = record

    def measure(self, row: str, seed: int, max_tokens: int, words: Words | None) -> None:
        if (row, seed, max_tokens) in self.done:
            return
        model, timings = self.model, {}
        if words is not None:
            recipe = dfrot.Recipe.parse(**{"spec": "w16a4kv16", **words}, calib=self.calib, seed=seed)
            report = dfrot.quantize(model, recipe, self.out / "checkpoint", overwrite=True)
            model, timings = str(report.path), report.timings_s
        record = evaluate(model, self.texts, max_tokens=max_tokens)
        record.timings_s |= timings
        record.conditions |= {"row": row, "seed": seed, "max_tokens": max_tokens}
        append_records(self.results, [record])
        self._keep(record)
        print(row, seed, {key: round(value, 3) for key, value in record.metrics.items()}, flush=True)

    def perplexities(self, row: str, max_tokens: int, text: str) -> list[float]:
        return [
            record.metrics[f"ppl/{text_label(text)}"]
            for (name, _, tokens), record in self.done.items()
            if (name, tokens) == (row, max_tokens)
        ]


def print_table(cells: Cells, text: str, max_tokens: int, rows: list[str]) -> None:
    measured = cells.done["unquantized", 0, max_tokens].conditions["tokens"][text_label(text)]
    print(f"\n{cells.model}, {text_label(text)}, {measured} tokens")
    means = {}
    for row in ["unquantized", *rows]:
        values = cells.perplexities(row, max_tokens, text)
        mean = means[row] = statistics.mean(values)
        spread = f"{min(values):.2f} … {max(values):.2f}" if len(values) > 1 else ""
        bottom, top = means["unquantized"], means.get(row.replace("DFRot", "RH"), means.get("RH"))
        closed = "" if top in (None, mean) else f"{(top - mean) / (top - bottom):+.1%} of the gap"
        print(f"{row:18} {mean:10.2f}   {spread:20} {closed}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--calib", required=True)
    parser.add_argument("--ppl", nargs="+", required=True)
    parser.add_argument("--rows", choices=TABLES, default="paper")
    parser.add_argument("--only", nargs="*", help="of these rows (default all)")
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    cells = Cells(arguments.out, arguments.model, arguments.calib, arguments.ppl)
    tables = [
        (max_tokens, {name: words for name, words in rows.items() if not arguments.only or name in arguments.only})
        for max_tokens, rows in TABLES[arguments.rows]
    ]
    for max_tokens, rows in tables:
        cells.measure("unquantized", 0, max_tokens, None)
        for seed in range(arguments.seeds):
            for row, words in rows.items():
                if row != "none" or seed == 0:  # nothing in it is random
                    cells.measure(row, seed, max_tokens, words)
    for max_tokens, rows in tables:
        for text in arguments.ppl:
            print_table(cells, text, max_tokens, list(rows))


if __name__ == "__main__":
    main()
