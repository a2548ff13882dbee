"""What the rotation is worth: perplexity of a model whose activations alone are quantized, by method and seed.

    python benchmarks/dfrot_table.py OUT --calib TEXT --ppl TEXT [TEXT ...] [--rows paper|released]

Rows `paper`: none, RO, RH, DFRot with γ = 1, 10, 100 and chosen by measurement, at w16a4kv16, preset paper.
Rows `released`: the settings of the released scripts: clip ratios 1, activations asymmetric and symmetric, w4a4kv4 by
RTN. Finished cells are lines of OUT/results.jsonl and are not measured again. The gap is that of RH to unquantized.
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

UNCLIPPED = {"act_clip": 1.0, "kv_clip": 1.0}
ROWS: dict[str, dict[str, dict[str, Any]]] = {
    "paper": {
        "none": {"method": "none"},
        "RO": {"method": "quarot", "rotation": "orthogonal"},
        "RH": {"method": "quarot"},
        "DFRot auto": {"method": "dfrot"},
        "DFRot γ=1": {"method": "dfrot", "gamma": 1.0},
        "DFRot γ=10": {"method": "dfrot", "gamma": 10.0},
        "DFRot γ=100": {"method": "dfrot", "gamma": 100.0},
        "DFRot paper": {"method": "dfrot", "objective": "paper"},
    },
    "released": {
        "RO": {"method": "quarot", "rotation": "orthogonal", **UNCLIPPED},
        "RH": {"method": "quarot", **UNCLIPPED},
        "DFRot": {"method": "dfrot", **UNCLIPPED},
        "RO symmetric": {"method": "quarot", "rotation": "orthogonal", "act_symmetric": True, **UNCLIPPED},
        "RH symmetric": {"method": "quarot", "act_symmetric": True, **UNCLIPPED},
        "DFRot symmetric": {"method": "dfrot", "act_symmetric": True, **UNCLIPPED},
        "RH w4a4kv4": {"method": "quarot", "spec": "w4a4kv4", **UNCLIPPED},
        "DFRot w4a4kv4": {"method": "dfrot", "spec": "w4a4kv4", **UNCLIPPED},
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--calib", required=True)
    parser.add_argument("--ppl", nargs="+", required=True)
    parser.add_argument("--rows", choices=ROWS, default="paper")
    parser.add_argument("--only", nargs="*", help="of these rows (default all)")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--max-tokens", type=int, default=40960)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    results = arguments.out / "results.jsonl"
    done: dict[tuple[str, int], Record] = {}
    for line in results.read_text().splitlines() if results.is_file() else []:
        record = Record.from_json(json.loads(line))
        done[record.conditions["row"], record.conditions["seed"]] = record

    def cell(row: str, seed: int, words: dict[str, Any] | None) -> None:
        if (row, seed) in done:
            return
        model, timings = arguments.model, {}
        if words is not None:
            recipe = dfrot.Recipe.parse(**{"spec": "w16a4kv16", **words}, calib=arguments.calib, seed=seed)
            report = dfrot.quantize(model, recipe, arguments.out / "checkpoint", overwrite=True)
            model, timings = str(report.path), report.timings_s
        record = evaluate(model, arguments.ppl, max_tokens=arguments.max_tokens)
        record.timings_s |= timings
        record.conditions |= {"row": row, "seed": seed}
        append_records(results, [record])
        done[row, seed] = record
        print(row, seed, {key: round(value, 3) for key, value in record.metrics.items()}, flush=True)

    cell("unquantized", 0, None)
    rows = {name: words for name, words in ROWS[arguments.rows].items() if not arguments.only or name in arguments.only}
    for seed in range(arguments.seeds):
        for row, words in rows.items():
            if row != "none" or seed == 0:  # nothing in it is random
                cell(row, seed, words)

    for text in map(text_label, arguments.ppl):
        tokens = done["unquantized", 0].conditions["tokens"][text]
        print(f"\n{arguments.model}, {text}, {tokens} tokens, {arguments.seeds} seeds")
        by_row: dict[str, list[float]] = {}
        for (row, _), record in done.items():
            by_row.setdefault(row, []).append(record.metrics[f"ppl/{text}"])
        bottom = by_row["unquantized"][0]
        for row, values in by_row.items():
            mean = statistics.mean(values)
            spread = f"{min(values):.2f} … {max(values):.2f}" if len(values) > 1 else ""
            peer = row.replace("DFRot", "RH")  # the RH row with the same grids
            top = statistics.mean(by_row.get(peer, by_row.get("RH", [float("nan")])))
            closed = f"{(top - mean) / (top - bottom):+.1%} of the gap" if row != peer else ""
            print(f"{row:18} {mean:10.2f}   {spread:20} {closed}")


if __name__ == "__main__":
    main()
