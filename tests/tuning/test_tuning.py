"""Tuning as a part of `quantize`: what it asks for, what it changes, what it survives."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import dfrot
from dfrot.checkpoint import writer as checkpoint
from dfrot.checkpoint.writer import CheckpointWriter
from dfrot.export import export
from dfrot.export.hub import model_card
from dfrot.models.source import open_source
from dfrot.pipeline.estimate import Estimate
from dfrot.quant.spec import Spec
from dfrot.system.errors import UserError
from dfrot.training.descent import Descent
from dfrot.training.teacher import RUN, Windows
from dfrot.training.trained import Trained
from dfrot.tuning import run as tuning_run
from dfrot.tuning import student
from dfrot.tuning.tuning import CONTINUOUS, PARTS, Tuning
from tests.tiny_models import write_tiny_model

Tiny = Callable[[str], Path]
AUTO = (("gptq", "w4a4kv4"), ("rtn", "w4a4kv16"), ("gptq", "w4a8kv4"), ("gptq", "w16a4kv4"))
SPEC = Spec.parse("w4a4kv4", "paper")


class Killed(BaseException):
    """Stands in for a signal in the middle of the work."""


def recipe(text: str, **words: Any) -> dfrot.Recipe:
    given: dict[str, Any] = {"calib": text, "calib_tokens": 64, "calib_seq_len": 32, "tune": "all", "tune_steps": 4}
    given |= {"method": "quarot", "weights": "rtn", "tune_tokens": 32, "tune_seq_len": 16}
    return dfrot.Recipe.parse(**{**given, **words})


def tensors_of(path: Path) -> dict[str, Tensor]:
    return {name: tensor for file in path.glob("*.safetensors") for name, tensor in load_file(file).items()}


def contents(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


# What is asked for


def test_all_is_every_part_that_the_spec_has() -> None:
    assert Tuning.parse("all", SPEC).parts == CONTINUOUS
    assert Tuning.parse("all", Spec.parse("w16a4kv4", "paper")).parts == ("biases", "clips", "gains")
    assert Tuning.parse("all", Spec.parse("w4a16kv16", "paper")).parts == ("biases", "gains", "scales")
    assert Tuning.parse("scales, biases", SPEC) == Tuning.parse("biases,scales,biases", SPEC)
    assert not Tuning.parse("none", SPEC).enabled
    auto = {spec: dfrot.Recipe.parse("none", rounding, spec).tuning.parts for rounding, spec in AUTO}
    assert auto == {"w4a4kv4": ("biases",), "w4a4kv16": (), "w4a8kv4": (), "w16a4kv4": ()}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            {"tune": "offsets"},
            "there is no 'offsets' to tune. --tune is all, none, or of biases, clips, gains, roundings",
        ),
        ({"tune": "all,biases"}, "joined by commas, got 'all,biases'"),
        ({"tune": " , "}, "joined by commas"),
        ({"tune": "roundings", "spec": "nvfp4"}, "of weights quantized to integers, and wnvfp4anvfp4kv16 has none"),
        ({"tune": "scales", "spec": "w16a4kv4"}, "of weights quantized to integers, and w16a4kv4 has none"),
        (
            {"tune": "clips", "spec": "w4a16kv16"},
            "activations, keys and values quantized to integers, and w4a16kv16 has none",
        ),
        ({"tune": "none"}, "--tune-seq-len needs --tune"),
        ({"tune_steps": 0}, "one step and windows of two tokens at least, got 0 steps"),
        ({"tune_seq_len": 1}, "windows of 1"),
        ({"tune_tokens": 40}, "whole windows, of 16 tokens, and 40 tokens are none. Give --tune-tokens 32"),
        ({"tune_steps": "many"}, "steps is a whole number, got 'many'"),
    ],
)
def test_what_cannot_be_tuned_is_refused_with_words(text: str, words: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        recipe(text, **words)
    assert message in str(error.value)


def test_a_recipe_with_tuning_survives_json_and_has_a_digest_of_its_own(text: str) -> None:
    tuned, untuned = recipe(text), dfrot.Recipe.parse("quarot", "rtn", calib=text, calib_tokens=64, calib_seq_len=32)
    assert dfrot.Recipe.from_json(json.loads(json.dumps(tuned.to_json()))) == tuned
    digests = {each.digest for each in (tuned, untuned, recipe(text, tune_steps=13), recipe(text, tune="biases"))}
    assert len(digests) == 4
    record = untuned.to_json()
    del record["tune"]  # as it was before there was tuning
    assert dfrot.Recipe.from_json(record) == untuned


def test_a_text_of_one_window_is_refused_before_the_work(tiny: Tiny, tmp_path: Path, text: str) -> None:
    with pytest.raises(UserError, match="training needs two windows, of 512 tokens"):
        dfrot.quantize(tiny("llama"), recipe(text, tune_tokens=512, tune_seq_len=512), tmp_path / "out")
    assert not (tmp_path / "out").exists()


# What is seen


def test_no_step_sees_a_held_out_window_and_every_other_comes_once_in_a_turn() -> None:
    windows = Windows.of(torch.arange(100), "text", 4, 3, 100, seed=5)
    assert windows.held == 6
    trained = len(windows.tokens) - windows.held
    assert trained == 19
    seen = [number for step in range(19) for number in windows.step(step)]
    assert [sorted(seen[start : start + trained]) for start in range(0, 57, trained)] == [[*range(trained)]] * 3
    assert [number for part in windows.held_out for number in part] == list(range(trained, 25))
    assert windows.tokens[-1].tolist() == [96, 97, 98, 99]


def test_nothing_held_out_is_trained_on_where_parts_of_the_text_overlap() -> None:
    text = torch.randint(0, 1000, (4000,), generator=torch.Generator().manual_seed(0))
    starts = torch.randint(0, 3900, (60,), generator=torch.Generator().manual_seed(1)).tolist()
    ids = torch.cat([text[start : start + 96] for start in starts])
    found = Windows.of(ids, "parts", 96, 2, 100, 0, overlapping=True)
    at = {tuple(text[start : start + 96].tolist()): start for start in starts}
    positions = [set(range(at[tuple(window)], at[tuple(window)] + 96)) for window in found.tokens.tolist()]
    trained, held = positions[: -found.held], positions[-found.held :]
    assert all(len(window & other) < RUN for window in trained for other in held)
    assert 0 < len(trained) < len(Windows.of(ids, "parts", 96, 2, 100, 0).tokens) - found.held


def test_only_as_much_text_is_kept_as_the_steps_see() -> None:
    assert len(Windows.of(torch.arange(1000), "text", 4, 2, 3, seed=0).tokens) == 6 + 62


# What is changed


@pytest.mark.parametrize("parts", [*PARTS, "all"])
def test_only_what_is_asked_for_changes(
    tiny: Tiny, tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch, parts: str
) -> None:
    falling = iter(range(100, 0, -1))
    monkeypatch.setattr(Descent, "_held_out", lambda _: float(next(falling)))  # so that the last step is kept
    rates = dict.fromkeys(PARTS, 0.05) | {"roundings": 10.0}  # bfloat16 has no smaller steps of scales
    monkeypatch.setattr(student, "RATES", rates)
    untuned = dfrot.Recipe.parse("quarot", "rtn", calib=text, calib_tokens=64, calib_seq_len=32)
    before = tensors_of(dfrot.quantize(tiny("llama"), untuned, tmp_path / "before").path)
    path = dfrot.quantize(tiny("llama"), recipe(text, tune=parts, tune_steps=2), tmp_path / "after").path
    after = tensors_of(path)
    kinds = {"biases": ".bias", "scales": ".scales", "gains": "layernorm.weight", "roundings": ".qweight"}
    asked = tuple(kinds[part] for part in (CONTINUOUS if parts == "all" else (parts,)) if part in kinds)
    # Llama's q, k, v and o have biases here; those of the MLP are made
    made = {name for name in after if "mlp" in name and name.endswith(".bias")} if ".bias" in asked else set()
    assert len(made) == (6 if ".bias" in asked else 0)
    assert after.keys() - made == before.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if asked and name.endswith(asked)}
    assert all(after[name].dtype == before[name].dtype for name in before)
    runtime = json.loads((path / "config.json").read_text())["quantization_config"]["runtime"]
    sites = {"input_layernorm", "post_attention_layernorm", "self_attn.o_proj", "mlp.down_proj", "keys", "values"}
    ratios = runtime.get("clips", {})
    assert ratios.keys() == (sites if parts in ("clips", "all") else set())
    assert all(len(set(by_block)) == 2 and max(by_block) <= 1 for by_block in ratios.values())
    assert runtime["biases"] == (["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"] if made else [])


def test_biases_of_layers_of_which_nothing_is_quantized_are_trained_too(tiny: Tiny, tmp_path: Path, text: str) -> None:
    """Of qwen2's q, k and v, which have biases of their own, only keys meet a quantizer in w16a16kv4."""
    paths = [tmp_path / tune for tune in ("none", "biases")]
    words: dict[str, Any] = {"spec": "w16a16kv4", "tune_tokens": None, "tune_seq_len": None, "tune_steps": None}
    dfrot.quantize(tiny("qwen2"), recipe(text, tune="none", **words), paths[0])
    dfrot.quantize(tiny("qwen2"), recipe(text, tune="biases", spec="w16a16kv4"), paths[1])
    before, after = map(tensors_of, paths)
    assert all(not torch.equal(before[name], after[name]) for name in before if name.endswith("_proj.bias"))


