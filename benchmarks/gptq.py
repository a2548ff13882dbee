"""What GPTQ costs: one layer, against the same algorithm in the usual layout, both in this run, Hessian excluded.

    python benchmarks/gptq.py [--size 4096] [--pairs 3]

The usual layout keeps the weight as (out, in), takes blocks of 128 columns, and updates with the Cholesky factor of the
inverse of the Hessian. Both quantize the same random weight on the same grid, 4 bits symmetric, 1 % damping. `quantize`
compares every row with rounding to nearest besides, which is timed apart. The time for LLaMA-2-7B is extrapolated:
factorisations grow with in³, the rest with out · in².
"""

import argparse
import os
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dfrot.quant.affine import QParams, choose_qparams, dequantize, quantize
from dfrot.quant.spec import TensorSpec
from dfrot.rounding.gptq import factorize, gptq, layer_loss
from dfrot.system.progress import track

SPEC, DAMPING = TensorSpec(4, symmetric=True), 0.01
# LLaMA-2-7B: 32 blocks of (out, in), layers with the same input together.
LLAMA_2_7B = 32 * [(3 * 4096, 4096), (4096, 4096), (2 * 11008, 4096), (4096, 11008)]


def usual(weight: Tensor, hessian: Tensor, qparams: QParams, block: int = 128) -> Tensor:
    """The algorithm in the layout that it is usually written in; returns ŵ (out, in)."""
    w, h = weight.clone(), hessian.clone()
    size = w.shape[1]
    h.diagonal().add_(DAMPING * h.diagonal().mean())
    upper = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True)
    quantized = torch.zeros_like(w)
    for start in range(0, size, block):
        stop = min(start + block, size)
        part, factor = w[:, start:stop].clone(), upper[start:stop, start:stop]
        errors = torch.zeros_like(part)
        for i in range(stop - start):
            column = part[:, i]
            code = torch.clamp(torch.round(column / qparams.scale[:, 0]), SPEC.grid.lowest, SPEC.grid.highest)
            quantized[:, start + i] = code * qparams.scale[:, 0]
            error = (column - quantized[:, start + i]) / factor[i, i]
            part[:, i:] -= error[:, None] @ factor[i : i + 1, i:]
            errors[:, i] = error
        w[:, stop:] -= errors @ upper[start:stop, stop:]
    return quantized


def rtn_loss(weight: Tensor, hessian: Tensor, qparams: QParams) -> Tensor:
    codes = quantize(weight, SPEC.grid, SPEC.weight_granularity, qparams)
    return layer_loss(weight - dequantize(codes, SPEC.weight_granularity, qparams), hessian)


def timed(seconds: list[float], work: Callable[[], Any]) -> Any:
    began = time.perf_counter()
    result = work()
    seconds.append(time.perf_counter() - began)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--pairs", type=int, default=3)
    arguments = parser.parse_args()
    size = arguments.size
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2 * size, size, generator=generator) @ torch.randn(size, size, generator=generator) / size**0.5
    hessian, weight = x.T @ x, torch.randn(size, size, generator=generator)
    qparams = choose_qparams(weight, SPEC.grid, SPEC.weight_granularity)
    print(f"{platform.machine()}, {torch.get_num_threads()} of {os.cpu_count()} cores, torch {torch.__version__}")

    seconds: dict[str, list[float]] = {"factorize": [], "columns": [], "comparison": [], "usual": []}
    for _ in track(range(arguments.pairs), "pairs"):
        factor = timed(seconds["factorize"], lambda: factorize(hessian, DAMPING, act_order=False))
        codes, _ = timed(seconds["columns"], lambda: gptq(weight, factor, qparams, SPEC))  # noqa: B023
        timed(seconds["comparison"], lambda: rtn_loss(weight, hessian, qparams))
        theirs = timed(seconds["usual"], lambda: usual(weight, hessian, qparams))
    ours = dequantize(codes, SPEC.weight_granularity, qparams)
    losses = [float(layer_loss(weight - w, hessian).sum()) for w in (ours, theirs)]
    ratios = [(f + c) / u for f, c, u in zip(seconds["factorize"], seconds["columns"], seconds["usual"], strict=True)]
    median = {name: statistics.median(values) for name, values in seconds.items()}
    print(f"{size} × {size}, medians of {arguments.pairs} pairs")
    for name, value in median.items():
        print(f"  {name:12} {value:.2f} s")
    print(f"time ratio {statistics.median(ratios):.2f} ({min(ratios):.2f} … {max(ratios):.2f})")
    print(f"loss ratio {losses[0] / losses[1]:.6f}")
    cubic, linear = median["factorize"], median["columns"] + median["comparison"]
    whole = sum(cubic * (i / size) ** 3 + linear * (o / size) * (i / size) ** 2 for o, i in LLAMA_2_7B)
    print(f"LLaMA-2-7B, extrapolated: {whole / 60:.0f} minutes without Hessians")


if __name__ == "__main__":
    main()
