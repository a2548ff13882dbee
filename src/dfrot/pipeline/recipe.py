"""How a checkpoint is made, completely: method, rounding, tuning, grids, calibration, seed.

A `Recipe` is frozen and hashable, turns into JSON and back, and stands in every checkpoint and every result, with
nothing left implied. It is provenance: what computes reads `RuntimeConfig` and never a recipe. Its `digest` is what
resuming and caches compare.
"""

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch

from dfrot.methods import METHODS
from dfrot.methods.method import Method
from dfrot.quant.spec import Preset, Spec, TensorSpec
from dfrot.rounding import ROUNDINGS
from dfrot.rounding.rounding import Rounding
from dfrot.system.errors import UserError
from dfrot.system.options import Options
from dfrot.tuning.tuning import Tuning

ROTATION_TOKENS = 2048  # calibration of a recipe that rounds weights without data: the papers' one sample
WEIGHT_TOKENS = 32 * 2048  # of one that fits them to data; the papers take 128 sequences


@dataclass(frozen=True)
class Calibration(Options):
    """The text that a method or rounding learns from."""

    text: str = "wikitext2"
    """Calibration text: wikitext2, c4, pydoc, or the path of a text file."""
    tokens: int = ROTATION_TOKENS
    """Calibration tokens in total."""
    seq_len: int = 2048
    """Tokens of one calibration sequence."""

    def __post_init__(self) -> None:
        if not 1 < self.seq_len <= self.tokens:
            raise UserError(
                f"calibration needs at least one sequence of two tokens, got {self.tokens} tokens in sequences of "
                f"{self.seq_len}."
            )


class Dtypes(NamedTuple):
    """The dtypes of a run."""

    stored: torch.dtype  # tensors of the checkpoint that are not quantized
    working: torch.dtype  # a block while it is folded and rounded
    computing: torch.dtype  # a loaded checkpoint, unless its loader says otherwise


