import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import dfrot
from dfrot.pipeline.recipe import Recipe
from dfrot.quant.affine import SCALE_DTYPE, dequantize
from dfrot.quant.spec import TensorSpec
from dfrot.rounding.lwc import ClippedWeight
from dfrot.rounding.rtn import rtn

SPECS = [
    TensorSpec(4, symmetric=True, clip_ratio=None),
    TensorSpec(4, symmetric=False, clip_ratio=None),
    TensorSpec(3, symmetric=False, clip_ratio=None, group=16),
]
every_spec = pytest.mark.parametrize("spec", SPECS, ids=str)


@every_spec
def test_gradients_are_those_of_rounding_that_passes_straight_through(
    spec: TensorSpec, generator: torch.Generator
) -> None:
    """Against autograd on the same formula, written with detached rounding."""
    weight = torch.randn(6, 32, generator=generator, dtype=torch.float64)
    towards = torch.randn(6, 32, generator=generator, dtype=torch.float64)
    clipped = ClippedWeight(weight, spec)
    (clipped() * towards).sum().backward()

    def straight(x: torch.Tensor) -> torch.Tensor:
        return x + (x.round() - x).detach()

    plain = ClippedWeight(weight, spec)
    scale, zero = plain.qparams()
    groups = weight.unflatten(-1, (scale.shape[1], -1))
    shift = 0 if zero is None else zero[..., None]
    code = (straight(groups / scale[..., None]) + shift).clamp(spec.grid.lowest, spec.grid.highest)
    ((code - shift) * scale[..., None] * towards.view_as(groups)).sum().backward()
    for ours, expected in zip(clipped.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, expected.grad)


@every_spec
def test_it_trains_on_the_grid_that_is_stored(spec: TensorSpec, generator: torch.Generator) -> None:
    clipped = ClippedWeight(torch.randn(6, 32, generator=generator), spec)
    codes, qparams = clipped.quantized()
    assert torch.equal(clipped(), dequantize(codes, spec.weight_granularity, qparams))
    assert torch.equal(qparams.scale, qparams.scale.to(SCALE_DTYPE).float())


def test_it_starts_from_the_clip_search(generator: torch.Generator) -> None:
    weight = torch.randn(6, 512, generator=generator)  # long rows, whose searched share is well below 1
    searched = rtn(weight, SPECS[0])[1].scale
    started = ClippedWeight(weight, SPECS[0]).quantized()[1].scale
    torch.testing.assert_close(started, searched, rtol=2**-7, atol=0)  # one step of bfloat16


@pytest.mark.parametrize("spec", ["w3a4kv4", "w3g16a16kv16"])
def test_learning_lowers_the_blocks_loss(
    tiny: Callable[[str], Path], text_file: Path, tmp_path: Path, spec: str
) -> None:
    recipe = Recipe.parse(
        "quarot",
        "lwc",
        spec,
        tune="none",
        calib=str(text_file),
        calib_tokens=128,
        calib_seq_len=32,
        epochs=8,
        learning_rate=0.05,
    )
    path = dfrot.quantize(tiny("llama"), recipe, tmp_path / "out").path
    for block in json.loads((path / "fit.json").read_text())["weights_by_block"]:
        losses = block["loss_by_epoch"]
        assert len(losses) == 8
        assert losses[-1] < losses[0]
