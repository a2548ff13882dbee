"""Nothing is lost: `dfrot quantize` is killed again and again, resumed, and ends with the same bytes.

    python benchmarks/kills.py MODEL OUT [--runs 50] [--weights gptq] [--seed 0] [words of dfrot quantize]

One run in peace says how long it takes and what comes out. Every other one is killed (SIGKILL) at a random moment up to
one and a half times as long, resumed with --resume and killed again, until it is done; then every file is compared with
the first run's.
"""

import argparse
import platform
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

from dfrot.system.progress import track


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def finish(command: list[str], folder: Path, seconds: float, generator: random.Random) -> int:
    """Quantize into a folder until it is done; returns how often the process was killed."""
    kills = 0
    while True:
        resumes = folder.is_dir() and any(folder.iterdir())
        words = [*command, "-o", str(folder), *(["--resume"] if resumes else [])]
        try:
            done = subprocess.run(words, capture_output=True, text=True, timeout=generator.uniform(0, 1.5 * seconds))
        except subprocess.TimeoutExpired:  # `run` has killed it, by SIGKILL
            kills += 1
            continue
        # killed after its last rename, a run is done; then there is nothing to resume, and that is said
        if done.returncode == 0 or "is a finished checkpoint" in done.stderr:
            return kills
        raise SystemExit(f"after {kills} kills: {done.stderr}")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("out", type=Path, help="a folder for the checkpoints; made, and must not be there")
    parser.add_argument("--runs", type=int, default=50)
    parser.add_argument("--weights", default="gptq")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    options, words = parser.parse_known_args(arguments)
    command = [sys.executable, "-m", "dfrot", "quantize", options.model, "--weights", options.weights, *words]
    generator = random.Random(options.seed)
    options.out.mkdir(parents=True)
    began = time.perf_counter()
    subprocess.run([*command, "-o", str(options.out / "whole")], check=True)
    seconds = time.perf_counter() - began
    whole = contents(options.out / "whole")
    kills = 0
    for number in track(range(options.runs), "killing"):
        folder = options.out / f"killed-{number + 1}"
        kills += finish(command, folder, seconds, generator)
        if (made := contents(folder)) != whole:
            differing = sorted(name for name in made.keys() | whole.keys() if made.get(name) != whole.get(name))
            raise SystemExit(f"{folder} differs from an uninterrupted run in {', '.join(differing)}")
        shutil.rmtree(folder)
    print(f"{options.model} --weights {options.weights} {' '.join(words)}; seed {options.seed}, {platform.machine()}")
    print(f"{kills} kills in {options.runs} runs of {seconds:.0f} s: all {len(whole)} files equal, bit by bit")


if __name__ == "__main__":
    main()
