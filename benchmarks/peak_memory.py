"""Peak memory of `dfrot quantize`, against the unquantized model's float32 size.

    python benchmarks/peak_memory.py [--model smollm2-135m] [--method quarot] [--spec w4a4kv4]

Runs the command in a process of its own and asks the operating system for the most memory it had resident.
"""

import argparse
import os
import platform
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

from dfrot.models.source import locate
from dfrot.results import model_size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--method", default="quarot")
    parser.add_argument("--spec", default="w4a4kv4")
    arguments = parser.parse_args()
    float32 = 2 * model_size(locate(arguments.model))["unquantized_bytes"]  # converts a GGUF file before we measure
    with tempfile.TemporaryDirectory() as folder:
        words = [arguments.model, "-o", str(Path(folder) / "out"), "--method", arguments.method]
        words += ["--spec", arguments.spec, "--calib", "pydoc"]
        subprocess.run([sys.executable, "-m", "dfrot", "quantize", *words], check=True)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    print(f"{arguments.model} {arguments.method} {arguments.spec}, {platform.machine()}, {os.cpu_count()} cores")
    print(f"peak resident memory {peak / 1e9:.2f} GB, weights in float32 {float32 / 1e9:.2f} GB")
    print(f"above the float32 weights: {(peak - float32) / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
