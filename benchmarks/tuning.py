"""What tuning after rounding brings: perplexity, KL divergence and seconds by recipe, parts and steps, in a table.

    python benchmarks/tuning.py OUT --calib TEXT --ppl TEXT TEXT [--device cuda] [--seeds 0,1,2] [--tune none,all]

Every recipe is quantized once a seed, where `none` is among the rows; the tuned ones then start from the same blocks.
Of several seeds the table shows means, with their standard deviation. One of the texts should be of another kind than
the one that is tuned on, to show whether tuning only learned that kind. Finished rows are lines of OUT/results.jsonl
and are not measured again.

On a GPU, the full budget: --steps 170 --tokens 8192 --seq-len 1024. On two cores: --steps 100 --tokens 512.
"""

import argparse
import itertools
import json
import shutil
import statistics
import time
from pathlib import Path
from typing import Any

import dfrot
from dfrot.evaluation.record import text_label
from dfrot.evaluation.run import Measurement, evaluate
from dfrot.system.memory import keep_freed_memory


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
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
    return parser.parse_args()


def trials(given: argparse.Namespace) -> dict[str, list[dfrot.Recipe | None]]:
    """Row of the table → its recipe for every seed; None stands for the unquantized model."""
    rows: dict[str, list[dfrot.Recipe | None]] = {"unquantized": [None]}
    words = {"calib": given.calib, "calib_tokens": given.calib_tokens}
    for recipe, parts in itertools.product(given.recipes.split(","), given.tune.split(",")):
        method, rounding, *options = recipe.split()
        given_options = dict(option.split("=") for option in options)
        for steps in [None] if parts == "none" else map(int, given.steps.split(",")):
            tuning: dict[str, Any] = {}
            if steps is not None:
                tuning = {"tune": parts.replace("+", ","), "tune_steps": steps, "tune_text": given.tune_text}
                tuning |= {"tune_tokens": given.tokens, "tune_seq_len": given.seq_len}
            rows[f"{recipe}, {parts}" + (f", {steps} steps" if steps else "")] = [
                dfrot.Recipe.parse(method, rounding, given.spec, seed=int(seed), **given_options, **words, **tuning)
                for seed in given.seeds.split(",")
            ]
    return rows


def measured(given: argparse.Namespace, recipe: dfrot.Recipe | None) -> dict[str, Any]:
    """Metrics, and seconds by stage."""
    texts = Measurement(tuple(given.ppl), given.eval_seq_len, given.max_tokens, given.model if recipe else None)
    if recipe is None:
        return {"metrics": evaluate(given.model, texts, device=given.device).metrics}
    path = given.out / "checkpoint"
    shared: Any = {"reuse_dir": given.out / "shared", "check_source": "never"}
    untuned = not recipe.tuning.enabled
    if untuned:  # stays: tuned rows take its blocks
        path = given.out / recipe.digest
    began = time.perf_counter()
    result = dfrot.quantize(given.model, recipe, path, device=given.device, overwrite=True, **shared)
    taken = {**result.timings_s, "whole": time.perf_counter() - began}
    metrics = evaluate(str(path), texts, device=given.device).metrics
    if not untuned:
        shutil.rmtree(path)
    return {"metrics": metrics, "seconds": taken, "tuning": result.notes.get("tuning")}


def shown(values: list[float]) -> str:
    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{spread}"


def main() -> None:
    keep_freed_memory()
    given = parsed()
    given.out.mkdir(parents=True, exist_ok=True)
    results = given.out / "results.jsonl"
    lines = results.read_text().splitlines() if results.is_file() else []
    known = {record["trial"]: record for record in map(json.loads, lines)}
    conditions = f"{given.model} {given.device} {given.ppl} {given.max_tokens} {given.eval_seq_len}"
    names = [name for text in given.ppl for name in (f"ppl/{text_label(text)}", f"kl/{text_label(text)}")]
    table = [["recipe", *names, "held-out KL", "rate", "quantize s", "tune s"]]
    table.append(["---"] * len(table[0]))
    for row, recipes in trials(given).items():
        found = []
        for recipe in recipes:
            trial = f"{recipe.digest if recipe else 'unquantized'} {conditions}"
            if trial not in known:
                known[trial] = {"trial": trial, "row": row, "seed": recipe and recipe.seed, **measured(given, recipe)}
                with results.open("a") as file:
                    file.write(json.dumps(known[trial]) + "\n")
                found_now = {name: round(value, 4) for name, value in known[trial]["metrics"].items()}
                print(f"{row}, seed {known[trial]['seed']}: {found_now}", flush=True)
            found.append(known[trial])
        cells = [
            shown([each["metrics"][name] for each in found]) if name in found[0]["metrics"] else "" for name in names
        ]
        tuned = [each["tuning"] for each in found if each.get("tuning")]
        held = f"{shown([each['held_kl']['0'] for each in tuned])} → " if tuned else ""
        held += shown([min(each["held_kl"].values()) for each in tuned]) if tuned else ""
        rates = ", ".join(f"{each['factor']:g}" for each in tuned)
        seconds = [each["seconds"] for each in found if "seconds" in each]
        times = [
            f"{statistics.mean([each.get(stage, 0) for each in seconds]):.0f}" if seconds else ""
            for stage in ("quantize", "tune")
        ]
        table.append([row, *cells, held, rates, *times])
    text = "\n".join(f"| {' | '.join(cells)} |" for cells in table)
    (given.out / "table.md").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
