"""Time and peak memory of `dfrot quantize`, against the unquantized model's float32 size.

    python benchmarks/quantize.py --method quarot --weights rtn --calib pydoc
    python benchmarks/quantize.py --method dfrot --weights gptq --calib wiki.train.raw --calib-tokens 65536

Takes the words of `dfrot quantize`, without MODEL (--model, default smollm2-135m) and -o. Runs the command in a process
of its own and asks the operating system for the most memory it had resident.
"""

import argparse
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from dfrot.models.source import locate
from dfrot.results import model_size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    arguments, words = parser.parse_known_args()
    float32 = 2 * model_size(locate(arguments.model))["unquantized_bytes"]  # converts a GGUF file before we measure
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "dfrot", "quantize", arguments.model, "-o", str(Path(folder) / "out"), *words]
        began = time.perf_counter()
        subprocess.run(command, check=True)
        seconds = time.perf_counter() - began
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    print(f"{arguments.model} {' '.join(words)}; {platform.machine()}, {os.cpu_count()} cores")
    print(f"{seconds:.0f} s; peak resident memory {peak / 1e9:.2f} GB, weights in float32 {float32 / 1e9:.2f} GB")
    print(f"above the float32 weights: {(peak - float32) / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
