"""The two kinds of failure that a user can do something about."""


class _Brief(Exception):
    def __str__(self) -> str:
        message = super().__str__()  # it may quote a whole file
        return message if len(message) <= 2000 else f"{message[:1000]} … {message[-1000:]}"


class UserError(_Brief, ValueError):
    """The request cannot be carried out as given. The message names the rule, what was given, and what to do.

    The command line prints it without a traceback and exits with code 2.
    """


class SetupError(_Brief, RuntimeError):
    """The environment failed: no network, a full disk, a missing optional package. Exit code 1."""
