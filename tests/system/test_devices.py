"""Where is computed if nobody says so."""

import pytest
import torch

from dfrot.system.devices import chosen_device


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: request.param > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: request.param)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100")


@pytest.mark.parametrize(
    ("gpus", "spread", "device", "why"),
    [
        (0, False, "cpu", None),
        (0, True, "cpu", None),
        (1, False, "cuda", "NVIDIA H100"),
        (1, True, "auto", "NVIDIA H100"),
        (4, False, "cuda", "NVIDIA H100 and 3 more"),
        (4, True, "auto", "NVIDIA H100 and 3 more"),
    ],
    indirect=["gpus"],
)
def test_a_gpu_is_taken_where_torch_sees_one(gpus: None, spread: bool, device: str, why: str | None) -> None:
    assert chosen_device("auto", spread=spread) == (device, why)


@pytest.mark.parametrize("gpus", [0, 4], indirect=True)
def test_what_is_said_is_done_without_a_word(gpus: None) -> None:
    assert chosen_device("cpu") == ("cpu", None)
    assert chosen_device("cuda:1", spread=True) == ("cuda:1", None)


@pytest.mark.parametrize("gpus", [1], indirect=True)
def test_without_accelerate_a_model_stays_on_one_gpu(gpus: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert chosen_device("auto", spread=True) == ("cuda", "NVIDIA H100")
