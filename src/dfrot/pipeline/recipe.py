"""What is done to a model, completely: method, weight quantizer, grids, calibration, seed.

A `Recipe` is frozen and hashable, turns into JSON and back, and stands in every checkpoint and every result, with
nothing left implied. Its `digest` is what resuming and caches compare.
"""

import dataclasses
import hashlib
import json
import math
import typing
from dataclasses import dataclass
from typing import Any, Literal

from dfrot.quant.spec import OVERRIDES, Spec, TensorSpec
from dfrot.system.errors import UserError


def _check_words(kind: type, given: dict[str, Any]) -> None:
    """Raise UserError if a field of `kind` that takes one of some words is given another."""
    for name, hint in typing.get_type_hints(kind).items():
        choices = typing.get_args(hint) if typing.get_origin(hint) is not Literal else (hint,)
        words = [word for choice in choices if typing.get_origin(choice) is Literal for word in typing.get_args(choice)]
        value = given.get(name)
        if words and isinstance(value, str) and value not in words:
            raise UserError(f"{name} is one of {', '.join(words)}, got '{value}'.")


def _check_types(record: Any) -> None:
    """Raise UserError if a field of a dataclass, or of one in it, is of another type than it says: JSON has its own."""
    for name, hint in typing.get_type_hints(type(record)).items():
        value = getattr(record, name)
        if dataclasses.is_dataclass(value):
            _check_types(value)
        elif not _has_type(value, hint):
            raise UserError(f"this is not the recipe of a dfrot checkpoint: its {name} is {value!r}.")


def _has_type(value: Any, hint: Any) -> bool:
    if typing.get_origin(hint) is Literal:
        return isinstance(value, str) and value in typing.get_args(hint)
    if choices := typing.get_args(hint):
        return any(_has_type(value, choice) for choice in choices)
    return type(value) is hint or (hint is float and type(value) is int)


@dataclass(frozen=True)
class NoRotation:
    """`none`: the model as it is, quantized."""


@dataclass(frozen=True)
class QuaRot:
    """`quarot` (arXiv 2404.00456)."""

    rotation: Literal["hadamard", "orthogonal"] = "hadamard"
    """R1: a randomized Hadamard matrix (the papers' RH) or a random orthogonal one (RO)."""
    head_mixing: bool = False
    """Also mix the heads by an online Hadamard before o_proj, as QuaRot does and DFRot does not."""
    online: bool = True
    """Also what is rotated while the model runs, R3 and R4. Without it all is folded, for engines that cannot."""

    def __post_init__(self) -> None:
        if self.head_mixing and not self.online:
            raise UserError("head-mixing is an online rotation: it does not go with --online False.")


@dataclass(frozen=True)
class DFRot:
    """`dfrot` (arXiv 2412.00648)."""

    rotation: Literal["hadamard", "orthogonal"] = "hadamard"
    """The rotation that refinement starts from."""
    gamma: float | Literal["auto"] | None = None
    """Weight γ of the tokens with massive activations (`alpha` in the released code); "auto" tries the paper's list and
    keeps the one that changes the model least on held-back calibration tokens. None: auto, or the paper's 100 if the
    objective is the paper's."""
    steps: int = 100
    """Refinement steps at most."""
    objective: Literal["recipe", "paper"] = "recipe"
    """Minimise the error of the recipe's activation quantizer, or of the paper's (symmetric, 4 bits, unclipped)."""
    solver: Literal["descent", "procrustes"] | None = None
    """Descent on the tokens' ranges, or the paper's alternation with Procrustes steps. None: descent, or procrustes if
    the objective is the paper's, which then is the paper's exact procedure."""
    massive: Literal["relative", "rotation"] = "relative"
    """The rule that finds massive tokens: a small relative error, or an error that a random rotation raises."""
    samples: int = 1
    """Calibration sequences that the rotation is refined on, from the first; weights are fitted to all."""
    online: bool = True
    """Also what is rotated while the model runs, R3 and R4. Without it all is folded, for engines that cannot."""

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise UserError(f"samples is at least 1, got {self.samples}.")
        if isinstance(self.gamma, (int, float)) and not (math.isfinite(self.gamma) and self.gamma > 0):
            raise UserError(f"gamma is a positive weight or 'auto', got {self.gamma}.")
        if self.steps < 1:
            raise UserError(f"steps is at least 1, got {self.steps}.")


@dataclass(frozen=True)
class RTN:
    """`rtn`: round to nearest, clip ratios by search."""


