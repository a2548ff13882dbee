import inspect
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

import dfrot_command
from dfrot import cli
from dfrot.cli import main, measuring
from dfrot.evaluation.bench import SHAPES
from dfrot.evaluation.record import read_records
from dfrot.methods import METHODS
from dfrot.models.graph import GRAPHS
from dfrot.rounding import ROUNDINGS
from dfrot.system.files import RUN_FILE
from tests.tiny_models import write_tiny_model

Tiny = Callable[[str], Path]


def run(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    code = main([str(word) for word in words])
    captured = capsys.readouterr()
    return code, " ".join(captured.out.split()), " ".join(captured.err.split())


def test_quantize_info_eval_generate(
    tiny: Tiny, tmp_path: Path, text_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = tmp_path / "ckpt"
    code, out, _ = run(
        capsys, "quantize", tiny("llama"), "-o", checkpoint, "--method", "quarot", "--weights", "rtn", "--seed", 2
    )
    assert code == 0
    assert "quarot rtn w4a4kv4" in out
    assert "bits per decoder weight" in out

    code, out, _ = run(capsys, "info", checkpoint)
    info = json.loads(out)
    assert (info["recipe"]["method"], info["recipe"]["seed"], info["recipe"]["spec"]) == ("quarot", 2, "w4a4kv4")

    words = ("eval", checkpoint, "--ppl", text_file, "--seq-len", 64, "--json", tmp_path / "r.json")
    code, out, _ = run(capsys, *words)
    record = json.loads((tmp_path / "r.json").read_text())
    assert out == f"ppl/text.txt {record['metrics']['ppl/text.txt']:.4f}"

    code, out, _ = run(capsys, "generate", checkpoint, "the quick", "--max-new-tokens", 5)
    assert code == 0
    assert out


@pytest.fixture
def longer_tokenizer(tmp_path: Path) -> Path:
    """A model whose tokenizer has a token more than the embedding has rows."""
    path = write_tiny_model("mistral", tmp_path / "longer")
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.add_tokens(["<tool>"])
    tokenizer.save_pretrained(path)
    (path / "text.txt").write_text("the fox <tool> and the dog. " * 100)
    return path


@pytest.mark.parametrize(
    "words",
    [
        [
            "quantize",
            "MODEL",
            "-o",
            "OUT",
            "--weights",
            "gptq",
            "--calib",
            "TEXT",
            "--calib-tokens",
            1024,
            "--tune",
            "none",
        ],
        ["quantize", "MODEL", "-o", "OUT", "--method", "dfrot", "--weights", "rtn", "--calib", "TEXT"],
        [
            "quantize",
            "MODEL",
            "-o",
            "OUT",
            "--method",
            "duquant",
            "--weights",
            "lwc",
            "--calib",
            "TEXT",
            "--tune",
            "none",
        ],
        ["eval", "MODEL", "--ppl", "TEXT", "--seq-len", 64],
        ["inspect", "MODEL", "-o", "OUT", "--text", "TEXT", "--seq-len", 64],
        ["generate", "MODEL", "the fox <tool>"],
    ],
)
def test_a_token_that_the_embedding_has_no_row_for_is_one_message(
    longer_tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[object]
) -> None:
    stands_for = {"MODEL": longer_tokenizer, "OUT": tmp_path / "out", "TEXT": longer_tokenizer / "text.txt"}
    code, _, err = run(capsys, *(stands_for.get(str(word), word) for word in words))
    assert code == 2
    assert "the model's embedding has 96 rows, none for token 96." in err
    code, _, _ = run(capsys, "generate", longer_tokenizer, "the fox", "--max-new-tokens", 2)
    assert code == 0


@pytest.mark.parametrize("names", [["input_ids"], ["input_ids", "token_type_ids", "attention_mask"]])
def test_whatever_the_tokenizer_returns_generate_takes_tokens_and_a_mask(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], names: list[str]
) -> None:
    path = write_tiny_model("qwen3", tmp_path / "model")
    expected = run(capsys, "generate", path, "the fox", "--max-new-tokens", 5)
    file = path / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "model_input_names": names}))
    assert run(capsys, "generate", path, "the fox", "--max-new-tokens", 5)[:2] == expected[:2]
    assert expected[0] == 0


