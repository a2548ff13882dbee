"""What refining costs and reaches: RangeRot's descent on a sample, against DFRot's 100 alternations on all tokens.

    python benchmarks/refinement.py TEXT [--model smollm2-135m] [--gamma 100]     both in one run
    python benchmarks/refinement.py --synthetic 4096 [--steps 3]                  peak memory at d = 4096

The objective is the paper's with the quantizer in use (4 bits, asymmetric, c = 0.9), on all tokens of the sample text.
`--synthetic D` streams 131 072 tokens of D channels, some of them massive, and reports the peak resident memory.
"""

import argparse
import os
import platform
import time

import torch

from dfrot.evaluation.record import peak_rss_bytes
from dfrot.linalg.rotation import Rotation, random_hadamard
from dfrot.methods.dfrot import DFRot
from dfrot.methods.massive import Sample, drawn, massive_tokens, sample_norm_outputs
from dfrot.methods.method import FitContext
from dfrot.methods.rangerot import RangeRot
from dfrot.methods.refinement import ORDINARY_TOKENS, squared_errors
from dfrot.models.source import open_source
from dfrot.models.texts import calibration_windows, load_tokenizer, read_text
from dfrot.quant.spec import TensorSpec
from dfrot.system.distributed import SINGLE_PROCESS

QUANTIZER = TensorSpec(4, symmetric=False, clip_ratio=0.9)
TOKENS, PIECE = 131_072, 2048


def compare(text: str, model: str, gamma: float) -> None:
    source = open_source(model)
    generator = torch.Generator().manual_seed(0)
    tokenizer, rows = load_tokenizer(source.path), source.config.vocab_size
    ids = calibration_windows(tokenizer, read_text(text, "train"), text, rows, 2048, 2048, generator)
    context = FitContext(source, QUANTIZER, lambda: ids, torch.device("cpu"))
    everything, _ = sample_norm_outputs(context, ids, "relative", kept=None)
    start = random_hadamard(source.config.hidden_size, context.generator())

    def objective(rotation: Rotation) -> float:
        error = squared_errors(everything.tokens, rotation, QUANTIZER)
        return float((error * everything.weights(gamma)).sum())

    print(f"{model}, {len(everything.tokens)} norm outputs, {int(everything.massive.sum())} massive, γ = {gamma:g}")
    print(f"start              objective {objective(start):.4f}")
    seconds = {}
    few, _ = sample_norm_outputs(context, ids, "relative", ORDINARY_TOKENS)
    for name, method, sample in (("descent, sampled", RangeRot(), few), ("alternation, all", DFRot(), everything)):
        began = time.perf_counter()
        refined, _ = method.refine(start, sample, QUANTIZER, gamma, SINGLE_PROCESS)
        seconds[name] = time.perf_counter() - began
        print(f"{name:18} objective {objective(refined):.4f}   {seconds[name]:.1f} s", flush=True)
    first, second = seconds.values()
    print(f"time ratio {first / second:.3f}")


def synthetic(size: int, steps: int, gamma: float) -> None:
    before = peak_rss_bytes()
    generator = torch.Generator().manual_seed(0)
    pieces = []
    for piece in range(TOKENS // PIECE):
        x = torch.randn(PIECE, size, generator=generator)
        x[:2, piece % 8] = 1000
        x /= x.square().mean(-1, keepdim=True).sqrt()
        pieces.append(drawn(x, massive_tokens(x), ORDINARY_TOKENS * PIECE // TOKENS, generator))
    sample = Sample.joined(pieces)
    began = time.perf_counter()
    start = random_hadamard(size, generator)
    refined, _ = RangeRot(steps=steps).refine(start, sample, QUANTIZER, gamma, SINGLE_PROCESS)
    deviation = (refined.matrix @ refined.matrix.T - torch.eye(size, dtype=torch.float64)).abs().max()
    print(f"d = {size}, {TOKENS} tokens, {int(sample.massive.sum())} massive, {len(sample.tokens)} kept, {steps} steps")
    print(f"{(time.perf_counter() - began) / steps:.1f} s per step, orthogonal to {deviation:.0e}")
    print(
        f"peak resident memory {peak_rss_bytes() / 1e9:.2f} GB, of which {before / 1e9:.2f} GB before the first token"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", nargs="?", default="pydoc")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--gamma", type=float, default=100.0)
    parser.add_argument("--synthetic", type=int, metavar="D")
    parser.add_argument("--steps", type=int, default=100)
    arguments = parser.parse_args()
    print(f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}")
    if arguments.synthetic:
        synthetic(arguments.synthetic, arguments.steps, arguments.gamma)
    else:
        compare(arguments.text, arguments.model, arguments.gamma)


if __name__ == "__main__":
    main()
