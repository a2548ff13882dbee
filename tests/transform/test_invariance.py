"""The guard against wrong folds: that it fires, and what it leaves behind."""

import math
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

import dfrot
from dfrot.models.source import loaded, open_source
from dfrot.pipeline.loop import Loop
from dfrot.transform.fold import Fold
from dfrot.transform.invariance import InvarianceCheck, InvarianceError, require_fall
from dfrot.transform.transforms import Transforms

Tiny = Callable[[str], Path]
VOCABULARY = 96  # rows of the head; no linear layer of the tiny llama has as many
WEIGHT, NORM_GAIN, BIAS = Fold.weight, Fold.norm_gain, Fold.bias


def gain_forgotten(fold: Fold, weight: torch.Tensor) -> torch.Tensor:
    return WEIGHT(replace(fold, gain=None), weight)


def gain_forgotten_in_the_head(fold: Fold, weight: torch.Tensor) -> torch.Tensor:
    return WEIGHT(replace(fold, gain=None) if len(weight) == VOCABULARY else fold, weight)


def output_not_rotated(fold: Fold, weight: torch.Tensor) -> torch.Tensor:
    return WEIGHT(replace(fold, output_rotation=None), weight)


def smoothing_forgotten(fold: Fold, weight: torch.Tensor) -> torch.Tensor:
    return WEIGHT(replace(fold, smooth=None), weight)


def gain_left_in_the_norm(fold: Fold, gain: torch.Tensor) -> torch.Tensor:
    return NORM_GAIN(replace(fold, gain=None), gain)


def bias_not_rotated(fold: Fold, *given: Any) -> torch.Tensor | None:
    return BIAS(replace(fold, output_rotation=None), *given)


def offset_forgotten(fold: Fold, *given: Any) -> torch.Tensor | None:
    return BIAS(replace(fold, offset=None), *given)


def offset_of_values_forgotten(fold: Fold, *given: Any) -> torch.Tensor | None:
    return BIAS(replace(fold, output_offset=None), *given)


@pytest.mark.parametrize(
    ("method", "part", "wrong", "where"),
    [
        ("quarot", "weight", gain_forgotten, "block 0"),
        ("quarot", "weight", gain_forgotten_in_the_head, "the head"),
        ("quarot", "weight", output_not_rotated, "block 0"),
        ("quarot", "norm_gain", gain_left_in_the_norm, "block 0"),
        ("quarot", "bias", bias_not_rotated, "block 0"),
        ("learned", "bias", offset_forgotten, "block 0"),
        ("learned", "bias", offset_of_values_forgotten, "block 0"),
        ("duquant", "weight", smoothing_forgotten, "block 0"),
    ],
)
def test_a_wrong_fold_ends_the_run_and_nothing_looks_finished(
    tiny: Tiny,
    tmp_path: Path,
    text_file: Path,
    monkeypatch: pytest.MonkeyPatch,
    method: str,
    part: str,
    wrong: Callable[..., torch.Tensor | None],
    where: str,
) -> None:
    monkeypatch.setattr(Fold, part, wrong)
    words: dict[str, Any] = _WORDS.get(method, {})
    recipe = dfrot.Recipe.parse(method, "rtn", calib=str(text_file), calib_tokens=64, **words)
    with pytest.raises(InvarianceError, match=f"what {where} computes") as raised:
        dfrot.quantize(tiny("llama"), recipe, tmp_path / "out")
    errors = re.search(r"relative error (\S+) in float32 and (\S+) in float64", str(raised.value))
    assert errors is not None
    in_float32, in_float64 = map(float, errors.groups())
    assert in_float64 > 1e-3
    assert in_float64 == pytest.approx(in_float32, rel=0.1)  # a mistake is as large in both
    assert looks_unfinished(tmp_path / "out", "model.layers.0." if where == "block 0" else "lm_head.")


_WORDS: dict[str, dict[str, Any]] = {
    "duquant": {"block": 8, "greedy_steps": 4},
    "learned": {"calib_seq_len": 16, "steps": 2, "learn_steps": 1, "learn_tokens": 16},
}


def looks_unfinished(out: Path, unproved: str) -> bool:
    """Whether no one would take `out` for a checkpoint, and no tensor of this prefix is in it."""
    with pytest.raises(dfrot.UserError):
        dfrot.load(out)
    names = []
    for shard in out.glob("*.safetensors"):
        with safe_open(shard, "pt") as opened:
            names += [name for name in opened.keys() if name.startswith(unproved)]  # noqa: SIM118
    return not (out / "config.json").exists() and not names


