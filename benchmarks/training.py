"""A step of tuning with the kernels around its products, and with torch in their place, alternating in one process.

    python benchmarks/training.py MODEL [--spec w4a4kv4] [--tokens 1024] [--seq-len 512] [--rounds 7]

Ratios of the same round, their median and quartiles.
"""

import argparse
import contextlib
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch

import dfrot
from dfrot.kernels import training
from dfrot.kernels.library import backend
from dfrot.system.memory import keep_freed_memory
from dfrot.tuning import run


class Measured(Exception):
    """Nothing is left to do."""


def seconds(loss: Callable[[int], float], *, kernels: bool) -> float:
    began = time.perf_counter()
    with contextlib.nullcontext() if kernels else mock.patch.object(training, "computable", return_value=False):
        loss(0)
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--spec", default="w4a4kv4")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=7)
    given = parser.parse_args()
    keep_freed_memory()
    print(f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(backend())

    class Timed:
        """In place of a descent."""

        done = True

        def __init__(self, trained: Any, loss: Callable[[int], float], *rest: Any) -> None:
            self.loss, self.total = loss, 0

        def remaining(self) -> Iterator[int]:
            yield 0
            times = []
            for number in range(given.rounds + 1):
                pair = seconds(self.loss, kernels=True), seconds(self.loss, kernels=False)
                if number:  # the first one warms up
                    times.append(pair)
            ours, torchs = (statistics.median(each) for each in zip(*times, strict=True))
            low, median, high = statistics.quantiles([slow / fast for fast, slow in times], n=4)
            print(f"{ours:.2f} s a step, {torchs:.2f} by torch: {median:.2f} times as fast ({low:.2f} … {high:.2f})")
            raise Measured

    tune = {"tune": "biases", "tune_steps": 1, "tune_tokens": given.tokens, "tune_seq_len": given.seq_len}
    recipe = dfrot.Recipe.parse("quarot", "rtn", given.spec, calib="pydoc", **tune)
    timed = mock.patch.object(run, "Descent", Timed)
    with tempfile.TemporaryDirectory() as folder, timed, contextlib.suppress(Measured):
        dfrot.quantize(given.model, recipe, Path(folder) / "checkpoint")


if __name__ == "__main__":
    main()