@dataclass(frozen=True)
class GPTQ:
    """`gptq` (arXiv 2210.17323)."""

    act_order: bool = True
    """Take the columns with the largest inputs first; the groups' scales stay where they are, so it costs nothing."""
    damping: float = 0.01
    """Added to the Hessian's diagonal, as a share of its mean."""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.damping) and self.damping >= 0):
            raise UserError(f"damping is a share of the mean diagonal, at least 0, got {self.damping}.")


@dataclass(frozen=True)
class LWC:
    """`lwc`: learnable weight clipping (arXiv 2308.13137; 2406.01721)."""

    epochs: int = 20
    """Lowered over the calibration text for every block."""
    learning_rate: float = 0.05
    """Of Adam, at the start; it falls to 0."""

    def __post_init__(self) -> None:
        if self.epochs < 1:
            raise UserError(f"epochs is at least 1, got {self.epochs}.")
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            raise UserError(f"a learning rate is positive, got {self.learning_rate}.")


@dataclass(frozen=True)
class DuQuant:
    """`duquant` (arXiv 2406.01721)."""

    block: int = 128
    """Size of the rotated blocks; where it does not divide, the largest power of two that does and is smaller."""
    greedy_steps: int = 256
    """Of the search for a rotation; the best prefix is kept."""
    permutations: int = 1
    """How often channels are permuted and rotated again; 0 rotates once."""
    order: Literal["zigzag", "random", "none"] = "zigzag"
    """How channels are dealt to the blocks: the largest in turn, at random, or left where they are."""
    smooth: bool = True
    """Move part of the channels' sizes into the weights first."""
    alpha: float | None = None
    """How much of it: s = max|x|^α / max|w|^(1 − α). None: 0.6, with learned clipping 0.5."""
    base: Literal["none", "quarot"] = "none"
    """Rotate the model as it is, or on top of QuaRot's folded rotations R1 and R2."""

    def __post_init__(self) -> None:
        if self.block < 2 or self.greedy_steps < 1 or self.permutations < 0:
            raise UserError(
                f"block is at least 2, greedy-steps at least 1 and permutations at least 0, got {self.block}, "
                f"{self.greedy_steps} and {self.permutations}."
            )
        if self.alpha is not None and not 0 <= self.alpha <= 1:
            raise UserError(f"alpha is between 0 and 1, got {self.alpha}.")


METHOD_OPTIONS: dict[str, type] = {"none": NoRotation, "quarot": QuaRot, "dfrot": DFRot, "duquant": DuQuant}
WEIGHT_OPTIONS: dict[str, type] = {"rtn": RTN, "gptq": GPTQ, "lwc": LWC}
ROTATION_TOKENS = 2048  # calibration of a recipe that rounds weights without data: the papers' one sample
WEIGHT_TOKENS = 32 * 2048  # of one that fits them to data; the papers take 128 sequences


@dataclass(frozen=True)
class Calibration:
    """The text that a method or weight quantizer learns from."""

    text: str = "wikitext2"
    """wikitext2, c4, pydoc, or the path of a text file."""
    tokens: int = ROTATION_TOKENS
    """Tokens in total."""
    seq_len: int = 2048
    """Tokens of one sequence."""

    def __post_init__(self) -> None:
        if not 1 < self.seq_len <= self.tokens:
            raise UserError(
                f"calibration needs at least one sequence of two tokens, got {self.tokens} tokens in sequences of "
                f"{self.seq_len}."
            )


