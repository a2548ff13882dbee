import io
import itertools

import pytest

from dfrot.system import progress


def test_without_a_terminal_a_stage_is_a_line_and_every_minute_one_with_an_eta(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = itertools.count(0.0, 25.0)  # seconds: 25 pass with every item
    monkeypatch.delenv("PYTEST_CURRENT_TEST")
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    assert list(progress.track(range(8), "quantizing")) == list(range(8))
    assert capsys.readouterr().err.splitlines() == [
        "quantizing: 8 steps",
        "quantizing: 3 of 8, ETA 0:02:05, 0:01:15 so far",
        "quantizing: 6 of 8, ETA 0:00:50, 0:02:30 so far",
    ]


def test_a_quiet_process_and_a_terminal_print_no_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTEST_CURRENT_TEST")
    shown = io.StringIO()
    monkeypatch.setattr(progress.sys, "stderr", shown)
    monkeypatch.setattr(progress.console, "quiet", True)
    assert list(progress.track(iter("abc"), "copying", total=3)) == ["a", "b", "c"]
    assert shown.getvalue() == ""
