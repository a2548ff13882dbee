"""The grids of a model, from a text such as w4a4kv4 or nvfp4 and a preset."""

import dataclasses
import math
import re
from dataclasses import dataclass, replace
from typing import Any, Literal

from jaxtyping import Float
from torch import Tensor

from dfrot.quant.affine import fake_quantize
from dfrot.quant.grids import FloatGrid, Granularity, IntGrid, PerChannel, PerGroup, PerToken
from dfrot.system.errors import UserError
from dfrot.system.options import Options

UNQUANTIZED_BITS = 16  # of tensors that are left alone

# Floats of 4 bits: the rule of their scales, and how many entries share one.
FLOATS: dict[str, tuple[Literal["e4m3", "e8m0"], int]] = {"nvfp4": ("e4m3", 16), "mxfp4": ("e8m0", 32)}

_FLOAT = "|".join(FLOATS)
_SPEC = re.compile(rf"w(?P<w>\d+|{_FLOAT})(?:g(?P<g>\d+))?a(?P<a>\d+|{_FLOAT})kv(?P<kv>\d+)")
_GRAMMAR = (
    "w<bits>[g<group>]a<bits>kv<bits>, bits 2 to 8 or 16 for 'left alone', such as w4a4kv4 or w4g128a8kv16; for w and "
    "a also nvfp4 and mxfp4, such as wnvfp4anvfp4kv8; nvfp4 alone is wnvfp4anvfp4kv16"
)


