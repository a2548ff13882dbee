"""Broken files for everything that reads files: how many are accepted, how many refused, and which make it fail.

    python benchmarks/fuzz.py all [--inputs 10000] [--seed 0]
    python benchmarks/fuzz.py config --only 4711      # one input again, with its traceback

A reader may return, or raise a UserError or an SetupError; another exception, a hang, a crash, a gigabyte of
memory or a file outside its directory is a failure, and the exit code 1.
"""

import argparse
import multiprocessing
import os
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.readers import Reader, Tally, broken_directory, fuzz, readers

SHOWN = 5  # failures of each reader


def fuzzed(name: str, reader: Reader, inputs: int, seed: int, folder: Path) -> Tally:
    """The tally of a reader in processes of its own: one that dies costs an input, and another goes on."""
    context = multiprocessing.get_context("fork")
    total, number = Tally(), 0
    while number < inputs:
        begun, (ours, theirs) = context.Value("l", number), context.Pipe()

        def work(start: int = number, begun: Any = begun, pipe: Any = theirs) -> None:
            def note(current: int) -> None:
                begun.value = current

            where = Path(tempfile.mkdtemp(dir=folder)) / "work"
            pipe.send(fuzz(name, reader, range(start, min(start + 500, inputs)), seed, where, note))

        process = context.Process(target=work)
        process.start()
        theirs.close()
        try:
            tally = ours.recv()
            number = min(number + 500, inputs)
        except EOFError:
            process.join()
            tally = Tally(failures=[(begun.value, f"the process died with {process.exitcode}")])
            number = begun.value + 1
        process.join()
        total.accepted += tally.accepted
        total.refused += tally.refused
        total.failures += tally.failures
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reader", help="the name of one, or all")
    parser.add_argument("--inputs", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="the number of one input, to see its traceback")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    failed = False
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        every = readers(folder)
        chosen = every if arguments.reader == "all" else {arguments.reader: every[arguments.reader]}
        if arguments.only is not None:
            ((name, reader),) = chosen.items()
            broken_directory(name, reader, arguments.only, arguments.seed, folder / "model")
            os.chdir(folder)
            reader.read(folder / "model")
            return
        print(f"{'reader':12}{'whose':14}{'inputs':>8}{'accepted':>10}{'refused':>9}{'failures':>10}{'seconds':>9}")
        for name, reader in chosen.items():
            began = time.perf_counter()
            tally = fuzzed(name, reader, arguments.inputs, arguments.seed, folder)
            print(
                f"{name:12}{reader.whose:14}{arguments.inputs:8}{tally.accepted:10}{tally.refused:9}{len(tally.failures):10}"
                f"{time.perf_counter() - began:9.0f}",
                flush=True,
            )
            for number, error in tally.failures[:SHOWN]:
                print(f"  --only {number} --seed {arguments.seed}: {error}", flush=True)
            failed |= bool(tally.failures)
    sys.exit(failed)


if __name__ == "__main__":
    main()
