"""What the online transforms take of a forward pass: with them and without, alternating in one process.

    python benchmarks/online.py CHECKPOINT [CHECKPOINT ...] [--tokens 1 2048] [--rounds 9]

Online are R3 and R4 of QuaRot and DFRot, and DuQuant's block rotations and permutations. What is computed without them
is wrong, but takes the time that the rest takes. Ratios of the same round, their median and quartiles.
"""

import argparse
import os
import platform
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

import dfrot
from dfrot.memory import keep_freed_memory
from dfrot.runtime.blocks import RotatedNorm
from dfrot.runtime.kv import KVQuantizer
from dfrot.runtime.linear import QuantLinear


@contextmanager
def without_rotations(model: nn.Module) -> Iterator[None]:
    """Inside, nothing is rotated at run time."""
    rotating: list[Any] = [m for m in model.modules() if isinstance(m, (QuantLinear, RotatedNorm, KVQuantizer))]
    kept = [module.rotation for module in rotating]
    for module in rotating:
        module.rotation = nn.Identity() if isinstance(module, RotatedNorm) else None
    try:
        yield
    finally:
        for module, rotation in zip(rotating, kept, strict=True):
            module.rotation = rotation


def seconds(model: Any, token_ids: torch.Tensor) -> float:
    began = time.perf_counter()
    model(token_ids, use_cache=False)
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", nargs="+")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 2048])
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    keep_freed_memory()
    print(f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, torch {torch.__version__}")
    for checkpoint in arguments.checkpoints:
        model, _ = dfrot.load(checkpoint)
        recipe = model.config.quantization_config.record["recipe"]
        for tokens in arguments.tokens:
            generator = torch.Generator().manual_seed(0)
            token_ids = torch.randint(model.config.vocab_size, (1, tokens), generator=generator)
            shares = []
            with torch.no_grad():
                seconds(model, token_ids)  # unpacks the weights
                for _ in range(arguments.rounds):
                    whole = seconds(model, token_ids)
                    with without_rotations(model):
                        rest = seconds(model, token_ids)
                    shares.append(1 - rest / whole)
            low, median, high = statistics.quantiles(shares, n=4)
            label = f"{recipe['method']} {recipe['weights']} {recipe['spec']}"
            print(f"{label:24} {tokens:5} tokens: {median:6.1%} of a forward pass ({low:.1%} … {high:.1%})", flush=True)


if __name__ == "__main__":
    main()
