"""Rows of the tables that tuning.py and peers.py print: what is measured for each, and finished ones kept."""

import argparse
import itertools
import json
import shutil
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import dfrot
from dfrot.evaluation.record import text_label
from dfrot.evaluation.run import Measurement, evaluate
from dfrot.system.memory import keep_freed_memory

Rows = Mapping[str, "Sequence[Trial]"]


class Trial(NamedTuple):
    """What stands in a row for one seed."""

    name: str  # differs between trials that differ, under the same conditions
    seed: int | None
    measure: Callable[[], dict[str, Any]]  # → metrics; seconds by stage; what tuning found


def parser(description: str | None) -> argparse.ArgumentParser:
    """The options that say what is measured, on what, and by which recipes."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--calib", required=True, help="text that rounding, and unless told otherwise tuning, sees")
    parser.add_argument("--tune-text", help="text that tuning sees")
    parser.add_argument("--ppl", nargs="+", required=True, help="texts that are measured")
    parser.add_argument("--max-tokens", type=int, default=40960, help="of each of them")
    parser.add_argument("--eval-seq-len", type=int, default=2048, help="tokens of a block that is measured")
    parser.add_argument(
        "--recipes",
        default="quarot gptq,rangerot gptq",
        help="method, rounding and options such as target=original, joined by commas",
    )
    parser.add_argument("--spec", default="w4a4kv4")
    parser.add_argument("--calib-tokens", type=int)
    parser.add_argument("--tune", default="none,biases,all", help="parts joined by +, alternatives by commas")
    parser.add_argument("--steps", default="100", help="joined by commas")
    parser.add_argument("--tokens", type=int, default=1024, help="of a step")
    parser.add_argument("--seq-len", type=int, default=512, help="tokens of a window")
    parser.add_argument("--seeds", default="0", help="joined by commas")
    parser.add_argument("--device", default="cpu")
    return parser


def seeds(given: argparse.Namespace) -> list[int]:
    return [int(seed) for seed in given.seeds.split(",")]


def unquantized(given: argparse.Namespace) -> Rows:
    return {"unquantized": [Trial("unquantized", None, partial(metrics, given, given.model, against=None))]}


def quantized(given: argparse.Namespace) -> Rows:
    """A row for every recipe by every tuning, `none` before those that take its blocks."""
    rows = {}
    words = {"calib": given.calib, "calib_tokens": given.calib_tokens}
    for recipe, parts in itertools.product(given.recipes.split(","), given.tune.split(",")):
        method, rounding, *options = recipe.split()
        given_options = dict(option.split("=") for option in options)
        for steps in [None] if parts == "none" else map(int, given.steps.split(",")):
            tuning: dict[str, Any] = {"tune": "none"}
            if steps is not None:
                tuning = {"tune": parts.replace("+", ","), "tune_steps": steps, "tune_text": given.tune_text}
                tuning |= {"tune_tokens": given.tokens, "tune_seq_len": given.seq_len}
            recipes = [
                dfrot.Recipe.parse(method, rounding, given.spec, seed=seed, **given_options, **words, **tuning)
                for seed in seeds(given)
            ]
            rows[f"{recipe}, {parts}" + (f", {steps} steps" if steps else "")] = [
                Trial(recipe.digest, recipe.seed, partial(by_recipe, given, recipe)) for recipe in recipes
            ]
    return rows


def metrics(given: argparse.Namespace, model: str | Path, *, against: str | None) -> dict[str, Any]:
    """Of a model or checkpoint, on the given texts."""
    texts = Measurement(tuple(given.ppl), given.eval_seq_len, given.max_tokens, against)
    return {"metrics": evaluate(str(model), texts, device=given.device).metrics}


def by_recipe(given: argparse.Namespace, recipe: dfrot.Recipe) -> dict[str, Any]:
    """Quantize and measure; what is not tuned stays, for the tuned rows that take its blocks."""
    tuned = recipe.tuning.enabled
    path = given.out / ("checkpoint" if tuned else recipe.digest)
    shared: Any = {"reuse_dir": given.out / "shared", "check_source": "never"}
    began = time.perf_counter()
    result = dfrot.quantize(given.model, recipe, path, device=given.device, overwrite=True, **shared)
    seconds = {**result.timings_s, "whole": time.perf_counter() - began}
    found = metrics(given, path, against=given.model)
    if tuned:
        shutil.rmtree(path)
    return {**found, "seconds": seconds, "tuning": result.notes.get("tuning")}


def measure(given: argparse.Namespace, rows: Rows) -> None:
    """Measure all rows but those in OUT/results.jsonl; print them as a table in Markdown, and write OUT/table.md."""
    keep_freed_memory()
    given.out.mkdir(parents=True, exist_ok=True)
    results = given.out / "results.jsonl"
    lines = results.read_text().splitlines() if results.is_file() else []
    known = {record["trial"]: record for record in map(json.loads, lines)}
    conditions = f"{given.model} {given.device} {given.ppl} {given.max_tokens} {given.eval_seq_len}"
    names = [name for text in given.ppl for name in (f"ppl/{text_label(text)}", f"kl/{text_label(text)}")]
    table = [["recipe", *names, "held-out KL", "rate", "quantize s", "tune s"]]
    table.append(["---"] * len(table[0]))
    for row, trials in rows.items():
        found = []
        for trial in trials:
            key = f"{trial.name} {conditions}"
            if key not in known:
                known[key] = {"trial": key, "row": row, "seed": trial.seed, **trial.measure()}
                with results.open("a") as file:
                    file.write(json.dumps(known[key]) + "\n")
                found_now = {name: round(value, 4) for name, value in known[key]["metrics"].items()}
                print(f"{row}, seed {trial.seed}: {found_now}", flush=True)
            found.append(known[key])
        table.append([row, *_cells(found, names)])
    text = "\n".join(f"| {' | '.join(cells)} |" for cells in table)
    (given.out / "table.md").write_text(text + "\n")
    print(text)


def _cells(found: Sequence[dict[str, Any]], names: Sequence[str]) -> list[str]:
    """A row of the table: metrics of these names, what tuning found, seconds."""
    values = [_shown([each["metrics"][name] for each in found if name in each["metrics"]]) for name in names]
    tuned = [each["tuning"] for each in found if each.get("tuning")]
    divergences = [each["held_kl"] for each in tuned]
    started, ended = _shown([kl["0"] for kl in divergences]), _shown([min(kl.values()) for kl in divergences])
    held = f"{started} → {ended}" if tuned else ""
    rates = ", ".join(f"{each['factor']:g}" for each in tuned)
    seconds = [each["seconds"] for each in found if "seconds" in each]
    times = [
        f"{statistics.mean([each.get(stage, 0) for each in seconds]):.0f}" if seconds else ""
        for stage in ("quantize", "tune")
    ]
    return [*values, held, rates, *times]


def _shown(values: Sequence[float]) -> str:
    """Their mean, and of several the standard deviation; nothing of none."""
    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{spread}" if values else ""
