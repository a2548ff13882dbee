"""Two processes make the checkpoint that one makes."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import dfrot
from dfrot.checkpoint.writer import PROGRESS_FILE
from dfrot.cli import main
from dfrot.methods import learned
from dfrot.models.source import open_source
from dfrot.pipeline import loop
from dfrot.pipeline.estimate import Estimate
from dfrot.system.distributed import SINGLE_PROCESS, ProcessGroup
from dfrot.system.errors import UserError
from dfrot.training.descent import Descent
from tests import together

Tiny = Callable[[str], Path]
ROOT = Path(__file__).parents[2]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def torchrun(*words: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}/src:{ROOT}"}
    return subprocess.run([*TORCHRUN, *words], capture_output=True, text=True, env=environment, timeout=300)


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.fixture(scope="module")
def found(tiny: Tiny, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes left: tensors by name, and two checkpoints."""
    folder = tmp_path_factory.mktemp("together")
    done = torchrun(str(ROOT / "tests" / "together.py"), str(folder), str(tiny("llama")), str(text_file))
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_hessians_differ_by_the_order_of_their_sums_alone(
    found: Path, tiny: Tiny, text_file: Path, tmp_path: Path, dtype: str
) -> None:
    """|H₁ − H₂|ᵢⱼ ≤ 2 γₙ (|X|ᵀ|X|)ᵢⱼ ≤ 2 γₙ √(Hᵢᵢ Hⱼⱼ), γₙ = n ε / (1 − n ε) for n tokens (Higham 2002, §3.1)."""
    alone = together.hessians(str(tiny("llama")), str(text_file), str(tmp_path / "out"), dtype)
    shared = load_file(found / f"{dtype}.safetensors")
    assert alone.keys() == shared.keys()
    tokens, unit = 120, torch.finfo(getattr(torch, dtype)).eps / 2
    bound = 2 * tokens * unit / (1 - tokens * unit)
    compared = alone if dtype == "float64" else {"0.self_attn.q_proj": alone["0.self_attn.q_proj"]}  # before any codes
    for name, hessian in compared.items():
        sizes = hessian.diagonal().sqrt()
        assert ((shared[name] - hessian).abs() <= bound * torch.outer(sizes, sizes)).all(), name
        assert hessian.abs().max() > 1


def test_in_float64_the_checkpoint_is_the_same_bit_by_bit(
    found: Path, tiny: Tiny, text_file: Path, tmp_path: Path
) -> None:
    """Sums differ by 1e-16, and no weight is that close to the middle between two integers."""
    together.hessians(str(tiny("llama")), str(text_file), str(tmp_path / "alone"), "float64")
    alone, shared = contents(tmp_path / "alone"), contents(found / "float64")
    assert alone.keys() == shared.keys()
    assert {name for name in alone if alone[name] != shared[name]} <= {"fit.json"}  # losses, which are not rounded


def test_refining_together_takes_the_same_steps(found: Path) -> None:
    """To 1e-12: an epsilon of 2e-16, times the rows of a sum, times what ten steps amplify."""
    alone, shared = together.refined(SINGLE_PROCESS), load_file(found / "refined.safetensors")
    for name, tensor in alone.items():
        assert torch.allclose(shared[name], tensor, rtol=0, atol=1e-12 * max(1.0, float(tensor.abs().max()))), name
        assert len(tensor) > together.STEPS // 2


