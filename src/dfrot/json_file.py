"""JSON that somebody else may have written: it is an object, or refused with a message."""

import json
from pathlib import Path
from typing import Any

from dfrot.errors import UserError

_DEPTH = 100  # what dfrot writes has six levels


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: it is none, or nested so deeply that whoever walks it would run out of stack.
    """
    try:
        value = json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    level = [value]
    for _ in range(_DEPTH):
        inner = [each for each in level if isinstance(each, dict | list)]
        level = [part for each in inner for part in (each.values() if isinstance(each, dict) else each)]
    if level:
        raise ValueError("it is nested too deeply")
    return value


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        UserError: there is none.
    """
    try:
        record = parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not a JSON file: {error}") from error
    if not isinstance(record, dict):
        raise UserError(f"{path} holds no JSON object.")
    return record
