"""What the runtime needs to know of a checkpoint beside its tensors, as JSON in `quantization_config`."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from dfrot.linalg.rotation import Rotation, rotation_from
from dfrot.pipeline.recipe import Recipe
from dfrot.quant.spec import UNQUANTIZED, Spec
from dfrot.system.errors import UserError

FORMAT = 3  # raised when older readers would misread a checkpoint


@dataclass(frozen=True, eq=False)
class RuntimeConfig:
    """How a checkpoint computes.

    Attributes:
        spec: the grids.
        online: linear layer of a block → the rotation of its input.
        keys: the rotation of queries and keys after RoPE (R3), if keys are rotated.
        blocks: norm or linear layer of a block → size of the blocks, and count, of the block rotations of its output
            or input. Unlike `online` ones they differ from block to block and are tensors of the checkpoint.
    """

    spec: Spec
    online: Mapping[str, Rotation]
    keys: Rotation | None
    blocks: Mapping[str, tuple[int, int]]

    def without(self, *kinds: Literal["weights", "activations"]) -> "RuntimeConfig":
        """The plan that leaves these kinds of tensors alone."""
        alone: dict[str, Any] = dict.fromkeys(kinds, UNQUANTIZED)
        return dataclasses.replace(self, spec=dataclasses.replace(self.spec, **alone))

    def to_json(self, recipe: Recipe) -> dict[str, Any]:
        """The `quantization_config` of a checkpoint; the grids are those of the recipe."""
        tensors: dict[str, Tensor] = {}
        record = {
            "quant_method": "dfrot",
            "format": FORMAT,
            "recipe": recipe.to_json(),
            "online": {name: rotation.describe(tensors, name) for name, rotation in self.online.items()},
            "keys": None if self.keys is None else self.keys.describe(tensors, "keys"),
            "blocks": {site: list(sizes) for site, sizes in self.blocks.items()},
        }
        assert not tensors, f"format {FORMAT} has no place for the tensors of online rotations: {sorted(tensors)}"
        return record

    @staticmethod
    def from_json(record: Mapping[str, Any]) -> "RuntimeConfig":
        """Raises UserError if the record is not one that this version can read."""
        if record.get("format") != FORMAT:
            raise UserError(
                f"this checkpoint has format {record.get('format')!r}; this version of dfrot reads format {FORMAT}. "
                "Use the version that wrote it, or quantize again."
            )
        try:
            online = {name: rotation_from(rotation, {}) for name, rotation in record["online"].items()}
            keys = None if record["keys"] is None else rotation_from(record["keys"], {})
            blocks = {site: (size, count) for site, (size, count) in record["blocks"].items()}
            if wrong := [sizes for sizes in blocks.values() if not all(type(n) is int and n > 0 for n in sizes)]:
                raise ValueError(f"the sizes of block rotations are two positive integers, got {wrong[0]}")
            return RuntimeConfig(Recipe.from_json(record["recipe"]).spec, online, keys, blocks)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise UserError(f"this is not the configuration of a dfrot checkpoint: {error}") from error