def test_torchrun_goes_on_with_what_one_process_began(
    tiny: Tiny, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["quantize", str(tiny("llama")), "--method", "dfrot", "--weights", "gptq", "--steps", "3", "--tune", "none"]
    words += ["--calib", str(text_file), "--calib-tokens", "96", "--calib-seq-len", "24", "-o", str(tmp_path / "out")]

    def dies(loop: Any, index: int, *rest: Any) -> Any:
        if index == 1:
            raise KeyboardInterrupt
        return original(loop, index, *rest)

    original = loop.Loop.quantize_block
    monkeypatch.setattr(loop.Loop, "quantize_block", dies)
    assert main(words) == 130
    done = torchrun("-m", "dfrot", *words, "--resume")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("bits per decoder weight") == 1  # the first one talks
    model, tokenizer = dfrot.load(tmp_path / "out")
    assert torch.isfinite(model(**tokenizer("the quick", return_tensors="pt")).logits).all()
    again = torchrun("-m", "dfrot", *words)
    assert again.returncode != 0
    assert "is a finished checkpoint" in again.stderr
    assert "dfrot/pipeline/run.py" not in again.stderr  # torchrun adds a traceback, but of itself


def test_torchrun_goes_on_with_what_one_process_was_learning(
    tiny: Tiny, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["quantize", str(tiny("llama")), "--method", "learned", "--weights", "rtn", "--tune", "none", "--spec"]
    words += ["w4a4kv16", "--steps", "2", "--learn-steps", "4", "--learn-tokens", "48", "--calib", str(text_file)]
    words += ["--calib-tokens", "96", "--calib-seq-len", "24", "-o", str(tmp_path / "out")]

    def dies(descent: Descent) -> None:
        if len(descent.probes) == 2:  # of four steps each
            raise KeyboardInterrupt
        original(descent)

    monkeypatch.setattr(learned, "SAVE_EVERY", 6)
    original = Descent._advance
    monkeypatch.setattr(Descent, "_advance", dies)
    assert main(words) == 130
    assert (tmp_path / "out" / PROGRESS_FILE).is_file()
    monkeypatch.delenv("PYTEST_CURRENT_TEST")  # which silences what is under way
    done = torchrun("-m", "dfrot", *words, "--resume")
    assert done.returncode == 0, done.stderr
    assert "learning" in done.stderr
    assert "refining" not in done.stderr  # neither began again


def test_rows_and_sequences_are_dealt_out_one_by_one() -> None:
    tensor = torch.arange(10).reshape(5, 2)
    parts = [tensor[ProcessGroup(rank, 3).shard].tolist() for rank in range(3)]
    assert parts == [[[0, 1], [6, 7]], [[2, 3], [8, 9]], [[4, 5]]]
    assert SINGLE_PROCESS.all_gather(tensor, 5) is tensor
    assert SINGLE_PROCESS.broadcast_object({"a": 1}) == {"a": 1}


def test_two_processes_train_what_one_trains(found: Path, tiny: Tiny, text_file: Path, tmp_path: Path) -> None:
    """Only the order of sums over windows differs, which is below 1e-9 in float64 after six steps of Adam."""
    alone = together.tuned(str(tiny("llama")), str(text_file), str(tmp_path / "out"))
    shared = load_file(found / "tuned.safetensors")
    assert alone.keys() == shared.keys()
    for name, tensor in alone.items():
        torch.testing.assert_close(shared[name], tensor, rtol=1e-9, atol=1e-9)


def test_torchrun_says_which_process_this_is() -> None:
    said = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4", "LOCAL_RANK": "1"}
    assert ProcessGroup.of(said) == ProcessGroup(5, 8, 4, 1)
    assert ProcessGroup.of({"RANK": "5"}) == SINGLE_PROCESS
    assert ProcessGroup.of(said).device("cuda") == "cuda:1"
    assert (ProcessGroup.of(said).device("cpu"), SINGLE_PROCESS.device("cuda")) == ("cpu", "cuda")


def test_each_process_plans_for_its_part(tiny: Tiny) -> None:
    recipe = dfrot.Recipe.parse("quarot", "gptq", tune="none", calib_tokens=160, calib_seq_len=32)  # five sequences
    source = open_source(str(tiny("llama")))
    alone, shared = (
        Estimate.of(source, recipe, 8 * 10**9),
        Estimate.of(source, recipe, 8 * 10**9, ProcessGroup(0, 4, 2, 0)),
    )
    assert shared.states == alone.states * 2 // 5
    assert (shared.budget, shared.checkpoint) == (4 * 10**9, alone.checkpoint)
    assert "for each of 2 processes" in str(shared)


def test_what_cannot_be_shared_is_refused(tiny: Tiny, text_file: Path, tmp_path: Path) -> None:
    words: dict[str, Any] = {"calib": str(text_file), "calib_tokens": 48, "calib_seq_len": 24, "tune": "none"}
    for weights, message in {
        "lwc": "one sequence after the other",
        "gptq": r"and there are 2.*--calib-tokens 72",
    }.items():
        with pytest.raises(UserError, match=message):
            dfrot.quantize(
                tiny("llama"),
                dfrot.Recipe.parse("none", weights, **words),
                tmp_path / "out",
                processes=ProcessGroup(0, 3),
            )
    assert not (tmp_path / "out").exists()


def test_other_commands_are_not_for_several(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    assert main(["models"]) == 2
    assert "only `dfrot quantize` can be shared by processes" in capsys.readouterr().err
