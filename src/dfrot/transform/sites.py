"""The sites at which a model is rotated.

| site | paper's name | online or folded | absorbed by |
|---|---|---|---|
| residual stream | R1 | folded | every reader and writer of the stream, embedding, head |
| value → output projection, per head | R2 | folded | v_proj, o_proj |
| queries and keys after RoPE, per head | R3 | online | nothing: scores are unchanged |
| input of down_proj | R4 | online | down_proj |
| across heads before o_proj | QuaRot's only | online | o_proj |

A method fits a `Transforms`; this module says what it means for each linear layer of a block.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from dfrot.linalg.rotation import Identity, Kronecker, Rotation, block_diagonal, rotation_from
from dfrot.models.graph import Config, ModelGraph, head_dim, value_width
from dfrot.transform.fold import Fold


@dataclass(frozen=True, eq=False)
class Transforms:
    """One rotation per site; None leaves the site alone.

    Attributes:
        residual: R1, of size hidden_size. Norm gains are folded exactly when it is set.
        values: R2, of size head_dim, the same for every head.
        keys: R3, of size head_dim, applied at run time to queries and keys.
        ffn: R4, of size intermediate_size, applied at run time.
        heads: the rotation over the head index, of size num_attention_heads, applied at run time.
    """

    residual: Rotation | None = None
    values: Rotation | None = None
    keys: Rotation | None = None
    ffn: Rotation | None = None
    heads: Rotation | None = None

    def describe(self, tensors: dict[str, Tensor]) -> dict[str, Any]:
        """JSON that `from_description` turns back into this; tensors are put into `tensors`."""
        rotations = {site.name: getattr(self, site.name) for site in fields(self)}
        return {site: rotation and rotation.describe(tensors, site) for site, rotation in rotations.items()}

    @staticmethod
    def from_description(description: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> "Transforms":
        """Raises ValueError if it describes no transforms."""
        return Transforms(**{site: record and rotation_from(record, tensors) for site, record in description.items()})

    def online(self, graph: ModelGraph, config: Config) -> dict[str, Rotation]:
        """The rotations that the runtime applies to the inputs of linear layers."""
        found = {}
        if self.ffn is not None:
            found[graph.down] = self.ffn
        if self.heads is not None:
            found[graph.output] = Kronecker(self.heads, Identity(head_dim(config)))
        return found

    def folds(self, graph: ModelGraph, config: Config, gains: Mapping[str, Tensor]) -> dict[str, Fold]:
        """What every linear layer of a block absorbs.

        Args:
            gains: the gain of each norm of the block.
        """
        online = self.online(graph, config)
        per_head = None
        if self.values is not None:
            per_head = block_diagonal(self.values, config.num_attention_heads)
        folds = {}
        for name in graph.linears:
            norm = graph.norm_before(name)
            offline = self.residual if norm else per_head if name == graph.output else None
            writes, first_row = (self.residual if name in graph.writers else None), 0
            if name == graph.value and self.values is not None:
                writes = block_diagonal(self.values, config.num_key_value_heads)
                first_row = -value_width(config)
            folds[name] = Fold(
                gain=gains[norm] if norm and self.residual is not None else None,
                reads=_product(offline, online.get(name)),
                online=online.get(name),
                writes=writes,
                first_row=first_row,
            )
        return folds


def _product(first: Rotation | None, second: Rotation | None) -> Rotation | None:
    if first is None or second is None:
        return first or second
    return first @ second


def block_folds(transforms: Transforms, graph: ModelGraph, config: Config, block: nn.Module) -> dict[str, Fold]:
    """The folds of one block, its norms' gains included."""
    gains: dict[str, Tensor] = {norm: block.get_submodule(norm).weight for norm in graph.norms}  # type: ignore[misc]
    return transforms.folds(graph, config, gains)


def fold_block_(block: nn.Module, folds: Mapping[str, Fold], graph: ModelGraph, dtype: torch.dtype) -> None:
    """Fold everything into a block's weights: computed in float64, cast once to `dtype`; folded gains become 1."""
    for name, fold in folds.items():
        linear = block.get_submodule(name)
        linear.weight = nn.Parameter(fold.weight(linear.weight.data).to(dtype), requires_grad=False)  # type: ignore[arg-type]
        if linear.bias is not None:
            linear.bias = nn.Parameter(fold.bias(linear.bias.data).to(dtype), requires_grad=False)  # type: ignore[arg-type]
    for norm, readers in graph.norms.items():
        if folds[readers[0]].gain is not None:
            nn.init.ones_(block.get_submodule(norm).weight)  # type: ignore[arg-type]
    block.to(dtype)