@dataclass(frozen=True)
class Recipe(Options):
    """What `dfrot.quantize` does to a model. Make one with `Recipe.parse`."""

    method: Method
    rounding: Rounding
    spec: Spec
    calibration: Calibration
    tuning: Tuning = field(default_factory=Tuning)
    dtype: Literal["auto", "float16", "bfloat16", "float32", "float64"] = "auto"
    """Of tensors that are not quantized; auto is the model's own, at most 16 bits beside quantized weights."""
    seed: int = 0
    """Of everything random."""
    kv_bits_by_block: float | None = None
    """Bits of keys and values, averaged over blocks: those that need it most get 8, the others what the spec says."""

    def __post_init__(self) -> None:
        if not self.spec.weights.integer and self.rounding.learns_clipping:
            raise UserError(
                f"{self.rounding.name} learns by how much ranges of weights are cut, and {self.spec.weights} has "
                "too few scales for a gradient. Take --weights gptq, or rtn."
            )
        if not 0 <= self.seed < 2**63:
            raise UserError(f"a seed is between 0 and 2^63 − 1, got {self.seed}.")
        keys, average = self.spec.keys, self.kv_bits_by_block
        if average is not None and not (keys.bits < average < 8 and self.reads_text):
            raise UserError(
                f"--kv-bits-by-block is an average between the bits of keys in {self.spec} and 8, such as "
                f"{min(keys.bits, 7) + 0.5}, of a recipe that reads calibration text; got {average} with "
                f"{self.method.name} and {self.rounding.name}."
            )
        if self.method.mean_keys and not self.spec.keys.enabled:
            raise UserError(f"--mean-keys is about quantized keys, and {self.spec} leaves them alone: leave it out.")
        drawn, wanted = self.calibration.tokens // self.calibration.seq_len, self.method.sequences_read
        if wanted > drawn:
            raise UserError(
                f"{self.method.name} reads {wanted} calibration sequences, of {self.calibration.seq_len} tokens, and "
                f"{self.calibration.tokens} tokens make {drawn}. "
                f"Give --calib-tokens {wanted * self.calibration.seq_len} or more."
            )

    @property
    def fits_weights(self) -> bool:
        """Whether weights are rounded with calibration data."""
        return self.spec.weights.enabled and self.rounding.needs_data

    @property
    def reads_text(self) -> bool:
        """Whether anything is fitted to calibration text."""
        method = self.method
        return self.fits_weights or method.reads_all_text or method.sequences_read > 0 or method.mean_keys

    def dtypes(self, source: torch.dtype) -> Dtypes:
        """The dtypes of a run on a model whose weights are stored in `source`."""
        asked = None if self.dtype == "auto" else getattr(torch, self.dtype)
        narrow = self.spec.weights.enabled and source.itemsize > 2
        stored = asked or (torch.float16 if narrow else source)
        return Dtypes(stored, torch.float64 if stored == torch.float64 else torch.float32, asked or source)

    @staticmethod
    def parse(
        method: str = "rangerot",
        weights: str | None = None,
        spec: str = "w4a4kv4",
        *,
        preset: str = "paper",
        calib: str = "wikitext2",
        calib_tokens: int | None = None,
        calib_seq_len: int | None = None,
        dtype: str = "auto",
        seed: int = 0,
        tune: str = "auto",
        kv_bits_by_block: float | None = None,
        **options: Any,
    ) -> "Recipe":
        """A recipe from the words of the command line.

        Args:
            method: none, quarot, dfrot, rangerot or duquant.
            weights: how they are rounded: rtn, gptq or lwc; None takes gptq below 8 bits, rtn from there on.
            spec: such as w4a4kv4.
            preset: paper, deploy or duquant.
            calib: wikitext2, c4, pydoc, or a path.
            calib_tokens: tokens of calibration text in total, whole sequences; None takes 65 536 where weights are
                fitted, else 2048, or as many sequences as these hold.
            tune: what is trained after rounding: all (but roundings), none, or of biases, clips, gains, roundings,
                scales, joined by commas. auto takes biases where activations have at most 4 bits and weights are
                fitted, else none.
            kv_bits_by_block: average bits of keys and values; blocks that need it most get 8.
            options: fields of `Preset`, method and rounding, and of `Tuning` as tune_…; None means not given.

        Raises:
            UserError: a word is not known or does not fit; the message says what would.
        """
        if method not in METHODS:
            raise UserError(f"there is no method '{method}'. Methods: {', '.join(METHODS)}.")
        given = {name: value for name, value in options.items() if value is not None}
        grids = Spec.parse(spec, preset, **_taken(Preset, given))
        tuned = {name: given.pop(f"tune_{name}", None) for name in Tuning.types().keys() - {"parts"}}
        if weights is None:
            weights = "gptq" if grids.weights.bits < 8 else "rtn"
        if weights not in ROUNDINGS:
            raise UserError(f"there is no rounding '{weights}'. Roundings: {', '.join(ROUNDINGS)}.")
        rounding = ROUNDINGS[weights].checked(**_taken(ROUNDINGS[weights], given))
        fitted = METHODS[method].checked(**_taken(METHODS[method], given)).resolved(rounding.learns_clipping)
        if given:
            known = sorted({*METHODS[method].types(), *ROUNDINGS[weights].types()})
            raise UserError(
                f"'{method}' with '{weights}' weights has no option {', '.join(sorted(given))}; "
                f"it takes {', '.join(known)}."
            )
        fits_weights = grids.weights.enabled and rounding.needs_data
        if (tokens := calib_tokens) is None:
            fits = fitted.reads_all_text or fits_weights
            least = max(1, fitted.sequences_read) * (calib_seq_len or ROTATION_TOKENS)
            tokens = max(WEIGHT_TOKENS if fits else ROTATION_TOKENS, least)
        seq_len = calib_seq_len if calib_seq_len is not None else min(tokens, Calibration.seq_len)
        calibration = Calibration.checked(text=calib, tokens=tokens, seq_len=seq_len)
        if rest := calibration.tokens % calibration.seq_len:
            whole = calibration.tokens - rest
            if calib_tokens is not None:
                raise UserError(
                    f"calibration text is drawn in whole sequences, of {seq_len} tokens, which {tokens} are not. Give "
                    f"--calib-tokens {whole} or {whole + seq_len}, or sequences of another length."
                )
            calibration = dataclasses.replace(calibration, tokens=whole)
        how: Any = {"calibration": calibration, "tuning": Tuning.parse(tune, grids, fits_weights, seq_len, **tuned)}
        how["kv_bits_by_block"] = kv_bits_by_block
        return Recipe.checked(method=fitted, rounding=rounding, spec=grids, dtype=dtype, seed=seed, **how)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON; `Recipe.from_json` is its inverse."""
        by_block = {} if self.kv_bits_by_block is None else {"kv_bits_by_block": self.kv_bits_by_block}
        return {
            "method": self.method.name,
            "options": dataclasses.asdict(self.method),
            "weights": self.rounding.name,
            "weight_options": dataclasses.asdict(self.rounding),
            "spec": str(self.spec),
            "grids": self.spec.to_json(),
            "calibration": dataclasses.asdict(self.calibration),
            "tune": self.tuning.to_json(),
            "dtype": self.dtype,
            "seed": self.seed,
            **by_block,
        }

    @staticmethod
    def from_json(record: dict[str, Any]) -> "Recipe":
        """Raises UserError if the record is not a recipe of this version of dfrot."""
        try:
            rounding = ROUNDINGS[record["weights"]].checked(**record["weight_options"])
            method = METHODS[record["method"]].checked(**record["options"])
            return Recipe.checked(
                method=method.resolved(rounding.learns_clipping),
                rounding=rounding,
                spec=Spec(**{name: TensorSpec.checked(**grid) for name, grid in record["grids"].items()}),
                calibration=Calibration.checked(**record["calibration"]),
                tuning=Tuning.from_json(record.get("tune", {})),
                dtype=record["dtype"],
                seed=record["seed"],
                kv_bits_by_block=record.get("kv_bits_by_block"),
            )
        except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as error:
            raise UserError(f"this is not the recipe of a dfrot checkpoint: {error!r}") from error

    @property
    def digest(self) -> str:
        """16 hexadecimal digits that differ between recipes that differ."""
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()[:16]


def _taken(kind: type[Options], given: dict[str, Any]) -> dict[str, Any]:
    """The fields of `kind` among the options, which lose them."""
    return {name: given.pop(name) for name in kind.types().keys() & given.keys()}
