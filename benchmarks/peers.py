"""Weights alone in 4 bits, beside auto-round: perplexity, KL divergence and seconds, in a table.

    python benchmarks/peers.py OUT --calib TEXT --ppl TEXT TEXT --auto-round PYTHON [--tune-text TEXT]

PYTHON is an interpreter of another environment, which has auto-round; without one its row is left out, and a line says
how to make it. auto-round is calibrated on the tokens that GPTQ sees, in samples of 512, its grids are of the same kind
(one scale in 16 bits for a group, 4.25 bits a weight for groups of 64), and what it makes is measured by the same code,
dequantized to float32. Tuning sees more text: steps × tokens. Rows, and what is kept of them, are as in tuning.py.
"""

import argparse
import json
import shutil
import subprocess
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from rows import Rows, Trial, measure, metrics, parser, quantized, seeds, unquantized

import dfrot
from dfrot.models.source import open_source
from dfrot.pipeline.run import calibration_tokens

SAMPLE = 512  # tokens
# On a machine without a GPU torch from https://download.pytorch.org/whl/cpu saves gigabytes.
ENVIRONMENT = (
    "python3 -m venv VENV && VENV/bin/pip install torch==2.13.0 && "
    "VENV/bin/pip install torch==2.13.0 auto-round==0.16.1"
)
SCRIPT = Path(__file__).with_name("peers_auto_round.py")


def auto_round(given: argparse.Namespace) -> Rows:
    """Its row; stops if the spec is not of weights alone, or that interpreter lacks it."""
    asked = "import importlib.metadata; print(importlib.metadata.version('auto-round'))"
    answer = subprocess.run([given.auto_round, "-c", asked], capture_output=True, text=True)
    if answer.returncode:
        raise SystemExit(f"{given.auto_round} has no auto-round. {ENVIRONMENT}")
    label = f"auto-round {answer.stdout.strip()}, {given.iterations} iterations"
    words = {"calib": given.calib, "calib_tokens": given.calib_tokens}
    trials = []
    for seed in seeds(given):  # a recipe that says which grids, and which tokens
        recipe = dfrot.Recipe.parse("none", "gptq", given.spec, seed=seed, **words)
        if recipe.spec.activations.enabled or recipe.spec.keys.enabled or not recipe.spec.weights.enabled:
            raise SystemExit(f"auto-round quantizes weights alone here, and {given.spec} is not of them alone.")
        trials.append(Trial(f"{label} {recipe.digest}", seed, partial(by_auto_round, given, recipe)))
    return {label: trials}


def by_auto_round(given: argparse.Namespace, recipe: dfrot.Recipe) -> dict[str, Any]:
    """Quantize in a process with the other interpreter, and measure here."""
    source, weights = open_source(given.model), recipe.spec.weights
    tokens = calibration_tokens(source, recipe).flatten()
    job = {
        "model": str(source.path),
        "windows": tokens[: len(tokens) // SAMPLE * SAMPLE].view(-1, SAMPLE).tolist(),
        "scheme": {"bits": weights.bits, "group_size": weights.group or -1, "sym": weights.symmetric},
        "iterations": given.iterations,
        "seed": recipe.seed,
        "device": given.device,
    }
    out, log = given.out / "auto-round", given.out / "auto-round.log"
    shutil.rmtree(out, ignore_errors=True)
    with tempfile.TemporaryDirectory() as folder, log.open("w") as file:
        path = Path(folder) / "job.json"
        path.write_text(json.dumps(job))
        run = subprocess.run([given.auto_round, SCRIPT, path, out], stdout=file, stderr=subprocess.STDOUT)
    if run.returncode:
        raise SystemExit(f"auto-round failed; {log} says how.")
    seconds = json.loads((out / "seconds.json").read_text())
    found = metrics(given, out, against=given.model)
    shutil.rmtree(out)
    return {**found, "seconds": {"quantize": seconds}}


def main() -> None:
    options = parser(__doc__)
    options.set_defaults(spec="w4g64a16kv16", recipes="quarot gptq", tune="none,biases,biases+scales", max_tokens=20480)
    options.add_argument("--auto-round", type=Path, metavar="PYTHON", help=f"VENV/bin/python after {ENVIRONMENT}")
    options.add_argument("--iterations", type=int, default=50, help="of auto-round, for each block")
    given = options.parse_args()
    if given.auto_round is None:
        print(f"auto-round is left out. For its row: {ENVIRONMENT}, then --auto-round VENV/bin/python")
    peers = {} if given.auto_round is None else auto_round(given)
    measure(given, {**unquantized(given), **peers, **quantized(given)})


if __name__ == "__main__":
    main()
