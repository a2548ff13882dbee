"""The main job on a real model: rotate, quantize to 4 bits, measure, save, load again, talk.

    python examples/demo.py OUT [--max-tokens 8192]

Needs no network and no GPU: the model comes in a PyPI package, the text is the documentation that every CPython has.
Every number that is printed is also a line of OUT/results.jsonl, with what it depends on, and in OUT/report.html. Begun
again after an interruption, it goes on.
"""

import argparse
import time
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

import dfrot
from dfrot.compare.table import LiveTable
from dfrot.compare.trials import compare
from dfrot.evaluation.record import Record
from dfrot.evaluation.run import Measurement
from dfrot.report.page import report
from dfrot.system.memory import keep_freed_memory

MODEL, TEXT = "smollm2-135m", "pydoc"
CALIBRATION_TOKENS = 8192  # for the weights; rotations take the first sequence of 2048
UNTUNED = {"tune": "none"}
RECIPES: list[tuple[str, str, str, dict[str, Any]]] = [
    ("none", "rtn", "w16a4kv16", {}),
    ("none", "rtn", "w4a4kv4", {}),
    ("quarot", "rtn", "w4a4kv4", {}),
    ("quarot", "gptq", "w4a4kv4", UNTUNED),
    ("rangerot", "gptq", "w4a4kv4", UNTUNED),
    ("rangerot", "gptq", "w4a4kv4", {"tune": "biases", "tune_steps": 40, "tune_tokens": 512}),
]
PROMPT = "The documentation of a function should"

console = Console()


def table_of(records: list[Record]) -> Table:
    table = Table(title=f"{MODEL}, perplexity on {TEXT} (lower is better)", box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("spec", "recipe", "perplexity", "MB", "bits/weight", "KV B/token", "s"):
        table.add_column(heading, justify="left" if heading in ("spec", "recipe") else "right", no_wrap=True)
    previous = None
    for record in records:
        recipe = record.recipe or {"spec": "—", "method": "unquantized", "weights": None}
        tuned = bool(recipe.get("tune", {}).get("parts"))  # it follows the same one that is not
        weights = "" if recipe["weights"] is None or recipe["spec"].startswith("w16") else f" {recipe['weights']}"
        if previous not in (None, recipe["spec"]):
            table.add_section()
        previous = recipe["spec"]
        perplexity = record.metrics[f"ppl/{TEXT}"]
        table.add_row(
            recipe["spec"],
            "… then tuned" if tuned else recipe["method"] + weights,
            f"{perplexity:.2f}" if perplexity < 1000 else f"{perplexity:.0f}",
            f"{record.size['weight_bytes'] / 1e6:.0f}",
            f"{record.size['decoder_bits_per_weight']:.2f}",
            f"{record.size['kv_bytes_per_token']:.0f}",
            f"{sum(record.timings_s.values()):.0f}",
        )
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="directory for checkpoints and results")
    parser.add_argument("--max-tokens", type=int, default=8192, help="tokens of text to measure on (default 8192)")
    arguments = parser.parse_args()
    keep_freed_memory()
    started = time.perf_counter()
    calibration: Any = {"calib": TEXT, "calib_tokens": CALIBRATION_TOKENS}
    recipes = [
        dfrot.Recipe.parse(method, weights, spec, **calibration, **tuning) for method, weights, spec, tuning in RECIPES
    ]
    measurement = Measurement((TEXT,), max_tokens=arguments.max_tokens)
    with LiveTable([None, *recipes], console) as table:
        records = compare(MODEL, [None, *recipes], measurement, arguments.out, on_trial=table.on_trial)
    console.print(table_of(records))
    if len(records) <= len(recipes):
        raise SystemExit("some recipes failed; what is above says why, and the same command goes on")

    checkpoint = arguments.out / records[-1].conditions["checkpoint"]
    model, tokenizer = dfrot.load(checkpoint)
    inputs = tokenizer(PROMPT, return_tensors="pt")
    tokens = model.generate(**inputs, max_new_tokens=24, do_sample=False, pad_token_id=tokenizer.eos_token_id)
    console.print(f"{checkpoint} continues, 4-bit weights, activations and KV cache:", markup=False)
    console.print(tokenizer.decode(tokens[0], skip_special_tokens=True), markup=False, style="italic")
    page = report(arguments.out)
    console.print(f"{time.perf_counter() - started:.0f} s. Numbers with their conditions: {page}")


if __name__ == "__main__":
    main()
