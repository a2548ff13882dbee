"""Perplexity of a quantized model by recipe and seed, as tables.

    python benchmarks/tables.py OUT --calib TEXT --ppl TEXT [TEXT ...] [--rows TABLE]

`paper`     what the rotation is worth: none, RO, RH, DFRot with γ = 1, 10, 100 and chosen by measurement, at w16a4kv16.
`released`  the settings of DFRot's released scripts, on the tokens that they were run on: clip ratios 1; activations
            asymmetric, w4a4kv4 by RTN, and activations symmetric.
`weights`   w4a4kv4, none, QuaRot and DFRot by RTN, GPTQ and LWC; and what GPTQ alone is worth, at w4a16kv16.
`best`      the best recipe at the specs of published numbers, on 20 480 tokens.
`duquant`   none, QuaRot, DFRot and DuQuant by RTN, LWC and GPTQ, at w4a4kv4 and w4a4kv16; DuQuant on top of QuaRot's
            folded rotations; and on 20 480 tokens its released settings and what each of its parts is worth there.
`deploy`    what it costs to quantize as stock servers do: preset deploy (symmetric activations, not clipped) against
            paper, and everything folded, without R3 and R4; at w4a4kv16, w4a4kv4 and w8a8kv16.

Weights are fitted to 32 × 2048 tokens (LWC: 8 × 2048). Finished trials are lines of OUT/results.jsonl and are not
measured again, as with `dfrot compare`, which this is with rows that its options do not reach. The gap is that between
a row's peer, QuaRot with the same grids or RTN, and the unquantized model.
"""

import argparse
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

import dfrot
from dfrot.compare.table import LiveTable
from dfrot.compare.trials import compare
from dfrot.evaluation.record import text_label
from dfrot.evaluation.run import Measurement

Words = dict[str, Any]


@dataclass(frozen=True)
class Row:
    """A recipe, the row it is compared with, and how many seeds it is worth."""

    words: Words
    peer: str | None = None
    seeds: int = 3


NONE: Words = {"method": "none"}
RO: Words = {"method": "quarot", "rotation": "orthogonal"}
RH: Words = {"method": "quarot"}
RANGEROT: Words = {"method": "rangerot"}
UNCLIPPED: Words = {"act_clip": 1.0, "kv_clip": 1.0}
SYMMETRIC: Words = {"act_symmetric": True, **UNCLIPPED}
RTN4: Words = {"spec": "w4a4kv4", "weights": "rtn"}
GPTQ4: Words = {"spec": "w4a4kv4", "weights": "gptq"}
# the papers' 20 epochs on 128 sequences, as far as two cores go
LWC4: Words = {"spec": "w4a4kv4", "weights": "lwc", "epochs": 2, "calib_tokens": 16384}
ASYMMETRIC: Words = {"weight_symmetric": False}
BEST: Words = RANGEROT | ASYMMETRIC | {"weights": "gptq"}
DUQUANT: Words = {"method": "duquant", "preset": "duquant"}
# the largest power of two that divides all widths, which is what the released code can take
RELEASED_DUQUANT: Words = DUQUANT | RTN4 | {"block": 64}


def every_method(spec: str) -> dict[str, Row]:
    """Rows for every method by every rounding; the peers are QuaRot's."""
    methods = {"none": NONE, "QuaRot": RH, "RangeRot": RANGEROT, "DuQuant": DUQUANT}
    weights = {"rtn": RTN4, "lwc": LWC4, "gptq": GPTQ4}
    return {
        f"{method} {quantizer} {spec}": Row(
            methods[method] | weights[quantizer] | {"spec": spec},
            peer=None if method == "QuaRot" else f"QuaRot {quantizer} {spec}",
            seeds=1,
        )
        for method in methods
        for quantizer in weights
    }


