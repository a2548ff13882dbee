"""Time and peak memory of `dfrot quantize`, against the unquantized model's float32 size and against the plan.

    python benchmarks/quantize.py --method quarot --weights rtn --calib pydoc
    python benchmarks/quantize.py --method rangerot --weights gptq --calib wiki.train.raw --calib-tokens 65536
    python benchmarks/quantize.py --model DIR --weights gptq --calib wiki.train.raw --extrapolate HOLES

Takes the words of `dfrot quantize`, without MODEL (--model, default smollm2-135m) and -o. Runs the command in a process
of its own and asks the operating system for the most memory it had resident. The time of a block is the median of those
between two finished shards. For another model (big_model.py makes some that take no room) it is extrapolated by what
the plans of both expect.
"""

import argparse
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path

import tyro

from dfrot.cli import Quantize
from dfrot.cli.flags import parse_size
from dfrot.evaluation.record import model_size
from dfrot.models.source import locate, open_source
from dfrot.pipeline.estimate import Estimate


def planned(model: str, words: list[str]) -> Estimate:
    options = tyro.cli(Quantize, args=[model, "-o", "nowhere", *words])
    return Estimate.of(
        open_source(model), options.recipe(), None if options.memory is None else parse_size(options.memory)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--extrapolate", metavar="DIR", help="another model, for which the time is to be told")
    parser.add_argument("--tmp", help="where the checkpoint goes until it is deleted")
    arguments, words = parser.parse_known_args()
    float32 = 2 * model_size(locate(arguments.model))["unquantized_bytes"]  # converts a GGUF file before we measure
    plan = planned(arguments.model, words)
    with tempfile.TemporaryDirectory(dir=arguments.tmp) as folder:
        made = Path(folder) / "out"
        command = [sys.executable, "-m", "dfrot", "quantize", arguments.model, "-o", str(made), *words]
        began = time.perf_counter()
        subprocess.run(command, check=True)
        seconds = time.perf_counter() - began
        shards = sorted(made.glob("model-*.safetensors"))[:-1]  # the embedding, and every block
        finished = [shard.stat().st_mtime for shard in shards]
    block = statistics.median(after - before for before, after in pairwise(finished))
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    print(f"{arguments.model} {' '.join(words)}; {platform.machine()}, {os.cpu_count()} cores")
    print(f"{seconds:.0f} s; peak resident memory {peak / 1e9:.2f} GB, weights in float32 {float32 / 1e9:.2f} GB")
    print(f"above the float32 weights: {(peak - float32) / 1e9:.2f} GB; planned {plan.memory / 1e9:.2f} GB")
    print(f"{len(finished) - 1} blocks, {block:.1f} s each")
    if arguments.extrapolate is not None:
        other = planned(arguments.extrapolate, words)
        ratio = other.block_weights / plan.block_weights  # at least: products with a Hessian grow faster
        hours = block * ratio * other.blocks / 3600
        print(f"{arguments.extrapolate}: {other.blocks} blocks, {block * ratio:.0f} s each, {hours:.1f} h in all")


if __name__ == "__main__":
    main()