@pytest.mark.parametrize("sample", [[], ["--sample"]])
def test_logits_that_are_nan_are_no_token(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], sample: list[str]
) -> None:
    path = write_tiny_model("qwen3", tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(path)
    model.model.norm.weight.data[:] = 1e38  # finite, as files have to be; the logits are not
    model.lm_head.weight.data[:] = 1e38
    model.save_pretrained(path)
    code, _, err = run(capsys, "generate", path, "the fox", *sample)
    assert code == 2
    assert "the model's logits are NaN or infinite here" in err


def test_bench_compares_a_checkpoint_or_a_shape_with_the_unquantized_model(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run(capsys, "quantize", tiny("llama"), "-o", tmp_path / "ckpt", "--method", "quarot", "--weights", "rtn")
    few = ("--prompt", 8, "--new-tokens", 2, "--rounds", 1, "--json", tmp_path / "bench.json")
    code, out, _ = run(capsys, "bench", tmp_path / "ckpt", "--source", tiny("llama"), *few)
    assert code == 0
    assert "against bfloat16: prefill" in out
    result = json.loads((tmp_path / "bench.json").read_text())
    assert result["ratios"]["bfloat16"].keys() == {"prefill", "decode", "decoder_bytes", "kv_bytes"}

    monkeypatch.setitem(SHAPES, "tiny", (64, 128, 2, 1))
    code, out, _ = run(capsys, "bench", "--shape", "tiny", "--baseline", "bfloat16", "float32", *few)
    assert code == 0
    assert "against float32: prefill" in out


def test_a_plan_is_printed_and_nothing_is_made(tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("quantize", tiny("llama"), "-o", tmp_path / "out", "--plan")
    code, out, _ = run(capsys, *words, "--memory", "2GB")
    assert code == 0
    assert "2 blocks of 0.0 million weights" in out
    assert "of 2.00 GB, 0.03 GB of calibration states in memory" in out
    code, _, err = run(capsys, *words, "--memory", "1MB")
    assert (code, "the budget is 0.00 GB" in err) == (2, True)
    assert not (tmp_path / "out").exists()


def test_models_lists_every_family(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "models")
    assert code == 0
    assert all(model_type in out for model_type in GRAPHS)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["quantize", "TINY", "-o", "OUT", "--spec", "w4a4"], "the spec 'w4a4' does not parse"),
        (
            ["quantize", "TINY", "-o", "OUT", "--spec", "w4g7a4kv4"],
            "got group_size=7 for width 48. Group sizes that do: [16]",
        ),
        (["bench", "--shape", "llama-9-1b"], "there is no shape 'llama-9-1b'. Shapes: llama-2-7b"),
        (["bench"], "bench takes a checkpoint, or --shape"),
        (["quantize", "TINY", "-o", "OUT", "--method", "quarot", "--gamma", "3"], "has no option gamma"),
        (["quantize", "TINY", "-o", "OUT", "--memory", "lots"], "such as 8GB"),
        (["quantize", "./nowhere", "-o", "OUT"], "there is no model at './nowhere'"),
        (["info", "nowhere"], "there is no model at 'nowhere'"),
        (["info", "--device", "banana"], "the device 'banana' cannot be used"),
        (["bench", "TINY"], "say which, --source MODEL"),
        (["bench", "--shape", "llama-3-8b", "--threads", "0"], "threads is at least 1"),
        (["bench", "--shape", "llama-3-8b", "--spec", "w4g100a4kv4"], "got group_size=100 for width 4096"),
        (["quantize", "TINY", "-o", "OUT", "--dry-run", "--spec", "w4g7a4kv4"], "got group_size=7 for width 48"),
        (["eval", "TINY", "--ppl", "SHORT", "--limit", "2"], "--limit is for tasks"),
        (["eval", "TINY", "--tasks", "piqa", "--batch-size", "-3"], "--batch-size is at least 1"),
        (["eval", "TINY", "--ppl", "SHORT", "--against", "TINY", "--per-token", "/no/where"], "does not exist"),
        (["eval", "OPT", "--ppl", "LONG", "--seq-len", "256"], "the model has learned 128 positions"),
        (["quantize", "TINY", "-o", "OUT", "--calib", "EMPTY"], "is empty"),
        (["quantize", "TINY", "-o", "OUT", "--calib", "SHORT"], "fewer than one sample of 2048"),
        (["quantize", "TINY", "-o", "TINY"], "is not a dfrot checkpoint; nothing there is touched"),
        (["eval", "TINY", "--ppl", "SHORT"], "fewer than one block of 2048"),
        (["eval", "TINY", "--ppl", "missing.txt"], "there is no text 'missing.txt'"),
        (["generate", "TINY", ""], "the prompt has no tokens"),
        (["generate", "TINY", "x", "--max-new-tokens", "0"], "max-new-tokens is at least 1"),
        (["quantize", "TINY", "-o", "OUT", "--device", "foo"], "the device 'foo' cannot be used"),
        (["quantize", "TINY", "-o", "OUT", "--memory", "8"], "such as 8GB"),
        (["report", "OUT"], "there is no directory"),
        (["quantize", "TINY", "-o", "OUT", "--gamma", "nan"], "gamma is a positive weight"),
        (["quantize", "TINY", "-o", "OUT", "--seed", "-1"], "a seed is between 0 and"),
        (["eval", "TINY", "--seq-len", "0", "--ppl", "SHORT"], "a block has at least two tokens"),
        (["eval", "TINY", "--ppl"], "give texts for perplexity, or tasks"),
        (["eval", "TINY", "--ppl", "SHORT", "--per-token", "t.safetensors"], "say which, --against MODEL"),
        (["eval", "TINY", "--ppl", "SHORT", "--massive-unquantized"], "massive tokens are found in the unquantized"),
        (["eval", "TINY", "--tasks", "nothing"], "lm-eval has no task 'nothing'"),
        (["compare", "TINY", "-o", "OUT", "--methods", "none,magic", "--ppl", "SHORT"], "there is no method 'magic'"),
        (["compare", "TINY", "-o", "OUT", "--seeds", "one", "--ppl", "SHORT"], "a seed is a whole number, got 'one'"),
        (["compare", "./nowhere", "-o", "OUT", "--ppl", "SHORT"], "there is no model at './nowhere'"),
        (["compare", "TINY", "-o", "OUT", "--jobs", "0", "--ppl", "SHORT"], "jobs and threads are at least 1"),
        (["eval", "TINY", "--ppl", "SHORT", "--json", "/no/where.json"], "does not exist"),
    ],
)
def test_a_mistake_is_one_message_and_exit_code_two(
    tiny: Tiny,
    tmp_path: Path,
    text_file: Path,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    message: str,
) -> None:
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "short.txt").write_text("short")
    stands_for = {
        "TINY": tiny("llama"),
        "OPT": tiny("opt"),
        "LONG": text_file,
        "OUT": tmp_path / "out",
        "EMPTY": tmp_path / "empty.txt",
        "SHORT": tmp_path / "short.txt",
    }
    capsys.readouterr()  # what making tiny models has printed
    code, _, err = run(capsys, *(stands_for.get(word, word) for word in words))
    assert code == 2
    assert err.startswith("dfrot: ")
    assert message in err
    assert "Traceback" not in err
    assert not (tmp_path / "out").exists()