def presets(method: Words, words: Words) -> dict[str, Row]:
    """Rows for what a server can compute, and for the papers' preset."""
    changes: dict[str, Words] = {
        "paper": {},
        "deploy": {"preset": "deploy"},
        "deploy, folded": {"preset": "deploy", "fold_only": True},
    }
    label = f"{method['method']} {words['weights']} {words['spec']}"
    return {f"{label} {name}": Row(method | words | changed, seeds=1) for name, changed in changes.items()}


# Each table has its number of tokens and its rows.
TABLES: dict[str, list[tuple[int, dict[str, Row]]]] = {
    "paper": [
        (
            40960,
            {
                "none": Row(NONE, seeds=1),
                "RO": Row(RO, "RH"),
                "RH": Row(RH),
                "RangeRot auto": Row(RANGEROT, "RH"),
                "RangeRot γ=1": Row(RANGEROT | {"gamma": 1.0}, "RH"),
                "RangeRot γ=10": Row(RANGEROT | {"gamma": 10.0}, "RH"),
                "RangeRot γ=100": Row(RANGEROT | {"gamma": 100.0}, "RH"),
            },
        )
    ],
    "released": [
        (
            20480,
            {
                "RO": Row(RO | UNCLIPPED, "RH"),
                "RH": Row(RH | UNCLIPPED),
                "RangeRot": Row(RANGEROT | UNCLIPPED, "RH"),
                "RH w4a4kv4": Row(RH | UNCLIPPED | RTN4),
                "RangeRot w4a4kv4": Row(RANGEROT | UNCLIPPED | RTN4, "RH w4a4kv4"),
            },
        ),
        (
            10240,
            {
                "RH asymmetric": Row(RH | UNCLIPPED),
                "RO symmetric": Row(RO | SYMMETRIC, "RH symmetric"),
                "RH symmetric": Row(RH | SYMMETRIC),
                "RangeRot symmetric": Row(RANGEROT | SYMMETRIC, "RH symmetric"),
            },
        ),
    ],
    "weights": [
        (
            40960,
            {
                "QuaRot gptq": Row(RH | GPTQ4, "QuaRot rtn"),
                "RangeRot gptq": Row(RANGEROT | GPTQ4, "QuaRot gptq"),
                "RangeRot gptq asymmetric": Row(RANGEROT | GPTQ4 | ASYMMETRIC, "QuaRot gptq", seeds=1),
                "QuaRot w4a16kv16 rtn": Row(RH | {"spec": "w4a16kv16", "weights": "rtn"}, seeds=1),
                "QuaRot w4a16kv16 gptq": Row(
                    RH | {"spec": "w4a16kv16", "weights": "gptq"}, "QuaRot w4a16kv16 rtn", seeds=1
                ),
                "none rtn": Row(NONE | RTN4, seeds=1),
                "none gptq": Row(NONE | GPTQ4, "none rtn", seeds=1),
                "none lwc": Row(NONE | LWC4, "none rtn", seeds=1),
                "QuaRot rtn": Row(RH | RTN4, seeds=1),
                "QuaRot lwc": Row(RH | LWC4, "QuaRot rtn", seeds=1),
                "RangeRot rtn": Row(RANGEROT | RTN4, "QuaRot rtn", seeds=1),
                "RangeRot lwc": Row(RANGEROT | LWC4, "QuaRot rtn", seeds=1),
            },
        )
    ],
    "best": [
        (
            20480,
            {
                "RangeRot w4a4kv4": Row(BEST | {"spec": "w4a4kv4"}, seeds=1),
                "RangeRot w4a4kv16": Row(BEST | {"spec": "w4a4kv16"}, seeds=1),
                "QuaRot w4a16kv16": Row(RH | {"spec": "w4a16kv16", "weights": "gptq"}, seeds=1),
            },
        )
    ],
    "duquant": [
        (
            20480,
            {
                "released settings": Row(RELEASED_DUQUANT),
                "queries left alone": Row(RELEASED_DUQUANT | {"quantize_queries": False}, "released settings", 1),
                "no smoothing": Row(RELEASED_DUQUANT | {"smooth": False}, "released settings", 1),
                "one rotation": Row(RELEASED_DUQUANT | {"permutations": 0}, "released settings", 1),
                "three rotations": Row(RELEASED_DUQUANT | {"permutations": 2}, "released settings", 1),
                "no permutation": Row(RELEASED_DUQUANT | {"order": "none"}, "released settings", 1),
                "random permutation": Row(RELEASED_DUQUANT | {"order": "random"}, "released settings", 1),
            },
        ),
        (
            40960,
            {
                **every_method("w4a4kv4"),
                "DuQuant gptq, clip ratios searched": Row(
                    DUQUANT | GPTQ4 | {"weight_clip": "search"}, "QuaRot gptq w4a4kv4", 1
                ),
                "DuQuant on QuaRot rtn": Row(DUQUANT | RTN4 | {"base": "quarot"}, "QuaRot rtn w4a4kv4", 1),
            },
        ),
        (40960, every_method("w4a4kv16")),
    ],
    "deploy": [
        (
            40960,
            {
                **presets(RANGEROT, GPTQ4 | {"spec": "w4a4kv16"}),
                **presets(RANGEROT, GPTQ4),
                **presets(RH, GPTQ4 | {"spec": "w4a4kv16"}),
                **presets(RH, {"spec": "w8a8kv16", "weights": "rtn"}),
            },
        )
    ],
}