@dataclass(frozen=True)
class TensorSpec(Options):
    """How one kind of tensor is quantized.

    Raises:
        UserError: a number is out of range.
    """

    bits: int
    """2 to 8, or 16 for not at all."""
    symmetric: bool
    """Whether the zero point is 0."""
    clip_ratio: float | None = 1.0
    """The share of the range that is kept; None means that it is searched for (weights only)."""
    group: int | None = None
    """Entries that share a scale; None means a whole row (an output channel, a token, a head)."""
    format: Literal["int", "nvfp4", "mxfp4"] = "int"
    """Integers, or floats of 4 bits (E2M1) with a scale of E4M3 or E8M0 for a group."""
    largest: float | None = None
    """For nvfp4: the largest magnitude that the tensor is to hold; None takes that of a token or output channel."""

    def __post_init__(self) -> None:
        if self.bits != UNQUANTIZED_BITS and not 2 <= self.bits <= 8:
            raise UserError(f"bits are 2 to 8, or 16 for 'left alone', got {self.bits}. The grammar is {_GRAMMAR}.")
        if self.clip_ratio is not None and not 0 < self.clip_ratio <= 1:
            raise UserError(f"a clip ratio is above 0 and at most 1, got {self.clip_ratio}.")
        if self.group is not None and self.group < 1:
            raise UserError(f"a group has at least one entry, got {self.group}.")
        if self.largest is not None and not 0 < self.largest < math.inf:
            raise UserError(f"the largest magnitude of a tensor is positive and finite, got {self.largest}.")
        if not self.integer and (self.bits, self.symmetric, self.group) != (4, True, FLOATS[self.format][1]):
            size = FLOATS[self.format][1]
            raise UserError(
                f"{self.format} has 4 bits, no zero point and groups of {size}; none of these can be chosen."
            )

    @property
    def enabled(self) -> bool:
        return self.bits != UNQUANTIZED_BITS

    @property
    def integer(self) -> bool:
        return self.format == "int"

    @property
    def grid(self) -> IntGrid | FloatGrid:
        return IntGrid(self.bits, self.symmetric) if self.integer else FloatGrid(FLOATS[self.format][0], self.largest)

    def __str__(self) -> str:
        return str(self.bits) if self.integer else self.format

    @property
    def in_words(self) -> str:
        return f"{self.bits} bits" if self.integer else self.format.upper()

    def holding(self, largest: Float[Tensor, ""]) -> "TensorSpec":
        """The same for a tensor whose largest magnitude is known; for the grids of other formats it means nothing."""
        return replace(self, largest=float(largest) or 1.0) if self.format == "nvfp4" else self

    def to_json(self) -> dict[str, Any]:
        """Plain JSON; integers are as versions before floats wrote them."""
        record = dataclasses.asdict(self)
        return {name: value for name, value in record.items() if (name, value) not in _WITHOUT_FLOATS}

    @property
    def fixed_clip(self) -> float:
        """The clip ratio of everything but weights, for which alone it is searched."""
        assert self.clip_ratio is not None, "activations, keys and values have a fixed clip ratio"
        return self.clip_ratio

    @property
    def weight_granularity(self) -> Granularity:
        return PerChannel() if self.group is None else PerGroup(self.group)

    @property
    def token_granularity(self) -> Granularity:
        return PerToken() if self.group is None else PerGroup(self.group)

    def fake_quantize(self, x: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch width"]:
        """Tokens, or heads, quantized and dequantized; x itself if they are left alone."""
        return fake_quantize(x, self.grid, self.token_granularity, self.fixed_clip) if self.enabled else x


_WITHOUT_FLOATS = (("format", "int"), ("largest", None))
UNQUANTIZED = TensorSpec(UNQUANTIZED_BITS, symmetric=True)


@dataclass(frozen=True)
class Preset(Options):
    """Symmetry and clip ratios, which the spec's text leaves open. Each can be overridden."""

    weight_symmetric: bool
    """Whether weights have a symmetric grid."""
    weight_clip: float | Literal["search"]
    """Clip ratio of weights, or search for the best one of every channel or group."""
    act_symmetric: bool
    """Whether activations have a symmetric grid."""
    act_clip: float
    """Clip ratio of activations."""
    kv_clip: float
    """Clip ratio of keys, values and queries."""
    value_clip: float
    """Clip ratio of values, if another one."""
    quantize_queries: bool
    """Whether queries are quantized on the grid of the keys, if keys are quantized."""


PRESETS = {
    # QuaRot's clip ratios, 0.9 and 0.95, on grids as DFRot has them: activations and KV cache asymmetric.
    "paper": Preset(
        True, "search", act_symmetric=False, act_clip=0.9, kv_clip=0.95, value_clip=0.95, quantize_queries=False
    ),
    # What stock servers compute: symmetric integers on both sides of the product, activations not clipped.
    "deploy": Preset(
        True, "search", act_symmetric=True, act_clip=1.0, kv_clip=0.95, value_clip=0.95, quantize_queries=False
    ),
    # DuQuant's command: everything asymmetric, fixed clip ratios 0.8 and 0.9, queries too; values are not clipped.
    "duquant": Preset(
        False, 0.8, act_symmetric=False, act_clip=0.9, kv_clip=0.9, value_clip=1.0, quantize_queries=True
    ),
}


@dataclass(frozen=True)
class Spec:
    """The grids of a model.

    Attributes:
        weights: of the decoder's linear layers.
        activations: before every one of them.
        keys: after RoPE, per head and token.
        values: per head and token; the bits of the keys, but a separate clip ratio.
        queries: after RoPE, per head and token; the grid of the keys, or left alone.
    """

    weights: TensorSpec
    activations: TensorSpec
    keys: TensorSpec
    values: TensorSpec
    queries: TensorSpec = UNQUANTIZED

    def __str__(self) -> str:
        group = "" if self.weights.group is None or not self.weights.integer else f"g{self.weights.group}"
        return f"w{self.weights}{group}a{self.activations}kv{self.keys}"

    def with_kv_bits(self, bits: int) -> "Spec":
        """The same with so many bits for keys, values and quantized queries, whose ranges are then not clipped: in 8
        bits that costs more than it saves."""
        kinds = {kind: getattr(self, kind) for kind in ("keys", "values", "queries")}
        grids = {kind: grid for kind, grid in kinds.items() if grid.enabled and grid.bits != bits}
        return replace(self, **{kind: replace(grid, bits=bits, clip_ratio=1.0) for kind, grid in grids.items()})

    def to_json(self) -> dict[str, dict[str, Any]]:
        """Plain JSON of each kind of tensors."""
        return {kind: grid.to_json() for kind, grid in vars(self).items()}

    @staticmethod
    def parse(text: str, preset: str = "paper", **overrides: Any) -> "Spec":
        """The spec `text` with the symmetry and clip ratios of a preset.

        Args:
            overrides: fields of `Preset`; None means not given. A `kv_clip` holds for values too unless there is a
                `value_clip`.

        Raises:
            UserError: the text does not parse, the preset is unknown, a number is out of range, queries are to be
                quantized without keys.
        """
        if (match := _SPEC.fullmatch(f"w{text}a{text}kv16" if text in FLOATS else text)) is None:
            raise UserError(f"the spec '{text}' does not parse. The grammar is {_GRAMMAR}.")
        if preset not in PRESETS:
            raise UserError(f"there is no preset '{preset}'. Presets: {', '.join(PRESETS)}.")
        given = {name: value for name, value in overrides.items() if value is not None}
        if "kv_clip" in given:
            given.setdefault("value_clip", given["kv_clip"])
        chosen = Preset.checked(**vars(PRESETS[preset]) | given)
        keys = TensorSpec(int(match["kv"]), False, chosen.kv_clip)
        if given.get("quantize_queries") and not keys.enabled:
            raise UserError(f"queries take the grid of the keys, and '{text}' leaves keys alone.")
        return Spec(
            weights=_grid(
                match["w"],
                chosen.weight_symmetric,
                None if chosen.weight_clip == "search" else chosen.weight_clip,
                None if match["g"] is None else int(match["g"]),
            ),
            # engines do not clip floats, so they are clipped only if that is asked for
            activations=_grid(
                match["a"],
                chosen.act_symmetric,
                chosen.act_clip if match["a"].isdigit() else given.get("act_clip", 1.0),
            ),
            keys=keys,
            values=replace(keys, clip_ratio=chosen.value_clip),
            queries=keys if keys.enabled and chosen.quantize_queries else UNQUANTIZED,
        )


def _grid(word: str, symmetric: bool, clip_ratio: float | None, group: int | None = None) -> TensorSpec:
    """That of a word of the grammar. Raises UserError for a group of a format that has its own."""
    if word.isdigit():
        return TensorSpec(int(word), symmetric, clip_ratio, group)
    if group is not None:
        raise UserError(f"{word} has groups of {FLOATS[word][1]}, which cannot be chosen: leave out g{group}.")
    return TensorSpec.checked(bits=4, symmetric=True, clip_ratio=clip_ratio, group=FLOATS[word][1], format=word)
