"""The papers' recipes and the best of ours on real models, beside the models themselves.

    python benchmarks/real_models.py MODEL… --out OUT --calib TEXT --ppl TEXT TEXT [--specs w4a4kv4,w4a8kv4]

For each model and spec: none, quarot, dfrot and duquant with gptq, then rangerot (quarot, where no rotation of the
stream can be folded) towards the original outputs, untuned and tuned; and quarot with nothing but the cache quantized.
Perplexity on each text and KL divergence from the original model, what the cache costs by the measure of `quantize`,
seconds, and the largest memory. Begun again it goes on where it was: each model has a folder in OUT with the records
and checkpoints of `dfrot compare`. The table is printed last, with the machine, and is OUT/table.md.
"""

import argparse
import functools
import json
import platform
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import dfrot
from dfrot.compare.table import LiveTable
from dfrot.compare.trials import compare
from dfrot.evaluation.record import Record, text_label
from dfrot.evaluation.run import Measurement
from dfrot.models.source import open_source
from dfrot.system.memory import keep_freed_memory

PAPERS = ("none", "quarot", "dfrot", "duquant")


def recipes(given: argparse.Namespace, rotates_stream: bool) -> dict[str, dfrot.Recipe | None]:
    """Row → recipe; None is the model itself. Where R1 cannot be folded there is none to refine."""
    method = "rangerot" if rotates_stream else "quarot"
    calibration: dict[str, Any] = {"calib": given.calib, "calib_tokens": given.calib_tokens, "seed": given.seed}
    tuning = {"tune": given.tune, "tune_steps": given.tune_steps, "tune_tokens": given.tune_tokens}
    rows: dict[str, dfrot.Recipe | None] = {"unquantized": None}
    rows["w16a16kv4 quarot"] = dfrot.Recipe.parse("quarot", spec="w16a16kv4", seed=given.seed)
    for spec in given.specs.split(","):
        for paper in (name for name in PAPERS if rotates_stream or name != "dfrot"):
            words = calibration | {"preset": "duquant" if paper == "duquant" else "paper"}
            rows[f"{spec} {paper} gptq"] = dfrot.Recipe.parse(paper, "gptq", spec, tune="none", **words)
        best: Any = functools.partial(dfrot.Recipe.parse, method, "gptq", spec, target="original", **calibration)
        rows[f"{spec} {method} gptq, target original"] = best(tune="none")
        rows[f"{spec} … then {given.tune} tuned"] = best(**tuning)
    return rows


def row_of(name: str, record: Record, original: Record, labels: list[str], out: Path) -> list[str]:
    """A line of the table."""
    cells = [name]
    for label in labels:
        perplexity, kl = record.metrics[f"ppl/{label}"], record.metrics.get(f"kl/{label}")
        cells.append(f"{perplexity:.2f} ({perplexity / original.metrics[f'ppl/{label}']:.2f} ×)")
        cells.append("" if kl is None or record is original else f"{kl:.3f}")
    notes = out / str(record.conditions.get("checkpoint")) / "fit.json"
    cost = json.loads(notes.read_text()).get("cache") if notes.is_file() else None
    cells.append(f"{cost['share']:.0%}" if cost else "")
    quantizing = sum(seconds for stage, seconds in record.timings_s.items() if stage != "evaluate")
    cells.append(f"{quantizing:.0f}" if quantizing else "")
    cells.append(f"{record.peak_rss_bytes / 1e9:.1f}")
    return cells


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="MODEL")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--calib", required=True, help="calibration text, which tuning sees too")
    parser.add_argument("--ppl", nargs="+", required=True, help="texts to measure on, none of them seen before")
    parser.add_argument("--specs", default="w4a4kv4,w4a8kv4")
    parser.add_argument("--calib-tokens", type=int, default=16384)
    parser.add_argument("--max-tokens", type=int, default=20480)
    parser.add_argument("--tune", default="biases")
    parser.add_argument("--tune-steps", type=int, default=200)
    parser.add_argument("--tune-tokens", type=int, default=1024)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args()
    keep_freed_memory()
    labels, console = [text_label(text) for text in given.ppl], Console()
    heads = ["recipe", *(head for label in labels for head in (label, "KL")), "KL by the cache", "s", "GB"]
    lines = []
    for model in given.models:
        out = given.out / Path(model).stem
        rows = recipes(given, open_source(model, fetch=False).graph.rotates_stream)
        measurement = Measurement(tuple(given.ppl), max_tokens=given.max_tokens, against=model)
        with LiveTable(list(rows.values()), console) as table:
            how: dict[str, Any] = {"device": given.device, "on_trial": table.on_trial}
            records = compare(model, list(rows.values()), measurement, out, **how)
        found = {json.dumps(record.recipe, sort_keys=True): record for record in records}
        original = found["null"]
        lines += [f"\n**{model}**\n", "| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
        for name, recipe in rows.items():
            if record := found.get(json.dumps(recipe and recipe.to_json(), sort_keys=True)):
                lines.append("| " + " | ".join(row_of(name, record, original, labels, out)) + " |")
    where = f"{torch.cuda.get_device_name()}" if given.device.startswith("cuda") else platform.processor()
    words = f"{where}, {torch.get_num_threads()} threads; first {given.max_tokens} tokens, seed {given.seed}"
    (given.out / "table.md").write_text("\n".join([*lines, "", words, ""]))
    print("\n".join([*lines, "", words]))


if __name__ == "__main__":
    main()
