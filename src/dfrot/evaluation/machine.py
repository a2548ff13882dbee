"""What computes on this machine, and how fast each spec is there: one layer, a few seconds.

A layer of Llama-2-7B (4096 → 11008) reads a short prompt and a single token, in every spec and in bfloat16, one after
the other and round after round; medians are compared. Whole models: `dfrot bench`.
"""

import time
from statistics import median, quantiles
from typing import Any, NamedTuple

import torch
from torch import nn

from dfrot.kernels import cuda
from dfrot.kernels.library import backend
from dfrot.quant.spec import Spec
from dfrot.runtime.linear import QuantLinear
from dfrot.system.products import onednn_is_faster

SPECS = ("w4a4kv4", "w4a8kv4", "w8a8kv8", "w4a16kv4")
IN, OUT, PROMPT = 4096, 11008, 128
ROUNDS, SECONDS = 3, 1.0  # so many rounds of each input at least, and so long
STEADY = 1.3  # third over first quartile of the rounds' ratios, above which other work is in the way
AS_FAST = 0.9  # of another's speed: as fast, as far as a short measurement can tell


class Speed(NamedTuple):
    """How many times as fast as bfloat16 a spec is."""

    spec: str
    prompt: float
    token: float
    spread: float = 1.0  # third over first quartile of its ratios by round, the larger of the two


def _layer(spec: str) -> nn.Module:
    grids = Spec.parse(spec)
    how: Any = {"weights": grids.weights, "activations": grids.activations, "rotation": None, "bias": False}
    layer = QuantLinear(IN, OUT, dtype=torch.bfloat16, **how)
    for tensor in layer.buffers():
        tensor.fill_(1)
    return layer


@torch.inference_mode()
def speeds(device: torch.device) -> list[Speed]:
    """Of every spec of `SPECS`, in that order."""
    with torch.inference_mode(False), torch.no_grad():  # nothing that is derived from inference tensors is kept
        plain = nn.Linear(IN, OUT, bias=False, dtype=torch.bfloat16)
        plain.weight.fill_(1)
        layers = [each.to(device) for each in (plain, *map(_layer, SPECS))]
    ratios, spreads = [], []
    for tokens in (PROMPT, 1):
        x = torch.linspace(-1, 1, tokens * IN, device=device).view(tokens, IN).to(torch.bfloat16)
        seconds: list[list[float]] = []
        for layer in layers:  # once unmeasured: kernels are compiled, weights unpacked
            layer(x)
        deadline = time.perf_counter() + SECONDS
        while len(seconds) < ROUNDS or time.perf_counter() < deadline:
            seconds.append([_seconds(layer, x) for layer in layers])
        plainly, *others = zip(*seconds, strict=True)
        ratios.append([median(plainly) / median(other) for other in others])
        by_round = [[first / own for first, own in zip(plainly, other, strict=True)] for other in others]
        spreads.append([high / low for low, _, high in (quantiles(each) for each in by_round)])
    found = zip(SPECS, *ratios, *spreads, strict=True)
    return [Speed(spec, prompt, token, max(both)) for spec, prompt, token, *both in found]


def _seconds(layer: nn.Module, x: torch.Tensor) -> float:
    began = time.perf_counter()
    layer(x)
    if x.is_cuda:
        torch.cuda.synchronize(x.device)
    return time.perf_counter() - began


def computes_with(device: torch.device) -> str:
    """The hardware and what computes on it, for people."""
    if device.type == "cuda":
        return f"{cuda.backend(device)} on {torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    floats = ", float32 by oneDNN" if onednn_is_faster() else ""
    return f"{backend()}; {torch.get_num_threads()} threads, torch {torch.__version__}{floats}"


def advice(found: list[Speed]) -> str:
    """What these speeds say about which spec to take, in a sentence or two."""
    by_spec = {speed.spec: speed for speed in found}
    four, eight = by_spec["w4a4kv4"], by_spec["w4a8kv4"]
    if min(eight.prompt / four.prompt, eight.token / four.token) >= AS_FAST:
        text = "Activations in 8 bits are as fast here as in 4, and lose less quality: take --spec w4a8kv4."
    else:
        text = f"Activations in 4 bits read prompts {four.prompt / eight.prompt:.1f} times as fast here as in 8."
    if max(four.prompt, eight.prompt) < 1:
        text += " Prompts are read slower than in bfloat16; what 4 bits save here is memory, and time for every token."
    if (spread := max(speed.spread for speed in found)) > STEADY:
        text += f" But the figures vary by {spread - 1:.0%} from round to round: other work runs here, so ask again."
    return text