def test_notes_say_what_was_trained_and_how(tiny: Tiny, tmp_path: Path, text: str) -> None:
    result = dfrot.quantize(tiny("qwen3"), recipe(text), tmp_path / "out")
    notes = json.loads((result.path / "fit.json").read_text())["tuning"]
    assert notes == result.notes["tuning"]
    assert len(notes["losses"]) == 4
    assert {"0.3", "1.0"} < notes["probes"].keys()
    assert notes["held_kl"][str(notes["kept_step"])] == min(notes["held_kl"].values()) < notes["held_kl"]["0"]
    assert "KL divergence on held-out text" in "\n".join(result.summary())


@pytest.mark.parametrize(("spec", "hints"), [("w4a4kv4", 1), ("w4a8kv4", 0), ("w4a16kv16", 0)])
def test_tuning_is_named_where_it_was_left_out_and_would_help(spec: str, hints: int) -> None:
    assert sum("--tune biases" in line for line in Tuning().summary({}, Spec.parse(spec))) == hints


def test_the_start_is_kept_where_training_only_makes_it_worse() -> None:
    trained = Trained(torch.ones(3), torch.float32, None, 1.0)
    assert trained.parameter is not None

    def loss(step: int) -> float:
        trained.parameter.grad.add_(1.0)  # type: ignore[union-attr]
        return 0.0

    descent = Descent([trained], loss, lambda: float(trained().detach().sub(1).square().sum()), steps=9)
    for _ in descent.remaining():
        pass
    assert torch.equal(trained(), torch.ones(3))
    assert descent.notes()["kept_step"] == 0