@dataclass(frozen=True)
class Recipe:
    """What `dfrot.quantize` does to a model. Make one with `Recipe.parse`."""

    method: NoRotation | QuaRot | DFRot | DuQuant
    weights: RTN | GPTQ | LWC
    spec: Spec
    calibration: Calibration
    dtype: Literal["auto", "float16", "bfloat16", "float32", "float64"] = "auto"
    """Of what is left unquantized; auto is the source's own, at most 16 bits beside quantized weights."""
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**63:
            raise UserError(f"a seed is between 0 and 2^63 − 1, got {self.seed}.")
        drawn = self.calibration.tokens // self.calibration.seq_len
        if isinstance(self.method, DFRot) and self.method.samples > drawn:
            raise UserError(
                f"samples={self.method.samples} sequences of {self.calibration.seq_len} tokens need more than the "
                f"{self.calibration.tokens} calibration tokens that are asked for."
            )

    @property
    def method_name(self) -> str:
        return next(name for name, kind in METHOD_OPTIONS.items() if type(self.method) is kind)

    @property
    def weights_name(self) -> str:
        return next(name for name, kind in WEIGHT_OPTIONS.items() if type(self.weights) is kind)

    @property
    def fits_weights(self) -> bool:
        """Whether weights are rounded with calibration data."""
        return self.spec.weights.enabled and not isinstance(self.weights, RTN)

    @staticmethod
    def parse(
        method: str = "dfrot",
        weights: str | None = None,
        spec: str = "w4a4kv4",
        *,
        preset: str = "paper",
        calib: str = "wikitext2",
        calib_tokens: int | None = None,
        calib_seq_len: int | None = None,
        dtype: str = "auto",
        seed: int = 0,
        **options: Any,
    ) -> "Recipe":
        """A recipe from the words of the command line.

        Args:
            method: none, quarot, dfrot or duquant.
            weights: rtn, gptq or lwc; None takes gptq below 8 bits, rtn from there on.
            spec: such as w4a4kv4.
            preset: paper, deploy or duquant.
            calib: wikitext2, c4, pydoc, or a path.
            calib_tokens: tokens of calibration text in total; None takes 65 536 where weights are fitted, else 2048.
            options: overrides of the preset (`OVERRIDES`), options of the method (`QuaRot`, `DFRot`, `DuQuant`) and of
                the weight quantizer (`GPTQ`, `LWC`); None means not given.

        Raises:
            UserError: anything that is not known or does not fit; the message says what would.
        """
        if method not in METHOD_OPTIONS:
            raise UserError(f"there is no method '{method}'. Methods: {', '.join(METHOD_OPTIONS)}.")
        given = {name: value for name, value in options.items() if value is not None}
        grids = Spec.parse(spec, preset, **{name: given.pop(name, None) for name in OVERRIDES})
        if weights is None:
            weights = "gptq" if grids.weights.bits < 8 else "rtn"
        if weights not in WEIGHT_OPTIONS:
            raise UserError(
                f"there is no weight quantizer '{weights}'. Weight quantizers: {', '.join(WEIGHT_OPTIONS)}."
            )
        chosen = [METHOD_OPTIONS[method], WEIGHT_OPTIONS[weights]]
        taken: list[dict[str, Any]] = []
        for kind in chosen:
            names = {field.name for field in dataclasses.fields(kind)}
            taken.append({name: given.pop(name) for name in names & given.keys()})
            _check_words(kind, taken[-1])
        if given:
            known = sorted(field.name for kind in chosen for field in dataclasses.fields(kind))
            raise UserError(
                f"'{method}' with '{weights}' weights has no option {', '.join(sorted(given))}; "
                f"it takes {', '.join(known) or 'no options'}."
            )
        _check_words(Recipe, {"dtype": dtype})
        fits = grids.weights.enabled and weights != "rtn"
        if (tokens := calib_tokens) is None:
            samples = taken[0].get("samples", 1) * (calib_seq_len or ROTATION_TOKENS)
            tokens = max(WEIGHT_TOKENS if fits else ROTATION_TOKENS, samples)
        seq_len = calib_seq_len if calib_seq_len is not None else min(tokens, 2048)
        return Recipe(
            method=chosen[0](**taken[0]),
            weights=chosen[1](**taken[1]),
            spec=grids,
            calibration=Calibration(calib, tokens, seq_len),
            dtype=dtype,  # type: ignore[arg-type]
            seed=seed,
        )

    def to_json(self) -> dict[str, Any]:
        """Plain JSON; `Recipe.from_json` is its inverse."""
        record = dataclasses.asdict(self)
        grids = record.pop("spec")
        return {
            "method": self.method_name,
            "options": record.pop("method"),
            "weights": self.weights_name,
            "weight_options": record.pop("weights"),
            "spec": str(self.spec),
            "grids": grids,
            **record,
        }

    @staticmethod
    def from_json(record: dict[str, Any]) -> "Recipe":
        """Raises UserError if the record is not a recipe."""
        try:
            method, weights = METHOD_OPTIONS[record["method"]], WEIGHT_OPTIONS[record["weights"]]
            _check_words(method, record["options"])
            _check_words(weights, record["weight_options"])
            _check_words(Recipe, {"dtype": record["dtype"]})
            recipe = Recipe(
                method=method(**record["options"]),
                weights=weights(**record["weight_options"]),
                spec=Spec(**{name: TensorSpec(**grid) for name, grid in record["grids"].items()}),
                calibration=Calibration(**record["calibration"]),
                dtype=record["dtype"],
                seed=record["seed"],
            )
        except (KeyError, TypeError, AttributeError, OverflowError) as error:
            raise UserError(f"this is not the recipe of a dfrot checkpoint: {error!r}") from error
        _check_types(recipe)
        return recipe

    @property
    def digest(self) -> str:
        """16 hexadecimal digits that differ between recipes that differ."""
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()[:16]
