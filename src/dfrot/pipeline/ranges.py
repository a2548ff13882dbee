"""The largest inputs of linear layers, which NVFP4's activations need: one factor for a tensor, chosen beforehand.

A group's scale is chosen for every token while the model runs, but engines take from the checkpoint the factor that
puts all scales of a layer's input into the range of E4M3. Too small a factor costs small groups their accuracy, and one
that is too large cuts off the largest tokens. E4M3 is accurate over 15 powers of two, of which one is kept as headroom.
"""

import torch
from jaxtyping import Int
from torch import Tensor, nn

from dfrot.checkpoint.writer import CheckpointWriter
from dfrot.models.source import Source
from dfrot.models.stream import BlockRunner
from dfrot.rounding.stream import runtime_block
from dfrot.runtime.config import RuntimeConfig
from dfrot.runtime.linear import QuantLinear
from dfrot.system.progress import track

TOKENS = 4096  # of the calibration text that are looked at, but one sequence at least
HEADROOM = 2.0  # how much larger inputs may be than any that were met


@torch.no_grad()
def largest_inputs(
    source: Source,
    runtime: RuntimeConfig,
    writer: CheckpointWriter,
    tokens: Int[Tensor, "sequences seq_len"],
    dtype: torch.dtype,
    device: torch.device,
) -> dict[str, tuple[float, ...]]:
    """Norm or linear layer → the largest magnitude that a checkpoint is to hold there, by block.

    Args:
        writer: of the checkpoint, whose shards are written.
        dtype: of the computation.
    """
    hidden = source.embedded(tokens, writer.read(0)).to(device, dtype)
    run, graph, found = BlockRunner(source, hidden[:1]), source.graph, dict[str, list[float]]()
    for index in track(range(source.num_blocks), "ranges"):
        prefix = f"{graph.blocks}.{index}."
        tensors = {name.removeprefix(prefix): tensor for name, tensor in writer.read(index + 1).items()}
        block = runtime_block(source, index, tensors, runtime).to(device, dtype)
        seen: dict[str, float] = {}

        def note(site: str, layer: QuantLinear, inputs: tuple[Tensor], seen: dict[str, float] = seen) -> None:
            seen[site] = max(seen.get(site, 0.0), float(layer.transformed(*inputs).abs().max()))

        sites = {name: graph.norm_before(name) or name for name in graph.linears}
        for name, site in sites.items():
            layer: nn.Module = block.get_submodule(name)
            layer.register_forward_pre_hook(lambda layer, inputs, site=site, note=note: note(site, layer, inputs))
        hidden = torch.cat([run(block, index, sequence) for sequence in hidden.split(1)])
        for site in dict.fromkeys(sites.values()):  # an expert that no token chose may get any of the others' inputs
            found.setdefault(site, []).append(HEADROOM * (seen.get(site) or max(seen.values()) or 1.0))
    return {site: tuple(values) for site, values in found.items()}
