"""What goes wrong around dfrot, and what others may intend: nothing is lost, nothing looks finished, no one gets in."""

import errno
import json
import os
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import dfrot
from dfrot.checkpoint.writer import opened_writer, read_fit, write_fit
from dfrot.cli import main
from dfrot.gguf.header import read_header
from dfrot.inspect.inspection import read_inspection
from dfrot.linalg.hadamard import is_hadamard_size, require_hadamard_size
from dfrot.linalg.rotation import rotation_from
from dfrot.models.configs import read_config
from dfrot.models.files import stored_tensors
from dfrot.models.source import open_source
from dfrot.models.texts import read_text
from dfrot.pipeline import loop
from dfrot.pipeline.recipe import Recipe
from dfrot.system import files as save
from dfrot.system.errors import SetupError, UserError
from dfrot.system.files import parse_json
from tests.report.records import write_inspection

Tiny = Callable[[str], Path]
RECIPE = Recipe.parse("quarot", "rtn")


def contents(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


@pytest.fixture
def broken(tiny: Tiny, tmp_path: Path) -> Path:
    """A copy of a tiny model, to be broken."""
    return shutil.copytree(tiny("llama"), tmp_path / "model")


@pytest.fixture
def checkpoint(tiny: Tiny, tmp_path: Path, text_file: Path) -> Path:
    """A checkpoint with online block rotations, to be broken."""
    recipe = Recipe.parse("duquant", "rtn", block=16, calib=str(text_file), calib_tokens=32)
    return dfrot.quantize(tiny("llama"), recipe, tmp_path / "checkpoint").path


def edit(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))


# What surrounds us fails.


