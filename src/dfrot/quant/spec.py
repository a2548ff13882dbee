"""The grids of a model, from a text such as w4a4kv4 and a preset."""

import re
from dataclasses import dataclass, replace
from typing import Any, Literal

from jaxtyping import Float
from torch import Tensor

from dfrot.quant.affine import fake_quantize
from dfrot.quant.grids import Granularity, IntGrid, PerChannel, PerGroup, PerToken
from dfrot.system.errors import UserError
from dfrot.system.options import Options

UNQUANTIZED_BITS = 16  # of tensors that are left alone

_SPEC = re.compile(r"w(?P<w>\d+)(?:g(?P<g>\d+))?a(?P<a>\d+)kv(?P<kv>\d+)")
_GRAMMAR = "w<bits>[g<group>]a<bits>kv<bits>, bits 2 to 8 or 16 for 'left alone', such as w4a4kv4 or w4g128a8kv16"


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

    def __post_init__(self) -> None:
        if self.bits != UNQUANTIZED_BITS and not 2 <= self.bits <= 8:
            raise UserError(f"bits are 2 to 8, or 16 for 'left alone', got {self.bits}. The grammar is {_GRAMMAR}.")
        if self.clip_ratio is not None and not 0 < self.clip_ratio <= 1:
            raise UserError(f"a clip ratio is above 0 and at most 1, got {self.clip_ratio}.")
        if self.group is not None and self.group < 1:
            raise UserError(f"a group has at least one entry, got {self.group}.")

    @property
    def enabled(self) -> bool:
        return self.bits != UNQUANTIZED_BITS

    @property
    def grid(self) -> IntGrid:
        return IntGrid(self.bits, self.symmetric)

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
        group = "" if self.weights.group is None else f"g{self.weights.group}"
        return f"w{self.weights.bits}{group}a{self.activations.bits}kv{self.keys.bits}"

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
        if (match := _SPEC.fullmatch(text)) is None:
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
            weights=TensorSpec(
                int(match["w"]),
                chosen.weight_symmetric,
                None if chosen.weight_clip == "search" else chosen.weight_clip,
                None if match["g"] is None else int(match["g"]),
            ),
            activations=TensorSpec(int(match["a"]), chosen.act_symmetric, chosen.act_clip),
            keys=keys,
            values=replace(keys, clip_ratio=chosen.value_clip),
            queries=keys if keys.enabled and chosen.quantize_queries else UNQUANTIZED,
        )
