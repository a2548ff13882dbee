"""How far a long loop is: a bar with an ETA on a terminal, elsewhere a line a stage and one a minute.

In a file or a log collector a bar is noise, and silence looks like a hang.
"""

import os
import sys
import time
from collections.abc import Iterable, Iterator, Sized
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from dfrot.system.interrupt import raise_if_interrupted

T = TypeVar("T")

LINE_EVERY_S = 60.0

console = Console(stderr=True)  # a process whose progress another one reports makes it quiet


def track(items: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
    """Yield from `items` and show how far that is, on standard error; nothing remains of a bar that is done."""
    quiet = console.quiet or "PYTEST_CURRENT_TEST" in os.environ
    if not quiet and not sys.stderr.isatty():
        yield from _lines(items, description, total)
        return
    eta = (TextColumn("eta"), TimeRemainingColumn())
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), *eta)
    with Progress(*columns, console=console, transient=True, disable=quiet) as progress:
        for item in progress.track(items, total=total, description=description):
            yield item
            raise_if_interrupted()


def _lines(items: Iterable[T], description: str, total: int | None) -> Iterator[T]:
    """Yield from `items`; print a line at the start, and one with an ETA whenever a minute is over."""
    total = len(items) if total is None and isinstance(items, Sized) else total
    start = last = time.monotonic()
    _print(f"{description}: {total} steps" if total and total > 1 else description)
    for done, item in enumerate(items, 1):
        yield item
        raise_if_interrupted()
        now = time.monotonic()
        if now - last >= LINE_EVERY_S and done != total:
            last, left = now, f" of {total}, ETA {_clock((now - start) / done * (total - done))}" if total else ""
            _print(f"{description}: {done}{left}, {_clock(now - start)} so far")


def _print(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _clock(seconds: float) -> str:
    """Hours, minutes and seconds: 0:01:30."""
    minutes, rest = divmod(round(max(seconds, 0)), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"
