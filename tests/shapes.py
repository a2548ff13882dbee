"""Which functions are checked while tests run: those whose annotations name shapes by jaxtyping, others by beartype,
inner ones by neither.

jaxtyping's import hook wraps every function, each call of which then takes some 20 µs more, and inner functions anew
each time they are defined.
"""

import functools
import inspect
import typing
from typing import Any

import jaxtyping
from beartype import BeartypeConf, beartype

_checked = jaxtyping.jaxtyped
_plain = BeartypeConf(violation_type=TypeError)  # as jaxtyping's errors are: what is read may be anything


def _names_a_shape(annotation: Any) -> bool:
    if isinstance(annotation, str | typing.ForwardRef):
        return True  # who knows
    own = inspect.isclass(annotation) and issubclass(annotation, jaxtyping.AbstractArray)
    return own or any(map(_names_a_shape, typing.get_args(annotation)))


def _checked_if_shaped(function: Any = None, *, typechecker: Any) -> Any:
    """What the hook decorates functions and classes with."""
    if function is None:
        return functools.partial(_checked_if_shaped, typechecker=typechecker)
    if inspect.isfunction(function):
        if "<locals>" in function.__qualname__:
            return function
        if not any(map(_names_a_shape, function.__annotations__.values())):
            return beartype(conf=_plain)(function)
    return _checked(function, typechecker=typechecker)


def check_shapes_only() -> None:
    """From here on, for what is imported later."""
    jaxtyping.jaxtyped = _checked_if_shaped  # type: ignore[assignment]