def test_a_disk_that_fills_up_anywhere_leaves_nothing_finished_and_says_resume(tiny: Tiny, tmp_path: Path) -> None:
    """The limit of the size of a file stands in for a full disk: the kernel refuses the write, whoever makes it."""
    script = f"""
        import resource, dfrot
        recipe = dfrot.Recipe.parse("quarot", "rtn")
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        for limit in (10, 2000, 5000, 12000):
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
            try:
                dfrot.quantize({str(tiny("llama"))!r}, recipe, {str(tmp_path / "out")!r}, resume=limit > 10)
            except dfrot.SetupError as error:
                message = str(error)
            resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
            print(limit, message, flush=True)
            del message
    """
    run = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=True)
    lines = run.stdout.strip().splitlines()
    assert len(lines) == 4
    assert all("cannot write" in line for line in lines)
    assert all("--resume" in line for line in lines[1:]), lines
    assert not (tmp_path / "out" / "config.json").exists()
    assert not list((tmp_path / "out").glob("*.tmp"))
    dfrot.quantize(tiny("llama"), RECIPE, tmp_path / "out", resume=True)
    dfrot.quantize(tiny("llama"), RECIPE, tmp_path / "whole")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_tokenizer_that_cannot_be_written_is_the_environments_fault(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny("llama")

    def full(*_: Any) -> None:
        raise Exception("No space left on device (os error 28)")

    monkeypatch.setattr("transformers.PreTrainedTokenizerFast.save_pretrained", full)
    with pytest.raises(SetupError, match=r"No space left.*--resume"):
        dfrot.quantize(model, RECIPE, tmp_path / "out")
    monkeypatch.undo()
    assert not (tmp_path / "out" / "config.json").exists()
    dfrot.quantize(model, RECIPE, tmp_path / "out", resume=True)


@pytest.mark.skipif(os.geteuid() == 0, reason="what is read-only for others is not for root")
def test_a_read_only_directory_is_one_message(tiny: Tiny, tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(SetupError, match=r"cannot write to .*Permission denied"):
        dfrot.quantize(tiny("llama"), RECIPE, tmp_path / "locked" / "out")


@pytest.mark.parametrize("call", ["mkdir", "write_text", "open"])
def test_a_write_that_is_not_permitted_is_one_message(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    model, original = tiny("llama"), getattr(Path, call)

    def denied(path: Path, *given: Any, **named: Any) -> Any:
        if tmp_path in path.parents:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return original(path, *given, **named)

    monkeypatch.setattr(Path, call, denied)
    with pytest.raises(SetupError, match=r"cannot write to .*Permission denied"):
        dfrot.quantize(model, RECIPE, tmp_path / "out")
    assert not (tmp_path / "out" / "config.json").exists()


def test_a_model_that_vanishes_between_two_blocks_is_one_message(
    broken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = tmp_path / "kept"

    def vanish(*given: Any) -> Any:
        if broken.exists():
            broken.rename(kept)
        return quantize_block(*given)

    quantize_block = loop.Loop.quantize_block
    monkeypatch.setattr(loop.Loop, "quantize_block", vanish)
    words = ["quantize", str(broken), "-o", str(tmp_path / "out"), "--method", "quarot", "--weights", "rtn"]
    assert main(words) == 1
    assert "model.safetensors is not there, or not any more" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out" / "config.json").exists()
    monkeypatch.undo()
    kept.rename(broken)
    assert main([*words, "--resume"]) == 0


def test_the_hubs_token_is_in_no_message(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    secret = "hf_" + "secret" * 6

    def fails(*_: Any, **__: Any) -> None:
        raise OSError(f"500 Server Error, sent with authorization: Bearer {secret}")

    monkeypatch.setenv("HF_TOKEN", secret)
    monkeypatch.setattr("huggingface_hub.snapshot_download", fails)
    assert main(["eval", "nobody/nothing"]) == 1
    printed = capsys.readouterr()
    assert "the hub cannot be reached" in " ".join(printed.err.split())
    assert secret not in printed.out + printed.err
    assert main(["info", str(checkpoint)]) == 0
    printed = capsys.readouterr()
    assert secret not in printed.out + printed.err


# Others mean harm, or know no better.


def test_code_that_comes_with_a_model_never_runs(broken: Path, tmp_path: Path) -> None:
    (broken / "evil.py").write_text(f"open({str(tmp_path / 'evidence')!r}, 'w').close()\nclass Evil: pass\n")
    names = ("AutoConfig", "AutoModelForCausalLM")
    edit(broken / "config.json", lambda c: c.update(auto_map=dict.fromkeys(names, "evil.Evil")))
    tokenizer = {"auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}}
    edit(broken / "tokenizer_config.json", lambda c: c.update(tokenizer))
    dfrot.load(dfrot.quantize(broken, RECIPE, tmp_path / "out").path)
    dfrot.load(broken)
    assert not (tmp_path / "evidence").exists()


def test_a_pickle_is_refused_also_by_load(broken: Path) -> None:
    (broken / "model.safetensors").unlink()
    torch.save({}, broken / "pytorch_model.bin")
    with pytest.raises(UserError, match="pickle files"):
        dfrot.load(broken)


def test_weights_may_be_links_as_they_are_in_the_hubs_cache(broken: Path, tmp_path: Path) -> None:
    (broken / "model.safetensors").rename(tmp_path / "blob")
    (broken / "model.safetensors").symlink_to(tmp_path / "blob")
    assert open_source(str(broken)).embedding().shape == (96, 48)


@pytest.mark.parametrize("shard", ["../x/model.safetensors", "sub/../model.safetensors", "", ".", "a\0b", "x" * 5000])
def test_a_shard_is_called_by_its_plain_name(broken: Path, shard: str) -> None:
    (broken / "model.safetensors").unlink()
    (broken / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"model.norm.weight": shard}}))
    with pytest.raises(UserError, match="which is not a file in"):
        stored_tensors(broken)


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2), "b": torch.ones(2)}, tmp_path / "1.safetensors")
    save_file({"a": torch.zeros(2)}, tmp_path / "2.safetensors")
    index = {"weight_map": {"b": "1.safetensors", "a": "2.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"two tensors 'a', in 1\.safetensors and in 2\.safetensors"):
        stored_tensors(tmp_path)


def test_names_of_templates_do_not_lead_out_of_the_checkpoint(broken: Path, tmp_path: Path) -> None:
    templates = [{"name": "default", "template": "x"}, {"name": "../../evil", "template": "x"}]
    edit(broken / "tokenizer_config.json", lambda c: c.update(chat_template=templates))
    with pytest.raises(UserError, match="cannot be kept"):
        dfrot.quantize(broken, RECIPE, tmp_path / "deep" / "out")
    assert not list(tmp_path.rglob("evil*"))


# What the fuzzer found.


def test_integers_are_no_weights(broken: Path) -> None:
    tensors = load_file(broken / "model.safetensors")
    save_file({**tensors, "model.norm.weight": torch.ones(48, dtype=torch.int32)}, broken / "model.safetensors")
    with pytest.raises(UserError, match=r"has the dtype torch\.int32; weights are floating-point"):
        open_source(str(broken))


@pytest.mark.parametrize("change", [{"pad_token_id": 10**6}, {"hidden_act": "nonsense"}, {"hidden_size": 0}])
def test_a_config_of_no_model_is_one_message(broken: Path, change: dict[str, Any]) -> None:
    edit(broken / "config.json", lambda c: c.update(change))
    with pytest.raises(UserError, match=r"config\.json"):
        open_source(str(broken))


@pytest.mark.parametrize("name", ["num_hidden_layers", "num_labels"])
def test_a_config_cannot_ask_for_a_list_of_a_billion(broken: Path, name: str) -> None:
    edit(broken / "config.json", lambda c: c.update({name: 10**9}))
    with pytest.raises(UserError, match=f"has {name} 1000000000"):
        read_config(broken)


@pytest.mark.parametrize("name", ["hidden_size", "head_dim", "intermediate_size"])
def test_a_config_cannot_ask_for_more_than_the_weights_hold(broken: Path, name: str) -> None:
    edit(broken / "config.json", lambda c: c.update({name: 2**31}))  # a hidden size of this took 8 GB
    with pytest.raises(UserError, match=f"has {name} 2147483648; no tensor there has so many entries"):
        open_source(str(broken))


@pytest.mark.parametrize("value", [3, [], "gptq", {"quant_method": []}])
def test_a_quantization_config_that_is_none_is_one_message(broken: Path, value: Any) -> None:
    edit(broken / "config.json", lambda c: c.update(quantization_config=value or ["x"]))
    with pytest.raises(UserError):
        dfrot.load(broken)
    with pytest.raises(UserError), opened_writer(broken, {}, 4):
        pass
    with pytest.raises(UserError):
        open_source(str(broken))


@pytest.mark.parametrize("nesting", [101, 990, 100_000])
def test_json_that_is_nested_without_end_is_refused(nesting: int) -> None:
    with pytest.raises(ValueError, match="nested too deeply"):
        parse_json("[" * nesting + "]" * nesting)


def test_a_message_does_not_quote_a_whole_file() -> None:
    assert len(str(UserError("x" * 10**6))) < 2100


@pytest.mark.parametrize(
    "description",
    [
        {"type": "hadamard", "factors": [[1, 2], 10**9], "transposed": False},  # a list of 16 GB
        {"type": "hadamard", "factors": [10**400], "transposed": False},
        {"type": "hadamard", "factors": "12", "transposed": False},
        {"type": "identity", "size": -1},
        {"type": "dense", "matrix": "missing"},
        {"type": "compose", "parts": 3},
    ],
)
def test_a_rotation_that_is_none_is_refused_before_anything_is_built(description: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="not the description"):
        rotation_from(description, {})


def test_asking_for_a_hadamard_matrix_builds_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dfrot.linalg.hadamard._jacobsthal", lambda *_: pytest.fail("built"))
    assert is_hadamard_size(20012)  # 20011 is a prime: Paley's construction takes gigabytes
    with pytest.raises(ValueError, match="at most"):
        require_hadamard_size(10**18)


@pytest.mark.parametrize(
    ("part", "change"),
    [("recipe", {"seed": 1.5}), ("recipe", {"dtype": None}), ("grids", {"bits": 4.0}), ("grids", {"symmetric": 1})],
)
def test_numbers_of_a_recipe_have_their_type(part: str, change: dict[str, Any]) -> None:
    record = RECIPE.to_json()
    (record if part == "recipe" else record["grids"]["weights"]).update(change)
    with pytest.raises(UserError, match="not the recipe of a dfrot checkpoint"):
        Recipe.from_json(record)


def test_orders_that_are_no_permutations_never_reach_a_kernel(checkpoint: Path) -> None:
    shard = checkpoint / "model-00002-of-00004.safetensors"
    tensors = load_file(shard)
    name = next(name for name in tensors if name.endswith(".orders"))
    tensors[name][0, 0] = 2**30  # an address gigabytes away
    save_file(tensors, shard, {"format": "pt"})
    with pytest.raises(UserError, match="are no permutations"):
        dfrot.load(checkpoint)


@pytest.mark.parametrize(
    ("name", "factor"), [("hidden_size", 10**6), ("intermediate_size", 10**7), ("vocab_size", 10**7)]
)
def test_a_checkpoints_config_cannot_ask_for_gigabytes(checkpoint: Path, name: str, factor: int) -> None:
    edit(checkpoint / "config.json", lambda config: config.update({name: config[name] * factor}))
    with pytest.raises(UserError, match=r"has the shape .*; its config asks for|describes no model"):
        dfrot.load(checkpoint)


def test_nan_in_a_checkpoint_is_named(checkpoint: Path) -> None:
    shard = checkpoint / "model-00002-of-00004.safetensors"
    tensors = load_file(shard)
    tensors["model.layers.0.mlp.up_proj.scales"][3] = torch.nan
    save_file(tensors, shard, {"format": "pt"})
    with pytest.raises(UserError, match=r"'model\.layers\.0\.mlp\.up_proj\.scales' in .* holds NaN"):
        dfrot.load(checkpoint)


def test_a_plan_for_another_model_is_refused(checkpoint: Path) -> None:
    edit(
        checkpoint / "config.json",
        lambda c: c["quantization_config"]["runtime"]["rotation_blocks"].update({"mlp.down_proj": [7, 2]}),
    )
    with pytest.raises(UserError, match=r"'mlp\.down_proj' has no channels that blocks of 7 divide"):
        dfrot.load(checkpoint)


def test_fitted_rotations_are_read_as_they_were_written_or_not_at_all(tmp_path: Path) -> None:
    path, tensors = tmp_path / "fit.safetensors", {"a": torch.arange(4.0)}
    write_fit(path, {"transforms": {}, "notes": {}}, tensors)
    whole = path.read_bytes()
    read = read_fit(path)
    assert read is not None
    assert read[0] == {"transforms": {}, "notes": {}}
    assert torch.equal(read[1]["a"], tensors["a"])
    for damaged in (whole[:-1] + b"\x01", whole.replace(b"notes", b"nodes")):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match="holds no fitted rotations, or damaged ones"):
            read_fit(path)
    save.write_tensors(path, tensors, {"record": "{}"})
    with pytest.raises(UserError, match="holds no fitted rotations, or damaged ones"):
        read_fit(path)


@pytest.mark.parametrize(
    "name", ["../x", "/etc/passwd", "model-00001-of-00004.safetensors\n", "\ud800", "\0", "config.json"]
)
def test_a_manifest_lists_files_of_a_run_and_no_others(tmp_path: Path, name: str) -> None:
    (tmp_path / save.RUN_FILE).write_text(json.dumps({"run": {}, "files": {name: {"sha256": ""}}}))
    with pytest.raises(UserError, match="lists a file that no run writes"), opened_writer(tmp_path, {}, 4, resume=True):
        pass


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["massive"][0].pop("channel"), r"item 0 of value of key 'massive' .* missing .*\"channel\""),
        (lambda c: c["kurtosis"]["none"].append(1.0), "another number"),
        (lambda c: c["error"].update(none=3), "value of key 'none' of value of key 'error' .* is not a dict"),
        (
            lambda c: c["kv"]["keys"].update(plain=[10**400]),
            r"\['kv'\]\['keys'\]\['plain'\]\[0\] is not a finite number",
        ),
        (
            lambda c: c["kurtosis"]["none"].insert(0, float("nan")),
            r"\['kurtosis'\]\['none'\]\[0\] is not a finite number",
        ),
        (lambda c: c["massive"][0].update(block=True), r"\['massive'\]\[0\]\['block'\] is not a finite number"),
        (lambda c: c["kv"]["keys"]["plain"].append(0.1), "different numbers of blocks"),
        (lambda c: c.update(norms=["a", 3]), "item 1 of value of key 'norms' .* is not an instance of str"),
    ],
)
def test_an_inspection_of_another_form_is_refused(tmp_path: Path, change: Callable[[Any], Any], message: str) -> None:
    write_inspection(tmp_path, blocks=2, tokens=8, width=16)
    edit(tmp_path / "inspect.json", change)
    with pytest.raises(UserError, match=message):
        read_inspection(tmp_path)


@pytest.mark.parametrize("row", ['{"text": 3}', '{"text": "\\ud800"}', "[" * 100_000])
def test_a_row_that_is_no_text_is_refused(tmp_path: Path, row: str) -> None:
    (tmp_path / "a.jsonl").write_text(row + "\n")
    with pytest.raises(UserError):
        read_text(str(tmp_path / "a.jsonl"))


def test_a_gguf_file_cannot_count_what_it_does_not_hold(tmp_path: Path) -> None:
    def number(value: int, size: int = 8) -> bytes:
        return value.to_bytes(size, "little")

    begin = b"GGUF" + number(3, 4)
    array = number(1) + b"a" + number(9, 4) + number(0, 4) + number(2**60)  # so many bytes; the package counts them
    for content in (begin, begin + number(2**60) * 2, begin + number(0) + number(1) + array):
        (tmp_path / "a.gguf").write_bytes(content)
        with pytest.raises(UserError, match="is a broken GGUF file"):
            read_header(tmp_path / "a.gguf")
