"""The two kinds of failure that a user can do something about."""


class UserError(ValueError):
    """The request cannot be carried out as it was made. The message gives the rule, what was given, what to do.

    The command line prints it without a traceback and exits with code 2.
    """


class EnvironmentFault(RuntimeError):
    """The surroundings failed: no network, a full disk, a missing optional package. Exit code 1."""