@pytest.mark.parametrize(
    ("losses", "tried"),
    [
        ({0.1: 3, 0.3: 2, 1.0: 4}, [0.3, 1.0, 0.1]),
        ({0.03: 2, 0.1: 1, 0.3: 2, 1.0: 4}, [0.3, 1.0, 0.1, 0.03]),
        ({0.03: 0, 0.1: 1, 0.3: 2, 1.0: 4}, [0.3, 1.0, 0.1, 0.03]),
        ({0.3: 2, 1.0: 1, 3.0: 2}, [0.3, 1.0, 3.0]),
        ({0.3: 2, 1.0: 1, 3.0: 0}, [0.3, 1.0, 3.0]),
    ],
)
def test_factors_are_tried_downhill_until_it_gets_worse(losses: dict[float, float], tried: list[float]) -> None:
    """A descent whose loss on held-out text depends on the factor alone."""
    trained = Trained(torch.ones(3), torch.float32, None, 1.0)
    at: list[float] = []

    def loss(step: int) -> float:
        at.append(descent.factor)
        return 0.0

    descent = Descent([trained], loss, lambda: float(losses[at[-1]]) if at else 10.0, steps=2)
    for _ in descent.remaining():
        pass
    assert list(descent.probes) == [str(factor) for factor in tried]
    assert descent.factor == min(losses, key=lambda factor: losses[factor])
    assert at == [factor for factor in [*tried, descent.factor] for _ in range(2)]


