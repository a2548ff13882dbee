"""Progress bars with an ETA, on the terminal only."""

import os
import sys
from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from dfrot.system.interrupt import raise_if_interrupted

T = TypeVar("T")

console = Console(stderr=True)  # a process whose progress another one reports makes it quiet


def track(items: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
    """Yield from `items` behind a bar that vanishes when done; silent unless standard error is a terminal."""
    eta = (TextColumn("eta"), TimeRemainingColumn())
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), *eta)
    disable = console.quiet or not sys.stderr.isatty() or "PYTEST_CURRENT_TEST" in os.environ
    with Progress(*columns, console=console, transient=True, disable=disable) as progress:
        for item in progress.track(items, total=total, description=description):
            yield item
            raise_if_interrupted()
