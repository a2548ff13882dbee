"""Tuning: once weights are rounded, what is continuous is trained end to end, and on demand which way they are rounded.

The objective is the KL divergence from the unquantized model's next-token distribution, with gradients straight through
the quantizers of activations, keys and values. What can be trained:

    biases      of all linear layers of the decoder blocks, made where there are none
    clips       ratios by which the ranges of activations, keys and values are cut, by block
    gains       of the blocks' norms, those behind writers too, in the basis in which they stand after folding
    roundings   the integers of weights, each of which moves once gradients that agree have asked for it
    scales      of the weights

Why biases: massive activations act as constant biases of attention and of the MLP (Sun et al. 2024, arXiv 2402.17762).
Quantization disturbs these constants in every layer, and an explicit bias gives them back. Matching each layer's mean
output does not; it takes the end-to-end objective. Related: EfficientQAT trains step sizes with the integers frozen
(arXiv 2407.11062), Norm Tweaking trains norms (2309.02784), OmniQuant clip ratios block by block (2308.13137), AdaRound
(2004.10568) and AutoRound (2309.05516) roundings layer by layer and block by block.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any, NamedTuple

from dfrot.models.sizes import ModelSizes
from dfrot.quant.spec import Spec
from dfrot.system.errors import UserError
from dfrot.system.options import Options
from dfrot.training.teacher import HELD_TOKENS, LOGITS, product_bytes, windows_at_once

# Float32 numbers for one that is trained: start, value, gradient, rate, bound, Adam's two, best, and a copy of four of
# them while they are saved or read again.
_COPIES = 12
_SAVED = 4 * 4  # bytes on disk for each: value, Adam's two, best
PARTS = ("biases", "clips", "gains", "roundings", "scales")
CONTINUOUS = tuple(part for part in PARTS if part != "roundings")
STEPS = 200


class Needs(NamedTuple):
    """Memory and disk of tuning, in bytes."""

    least: int  # memory, if weights are unpacked and blocks computed again whenever they are needed
    integers: int  # more memory on a CPU, if the weights stay unpacked
    product: int  # of one of them there
    window: int  # more memory for each window of which stays for the backward pass what the blocks compute
    at_once: int  # windows that are computed together on a CPU
    disk: int  # for every process: the teacher's states, and those between blocks while they are made
    state: int  # on disk, too, once: what a run is resumed from, twice while one file replaces another

    def affordable(self, budget: int, at_once: int, product: int) -> tuple[bool, bool]:
        """Whether integers, each as wide as `product`, and whether what so many windows need backward, are to stay: if
        half of what is left holds them."""
        unpacked = self.integers // self.product * product
        integers = unpacked <= (budget - self.least) // 2
        return integers, at_once * self.window <= (budget - self.least - integers * unpacked) // 2

    def memory(self, budget: int) -> int:
        """What is taken of so much on a CPU."""
        integers, states = self.affordable(budget, self.at_once, self.product)
        return self.least + integers * self.integers + states * self.at_once * self.window


NOTHING = Needs(0, 0, 1, 0, 0, 0, 0)


@dataclass(frozen=True)
class Tuning(Options):
    """What is trained after rounding, and for how long. Make one with `Tuning.parse`."""

    parts: tuple[str, ...] = ()
    """Of biases, clips, gains, roundings and scales, in this order; empty: nothing is trained."""
    steps: int = STEPS
    """Steps of Adam, beside those that choose the learning rate."""
    tokens: int = 1024
    """Tokens of one step; a run sees steps × tokens, the text again and again if it has fewer."""
    seq_len: int = 512
    """Tokens of one window; a step has whole windows."""
    text: str | None = None
    """The text; None is that of the calibration."""

    def __post_init__(self) -> None:
        if unknown := [part for part in self.parts if part not in PARTS]:
            raise UserError(f"there is no '{unknown[0]}' to tune. --tune is all, none, or of {', '.join(PARTS)}.")
        if self.steps < 1 or self.seq_len < 2:
            raise UserError(
                f"tuning takes one step and windows of two tokens at least, got {self.steps} steps of windows of "
                f"{self.seq_len}."
            )
        if self.tokens < self.seq_len or self.tokens % self.seq_len:
            raise UserError(
                f"a step of tuning has whole windows, of {self.seq_len} tokens, and {self.tokens} tokens are none. "
                f"Give --tune-tokens {max(1, self.tokens // self.seq_len) * self.seq_len}, or another --tune-seq-len."
            )

    @property
    def enabled(self) -> bool:
        return bool(self.parts)

    @staticmethod
    def parse(words: str, spec: Spec, fitted: bool = False, window: int = seq_len, **given: Any) -> "Tuning":
        """From the words of the command line.

        Args:
            words: all (that is continuous), none, parts joined by commas, or auto: biases where activations have at
                most 4 bits and weights are `fitted` to calibration data, else none.
            window: tokens of one, if that is not given and it is less than the default.
            given: the other fields; None means not given.

        Raises:
            UserError: a word is not known, or names what the spec leaves alone.
        """
        parts = {word.strip() for word in words.split(",") if word.strip()}
        given = {name: value for name, value in given.items() if value is not None}
        integers = spec.weights.enabled and spec.weights.integer
        absent = {} if integers else {"roundings": "weights", "scales": "weights"}
        if not any(grid.enabled and grid.integer for grid in (spec.activations, spec.keys, spec.values)):
            absent["clips"] = "activations, keys and values"
        if not parts or ({"all", "auto", "none"} & parts and len(parts) > 1):
            raise UserError(f"--tune is auto, all, none, or of {', '.join(PARTS)} joined by commas, got '{words}'.")
        if parts == {"auto"}:
            parts = {"biases" if fitted and spec.activations.bits <= 4 else "none"}
        if parts == {"none"}:
            if given:
                raise UserError(f"--tune-{min(given).replace('_', '-')} needs --tune, which says what is trained.")
            return Tuning()
        if parts == {"all"}:
            parts = {part for part in CONTINUOUS if part not in absent}
        if wrong := sorted(parts & absent.keys()):
            raise UserError(
                f"--tune {wrong[0]} trains those of {absent[wrong[0]]} quantized to integers, and {spec} has none. The "
                "scales of nvfp4 and mxfp4 are floats of 8 bits, too coarse to be trained."
            )
        length = given.setdefault("seq_len", min(Tuning.seq_len, window, given.get("tokens", window)))
        given.setdefault("tokens", max(1, Tuning.tokens // max(1, length)) * length)
        return Tuning.checked(parts=tuple(sorted(parts)), **given)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON; `from_json` is its inverse."""
        return {**dataclasses.asdict(self), "parts": list(self.parts)}

    @staticmethod
    def from_json(record: dict[str, Any]) -> "Tuning":
        return Tuning.checked(**record | {"parts": tuple(record.get("parts", ()))})

    def needs(self, sizes: ModelSizes, spec: Spec) -> Needs:
        """What it takes on a model of these sizes, with float32 states, on this machine's CPU."""
        if not self.enabled:
            return NOTHING
        weights = sum(rows * columns for rows, columns in sizes.linears.values())
        outputs = sum(rows for rows, _ in sizes.linears.values())
        groups = sum(rows * (columns // (spec.weights.group or columns)) for rows, columns in sizes.linears.values())
        counts = {"biases": outputs, "clips": 6, "gains": 2 * sizes.hidden, "roundings": weights, "scales": groups}
        moving = sum(counts[part] for part in self.parts)
        trained = _COPIES * moving + sizes.block - weights + outputs + groups
        codes = 2 * weights * ("roundings" in self.parts)  # that move are unpacked
        model = sizes.num_blocks * (weights * spec.weights.bits // 8 + codes + 4 * trained)
        product = product_bytes(sizes.working)
        vocabulary = sizes.vocabulary * sizes.hidden * (sizes.stored + product)
        # numbers that the backward pass of a block reads, as counted: what norms read and hand out, queries and what
        # attention makes of them, keys and values before and after rounding, the gate before and behind its activation
        # function, up, and their product; on demand what scales and gains multiply
        kept = 4 * sizes.hidden + 3 * sizes.heads + 4 * sizes.kv_heads
        kept += 4 * sizes.chosen * sizes.stages[-1][1]
        kept += 2 * sizes.chosen * sizes.hidden * bool(sizes.experts)  # what each expert reads, and makes
        kept += outputs * ("scales" in self.parts) + 2 * sizes.hidden * ("gains" in self.parts)
        if "roundings" in self.parts:  # what every layer reads
            kept += 2 * sizes.hidden + sizes.heads + sizes.chosen * sizes.stages[-1][1]
        at_once = windows_at_once("cpu", self.seq_len, self.tokens // self.seq_len)
        window, tokens = 4 * self.seq_len * kept, at_once * self.seq_len
        between = 4 * tokens * sizes.hidden * sizes.num_blocks
        block = 2 * at_once * window + 10 * sizes.largest  # computed, its gradients, and a weight while it is unpacked
        logits = 8 * 4 * max(LOGITS, sizes.vocabulary)  # with the teacher's and scratch, as measured
        seen = self.tokens * self.steps + HELD_TOKENS
        return Needs(
            least=model + vocabulary + between + max(block, logits),
            integers=0 if codes else product * weights * sizes.num_blocks,
            product=product,
            window=window * (sizes.num_blocks - 1),
            at_once=at_once,
            disk=seen * sizes.hidden * (2 + 4),
            state=2 * _SAVED * moving * sizes.num_blocks,
        )

    def summary(self, notes: dict[str, Any], spec: Spec) -> list[str]:
        """What tuning found out, or could, in sentences."""
        if not self.enabled:
            hint = "nothing was tuned; --tune biases gives back some of what activations in so few bits cost"
            return [hint] if spec.activations.enabled and spec.activations.bits <= 4 else []
        before, after = notes["held_kl"]["0"], min(notes["held_kl"].values())
        return [f"tuning lowered the KL divergence on held-out text from {before:.4f} to {after:.4f} nats a token"]
