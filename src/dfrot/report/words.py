"""Numbers and texts in few characters, for tables, figures and captions."""

import statistics
from collections.abc import Iterable
from typing import Any

from dfrot.evaluation.record import is_number


def is_finite(value: Any) -> bool:
    """Whether this is a number, and small enough for sums and differences of such to be finite too."""
    return is_number(value) and abs(value) < 1e300


def mean(values: Iterable[Any]) -> float | None:
    """Of the finite numbers among the values."""
    known = [value for value in values if is_finite(value)]
    return statistics.fmean(known) if known else None


def number(value: Any) -> str:
    """A number with about four digits; a dash for None."""
    if not is_finite(value):
        return "–" if value is None else str(value)
    if value == 0 or (isinstance(value, int) and abs(value) < 1e5):
        return str(int(value))
    size = abs(value)
    if size >= 1e5 or size < 1e-3:
        return f"{value:.2e}"
    return f"{value:.{0 if size >= 1000 else 2 if size >= 10 else 3 if size >= 1 else 4}f}"


def shorten(text: str, most: int = 120) -> str:
    """A text of at most so many characters; what is cut out of its middle is marked."""
    half = (most - 1) // 2
    return text if len(text) <= most else f"{text[:half]}…{text[-half:]}"
