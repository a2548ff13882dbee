"""A step of tuning with the kernels around its products, and with torch in their place, alternating in one process.

    python benchmarks/training.py MODEL [--spec w4a4kv4] [--tokens 1024] [--seq-len 512] [--rounds 7]

The gradient through the quantizers is by the kernel in both. Ratios of the same round, their median and quartiles.
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
from dfrot.quant import affine
from dfrot.system.memory import keep_freed_memory
from dfrot.training import teacher
from dfrot.tuning import run


class Measured(Exception):
    """Nothing is left to do."""


def by_torch(x: Any, spec: Any, clip: Any, scale_dtype: Any) -> torch.Tensor:
    return affine.fake_quantize(x, spec.grid, spec.token_granularity, clip, scale_dtype)


def scaled_by_torch(x: Any, scale: Any, bias: Any, dtype: Any) -> torch.Tensor:
    y = x.to(scale.dtype) * scale
    return (y if bias is None else y + bias).to(dtype)


def seconds(loss: Callable[[int], float], *, kernels: bool) -> float:
    began = time.perf_counter()
    if kernels:
        loss(0)
    else:
        replaced = mock.patch.multiple(training, fake_quantize=by_torch, scaled=scaled_by_torch)
        with replaced, mock.patch.object(teacher, "computable", return_value=False):
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
