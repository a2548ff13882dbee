"""Options: frozen dataclasses whose fields are declared once, for the command line, JSON and Python alike.

A field's type is checked, and the docstring below the field is the command line's help.
"""

import dataclasses
import inspect
import typing
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import docstring_parser
import typeguard

from dfrot.system.errors import UserError

T = TypeVar("T", bound="Options")  # typing.Self would stop the tests, which beartype instruments by function


@dataclass(frozen=True)
class Options:
    """The base of methods, roundings and recipes."""

    @classmethod
    def checked(cls: type[T], **given: Any) -> T:
        """An instance from unchecked values of a command line or of JSON.

        Raises:
            UserError: a value is not of its field's type, or there is no such field; the message names it.
        """
        types = cls.types()
        for name, value in given.items():
            if name not in types:
                raise UserError(f"there is no {name}; known are {', '.join(types) or 'no options'}.")
            try:
                typeguard.check_type(value, types[name])
            except typeguard.TypeCheckError as error:
                shown = f"'{value}'" if isinstance(value, str) else repr(value)
                raise UserError(f"{name} is {_described(types[name])}, got {shown}.") from error
        return cls(**given)

    @classmethod
    def types(cls) -> dict[str, Any]:
        """The type of each field."""
        hints = typing.get_type_hints(cls)
        return {field.name: hints[field.name] for field in dataclasses.fields(cls)}

    @classmethod
    def help(cls) -> dict[str, str]:
        """The docstring of each field, by its name."""
        found: dict[str, str] = {}
        for kind in reversed(cls.__mro__):  # docstring_parser reads the class itself, not its bases
            if dataclasses.is_dataclass(kind) and inspect.getdoc(kind):
                described = docstring_parser.parse_from_object(kind).params
                found |= {each.arg_name: " ".join((each.description or "").split()) for each in described}
        return {field.name: found.get(field.name, "") for field in dataclasses.fields(cls)}


_WORDS = {int: "a whole number", float: "a number", bool: "True or False", str: "a text", type(None): "left out"}


def _described(hint: Any) -> str:
    """A type in words."""
    parts = typing.get_args(hint)
    if typing.get_origin(hint) is Literal:
        return f"one of {', '.join(parts)}"
    return " or ".join(map(_described, parts)) if parts else _WORDS.get(hint, hint.__name__)
