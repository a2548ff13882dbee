"""What is timed is a model as its users have it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import dfrot
from dfrot.evaluation import machine
from dfrot.evaluation.bench import bench
from dfrot.runtime.linear import QuantLinear

Tiny = Callable[[str], Path]


def of_inference(model: nn.Module) -> list[str]:
    """Tensors whose changes torch does not count, so that nothing that is made from them can be kept."""
    return [name for name, tensor in model.state_dict().items() if tensor.is_inference()]


def test_what_is_derived_from_weights_is_kept_while_a_model_is_timed(tiny: Tiny, tmp_path: Path) -> None:
    recipe = dfrot.Recipe.parse("quarot", "rtn", tune="none")
    path = dfrot.quantize(tiny("mistral"), recipe, tmp_path / "out").path
    models: list[Any] = []

    def loaded(model: Path) -> Callable[[torch.dtype], Any]:
        def load(dtype: torch.dtype) -> Any:
            models.append(dfrot.load(model, dtype=dtype)[0])
            return models[-1]

        return load

    bench(loaded(path), loaded(tiny("mistral")), prompt=4, new_tokens=2, rounds=1)
    assert len(models) == 2
    assert not any(map(of_inference, models))


def test_a_model_that_is_loaded_in_inference_mode_keeps_it_too(tiny: Tiny, tmp_path: Path) -> None:
    path = dfrot.quantize(tiny("mistral"), dfrot.Recipe.parse("quarot", "rtn", tune="none"), tmp_path / "out").path
    with torch.inference_mode():
        model, _ = dfrot.load(path)
    assert not of_inference(model)


def test_so_do_the_layers_that_info_times(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[nn.Module] = []

    def seconds(layer: nn.Module, x: torch.Tensor) -> float:
        seen.append(layer)
        return 1.0

    monkeypatch.setattr(machine, "SECONDS", 0.0)
    monkeypatch.setattr(machine, "_seconds", seconds)
    for name, small in {"IN": 64, "OUT": 96}.items():
        monkeypatch.setattr(machine, name, small)
    machine.speeds(torch.device("cpu"))
    assert any(isinstance(layer, QuantLinear) for layer in seen)
    assert not any(map(of_inference, seen))