def print_table(title: str, values: dict[str, list[float]], rows: dict[str, Row]) -> None:
    """Mean and spread over seeds; gaps over the seeds that a row and its peer share."""
    print(f"\n{title}")
    (bottom,) = values["unquantized"]
    for row, of_seeds in values.items():
        spread = f"{min(of_seeds):.2f} … {max(of_seeds):.2f}" if len(of_seeds) > 1 else ""
        peer = rows[row].peer if row in rows else None
        closed = ""
        if peer in values:
            shared = list(zip(values[peer], of_seeds, strict=False))
            gap, gained = sum(top - bottom for top, _ in shared), sum(top - own for top, own in shared)
            closed = f"{gained / gap:+.1%} of the gap of {peer} closed, {len(shared)} seeds"
        print(f"{row:34} {statistics.mean(of_seeds):10.2f}   {spread:20} {closed}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--calib", required=True)
    parser.add_argument("--ppl", nargs="+", required=True)
    parser.add_argument("--rows", choices=TABLES, default="paper")
    parser.add_argument("--only", nargs="*", help="of these rows (default all)")
    parser.add_argument("--seeds", type=int, default=3, help="at most; rows that vary little have one")
    arguments = parser.parse_args()
    for max_tokens, rows in TABLES[arguments.rows]:
        rows = {name: row for name, row in rows.items() if not arguments.only or name in arguments.only}
        recipes: dict[str, list[dfrot.Recipe]] = {}
        for name, row in rows.items():
            words = {"spec": "w16a4kv16", "tune": "none", **row.words, "calib": arguments.calib}
            recipes[name] = [dfrot.Recipe.parse(**words, seed=seed) for seed in range(min(row.seeds, arguments.seeds))]
        every = list(dict.fromkeys(recipe for of_row in recipes.values() for recipe in of_row))
        measurement = Measurement(tuple(arguments.ppl), max_tokens=max_tokens)
        with LiveTable([None, *every], Console()) as table:
            records = compare(arguments.model, [None, *every], measurement, arguments.out, on_trial=table.on_trial)
        measured = dict(zip([None, *every], records, strict=True))
        for text in arguments.ppl:
            metric = f"ppl/{text_label(text)}"
            values = {"unquantized": [measured[None].metrics[metric]]}
            values |= {name: [measured[recipe].metrics[metric] for recipe in recipes[name]] for name in recipes}
            print_table(f"{arguments.model}, {text_label(text)}, first {max_tokens} tokens or all", values, rows)


if __name__ == "__main__":
    main()
