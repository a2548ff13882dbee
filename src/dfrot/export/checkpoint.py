"""A dfrot checkpoint as an exporter reads it: layer by layer, in integers or as what they stand for."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dfrot.checkpoint.load import checkpoint_recipe
from dfrot.models.families import graph_for
from dfrot.models.graph import Config, ModelGraph
from dfrot.models.source import load_tokenizer, open_safetensors, read_config, weight_files
from dfrot.pipeline.recipe import Recipe
from dfrot.quant.affine import QParams, dequantize
from dfrot.quant.packing import unpack
from dfrot.runtime.config import RuntimeConfig
from dfrot.system.errors import UserError
from dfrot.transform.transforms import input_widths


@dataclass(frozen=True)
class Layer:
    """A linear layer of a block.

    Attributes:
        codes: integers, those of a symmetric grid around 0; None if the weight is not quantized.
        scales: of every output channel, or group of it.
        zeros: zero points, for asymmetric grids.
        weight: what they stand for, in float32, or the weight as it is stored.
        bias: if there is one.
    """

    codes: Int[Tensor, "out in"] | None
    scales: Float[Tensor, "out groups"] | None
    zeros: Int[Tensor, "out groups"] | None
    weight: Float[Tensor, "out in"]
    bias: Float[Tensor, " out"] | None


@dataclass(frozen=True)
class Checkpoint:
    """A directory that `dfrot quantize` wrote, read one tensor at a time.

    Attributes:
        record: config.json.
        config: the same, as transformers' config.
        files: tensor name → safetensors file.
    """

    path: Path
    record: dict[str, Any]
    config: Config
    recipe: Recipe
    plan: RuntimeConfig
    graph: ModelGraph
    files: dict[str, Path]

    @staticmethod
    def open(path: Path) -> "Checkpoint":
        """Raises UserError if there is none, or it is incomplete or broken."""
        path = path.expanduser()
        if (recipe := checkpoint_recipe(path)) is None:
            raise UserError(f"{path} is a model, but not a dfrot checkpoint. Make one: dfrot quantize {path} -o CKPT.")
        config = read_config(path)
        record = config.to_dict()
        plan = RuntimeConfig.from_json(record["quantization_config"])
        return Checkpoint(path, record, config, recipe, plan, graph_for(config), weight_files(path))

    def require_folded(self, engine: str) -> None:
        """Raise UserError if something is rotated while the model runs, which `engine` cannot."""
        self.require_shared(engine)
        if self.plan.online:
            raise UserError(
                f"{self.path} rotates the input of {', '.join(self.plan.online)} while the model runs; "
                f"{engine} cannot. Quantize with --online False, which folds everything."
            )

    def require_shared(self, engine: str) -> None:
        """Raise UserError if every block has rotations of its own (DuQuant), which no engine knows."""
        if self.plan.blocks:
            raise UserError(
                f"{self.path} was made by duquant, which rotates the input of every layer while the model runs; "
                f"{engine} cannot. Quantize with --method dfrot --online False."
            )

    def lost(self, engine: str, kinds: Iterable[str]) -> list[str]:
        """Sentences: which of these kinds of tensors the checkpoint quantizes and `engine` does not."""
        grids = {kind: getattr(self.recipe.spec, kind) for kind in kinds}
        return [
            f"{kind} are in {grid.bits} bits here, and not quantized by {engine}: its quality is another."
            for kind, grid in grids.items()
            if grid.enabled
        ]

    @property
    def dtype(self) -> torch.dtype:
        """In which the model computes."""
        return getattr(torch, self.record["dtype"])

    def tokenizer(self) -> Any:
        return load_tokenizer(self.path)

    def tensor(self, name: str) -> Tensor:
        with open_safetensors(self.files[name]) as file:
            return file.get_tensor(name)

    def layer(self, index: int, linear: str) -> Layer:
        """Linear layer `linear` of block `index`."""
        name, spec = f"{self.graph.blocks}.{index}.{linear}", self.recipe.spec.weights
        bias = self.tensor(f"{name}.bias") if f"{name}.bias" in self.files else None
        if not spec.enabled:
            return Layer(None, None, None, self.tensor(f"{name}.weight"), bias)
        scales = self.tensor(f"{name}.scales").float()
        width = input_widths(self.graph, self.config)[linear]
        codes = unpack(self.tensor(f"{name}.qweight"), spec.bits, width).to(torch.int16)
        zeros = None if spec.symmetric else self.tensor(f"{name}.zeros").to(torch.int16)
        if spec.symmetric:
            codes = codes - 2 ** (spec.bits - 1)
        qparams = QParams(scales, None if zeros is None else zeros.float())
        return Layer(codes, scales, zeros, dequantize(codes, spec.weight_granularity, qparams), bias)

    def others(self, index: int) -> dict[str, Tensor]:
        """The tensors of block `index` that belong to none of its linear layers (norms), by their names in it."""
        prefix = f"{self.graph.blocks}.{index}."
        names = {name.removeprefix(prefix) for name in self.files if name.startswith(prefix)}
        linears = tuple(f"{linear}." for linear in self.graph.linears)
        return {name: self.tensor(prefix + name) for name in sorted(names) if not name.startswith(linears)}

    def ends(self) -> dict[str, Tensor]:
        """The embedding, the last norm and, unless it is the embedding, the head."""
        names = [f"{self.graph.embedding}.weight", f"{self.graph.final_norm}.weight", f"{self.graph.head}.weight"]
        return {name: self.tensor(name) for name in names if name in self.files}
