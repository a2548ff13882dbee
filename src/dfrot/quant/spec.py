"""The grids of a model, from a text such as w4a4kv4 and a preset."""

import re
from dataclasses import dataclass, replace
from typing import Any

from dfrot.quant.grids import Granularity, IntGrid, PerChannel, PerGroup, PerToken
from dfrot.system.errors import UserError

UNQUANTIZED_BITS = 16  # the bits of what is left alone

_SPEC = re.compile(r"w(?P<w>\d+)(?:g(?P<g>\d+))?a(?P<a>\d+)kv(?P<kv>\d+)")
_GRAMMAR = "w<bits>[g<group>]a<bits>kv<bits>, bits 2 to 8 or 16 for 'left alone', such as w4a4kv4 or w4g128a8kv16"


@dataclass(frozen=True)
class TensorSpec:
    """How one kind of tensor is quantized.

    Attributes:
        bits: 2 to 8, or 16 for not at all.
        symmetric: whether the zero point is 0.
        clip: the share of the range that is kept; None means that it is searched for (weights only).
        group: entries that share a scale; None means a whole row (an output channel, a token, a head).
    """

    bits: int
    symmetric: bool
    clip: float | None = 1.0
    group: int | None = None

    def __post_init__(self) -> None:
        if self.bits != UNQUANTIZED_BITS and not 2 <= self.bits <= 8:
            raise UserError(f"bits are 2 to 8, or 16 for 'left alone', got {self.bits}. The grammar is {_GRAMMAR}.")
        if self.clip is not None and not 0 < self.clip <= 1:
            raise UserError(f"a clip ratio is above 0 and at most 1, got {self.clip}.")
        if self.group is not None and self.group < 1:
            raise UserError(f"a group has at least one entry, got {self.group}.")

    @property
    def enabled(self) -> bool:
        return self.bits != UNQUANTIZED_BITS

    @property
    def grid(self) -> IntGrid:
        return IntGrid(self.bits, self.symmetric)

    @property
    def weight_granularity(self) -> Granularity:
        return PerChannel() if self.group is None else PerGroup(self.group)

    @property
    def token_granularity(self) -> Granularity:
        return PerToken() if self.group is None else PerGroup(self.group)


UNQUANTIZED = TensorSpec(UNQUANTIZED_BITS, symmetric=True)


@dataclass(frozen=True)
class Spec:
    """The grids of a model.

    Attributes:
        weights: of the decoder's linear layers.
        activations: before every one of them.
        keys: after RoPE, per head and token.
        values: per head and token; bits of the keys, but with a clip ratio of their own.
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
    def parse(
        text: str,
        preset: str = "paper",
        *,
        weight_symmetric: bool | None = None,
        weight_clip: float | str | None = None,
        act_symmetric: bool | None = None,
        act_clip: float | None = None,
        kv_clip: float | None = None,
        value_clip: float | None = None,
        quantize_queries: bool | None = None,
    ) -> "Spec":
        """The spec `text` with the symmetry and clip ratios of a preset, each of which can be overridden.

        Args:
            weight_clip: a ratio, or "search" for the best one of every channel or group.
            kv_clip: of keys, values and queries.
            value_clip: of values, if it is another one.

        Raises:
            UserError: the text does not parse, the preset is unknown, a number is out of range, queries are to be
                quantized without keys.
        """
        if (match := _SPEC.fullmatch(text)) is None:
            raise UserError(f"the spec '{text}' does not parse. The grammar is {_GRAMMAR}.")
        if preset not in PRESETS:
            raise UserError(f"there is no preset '{preset}'. Presets: {', '.join(PRESETS)}.")
        chosen = PRESETS[preset]
        group = None if match["g"] is None else int(match["g"])

        def over(given: Any, default: Any) -> Any:
            return default if given is None else given

        keys = TensorSpec(int(match["kv"]), False, over(kv_clip, chosen.kv_clip))
        values = replace(keys, clip=over(value_clip, over(kv_clip, chosen.value_clip)))
        if quantize_queries and not keys.enabled:
            raise UserError(f"queries take the grid of the keys, and '{text}' leaves keys alone.")
        if isinstance(weight_clip, str) and weight_clip != "search":
            raise UserError(f"weight_clip is a clip ratio or 'search', got '{weight_clip}'.")
        with_queries = keys.enabled and over(quantize_queries, chosen.quantize_queries)
        return Spec(
            weights=TensorSpec(
                int(match["w"]),
                over(weight_symmetric, chosen.weight_symmetric),
                None if isinstance(weight_clip, str) else over(weight_clip, chosen.weight_clip),
                group,
            ),
            activations=TensorSpec(
                int(match["a"]),
                over(act_symmetric, chosen.act_symmetric),
                over(act_clip, chosen.act_clip),
            ),
            keys=keys,
            values=values,
            queries=keys if with_queries else UNQUANTIZED,
        )


@dataclass(frozen=True)
class Preset:
    """Symmetry and clip ratios that the spec's text leaves open."""

    weight_symmetric: bool
    weight_clip: float | None  # None: searched for
    act_symmetric: bool
    act_clip: float
    kv_clip: float
    value_clip: float
    quantize_queries: bool = False  # with the keys


# Words of `Spec.parse` that override the preset.
OVERRIDES = (
    *("weight_symmetric", "weight_clip", "act_symmetric", "act_clip"),
    *("kv_clip", "value_clip", "quantize_queries"),
)

PRESETS = {
    # DFRot's command: activations and KV cache asymmetric, clipped at 0.9 and 0.95.
    "paper": Preset(
        weight_symmetric=True, weight_clip=None, act_symmetric=False, act_clip=0.9, kv_clip=0.95, value_clip=0.95
    ),
    # What stock servers compute: symmetric integers on both sides of the product, activations not clipped.
    "deploy": Preset(
        weight_symmetric=True, weight_clip=None, act_symmetric=True, act_clip=1.0, kv_clip=0.95, value_clip=0.95
    ),
    # DuQuant's command: everything asymmetric, fixed clip ratios 0.8 and 0.9, queries too; values are not clipped.
    "duquant": Preset(
        weight_symmetric=False,
        weight_clip=0.8,
        act_symmetric=False,
        act_clip=0.9,
        kv_clip=0.9,
        value_clip=1.0,
        quantize_queries=True,
    ),
}
