"""The runtime record of a checkpoint: all that loading and computing need beside the tensors, and nothing else.

It lies in `quantization_config` beside the recipe, which says how the checkpoint was made and which nothing here reads.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from torch import Tensor

from dfrot.linalg.rotation import Rotation, rotation_from
from dfrot.quant.spec import UNQUANTIZED, Spec, TensorSpec
from dfrot.system.errors import UserError

FORMAT = 4  # raised when older readers would misread a checkpoint


@dataclass(frozen=True, eq=False)
class RuntimeConfig:
    """How a checkpoint computes."""

    spec: Spec
    online: Mapping[str, Rotation]  # norm or linear layer of a block → rotation of its output or input
    keys: Rotation | None  # of queries and keys after RoPE (R3)
    # Norm or linear layer → block size and count of the rotation of its output or input. Unlike `online`, these
    # rotations differ between blocks of the model, and are tensors of the checkpoint.
    rotation_blocks: Mapping[str, tuple[int, int]]
    biases: tuple[str, ...] = ()  # linear layers of a block with a bias that the model's own config does not give them
    # Norms whose output, and linear layers whose rotated input, is taken less an offset, a tensor of the checkpoint.
    offsets: tuple[str, ...] = ()
    # Such a norm or layer, keys or values → clip ratio by block.
    clips: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    # Such a norm or layer → the largest magnitude that NVFP4 is to hold there, by block.
    largest: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    kv_bits: tuple[int, ...] = ()  # of keys and values by block, if not all have those of the grids
    key_means: bool = False  # whether a tensor of each block, in place of the bias of keys, stays out of the cache

    def activations(self, site: str, index: int) -> TensorSpec:
        """The grid of a norm's output or a linear layer's input in block `index`."""
        grid = self._clipped(self.spec.activations, site, index)
        known = site in self.largest and grid.enabled
        return replace(grid, largest=self.largest[site][index]) if known else grid

    def heads(self, index: int) -> Spec:
        """The spec with the grids that keys and values have in block `index`."""
        spec = self.spec.with_kv_bits(self.kv_bits[index]) if self.kv_bits else self.spec
        keys, values = (self._clipped(getattr(spec, kind), kind, index) for kind in ("keys", "values"))
        return replace(spec, keys=keys, values=values)

    def _clipped(self, grid: TensorSpec, site: str, index: int) -> TensorSpec:
        return replace(grid, clip_ratio=self.clips[site][index]) if site in self.clips and grid.enabled else grid

    def with_kv_bits(self, bits: Sequence[int]) -> "RuntimeConfig":
        """The same with these bits of keys and values by block. What clips there are is meant for the spec's own bits:
        as in `Spec.with_kv_bits`, other bits are not clipped."""
        few, clips = self.spec.keys.bits, dict(self.clips)
        for kind in {"keys", "values"} & clips.keys():
            clips[kind] = tuple(clip if own == few else 1.0 for clip, own in zip(clips[kind], bits, strict=True))
        return replace(self, kv_bits=tuple(bits), clips=clips)

    def without(self, *kinds: Literal["weights", "activations", "keys", "values"]) -> "RuntimeConfig":
        """The same, leaving these kinds of tensors alone."""
        alone: dict[str, Any] = dict.fromkeys(kinds, UNQUANTIZED)
        return replace(self, spec=replace(self.spec, **alone))

    def to_json(self) -> dict[str, Any]:
        """Plain JSON; `from_json` is its inverse."""
        tensors: dict[str, Tensor] = {}
        record: dict[str, Any] = {
            "grids": self.spec.to_json(),
            "online": {name: rotation.describe(tensors, name) for name, rotation in self.online.items()},
            "keys": None if self.keys is None else self.keys.describe(tensors, "keys"),
            "rotation_blocks": {site: list(sizes) for site, sizes in self.rotation_blocks.items()},
            "biases": list(self.biases),
        }
        if self.offsets:  # where there are none, older versions read the record
            record["offsets"] = list(self.offsets)
        if self.clips:
            record["clips"] = {site: list(clips) for site, clips in self.clips.items()}
        if self.largest:
            record["largest"] = {site: list(values) for site, values in self.largest.items()}
        if self.kv_bits:
            record["kv_bits"] = list(self.kv_bits)
        if self.key_means:
            record["key_means"] = True
        assert not tensors, f"format {FORMAT} has no place for the tensors of online rotations: {sorted(tensors)}"
        return record

    @staticmethod
    def from_json(record: Any) -> "RuntimeConfig":
        """Raises UserError if the record is not complete, or says something that this version does not know."""
        wrong = "this is not the runtime record of a dfrot checkpoint"
        # what records of earlier versions leave out
        left_out: dict[str, Any] = {"biases": [], "offsets": [], "clips": {}, "largest": {}}
        left_out |= {"kv_bits": [], "key_means": False}
        names = {"grids", "online", "keys", "rotation_blocks", *left_out}
        record = left_out | record if isinstance(record, dict) else {}
        if differing := names ^ record.keys():
            raise UserError(f"{wrong}: {min(differing)!r} is unknown or missing.")
        try:
            spec = Spec(**{kind: TensorSpec.checked(**grid) for kind, grid in record["grids"].items()})
            online = {name: rotation_from(rotation, {}) for name, rotation in record["online"].items()}
            keys = None if record["keys"] is None else rotation_from(record["keys"], {})
            blocks = {site: (size, count) for site, (size, count) in record["rotation_blocks"].items()}
            if bad := [sizes for sizes in blocks.values() if not all(type(n) is int and n > 0 for n in sizes)]:
                raise ValueError(f"the sizes of block rotations are two positive integers, got {bad[0]}")
            biases, offsets = tuple(record["biases"]), tuple(record["offsets"])
            ",".join(biases + offsets)  # a TypeError unless all of them are names
            clips = {site: tuple(ratios) for site, ratios in record["clips"].items()}
            largest = {site: tuple(values) for site, values in record["largest"].items()}
            for name, sites in (("clip_ratio", clips), ("largest", largest)):
                for value in itertools.chain(*sites.values()):
                    TensorSpec.checked(**vars(spec.activations) | {name: value})
            kv_bits = tuple(record["kv_bits"])
            if not all(spec.keys.enabled and bits in range(2, 9) for bits in kv_bits):
                raise ValueError(f"keys and values of {spec} have the bits {kv_bits} by block")
            means = {True: True, False: False}[record["key_means"]]
        except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as error:
            raise UserError(f"{wrong}: {error}") from error
        return RuntimeConfig(spec, online, keys, blocks, biases, offsets, clips, largest, kv_bits, means)

    @staticmethod
    def of_checkpoint(record: Mapping[str, Any]) -> "RuntimeConfig":
        """From the `quantization_config` of a checkpoint, of this format or of format 3.

        Raises:
            UserError: it has another format, or its runtime record cannot be read.
        """
        if record.get("format") == 3:
            return RuntimeConfig.from_json(_of_format_3(record))
        if record.get("format") != FORMAT:
            raise UserError(
                f"this checkpoint has format {record.get('format')!r}; this version of dfrot reads formats 3 and "
                f"{FORMAT}. Use the version that wrote it, or quantize again."
            )
        return RuntimeConfig.from_json(record.get("runtime"))


def _of_format_3(record: Mapping[str, Any]) -> dict[str, Any]:
    """Format 3 had the grids in the recipe, and two other names."""
    try:
        grids = {
            kind: {("clip_ratio" if name == "clip" else name): value for name, value in grid.items()}
            for kind, grid in record["recipe"]["grids"].items()
        }
        names = {"online": "online", "keys": "keys", "rotation_blocks": "blocks"}
        return {"grids": grids, "biases": []} | {name: record[old] for name, old in names.items()}
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"this is not the configuration of a dfrot checkpoint: {error!r}") from error
