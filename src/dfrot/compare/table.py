"""The recipes of a comparison, and the table of its trials."""

import itertools
import time
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from dfrot.compare.trials import Trial
from dfrot.evaluation.record import Record, reported
from dfrot.methods import METHODS, variants
from dfrot.pipeline.recipe import Recipe
from dfrot.report.records import deviations
from dfrot.system.errors import UserError

HEADS = ("method", "weights", "spec", "seed")


def recipes(
    methods: Sequence[str],
    weights: Sequence[str],
    specs: Sequence[str],
    seeds: Sequence[str],
    preset: str = "auto",
    tunes: Sequence[str] = ("none",),
    tuning: Mapping[str, Any] = MappingProxyType({}),
    **calibration: Any,
) -> list[Recipe]:
    """Every combination, in the order of the words; specs that leave weights alone come once.

    Tuned recipes follow the same one that is not, whose blocks they take.

    Args:
        methods: names of methods, or the papers' RO and RH, which are quarot with that rotation.
        preset: auto is each method's own.
        tunes: what is tuned, parts joined by +.
        tuning: tune_… of `Recipe.parse`, for those that tune.
        calibration: what `Recipe.parse` takes for it.

    Raises:
        UserError: one of the words is not known, or there is nothing to combine.
    """
    if not (methods and weights and specs and seeds and tunes):
        raise UserError("a comparison has at least one method, rounding, spec, seed and tune.")
    if wrong := [seed for seed in seeds if not seed.isdecimal()]:
        raise UserError(f"a seed is a whole number, got '{wrong[0]}'.")
    found: dict[str, Recipe] = {}
    named = variants()
    for spec, word, quantizer, seed, parts in itertools.product(specs, methods, weights, seeds, tunes):
        method, options = named.get(word, (word, {}))
        of_method = getattr(METHODS.get(method), "preset", "paper") if preset == "auto" else preset
        words = {**calibration, **options, **({} if parts == "none" else tuning)}
        how: Any = {"preset": of_method, "seed": int(seed), "tune": parts.replace("+", ",")}
        made = Recipe.parse(method, quantizer, spec, **how, **words)
        if made.spec.weights.enabled or quantizer == weights[0]:
            found.setdefault(made.digest, made)
    return list(found.values())


class LiveTable(Live):
    """Trials and their results, a table that grows; without a terminal a line for each trial, and the table last."""

    def __init__(self, trials: Sequence[Recipe | None], console: Console) -> None:
        self._trials = trials
        # of each trial: None, when it began, or how it ended
        self._state: dict[Recipe | None, Record | Exception | float | None] = dict.fromkeys(trials)
        self._measured: list[float] = []  # seconds of the trials that this run has measured
        super().__init__(console=console, get_renderable=self.table, refresh_per_second=2)  # asks for the table

    def on_trial(self, trial: Trial, outcome: Record | Exception | None) -> None:
        """For `compare`: show that a trial has begun, or how it ended."""
        before = self._state.get(trial.recipe)
        self._state[trial.recipe] = time.monotonic() if outcome is None else outcome
        if isinstance(before, float):
            self._measured.append(time.monotonic() - before)
        if outcome is not None and not self.console.is_terminal:
            told = f"failed: {outcome}"
            if isinstance(outcome, Record):
                told = ", ".join(f"{metric} {_number(value)}" for metric, value in outcome.metrics.items())
            name = " ".join(_name(trial.recipe))
            self.console.print(f"{name}: {told}", soft_wrap=True, highlight=False, markup=False)

    def table(self) -> Table:
        """A row for every trial; where there are more metrics than trials, a column."""
        records = [state for state in self._state.values() if isinstance(state, Record)]
        metrics = reported(dict.fromkeys(metric for record in records for metric in record.metrics))
        names = [_name(recipe) for recipe in self._trials]
        numbers = [self._numbers(recipe, metrics) for recipe in self._trials]
        if len(metrics) > len(self._trials):
            heads = ["", *("\n".join(filter(None, name)) for name in names)]
            rows = list(zip([*metrics, "MB", ""], *numbers, strict=True))
        else:
            heads = [*HEADS, *metrics, "MB", ""]
            rows = [(*name, *cells) for name, cells in zip(names, numbers, strict=True)]
        table = Table(caption=self._caption(len(records)))
        for head in heads:
            wrapped = head.replace("/", "/\n").replace("massive_unquantized", "massive unquantized")
            table.add_column(wrapped, justify="left" if head in ("", *HEADS) else "right", overflow="fold")
        for row in rows:
            table.add_row(*row)
        return table

    def _numbers(self, recipe: Recipe | None, metrics: Sequence[str]) -> list[str]:
        """The last cells of a trial: its metrics, its size, how it stands."""
        state = self._state.get(recipe)
        if isinstance(state, Record):
            beside = state.conditions.get("published", {})
            numbers = [
                _number(state.metrics.get(metric))
                + (f" ({beside[metric]['value']:g} published)" if metric in beside else "")
                for metric in metrics
            ]
            return [*numbers, f"{state.size['weight_bytes'] / 1e6:.1f}", "[green]done[/]"]
        note = "[dim]waits[/]" if state is None else f"[red]failed: {escape(str(state))}[/]"
        if isinstance(state, float):
            note = f"[yellow]{time.monotonic() - state:.0f} s …[/]"
        return [*[""] * (len(metrics) + 1), note]

    def _caption(self, finished: int) -> str:
        done = f"{finished} of {len(self._trials)} trials"
        left = len(self._trials) - finished - sum(isinstance(state, Exception) for state in self._state.values())
        if not left or not self._measured:
            return done
        at_a_time = max(1, sum(isinstance(state, float) for state in self._state.values()))
        seconds = left * sum(self._measured) / len(self._measured) / at_a_time
        return f"{done}, about {f'{seconds / 60:.0f} minutes' if seconds > 120 else f'{seconds:.0f} seconds'} to go"


def _name(recipe: Recipe | None) -> tuple[str, str, str, str]:
    """The cells under `HEADS`; options that are not the default stand with the method, as RO is QuaRot with one."""
    if recipe is None:
        return "unquantized", "", "", ""
    method = ", ".join(filter(None, (recipe.method.name, deviations(recipe.to_json()))))
    return method, recipe.rounding.name if recipe.spec.weights.enabled else "", str(recipe.spec), str(recipe.seed)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}" if abs(value) < 1e5 else f"{value:.3e}"
