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
from typing import Any

import torch

import dfrot
from dfrot.kernels.library import backend
from dfrot.runtime.kv import KVQuantizer
from dfrot.runtime.linear import QuantLinear
from dfrot.runtime.norms import TransformedNorm
from dfrot.system.memory import keep_freed_memory


def load(checkpoint: str, *, rotates: bool) -> Any:
    """A checkpoint, or what is left of it when nothing is rotated at run time."""
    model, _ = dfrot.load(checkpoint)
    for module in list(model.modules()):
        if not rotates and isinstance(module, (QuantLinear, TransformedNorm, KVQuantizer)):
            module.rotation = None
    return model


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
    print(backend())
    for checkpoint in arguments.checkpoints:
        model, plain = load(checkpoint, rotates=True), load(checkpoint, rotates=False)
        recipe = model.config.quantization_config.record["recipe"]
        for tokens in arguments.tokens:
            generator = torch.Generator().manual_seed(0)
            token_ids = torch.randint(model.config.vocab_size, (1, tokens), generator=generator)
            shares = []
            with torch.no_grad():
                for number in range(arguments.rounds + 1):
                    whole, rest = seconds(model, token_ids), seconds(plain, token_ids)
                    if number:  # the first one warms up
                        shares.append(1 - rest / whole)
            low, median, high = statistics.quantiles(shares, n=4)
            label = f"{recipe['method']} {recipe['weights']} {recipe['spec']}"
            print(f"{label:24} {tokens:5} tokens: {median:6.1%} of a forward pass ({low:.1%} … {high:.1%})", flush=True)


if __name__ == "__main__":
    main()
