import contextlib
import errno
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import dfrot
from dfrot.models.source import open_source
from dfrot.pipeline import loop
from dfrot.pipeline.estimate import Estimate
from dfrot.system import files as save
from dfrot.system.errors import SetupError, UserError

Tiny = Callable[[str], Path]
RECIPE = dfrot.Recipe.parse("quarot", "rtn")


def contents(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


class Killed(BaseException):
    """Stands in for a signal in the middle of the work."""


def interrupted(
    tiny: Tiny, out: Path, monkeypatch: pytest.MonkeyPatch, after: int = 1, recipe: dfrot.Recipe = RECIPE
) -> None:
    """Leave a run that died after so many blocks."""
    calls = 0

    def die(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > after:
            raise Killed
        return quantize_block(*args)

    quantize_block = loop.Loop.quantize_block
    monkeypatch.setattr(loop.Loop, "quantize_block", die)
    with pytest.raises(Killed):
        dfrot.quantize(tiny("llama"), recipe, out)
    monkeypatch.undo()


def test_an_interrupted_run_resumes_to_the_same_bytes(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted(tiny, tmp_path / "out", monkeypatch)
    with pytest.raises(UserError, match="interrupted run of `dfrot quantize`"):
        dfrot.load(tmp_path / "out")
    with pytest.raises(UserError, match="Continue it with --resume"):
        dfrot.quantize(tiny("llama"), RECIPE, tmp_path / "out")
    dfrot.quantize(tiny("llama"), RECIPE, tmp_path / "out", resume=True)
    dfrot.quantize(tiny("llama"), RECIPE, tmp_path / "whole")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


# Of 13 renames: 1 the manifest, 2 the fit, 3 the manifest that lists it, 4 a shard, 5 its entry, 13 config.json.
@pytest.mark.parametrize(("write", "published"), [(1, False), (2, True), (4, True), (5, True), (13, False), (13, True)])
@pytest.mark.filterwarnings("ignore:not as the interrupted run finished them")
def test_a_run_that_dies_at_a_write_resumes_to_the_same_bytes(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: int, published: bool
) -> None:
    publish, count = save.publish, 0

    def dying(temporary: Path, final: Path) -> None:
        nonlocal count
        count += 1
        if count == write and not published:
            raise Killed
        publish(temporary, final)
        if count == write:
            raise Killed

    monkeypatch.setattr(save, "publish", dying)
    with pytest.raises(Killed):
        dfrot.quantize(tiny("llama"), RECIPE, tmp_path / "out")
    monkeypatch.undo()
    finished = (tmp_path / "out" / "config.json").exists()
    assert finished == ((write, published) == (13, True))
    with pytest.raises(UserError, match="finished checkpoint") if finished else contextlib.nullcontext():
        dfrot.quantize(tiny("llama"), RECIPE, tmp_path / "out", resume=True)
    dfrot.quantize(tiny("llama"), RECIPE, tmp_path / "whole")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.parametrize("name", ["model-00002-of-00004.safetensors", "dfrot-run.safetensors"])
def test_what_is_not_as_the_run_wrote_it_is_made_again(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    interrupted(tiny, tmp_path / "out", monkeypatch)
    damaged = bytearray((tmp_path / "out" / name).read_bytes())
    damaged[-1] ^= 1
    (tmp_path / "out" / name).write_bytes(damaged)
    with pytest.warns(UserWarning, match=f"made again: .*{name}"):
        dfrot.quantize(tiny("llama"), RECIPE, tmp_path / "out", resume=True)
    dfrot.quantize(tiny("llama"), RECIPE, tmp_path / "whole")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.parametrize("words", [{"resume": True}, {"overwrite": True}, {}])
def test_a_second_run_in_one_directory_is_refused(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: dict[str, Any]
) -> None:
    refusals = []

    def second(*args: Any) -> Any:
        with pytest.raises(UserError, match="another process works in") as refusal:
            dfrot.quantize(tiny("llama"), RECIPE, tmp_path / "out", **words)
        refusals.append(refusal)
        return quantize_block(*args)

    quantize_block = loop.Loop.quantize_block
    monkeypatch.setattr(loop.Loop, "quantize_block", second)
    dfrot.quantize(tiny("llama"), RECIPE, tmp_path / "out")
    assert len(refusals) == 2
    assert not (tmp_path / "out" / ".lock").exists()


def test_killed_processes_lose_nothing(tiny: Tiny, tmp_path: Path, text_file: Path) -> None:
    """A short version of the benchmark."""
    script = Path(__file__).parents[2] / "benchmarks" / "kills.py"
    words = ["--calib", str(text_file), "--calib-tokens", "96", "--calib-seq-len", "32", "--method", "quarot"]
    command = [sys.executable, str(script), str(tiny("llama")), str(tmp_path / "kills"), "--runs", "2", *words]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "in 2 runs" in done.stdout


FITTED: dict[str, dict[str, Any]] = {
    "gptq": {},
    "lwc": {"epochs": 2},
}


@pytest.mark.parametrize("weights", FITTED)
@pytest.mark.parametrize("after", [0, 1])
def test_weights_that_are_fitted_to_data_resume_to_the_same_bytes(
    tiny: Tiny, tmp_path: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch, weights: str, after: int
) -> None:
    text: dict[str, Any] = {"calib": str(text_file), "calib_tokens": 96, "calib_seq_len": 32, "tune": "none"}
    recipe = dfrot.Recipe.parse("quarot", weights, **text, **FITTED[weights])
    interrupted(tiny, tmp_path / "out", monkeypatch, after, recipe)
    dfrot.quantize(tiny("llama"), recipe, tmp_path / "out", resume=True)
    without_states = Estimate.of(open_source(str(tiny("llama"))), recipe).resident
    dfrot.quantize(tiny("llama"), recipe, tmp_path / "whole", memory=without_states)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_resuming_another_recipe_says_what_differs(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupted(tiny, tmp_path / "out", monkeypatch)
    other = dfrot.Recipe.parse("quarot", "gptq", calib_tokens=2048, seed=1, tune="none")
    with pytest.raises(UserError, match=r"another: weights: rtn, not gptq; seed: 0, not 1\. Resume with the same"):
        dfrot.quantize(tiny("llama"), other, tmp_path / "out", resume=True)
    with pytest.raises(UserError, match="another: model: "):
        dfrot.quantize(tiny("qwen2"), RECIPE, tmp_path / "out", resume=True)


def test_resuming_goes_on_with_the_rotation_that_was_fitted(
    tiny: Tiny, tmp_path: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = dfrot.Recipe.parse("dfrot", "rtn", steps=2, gamma=1.0, calib=str(text_file), calib_tokens=64)
    interrupted(tiny, tmp_path / "out", monkeypatch, recipe=recipe)
    monkeypatch.setattr(type(recipe.method), "fit", lambda *_: pytest.fail("fitted again"))
    report = dfrot.quantize(tiny("llama"), recipe, tmp_path / "out", resume=True)
    monkeypatch.undo()
    dfrot.quantize(tiny("llama"), recipe, tmp_path / "whole")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert report.notes["gamma"] == 1.0


def test_resuming_after_the_model_changed_is_refused(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = shutil.copytree(tiny("llama"), tmp_path / "model")
    interrupted(lambda _: model, tmp_path / "out", monkeypatch)
    tensors = load_file(model / "model.safetensors")
    save_file({name: 2 * tensor for name, tensor in tensors.items()}, model / "model.safetensors")
    with pytest.raises(UserError, match="another: model: "):
        dfrot.quantize(model, RECIPE, tmp_path / "out", resume=True)


def test_overwriting_deletes_nothing_before_there_is_something_new(tiny: Tiny, tmp_path: Path) -> None:
    dfrot.quantize(tiny("llama"), RECIPE, tmp_path / "out")
    before = contents(tmp_path / "out")
    with pytest.raises(UserError, match="there is no text"):
        dfrot.quantize(
            tiny("llama"), dfrot.Recipe.parse("dfrot", "rtn", calib="nosuch.txt"), tmp_path / "out", overwrite=True
        )
    with pytest.raises(UserError, match="give one of them"):
        dfrot.quantize(tiny("llama"), RECIPE, tmp_path / "out", overwrite=True, resume=True)
    assert contents(tmp_path / "out") == before


def test_a_run_that_died_in_its_first_write_leaves_an_empty_directory(tiny: Tiny, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "dfrot-run.json.tmp").write_text("{")
    dfrot.quantize(tiny("llama"), RECIPE, tmp_path / "out")


def test_the_sources_generation_settings_are_kept(tiny: Tiny, tmp_path: Path) -> None:
    model = shutil.copytree(tiny("llama"), tmp_path / "model")
    settings = json.dumps({"eos_token_id": [0, 5, 7], "do_sample": True, "temperature": 0.6})
    (model / "generation_config.json").write_text(settings)
    path = dfrot.quantize(model, RECIPE, tmp_path / "out").path
    assert (path / "generation_config.json").read_text() == settings
    assert dfrot.load(path)[0].generation_config.eos_token_id == [0, 5, 7]


def test_a_directory_that_is_not_ours_is_left_alone(tiny: Tiny, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    for overwrite in (False, True):
        with pytest.raises(UserError, match="is not a dfrot checkpoint; nothing there is touched"):
            dfrot.quantize(tiny("llama"), RECIPE, tmp_path, overwrite=overwrite)
    assert contents(tmp_path) == {"thesis.tex": b"precious"}


def test_a_finished_checkpoint_is_replaced_only_on_request(tiny: Tiny, tmp_path: Path) -> None:
    dfrot.quantize(tiny("llama"), RECIPE, tmp_path / "out")
    with pytest.raises(UserError, match="finished checkpoint"):
        dfrot.quantize(tiny("llama"), RECIPE, tmp_path / "out")
    dfrot.quantize(tiny("llama"), dfrot.Recipe.parse("none", "rtn"), tmp_path / "out", overwrite=True)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["recipe"]["method"] == "none"


def test_a_full_disk_is_one_message_and_leaves_nothing_finished(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = 0

    def full(tensors: Any, path: Path, metadata: Any) -> None:
        nonlocal written
        written += 1
        if written == 3:
            path.write_bytes(b"half a shard")
            raise OSError(errno.ENOSPC, "No space left on device")
        save_file(tensors, path, metadata)

    save_file = save.save_file
    monkeypatch.setattr(save, "save_file", full)
    with pytest.raises(SetupError, match=re.escape("No space left on device")):
        dfrot.quantize(tiny("llama"), RECIPE, tmp_path / "out")
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert names == {"dfrot-run.json", "dfrot-run.safetensors", "model-00001-of-00004.safetensors"}


def test_config_json_is_the_last_file_written(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    publish = save.publish

    def noting(temporary: Path, final: Path) -> None:
        order.append(final.name)
        publish(temporary, final)

    monkeypatch.setattr(save, "publish", noting)
    path = dfrot.quantize(tiny("llama"), RECIPE, tmp_path / "out").path
    assert order[-1] == "config.json"
    assert not list(path.glob("*.tmp"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 99}, "this checkpoint has format 99"),
        ({"quant_method": "gptq"}, "was quantized by 'gptq'"),
        ({"runtime": 3}, "not the runtime record"),
        ({"runtime": {"online": 3}}, "not the runtime record"),
        (
            {"runtime": {"keys": {"type": "hadamard", "factors": [7], "transposed": False}}},
            "no Hadamard matrix of size",
        ),
    ],
)
def test_a_config_of_something_else_is_refused(
    tiny: Tiny, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    path = dfrot.quantize(tiny("llama"), RECIPE, tmp_path / "out").path
    config = json.loads((path / "config.json").read_text())
    record = config["quantization_config"]
    parts = change.get("runtime")
    record |= {"runtime": record["runtime"] | parts} if isinstance(parts, dict) else change
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=message):
        dfrot.load(path)


def test_a_truncated_shard_is_refused_on_loading(tiny: Tiny, tmp_path: Path) -> None:
    path = dfrot.quantize(tiny("llama"), RECIPE, tmp_path / "out").path
    shard = path / "model-00002-of-00004.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"model-00002-of-00004\.safetensors is not a complete"):
        dfrot.load(path)


def test_saving_a_loaded_checkpoint_makes_an_equal_one(tiny: Tiny, tmp_path: Path) -> None:
    model, _ = dfrot.load(dfrot.quantize(tiny("qwen3"), RECIPE, tmp_path / "out").path)
    model.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again").state_dict()
    assert again.keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, again[name]) for name, tensor in model.state_dict().items())
