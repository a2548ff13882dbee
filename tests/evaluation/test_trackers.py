from typing import Any

import pytest
from accelerate import tracking

from dfrot.cli import main
from dfrot.evaluation.record import Record, log_records
from dfrot.pipeline.recipe import Recipe
from dfrot.system.errors import SetupError, UserError

heard: list[tuple[str, Any]] = []


class Listening(tracking.GeneralTracker):
    """A tracker of accelerate's kind that keeps what it is told."""

    name, requires_logging_directory, tracker = "wandb", False, None

    def __init__(self, run_name: str) -> None:
        super().__init__()
        heard.append(("run", run_name))

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        heard.append(("configuration", values))

    def log(self, values: dict[str, Any], step: int | None = None) -> None:
        heard.append((f"step {step}", values))

    def finish(self) -> None:
        heard.append(("finish", None))


def record(seed: int) -> Record:
    recipe = Recipe.parse("quarot", "rtn", seed=seed).to_json()
    return Record("a/model", recipe, {"ppl/pydoc": 9.5 + seed}, {}, {}, {"tokens": {"pydoc": 64}, "commit": None})


def test_records_reach_a_tracker_of_accelerate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "wandb", Listening)
    monkeypatch.setattr(tracking, "get_available_trackers", lambda: ["wandb"])
    log_records([record(0), record(1)], "wandb")
    (run, configuration, first, second, finish) = heard
    assert run == ("run", "dfrot")
    assert configuration == ("configuration", {"model": "a/model", "tokens/pydoc": 64})
    assert (first[0], second[0], finish[0]) == ("step 0", "step 1", "finish")
    assert second[1]["ppl/pydoc"] == 10.5
    assert (second[1]["recipe/method"], second[1]["recipe/seed"]) == ("quarot", 1)


def test_a_tracker_that_is_not_there_is_said_before_anything_is_measured(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "nowhere", "--log-to", "paper"]) == 2
    assert "no tracker 'paper'" in capsys.readouterr().err


def test_trackers_that_are_not_there_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="no tracker 'paper'"):
        log_records([], "paper")
    monkeypatch.setattr(tracking, "get_available_trackers", lambda: [])
    with pytest.raises(SetupError, match="pip install mlflow"):
        log_records([], "mlflow")
