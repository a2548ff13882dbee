"""The sites at which a model is rotated.

| site | paper's name | online or folded | absorbed by |
|---|---|---|---|
| residual stream | R1 | folded | every reader and writer of the stream, embedding, head |
| value → output projection, per head | R2 | folded | v_proj, o_proj |
| queries and keys after RoPE, per head | R3 | online | nothing: scores are unchanged |
| input of down_proj | R4 | online | down_proj |
| across heads before o_proj | QuaRot's only | online | o_proj |
| input of every linear layer | DuQuant's | online; its smoothing folded | that layer; the norm or layer before |

A method fits a `Transforms`; this module says what it means for each linear layer of a block.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from dfrot.linalg.rotation import (
    Identity,
    Kronecker,
    Rotation,
    block_diagonal,
    block_rotation,
    is_finite,
    is_permutation,
    rotation_from,
)
from dfrot.models.graph import Config, ModelGraph, head_dim, value_width
from dfrot.system.errors import UserError
from dfrot.transform.fold import Fold

SITES = ("residual", "values", "keys", "ffn", "heads")
_PARTS = ("smooth", "matrices", "orders")


@dataclass(frozen=True, eq=False)
class InputTransform:
    """x ↦ (x / s) B₁ P₁ B₂ … for the layers that read one input: DuQuant's.

    Attributes:
        smooth: s, (in,).
        matrices: (count, block, block), each a block that is repeated along the diagonal of one B.
        orders: (count − 1, in), the permutations between them.
    """

    smooth: Float[Tensor, " in"] | None
    matrices: Float[Tensor, "count block block"]
    orders: Int[Tensor, "between in"]

    @property
    def rotation(self) -> Rotation:
        return block_rotation(self.matrices, self.orders)


def input_widths(graph: ModelGraph, config: Config) -> dict[str, int]:
    """Channels that the linear layers of a block read."""
    widths = (
        config.hidden_size,
        config.num_attention_heads * head_dim(config),
        config.hidden_size,
        config.intermediate_size,
    )
    return {name: width for stage, width in zip(graph.stages, widths, strict=True) for name in stage}


def _input_transform(name: str, tensors: Mapping[str, Tensor]) -> InputTransform:
    """The parts that were kept under a name.

    Raises:
        ValueError: they are not there, or do not fit together.
    """
    smooth, matrices, orders = (tensors.get(f"{name}.{part}") for part in _PARTS)
    if matrices is None or orders is None:
        raise ValueError(f"{name} lacks a part")
    size = orders.shape[-1:]
    fits = matrices.ndim == 3 and matrices.shape[1] == matrices.shape[2] > 0 and is_finite(matrices)
    fits = fits and orders.ndim == 2 and len(orders) == len(matrices) - 1 and is_permutation(orders)
    fits = fits and size[0] > 0 and size[0] % matrices.shape[-1] == 0
    if not fits or (
        smooth is not None and not (smooth.shape == size and is_finite(smooth) and bool((smooth > 0).all()))
    ):
        raise ValueError(f"the parts of {name} do not fit together")
    return InputTransform(smooth, matrices, orders)


@dataclass(frozen=True, eq=False)
class Transforms:
    """One rotation per site; None leaves the site alone.

    Attributes:
        residual: R1, of size hidden_size. Norm gains are folded exactly when it is set.
        values: R2, of size head_dim, the same for every head.
        keys: R3, of size head_dim, applied at run time to queries and keys, if keys are quantized.
        ffn: R4, of size intermediate_size, applied at run time.
        heads: the rotation over the head index, of size num_attention_heads, applied at run time.
        inputs: for each block, the first layer of a stage → what is done to the input of the stage's layers.
    """

    residual: Rotation | None = None
    values: Rotation | None = None
    keys: Rotation | None = None
    ffn: Rotation | None = None
    heads: Rotation | None = None
    inputs: tuple[Mapping[str, InputTransform], ...] = ()

    def describe(self, tensors: dict[str, Tensor]) -> dict[str, Any]:
        """JSON that `from_description` turns back into this; tensors are put into `tensors`."""
        described: dict[str, Any] = {}
        for site in SITES:
            rotation = getattr(self, site)
            described[site] = rotation and rotation.describe(tensors, site)
        for index, stages in enumerate(self.inputs):
            for stage, transform in stages.items():
                parts = {part: getattr(transform, part) for part in _PARTS}
                tensors.update(
                    {f"{index}.{stage}.{part}": tensor for part, tensor in parts.items() if tensor is not None}
                )
        return {**described, "inputs": [list(stages) for stages in self.inputs]}

    @staticmethod
    def from_description(description: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> "Transforms":
        """Raises UserError if it describes no transforms."""
        try:
            sites = {site: description[site] for site in SITES}
            rotations = {site: None if at is None else rotation_from(at, tensors) for site, at in sites.items()}
            inputs = tuple(
                {stage: _input_transform(f"{index}.{stage}", tensors) for stage in stages}
                for index, stages in enumerate(description["inputs"])
            )
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"these are not the rotations of a run ({error}). Begin again with --overwrite.") from error
        return Transforms(**rotations, inputs=inputs)

    def fit(self, graph: ModelGraph, config: Config) -> bool:
        """Whether the sizes are those of a model."""
        head, heads = head_dim(config), config.num_attention_heads
        widths = {"residual": config.hidden_size, "values": head, "keys": head, "ffn": config.intermediate_size}
        sizes = {site: rotation.size for site in SITES if (rotation := getattr(self, site)) is not None}
        if any(size != {**widths, "heads": heads}[site] for site, size in sizes.items()):
            return False
        input_width = input_widths(graph, config)
        inputs = {stage[0]: input_width[stage[0]] for stage in graph.stages}
        wanted = [inputs] * config.num_hidden_layers if self.inputs else []
        return [{stage: part.orders.shape[-1] for stage, part in stages.items()} for stages in self.inputs] == wanted

    def blocks(self, graph: ModelGraph) -> dict[str, tuple[int, int]]:
        """Where the runtime applies the rotations of `inputs`: size of the blocks and how many, by norm or layer."""
        stages = self.inputs[0] if self.inputs else {}
        return {
            graph.norm_before(stage) or stage: (transform.matrices.shape[-1], len(transform.matrices))
            for stage, transform in stages.items()
        }

    def online_tensors(self, index: int, graph: ModelGraph, dtype: torch.dtype) -> dict[str, Tensor]:
        """What the checkpoint keeps of the rotations of one block's inputs, by the names of the runtime's modules."""
        tensors = {}
        for stage, transform in (self.inputs[index] if self.inputs else {}).items():
            site = f"{graph.norm_before(stage) or stage}.rotation"
            tensors[f"{site}.matrices"] = transform.matrices.to(dtype)
            tensors[f"{site}.orders"] = transform.orders.to(torch.int32)
        return tensors

    def online(self, graph: ModelGraph, config: Config) -> dict[str, Rotation]:
        """The rotations that the runtime applies to the inputs of linear layers."""
        found = {}
        if self.ffn is not None:
            found[graph.down] = self.ffn
        if self.heads is not None:
            found[graph.output] = Kronecker(self.heads, Identity(head_dim(config)))
        return found

    def folds(self, index: int, graph: ModelGraph, config: Config, gains: Mapping[str, Tensor]) -> dict[str, Fold]:
        """What every linear layer of block `index` absorbs.

        Args:
            gains: the gain of each norm of the block.
        """
        online = self.online(graph, config)
        smooth: dict[str, Tensor | None] = {}
        for stage in graph.stages if self.inputs else ():
            transform = self.inputs[index][stage[0]]
            online |= dict.fromkeys(stage, transform.rotation)
            smooth |= dict.fromkeys(stage, transform.smooth)
        output_divisor = {graph.up: smooth.get(graph.down)}
        if (of_heads := smooth.get(graph.output)) is not None:  # the same for all heads that read one value head
            output_divisor[graph.value] = of_heads.view(config.num_key_value_heads, -1, head_dim(config))[
                :, 0
            ].flatten()
        per_head = None
        if self.values is not None:
            per_head = block_diagonal(self.values, config.num_attention_heads)
        folds = {}
        for name in graph.linears:
            norm = graph.norm_before(name)
            offline = self.residual if norm else per_head if name == graph.output else None
            writes, first_output_row = (self.residual if name in graph.writers else None), 0
            if name == graph.value and self.values is not None:
                writes = block_diagonal(self.values, config.num_key_value_heads)
                first_output_row = -value_width(config)
            folds[name] = Fold(
                gain=gains[norm] if norm and self.residual is not None else None,
                input_rotation=offline,
                smooth=smooth.get(name),
                online=online.get(name),
                output_rotation=writes,
                first_output_row=first_output_row,
                output_divisor=output_divisor.get(name),
            )
        return folds


def block_folds(
    transforms: Transforms, index: int, graph: ModelGraph, config: Config, block: nn.Module
) -> dict[str, Fold]:
    """The folds of one block, its norms' gains included."""
    gains: dict[str, Tensor] = {norm: block.get_submodule(norm).weight for norm in graph.norms}  # type: ignore[misc]
    return transforms.folds(index, graph, config, gains)


def fold_block_(block: nn.Module, folds: Mapping[str, Fold], graph: ModelGraph, dtype: torch.dtype) -> None:
    """Fold everything into a block's weights and norms: computed in float64, cast once to `dtype`."""
    for name, fold in folds.items():
        linear = block.get_submodule(name)
        linear.weight = nn.Parameter(fold.weight(linear.weight.data).to(dtype), requires_grad=False)  # type: ignore[arg-type]
        if linear.bias is not None:
            linear.bias = nn.Parameter(fold.bias(linear.bias.data).to(dtype), requires_grad=False)  # type: ignore[arg-type]
    for name, readers in graph.norms.items():
        norm = block.get_submodule(name)
        norm.weight = nn.Parameter(folds[readers[0]].norm_gain(norm.weight), requires_grad=False)  # type: ignore[arg-type]
    block.to(dtype)