def test_info_describes_a_model(tiny: Tiny, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "info", tiny("llama"))
    theirs = AutoModelForCausalLM.from_pretrained(tiny("llama"))
    found = json.loads(out)
    assert code == 0
    assert (found["model_type"], found["blocks"], found["quantized"]) == ("llama", 2, False)
    assert found["parameters"] == theirs.num_parameters()


def test_a_model_is_not_timed_against_another(
    tiny: Tiny, tmp_path: Path, text_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--method", "none", "--weights", "rtn", "--tune", "none", "--calib", str(text_file)]
    assert main(["quantize", str(tiny("qwen3")), "-o", str(tmp_path / "out"), *words, "--calib-tokens", "64"]) == 0
    code, _, err = run(capsys, "bench", tmp_path / "out", "--source", tiny("llama"))
    assert (
        code,
        "was made from another model: the source has llama for qwen3 (model_type)" in " ".join(err.split()),
    ) == (2, True)


def test_a_mistake_in_the_tasks_is_found_before_the_model_is_loaded(
    tiny: Tiny, text_file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dfrot.evaluation.run.load", lambda *_, **__: pytest.fail("loaded"))
    code, _, err = run(capsys, "eval", tiny("llama"), "--ppl", text_file, "--tasks", "pica")
    assert (code, "lm-eval has no task 'pica'" in err) == (2, True)


def test_records_are_added_to_a_file_of_lines(tiny: Tiny, text_file: Path, tmp_path: Path) -> None:
    words = ["eval", str(tiny("llama")), "--ppl", str(text_file), "--seq-len", "32", "--max-tokens", "32"]
    for _ in range(2):
        assert main([*words, "--json", str(tmp_path / "results.jsonl")]) == 0
    assert len(read_records(tmp_path / "results.jsonl")) == 2
    assert main([*words, "--json", str(tmp_path / "one.json")]) == 0
    assert json.loads((tmp_path / "one.json").read_text())["model"] == str(tiny("llama"))


def test_a_folder_called_like_a_text_or_a_model_is_not_taken_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("pydoc", "smollm2-135m", "own.txt"):
        (tmp_path / name).mkdir()
    assert [measuring._absolute(name) for name in ("pydoc", "smollm2-135m")] == ["pydoc", "smollm2-135m"]
    assert measuring._absolute("own.txt") == str(tmp_path / "own.txt")


def test_the_environments_fault_is_exit_code_one(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("in the way")
    code, _, err = run(
        capsys, "quantize", tiny("llama"), "-o", tmp_path / "file" / "out", "--method", "none", "--weights", "rtn"
    )
    assert (code, "cannot write to" in err) == (1, True)


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no model"):
        main(["eval", str(tmp_path / "nowhere"), "--debug"])


def test_interrupting_says_how_to_resume_and_resuming_finishes(tiny: Tiny, tmp_path: Path) -> None:
    """Ctrl-C in the middle, sent to a real process that has written its first shard."""
    pause = (
        "import signal, sys, time\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # background jobs inherit that it is ignored
        "from dfrot import cli\n"
        "from dfrot.pipeline import loop\n"
        "loop.Loop.quantize_block = lambda *_: time.sleep(20)\n"
        "sys.exit(cli.main(sys.argv[1:]))\n"
    )
    words = ["quantize", str(tiny("llama")), "-o", str(tmp_path / "out"), "--method", "quarot", "--weights", "rtn"]
    process = subprocess.Popen([sys.executable, "-c", pause, *words], stderr=subprocess.PIPE, text=True)
    deadline, manifest = time.monotonic() + 60, tmp_path / "out" / RUN_FILE
    # the shard has its name before the manifest lists it; interrupted in between it would be made again, with a warning
    while not (manifest.is_file() and "model-00001" in manifest.read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGINT, err
    assert f"this continues: {shlex.join(['dfrot', *words, '--resume'])}" in " ".join(err.split())
    assert not (tmp_path / "out" / "config.json").exists()
    assert main([*words, "--resume"]) == 0
    assert (tmp_path / "out" / "config.json").exists()


def test_a_closed_pipe_ends_quietly() -> None:
    for words in ("models", "--help"):
        shell = f"{sys.executable} -m dfrot {words} | head -n 1"
        environment = {**os.environ, "COLUMNS": "60"}
        done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, env=environment)
        assert "Traceback" not in done.stderr


def test_help_and_version_import_neither_torch_nor_the_package() -> None:
    script = (
        "import runpy, sys\n"
        "import dfrot_command\n"
        "assert dfrot_command.main(sys.argv[1:]) == 0\n"
        "assert not {'torch', 'transformers', 'dfrot', 'tyro'} & set(sys.modules)\n"
    )
    for words in (["--help"], ["--version"], ["-h"]):
        done = subprocess.run([sys.executable, "-c", script, *words], capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")
        assert "dfrot" in done.stdout


def test_the_console_script_lists_every_command_as_the_command_describes_itself() -> None:
    described = {name: (kind.__doc__ or "").splitlines()[0] for name, kind in cli.COMMANDS.items()}
    assert described == dfrot_command.COMMANDS
    assert all(f"  {name} " in dfrot_command.HELP for name in described)


def test_a_command_that_there_is_none_of_is_one_message(capsys: pytest.CaptureFixture[str]) -> None:
    assert dfrot_command.main(["quantise", "model"]) == 2
    assert capsys.readouterr().err == "dfrot: there is no command 'quantise'. Did you mean 'quantize'?\n"
    assert dfrot_command.main([]) == 2
    assert "quantize" in capsys.readouterr().err


def shown_help(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as ended:
        cli.parse(words)
    assert ended.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("command", list(dfrot_command.COMMANDS))
def test_help_shows_common_flags_on_a_screen_and_help_all_every_flag_with_its_help(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    short = shown_help([command, "--help"], capsys)
    whole = shown_help([command, "--help-all"], capsys)
    assert len(short.splitlines()) <= 55
    assert "None" not in whole
    shown, every = (set(re.findall(r"--[a-z][a-z-]+", text)) for text in (short, whole))
    assert shown - {"--help-all"} <= every
    comments = re.findall(r"^    \w+: .*  # (?!type:)(\S.*)$", inspect.getsource(cli.COMMANDS[command]), re.M)
    assert not [each for each in comments if each not in " ".join(whole.split())]
    assert ("--help-all" in short) == (shown - {"--help-all"} != every)


def test_options_stand_under_the_names_of_the_methods_that_have_them(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")  # one column of boxes
    whole = shown_help(["quantize", "--help-all"], capsys)
    for owner, kind in {**METHODS, **ROUNDINGS}.items():
        for name in kind.types():
            heads = re.findall(r"^ (\S.*) options +$", whole[: whole.index(f"--{name.replace('_', '-')} ")], re.M)
            assert owner in heads[-1].split(", "), name


def test_switches_with_no_default_of_their_own_take_true_and_false() -> None:
    words = ["quantize", "m", "-o", "out", "--method", "duquant", "--smooth", "False", "--weights", "gptq"]
    recipe = cli.parse([*words, "--act-order", "True"]).recipe()
    assert (recipe.method.smooth, recipe.rounding.act_order) == (False, True)


def test_a_completion_script_knows_rare_flags_too(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.parse(["--tyro-print-completion", "bash"])
    script = capsys.readouterr().out
    assert all(name in script for name in (*dfrot_command.COMMANDS, "--greedy-steps"))
