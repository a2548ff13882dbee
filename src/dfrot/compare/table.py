"""The grid of a comparison: its recipes, and how it stands, as a table."""

import itertools
import time
from collections.abc import Sequence
from types import TracebackType

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from dfrot.compare.trials import Cell
from dfrot.evaluation.record import Record, reported
from dfrot.pipeline.recipe import Recipe
from dfrot.system.errors import UserError


def recipes(
    methods: Sequence[str],
    weights: Sequence[str],
    specs: Sequence[str],
    seeds: Sequence[str],
    *,
    preset: str = "auto",
    calib: str = "wikitext2",
    calib_tokens: int | None = None,
) -> list[Recipe]:
    """Every combination, in the order of the words; specs that leave weights alone come once.

    Raises:
        UserError: one of the words is not known, or there is nothing to combine.
    """
    if not (methods and weights and specs and seeds):
        raise UserError("a grid has at least one method, weight quantizer, spec and seed.")
    if wrong := [seed for seed in seeds if not seed.isdecimal()]:
        raise UserError(f"a seed is a whole number, got '{wrong[0]}'.")
    found: dict[str, Recipe] = {}
    for spec, method, quantizer, seed in itertools.product(specs, methods, weights, seeds):
        of_method = ("duquant" if method == "duquant" else "paper") if preset == "auto" else preset
        made = Recipe.parse(
            method, quantizer, spec, preset=of_method, calib=calib, calib_tokens=calib_tokens, seed=int(seed)
        )
        if not made.spec.weights.enabled and quantizer != weights[0]:
            continue
        found.setdefault(made.digest, made)
    return list(found.values())


class LiveTable:
    """Cells and what is known of them. On a terminal a table that grows, elsewhere a line for each that is done."""

    def __init__(self, cells: Sequence[Recipe | None], console: Console) -> None:
        self._cells, self._console = cells, console
        # what is known of each: nothing, when it began, or how it ended
        self._state: dict[Recipe | None, Record | Exception | float | None] = dict.fromkeys(cells)
        self._measured: list[float] = []  # seconds of the cells that this run has measured
        self._live = Live(console=console, get_renderable=self.table, refresh_per_second=2, transient=False)

    def __enter__(self) -> "LiveTable":
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._console.is_terminal:
            self._live.stop()
        elif kind is None:
            self._console.print(self.table())

    def hear(self, cell: Cell, outcome: Record | Exception | None) -> None:
        """A listener for `compare`."""
        before = self._state.get(cell.recipe)
        if outcome is None:
            self._state[cell.recipe] = time.monotonic()
            return
        if isinstance(before, float):
            self._measured.append(time.monotonic() - before)
        self._state[cell.recipe] = outcome
        if not self._console.is_terminal:
            name = " ".join(_name(cell.recipe))
            told = _told(outcome) if isinstance(outcome, Record) else f"failed: {outcome}"
            self._console.print(f"{name}: {told}", soft_wrap=True, highlight=False, markup=False)

    def table(self) -> Table:
        """A row for every cell; where there are more metrics than cells, a column."""
        records = [state for state in self._state.values() if isinstance(state, Record)]
        metrics = reported(dict.fromkeys(metric for record in records for metric in record.metrics))
        lines = [["method", "weights", "spec", "seed", *metrics, "MB", ""]]
        lines += [[*_name(recipe), *self._numbers(recipe, metrics)] for recipe in self._cells]
        table = Table(caption=self._caption(len(records)))
        if across := len(metrics) > len(self._cells):
            names, lines = lines[0][:4], [list(line) for line in zip(*lines, strict=True)]
            lines = [*lines[len(names) :]]
            heads = ["", *("\n".join(filter(None, _name(recipe))) for recipe in self._cells)]
        else:
            heads, *lines = lines
        for number, head in enumerate(heads):
            table.add_column(head, justify="right" if number and (across or 4 <= number < len(heads) - 1) else "left")
        for line in lines:
            table.add_row(*line)
        return table

    def _numbers(self, recipe: Recipe | None, metrics: Sequence[str]) -> list[str]:
        """What is known of a cell: its metrics, its size, how it stands."""
        state = self._state.get(recipe)
        if isinstance(state, Record):
            beside = state.conditions.get("published", {})
            numbers = [
                _number(state.metrics.get(metric))
                + (f" ({beside[metric]['value']:g} published)" if metric in beside else "")
                for metric in metrics
            ]
            return [*numbers, f"{state.size['weight_bytes'] / 1e6:.1f}", "[green]done[/]"]
        if isinstance(state, Exception):
            note = f"[red]failed: {escape(str(state))}[/]"
        else:
            note = "[dim]waits[/]" if state is None else f"[yellow]{time.monotonic() - state:.0f} s …[/]"
        return [*[""] * (len(metrics) + 1), note]

    def _caption(self, finished: int) -> str:
        left = len(self._cells) - finished - sum(isinstance(state, Exception) for state in self._state.values())
        if not left or not self._measured:
            return f"{finished} of {len(self._cells)} cells"
        at_a_time = max(1, sum(isinstance(state, float) for state in self._state.values()))
        seconds = left * sum(self._measured) / len(self._measured) / at_a_time
        time_left = f"{seconds / 60:.0f} minutes" if seconds > 120 else f"{seconds:.0f} seconds"
        return f"{finished} of {len(self._cells)} cells, about {time_left} to go"


def _name(recipe: Recipe | None) -> tuple[str, str, str, str]:
    if recipe is None:
        return "unquantized", "", "", ""
    weights = recipe.weights_name if recipe.spec.weights.enabled else ""
    return recipe.method_name, weights, str(recipe.spec), str(recipe.seed)


def _told(record: Record) -> str:
    return ", ".join(f"{metric} {_number(value)}" for metric, value in record.metrics.items())


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}" if abs(value) < 1e5 else f"{value:.3e}"
