"""Ctrl-C that no library loses."""

import contextlib
import signal
from collections.abc import Iterator
from typing import Any

_arrived = False


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Ctrl-C ends the body with KeyboardInterrupt, whatever a library makes of it.

    One that arrives inside a call into safetensors or torch can come out as another error, or not at all.
    """
    global _arrived

    def handle(*_: Any) -> None:
        global _arrived
        _arrived = True
        raise KeyboardInterrupt

    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:  # ignored, or somebody else's
        yield
        return
    signal.signal(signal.SIGINT, handle)
    try:
        yield
    except Exception as error:
        if _arrived:
            raise KeyboardInterrupt from error
        raise
    finally:
        _arrived = False
        signal.signal(signal.SIGINT, signal.default_int_handler)


def raise_if_interrupted() -> None:
    """Raise the KeyboardInterrupt that a library has lost."""
    if _arrived:
        raise KeyboardInterrupt