_QUANTIZE_WITH_A_WRONG_FOLD = """
import sys
from dfrot.cli import main
from dfrot.transform.fold import Fold
Fold.norm_gain = lambda fold, gain: gain.double()
sys.exit(main(sys.argv[1:]))
"""


def test_a_wrong_fold_is_an_exit_code_of_the_command(tiny: Tiny, tmp_path: Path) -> None:
    words = ["quantize", str(tiny("llama")), "-o", str(tmp_path / "out"), "--method", "quarot", "--weights", "rtn"]
    command = [sys.executable, "-c", _QUANTIZE_WITH_A_WRONG_FOLD, *words]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert "dfrot: folding changed what block 0 computes" in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr
    debugged = subprocess.run([*command, "--overwrite", "--debug"], capture_output=True, text=True)
    assert "Traceback" in debugged.stderr
    assert "folding changed what block 0 computes" in " ".join(debugged.stderr.split())
    assert looks_unfinished(tmp_path / "out", "model.layers.0.")


@pytest.mark.parametrize(("in_float32", "in_float64"), [(1e-6, 1e-15), (1e-7, 0.0), (1e-4, 9e-11), (0.0, 0.0)])
def test_an_error_at_rounding_level_passes(in_float32: float, in_float64: float) -> None:
    require_fall("block 7", in_float32, in_float64)


@pytest.mark.parametrize(
    ("in_float32", "in_float64"),
    [
        (1e-3, 1e-3),  # a wrong fold: the same in both
        (1e-12, 1e-12),  # tiny, and yet no rounding error: it does not fall
        (1e-6, 2e-10 / 2**0.5),  # it falls too little
        (1e-2, 1e-7),  # it falls by 10⁵, and is not tiny
        (1.0, 2e-10),
        (math.nan, math.nan),
        (math.nan, 1e-15),
        (1e-6, math.nan),
        (math.inf, math.inf),
        (math.inf, 1e-15),
        (0.0, 1e-16),
    ],
)
def test_an_error_that_is_not_at_rounding_level_is_a_bug(in_float32: float, in_float64: float) -> None:
    message = re.escape(f"block 7 computes: relative error {in_float32:.1e} in float32 and {in_float64:.1e} in float64")
    with pytest.raises(InvarianceError, match=message):
        require_fall("block 7", in_float32, in_float64)


def test_no_weight_is_folded_more_than_twice(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once as the original computes with it, in float64, and once folded: the folded one is proved, cast and stored."""
    folded: list[torch.Tensor] = []

    def counted(fold: Fold, weight: torch.Tensor) -> torch.Tensor:
        folded.append(weight)
        return WEIGHT(fold, weight)

    monkeypatch.setattr(Fold, "weight", counted)
    dfrot.quantize(tiny("qwen2"), dfrot.Recipe.parse("quarot", "rtn"), tmp_path / "out")
    times = Counter((weight.shape, float(weight.double().sum())) for weight in folded)
    assert len(folded) == 2 * 2 * 7 + 1 + 2  # two blocks of seven linear layers, the embedding, the head
    assert max(times.values()) <= 2


def test_a_head_that_stays_tied_though_it_was_folded_ends_the_run(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it went with a method that the code did not know: the head was proved, and the embedding was kept."""
    monkeypatch.setattr(Transforms, "unties_head", False)
    with pytest.raises(InvarianceError, match="the head in the checkpoint is not the one that was checked"):
        dfrot.quantize(tiny("llama"), dfrot.Recipe.parse("quarot", "rtn"), tmp_path / "out")
    assert not (tmp_path / "out" / "config.json").exists()


def test_an_embedding_that_was_not_rotated_ends_the_run(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Loop, "_fold_rows", lambda _, matrix, fold: matrix.half())
    with pytest.raises(InvarianceError, match="the embedding in the checkpoint is not the one that was checked"):
        dfrot.quantize(tiny("llama"), dfrot.Recipe.parse("quarot", "rtn"), tmp_path / "out")
    assert not (tmp_path / "out" / "config.json").exists()


def test_a_tensor_whose_name_begins_like_that_of_a_layer_is_handed_on(tiny: Tiny) -> None:
    source = open_source(str(tiny("llama")))
    tensors = source.block(0).state_dict()
    source.skeleton.get_submodule("model.layers.0.mlp").register_buffer("up_proj_scale", torch.ones(1, device="meta"))
    block = loaded(source.empty_block(0), tensors | {"mlp.up_proj_scale": torch.ones(1)})
    check = InvarianceCheck(source, source.embeddings(), 0, torch.device("cpu"))
    _, state = check.block(0, block, Transforms(), torch.float32)
    assert state.keys() == block.state_dict().keys()
