"""The two kinds of failure that a user can do something about."""

_MOST = 2000  # characters of a message; what it quotes may be a whole file


def _brief(message: str) -> str:
    return message if len(message) <= _MOST else f"{message[: _MOST // 2]} … {message[-_MOST // 2 :]}"


class UserError(ValueError):
    """The request cannot be carried out as it was made. The message gives the rule, what was given, what to do.

    The command line prints it without a traceback and exits with code 2.
    """

    def __str__(self) -> str:
        return _brief(super().__str__())


class SetupError(RuntimeError):
    """The surroundings failed: no network, a full disk, a missing optional package. Exit code 1."""

    def __str__(self) -> str:
        return _brief(super().__str__())
