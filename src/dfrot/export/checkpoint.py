"""A dfrot checkpoint as exporters read it: one layer at a time, as integers and as the floats that they stand for.

Grids and rotations come from the runtime's record, as in inference; the recipe is good for names and descriptions only.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dfrot.checkpoint.load import read_checkpoint
from dfrot.models.graph import Config, ModelGraph, graph_for
from dfrot.models.source import StoredTensor, read_config, stored_tensors
from dfrot.quant.affine import QParams, dequantize
from dfrot.quant.packing import unpack
from dfrot.runtime.config import RuntimeConfig
from dfrot.system.errors import UserError
from dfrot.transform.transforms import input_widths


@dataclass(frozen=True)
class Layer:
    """A linear layer of a decoder block.

    Attributes:
        weight: dequantized to float32, or as stored if it is not quantized.
        bias: if it has one.
        integers: codes, centred on 0 if symmetric, and scales; None if the weight is not quantized.
    """

    weight: Float[Tensor, "out in"]
    bias: Float[Tensor, " out"] | None
    integers: tuple[Int[Tensor, "out in"], Float[Tensor, "out groups"]] | None


@dataclass(frozen=True)
class Checkpoint:
    """A directory that `dfrot quantize` wrote. Tensors are read when asked for, so that memory holds one layer."""

    path: Path
    config: Config
    recipe: dict[str, Any]
    runtime: RuntimeConfig
    graph: ModelGraph
    stored: dict[str, StoredTensor]

    @staticmethod
    def open(path: Path) -> "Checkpoint":
        """Raises UserError if the directory is not a complete dfrot checkpoint."""
        path = path.expanduser()
        if (found := read_checkpoint(path)) is None:
            raise UserError(f"{path} is a model, but not a dfrot checkpoint. Make one: dfrot quantize {path} -o CKPT.")
        config = read_config(path)
        return Checkpoint(path, config, found.recipe, found.runtime, graph_for(config), stored_tensors(path))

    def require_folded(self, engine: str) -> None:
        """Raise UserError if anything is rotated online, which `engine` cannot do."""
        self.require_shared(engine)
        if online := ", ".join(self.runtime.online):
            raise UserError(
                f"{self.path} rotates the input of {online} while the model runs; {engine} cannot. "
                "Quantize with --fold-only, which leaves out online rotations."
            )

    def require_shared(self, engine: str) -> None:
        """Raise UserError if online rotations differ from block to block (DuQuant), which no engine supports."""
        if self.runtime.rotation_blocks:
            raise UserError(
                f"{self.path} was made by {self.recipe.get('method')}, which rotates every layer's input while the "
                f"model runs; {engine} cannot. Quantize with --method rangerot --fold-only."
            )

    def lost(self, engine: str, *kinds: str) -> Iterator[str]:
        """A sentence for each of these kinds of tensors that is quantized here; `engine` does not quantize them."""
        for kind in kinds:
            if (grid := getattr(self.runtime.spec, kind)).enabled:
                yield f"{kind} are in {grid.bits} bits here, and not quantized by {engine}, so its quality differs."

    def tensor(self, name: str) -> Tensor:
        return self.stored[name].read()

    def layer(self, index: int, linear: str) -> Layer:
        """Linear layer `linear` of block `index`."""
        name, spec = f"{self.graph.blocks}.{index}.{linear}", self.runtime.spec.weights
        bias = self.tensor(f"{name}.bias") if f"{name}.bias" in self.stored else None
        if not spec.enabled:
            return Layer(self.tensor(f"{name}.weight"), bias, None)
        width = input_widths(self.graph, self.config)[linear]
        codes = unpack(self.tensor(f"{name}.qweight"), spec.bits, width).to(torch.int16)
        codes -= 2 ** (spec.bits - 1) if spec.symmetric else 0  # symmetric codes are stored with this offset
        scales = self.tensor(f"{name}.scales").float()
        zeros = None if spec.symmetric else self.tensor(f"{name}.zeros").float()
        return Layer(dequantize(codes, spec.weight_granularity, QParams(scales, zeros)), bias, (codes, scales))

    def others(self, index: int) -> dict[str, Tensor]:
        """The tensors of block `index` outside its linear layers (norms), by their names in the block."""
        prefix = f"{self.graph.blocks}.{index}."
        linears = tuple(f"{prefix}{linear}." for linear in self.graph.linears)
        names = (name for name in sorted(self.stored) if name.startswith(prefix) and not name.startswith(linears))
        return {name.removeprefix(prefix): self.tensor(name) for name in names}

    def ends(self) -> dict[str, Tensor]:
        """The embedding, the last norm and, unless it is tied to the embedding, the head."""
        names = [f"{self.graph.embedding}.weight", f"{self.graph.final_norm}.weight", f"{self.graph.head}.weight"]
        return {name: self.tensor(name) for name in names if name in self.stored}
