"""What `dfrot info` says of the machine."""

import pytest
import torch

from dfrot.cli import main
from dfrot.evaluation import machine
from dfrot.evaluation.machine import SPECS, Speed, advice, computes_with
from dfrot.kernels import cuda


def made(four: float, eight: float) -> list[Speed]:
    return [Speed(spec, {"w4a4kv4": four}.get(spec, eight), 2.0) for spec in SPECS]


def test_where_8_bits_are_as_fast_as_4_they_are_advised() -> None:
    assert "take --spec w4a8kv4" in advice(made(1.5, 1.5))
    assert advice(made(3.0, 1.5)) == "Activations in 4 bits read prompts 2.0 times as fast here as in 8."


def test_prompts_that_are_read_slower_than_in_bfloat16_are_said() -> None:
    assert "slower than in bfloat16" in advice(made(0.7, 0.7))
    assert "slower" not in advice(made(1.1, 0.7))


def test_figures_of_a_busy_machine_are_said_to_be_noise() -> None:
    quiet = made(1.5, 1.5)
    assert "vary" not in advice(quiet)
    assert "vary by 60% from round to round" in advice([quiet[0]._replace(spread=1.6), *quiet[1:]])


def test_info_alone_measures_every_spec(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name, small in {"IN": 64, "OUT": 96, "SECONDS": 0.0}.items():
        monkeypatch.setattr(machine, name, small)
    found = machine.speeds(torch.device("cpu"))
    assert [speed.spec for speed in found] == list(SPECS)
    assert all(ratio > 0 for speed in found for ratio in speed[1:])
    assert main(["info", "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert all(word in printed for word in (*SPECS, "threads"))


@pytest.mark.parametrize(
    ("capability", "hip", "variable", "says"),
    [
        ((9, 0), None, None, "Triton kernels on NVIDIA H100"),
        ((7, 5), None, None, "torch reference: the GPU's capability is below 8.0 on NVIDIA H100"),
        ((9, 0), "7.0", None, "torch reference: there are no kernels for AMD GPUs on NVIDIA H100"),
        ((9, 0), None, "reference", "torch reference: DFROT_KERNELS=reference is set on NVIDIA H100"),
    ],
)
def test_what_computes_on_a_gpu_is_said_and_why(
    capability: tuple[int, int], hip: str | None, variable: str | None, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton", reason="Triton is not there: pip install 'dfrot[dev]'")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.delenv("DFROT_KERNELS", raising=False)
    if variable is not None:
        monkeypatch.setenv("DFROT_KERNELS", variable)
    cuda._why_not.cache_clear()
    try:
        assert computes_with(torch.device("cuda", 0)).startswith(says)
    finally:
        cuda._why_not.cache_clear()