def test_a_clip_ratio_that_has_met_its_bound_comes_back() -> None:
    """20 steps outwards, then 20 inwards: a clamp alone would keep it where it has no gradient."""
    clip = Trained(torch.tensor([0.9]), torch.float32, None, 0.1, most=1.0)

    def loss(step: int) -> float:
        assert clip.parameter is not None
        (clip() * (-1.0 if step < 20 else 1.0)).sum().backward()
        seen.append(float(clip().detach()))
        return 0.0

    seen: list[float] = []
    descent = Descent([clip], loss, lambda: 1.0, 40)
    for _ in descent.remaining():
        pass
    seen = seen[-40:]
    assert max(seen) == pytest.approx(1.0, abs=1e-6)
    assert min(seen[30:]) < 0.99


def test_adam_is_torchs(generator: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    targets = torch.randn(3, 5, generator=generator)
    trained = Trained(torch.zeros(3, 5), torch.float32, 1.0, 0.1)
    assert trained.parameter is not None
    other = torch.zeros(3, 5, requires_grad=True)
    adam = torch.optim.Adam([other], lr=1.0, betas=(0.9, 0.98), eps=1e-12)

    def loss(step: int) -> float:
        value = (trained() - targets).square().sum()
        value.backward()
        return float(value.detach())

    monkeypatch.setattr("dfrot.training.descent.PIECE", 4)  # of 15 numbers
    descent = Descent([trained], loss, lambda: float((trained() - targets).square().sum().detach()), steps=1)
    descent.steps = 24
    descent.held, descent.probes = {"0": 100.0}, {"0.3": 2.0, "1.0": 0.0, "3.0": 1.0}
    for step in range(20):
        descent._advance()
        adam.param_groups[0]["lr"] = 0.1 * min(1, (step + 1) / 8) * 0.5 * (1 + math.cos(math.pi * step / 24))
        adam.zero_grad()
        (other - targets).square().sum().backward()
        adam.step()
    torch.testing.assert_close(trained.parameter.detach(), other.detach())


# What is survived


def kill_on_call(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, number: int) -> None:
    calls, original = 0, getattr(owner, name)

    def die(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == number:
            raise Killed
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, die)


def kill(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, number: int, of: Callable[[], Any]) -> None:
    """A run that dies at the given call of a function."""
    kill_on_call(monkeypatch, owner, name, number)
    with pytest.raises(Killed):
        of()
    monkeypatch.undo()


@pytest.fixture(scope="module")
def whole(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory, text: str) -> dict[str, bytes]:
    """The files of a run that nobody killed."""
    return contents(dfrot.quantize(tiny("llama"), recipe(text), tmp_path_factory.mktemp("whole") / "out").path)


@pytest.mark.parametrize(("owner", "name", "number"), [(Descent, "_advance", 16), (CheckpointWriter, "replace", 2)])
def test_integers_that_moved_survive_a_kill(
    tiny: Tiny, tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, number: int
) -> None:
    def last_step_is_kept() -> None:
        monkeypatch.setitem(student.RATES, "roundings", 10.0)
        monkeypatch.setattr(Descent, "_held_out", lambda descent: 100.0 - descent.step)

    last_step_is_kept()
    wanted = recipe(text, tune="biases,roundings")
    frozen = tensors_of(dfrot.quantize(tiny("llama"), recipe(text, tune="biases"), tmp_path / "frozen").path)
    whole = dfrot.quantize(tiny("llama"), wanted, tmp_path / "whole").path
    moved = tensors_of(whole)
    kill(monkeypatch, owner, name, number, of=lambda: dfrot.quantize(tiny("llama"), wanted, tmp_path / "out"))
    last_step_is_kept()
    resumed = dfrot.quantize(tiny("llama"), wanted, tmp_path / "out", resume=True).path
    assert contents(resumed) == contents(whole)
    assert any(not torch.equal(frozen[key], moved[key]) for key in frozen if key.endswith("qweight"))


@pytest.mark.parametrize(
    ("owner", "name", "number"),
    [
        (tuning_run, "teacher_states", 1),
        (Descent, "_advance", 1),
        (Descent, "_advance", 6),
        (Descent, "_advance", 12),
        (Descent, "_advance", 16),
        (tuning_run, "write_fit", 3),
        (CheckpointWriter, "replace", 1),
        (CheckpointWriter, "replace", 2),
        (checkpoint, "publish", 1),
        (CheckpointWriter, "_list", 7),
        (CheckpointWriter, "finish", 1),
    ],
)
def test_a_killed_run_that_is_resumed_equals_one_that_was_not(
    whole: dict[str, bytes],
    tiny: Tiny,
    tmp_path: Path,
    text: str,
    monkeypatch: pytest.MonkeyPatch,
    owner: Any,
    name: str,
    number: int,
) -> None:
    kill(monkeypatch, owner, name, number, of=lambda: dfrot.quantize(tiny("llama"), recipe(text), tmp_path / "out"))
    assert not (tmp_path / "out" / "config.json").exists()
    resumed = dfrot.quantize(tiny("llama"), recipe(text), tmp_path / "out", resume=True).path
    assert contents(resumed) == whole


def test_a_resumed_run_does_not_begin_again(
    tiny: Tiny, tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kill(monkeypatch, Descent, "_advance", 12, of=lambda: dfrot.quantize(tiny("llama"), recipe(text), tmp_path / "out"))
    monkeypatch.setattr(tuning_run, "teacher_states", None)  # it is there, and its digest says that it is whole
    kill_on_call(monkeypatch, Descent, "_advance", 7)  # 10 of 16 steps are in the state: 6 are left
    dfrot.quantize(tiny("llama"), recipe(text), tmp_path / "out", resume=True)


def test_a_damaged_teacher_is_made_again(
    whole: dict[str, bytes], tiny: Tiny, tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kill(monkeypatch, Descent, "_advance", 12, of=lambda: dfrot.quantize(tiny("llama"), recipe(text), tmp_path / "out"))
    with (tmp_path / "out" / tuning_run.TEACHER_FILE.format(0)).open("r+b") as file:
        file.write(b"damaged!")
    resumed = dfrot.quantize(tiny("llama"), recipe(text), tmp_path / "out", resume=True).path
    assert contents(resumed) == whole


def test_a_shard_that_is_lost_while_tuned_ones_are_written_is_refused(
    tiny: Tiny, tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kill(
        monkeypatch,
        CheckpointWriter,
        "replace",
        2,
        of=lambda: dfrot.quantize(tiny("llama"), recipe(text), tmp_path / "out"),
    )
    (tmp_path / "out" / "model-00003-of-00004.safetensors").unlink()
    with pytest.warns(match="made again"), pytest.raises(UserError, match="one of them is damaged"):
        dfrot.quantize(tiny("llama"), recipe(text), tmp_path / "out", resume=True)
    dfrot.quantize(tiny("llama"), recipe(text), tmp_path / "out", overwrite=True)


def test_a_run_is_not_resumed_with_another_text_of_the_same_name(
    tiny: Tiny, tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = tmp_path / "own.txt"
    own.write_text(Path(text).read_text())
    wanted = recipe(text, tune_text=str(own))
    kill(monkeypatch, Descent, "_advance", 12, of=lambda: dfrot.quantize(tiny("llama"), wanted, tmp_path / "out"))
    own.write_text(Path(text).read_text()[::-1])
    with pytest.raises(UserError, match="whose text for tuning was another"):
        dfrot.quantize(tiny("llama"), wanted, tmp_path / "out", resume=True)


def test_the_same_seed_makes_the_same_bytes_and_another_seed_others(tiny: Tiny, tmp_path: Path, text: str) -> None:
    made = [
        tensors_of(dfrot.quantize(tiny("qwen2"), recipe(text, method="none", seed=seed), tmp_path / str(number)).path)
        for number, seed in enumerate([1, 1, 2])
    ]
    assert all(torch.equal(made[0][name], made[1][name]) for name in made[0])
    assert not all(torch.equal(made[0][name], made[2][name]) for name in made[0])


def test_blocks_are_shared_with_untuned_runs_which_they_leave_as_they_are(
    tiny: Tiny, tmp_path: Path, text: str
) -> None:
    untuned = dfrot.Recipe.parse("quarot", "rtn", calib=text, calib_tokens=64, calib_seq_len=32)
    first = dfrot.quantize(tiny("llama"), untuned, tmp_path / "first", reuse_dir=tmp_path / "reuse").path
    before = contents(first)
    tuned = dfrot.quantize(tiny("llama"), recipe(text), tmp_path / "tuned", reuse_dir=tmp_path / "reuse").path
    alone = dfrot.quantize(tiny("llama"), recipe(text), tmp_path / "alone").path
    again = dfrot.quantize(tiny("llama"), untuned, tmp_path / "again", reuse_dir=tmp_path / "reuse").path
    assert contents(first) == before == contents(again)
    assert contents(tuned) == contents(alone)


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_the_size_of_a_tuned_checkpoint_is_known_before_it_is_made(
    tiny: Tiny, tmp_path: Path, text: str, name: str
) -> None:
    wanted = recipe(text, tune_steps=1)
    expected = Estimate.of(open_source(str(tiny(name))), wanted)
    path = dfrot.quantize(tiny(name), wanted, tmp_path / "out").path
    assert expected.checkpoint == sum(tensor.nbytes for tensor in tensors_of(path).values())
    untuned = Estimate.of(open_source(str(tiny(name))), dfrot.Recipe.parse("quarot", "rtn"))
    assert expected.disk > untuned.disk


@pytest.mark.parametrize("engine", ["huggingface", "gguf"])
def test_biases_go_where_the_config_can_ask_for_them(
    tmp_path: Path, text: str, engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DFROT_CACHE", str(tmp_path / "cache"))
    pytest.importorskip("gguf")
    from tests.export.test_gguf import byte_tokenizer, save_tokenizer

    model = write_tiny_model("llama", tmp_path / "model", vocab_size=300, hidden_size=64, attention_bias=False)
    save_tokenizer(byte_tokenizer(), model)
    words: dict[str, Any] = {"tune": "biases", "spec": "w4a16kv16", "fold_only": True}
    path = dfrot.quantize(model, recipe(text, **words), tmp_path / "ckpt").path
    exported = tmp_path / ("plain.gguf" if engine == "gguf" else "plain")
    export(path, engine, exported, kind="f32" if engine == "gguf" else None)
    tokens = torch.arange(1, 40)[None]
    ours, plain = (dfrot.load(str(each), dtype=torch.float32)[0](tokens).logits for each in (path, exported))
    assert (plain - ours).norm() < 1e-5 * ours.norm()  # float32, two blocks


@pytest.mark.parametrize("name", ["qwen2", "qwen3", "phi3"])
def test_biases_without_a_place_are_not_exported(tiny: Tiny, tmp_path: Path, text: str, name: str) -> None:
    path = dfrot.quantize(tiny(name), recipe(text, tune="biases", tune_steps=1), tmp_path / "out").path
    with pytest.raises(UserError, match=f"has a bias in down_proj, for which {name} has no place.*--tune gains,scales"):
        export(path, "huggingface", tmp_path / "exported")
    assert not (tmp_path / "exported").exists()
    assert "quarot" in model_card(path, "someone/model")  # the hub takes it as it is


def test_moving_integers_are_in_the_plan(tiny: Tiny, text: str) -> None:
    plans = [Estimate.of(open_source(str(tiny("llama"))), recipe(text, tune=tune)) for tune in ("gains", "roundings")]
    gains, roundings = (plan.tuning for plan in plans)
    weights = plans[0].blocks * plans[0].block_weights
    assert roundings.state == 2 * 16 * weights
    assert roundings.integers == 0 < gains.integers
    assert roundings.least - gains.least > 44 * weights  # less what gains take
    assert plans[1].disk == plans[1].checkpoint + roundings.disk + roundings.state
