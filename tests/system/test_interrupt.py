"""Ctrl-C ends a command, whatever a library makes of it."""

import contextlib
import signal
from collections.abc import Iterator

import pytest

from dfrot.system.interrupt import interruptible
from dfrot.system.progress import track


@pytest.fixture(autouse=True)
def _usual_handler() -> Iterator[None]:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    assert signal.signal(signal.SIGINT, before) is signal.default_int_handler


def test_an_interrupt_that_a_library_turns_into_another_error_is_an_interrupt() -> None:
    def convert() -> None:
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt as interrupt:
            raise ValueError("could not determine the shape") from interrupt

    with pytest.raises(KeyboardInterrupt), interruptible():
        convert()


def test_an_interrupt_that_a_library_swallows_ends_the_loop_at_its_next_step() -> None:
    done = []

    def swallow() -> None:
        for item in track(range(3), "counting"):
            with contextlib.suppress(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
            done.append(item)

    with pytest.raises(KeyboardInterrupt), interruptible():
        swallow()
    assert done == [0]


def test_an_error_without_an_interrupt_stays_what_it_is() -> None:
    with pytest.raises(ValueError, match="the model"), interruptible():
        raise ValueError("the model")


def test_a_process_that_ignores_interrupts_goes_on_ignoring_them() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with interruptible():
        signal.raise_signal(signal.SIGINT)
    assert signal.signal(signal.SIGINT, signal.default_int_handler) is signal.SIG_IGN
