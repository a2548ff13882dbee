"""Comparisons: what is shared, what survives a kill, what a cluster computes."""

import dataclasses
import fcntl
import hashlib
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

import dfrot
from dfrot.checkpoint.load import read_checkpoint
from dfrot.compare import trials
from dfrot.compare.published import is_recipe, published
from dfrot.compare.table import LiveTable, recipes
from dfrot.compare.trials import Trial, compare, measure
from dfrot.evaluation.record import Record, read_records
from dfrot.evaluation.run import Measurement
from dfrot.inspect.inspect import inspect
from dfrot.methods.dfrot import DFRot
from dfrot.methods.method import Fit, FitContext
from dfrot.models.source import Source
from dfrot.pipeline import loop
from dfrot.pipeline import run as pipeline
from dfrot.pipeline.recipe import Recipe
from dfrot.report.page import report
from dfrot.system.errors import SetupError, UserError
from dfrot.version import __version__
from tests.browser import Visit, in_browser

Tiny = Callable[[str], Path]
RECIPES = ("--methods", "none,quarot", "--weights", "rtn", "--specs", "w4a4kv4,w4a4kv16")


def command(model: Path, text: Path, out: Path, *more: str) -> list[str]:
    texts = ("--calib", str(text), "--calib-tokens", "64", "--ppl", str(text), "--seq-len", "32", "--max-tokens", "96")
    processes = ("--threads", "1", "--jobs", "2")
    return [sys.executable, "-m", "dfrot", "compare", str(model), *RECIPES, *texts, *processes, "-o", str(out), *more]


def measured(out: Path) -> dict[str, dict[str, Any]]:
    """By trial, all of a record but what differs from run to run."""
    records = read_records(out / "results.jsonl")
    found = {}
    for record in records:
        kept = dataclasses.asdict(record)
        for name in ("timings_s", "peak_rss_bytes"):
            del kept[name]
        found[record.conditions["trial"]] = kept
    assert len(found) == len(records), "a trial was measured twice"
    return found


@pytest.fixture(scope="module")
def uninterrupted(tiny: Tiny, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("compare") / "out"
    run = subprocess.run(command(tiny("llama"), text_file, out), capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "quarot rtn w4a4kv16 0: ppl/text.txt " in run.stdout
    return out


def test_every_trial_and_the_unquantized_model_are_measured(uninterrupted: Path, tiny: Tiny) -> None:
    found = measured(uninterrupted).values()
    methods = {(record["recipe"] or {}).get("method") for record in found}
    assert len(found) == 5
    assert methods == {None, "none", "quarot"}
    assert {record["model"] for record in found} == {str(tiny("llama"))}


@in_browser
def test_the_report_of_a_real_comparison_and_inspection_opens_in_a_browser(
    uninterrupted: Path, browser: Any, tiny: Tiny, text_file: Path, tmp_path: Path
) -> None:
    shutil.copyfile(uninterrupted / "results.jsonl", tmp_path / "results.jsonl")
    inspect(str(tiny("llama")), tmp_path, rotations=("none", "RH"), text=str(text_file), seq_len=32)
    visit = Visit(browser, report(tmp_path))
    assert (visit.errors, visit.requests) == ([], [(tmp_path / "report.html").as_uri()])
    rows = visit.page.locator("#results-table tbody:visible")
    assert rows.count() == 5
    visit.page.get_by_label("filter", exact=True).fill("quarot")
    assert rows.count() == 2
    assert visit.page.locator(".plot .main-svg").count() > 0
    visit.context.close()


def test_a_comparison_that_is_killed_again_and_again_ends_like_one_that_is_not(
    uninterrupted: Path, tiny: Tiny, text_file: Path, tmp_path: Path
) -> None:
    moments, out = random.Random(0), tmp_path / "out"
    for _ in range(3):
        before = (out / "results.jsonl").read_bytes() if (out / "results.jsonl").is_file() else b""
        run = subprocess.Popen(
            command(tiny("llama"), text_file, out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        try:
            run.wait(timeout=moments.uniform(4, 20))
        except subprocess.TimeoutExpired:
            os.kill(run.pid, signal.SIGKILL)
            run.wait()
        if out.is_dir():
            assert not before or (out / "results.jsonl").read_bytes().startswith(before), "a finished trial was touched"
    deadline = time.monotonic() + 60  # a worker may be about to notice that its parent is gone
    while time.monotonic() < deadline:
        run_again = subprocess.run(command(tiny("llama"), text_file, out), capture_output=True, text=True)
        if run_again.returncode == 0:
            break
    assert run_again.returncode == 0, run_again.stderr
    assert measured(out) == measured(uninterrupted)


def test_a_line_that_a_kill_has_torn_is_measured_again(
    uninterrupted: Path, tiny: Tiny, text_file: Path, tmp_path: Path
) -> None:
    results = tmp_path / "results.jsonl"
    lines = (uninterrupted / "results.jsonl").read_bytes().splitlines(keepends=True)
    results.write_bytes(b"".join(lines[:4]) + lines[4][:50])
    assert len(read_records(results)) == 4
    compared = subprocess.run(command(tiny("llama"), text_file, tmp_path), capture_output=True, text=True)
    assert compared.returncode == 0, compared.stderr
    assert measured(tmp_path) == measured(uninterrupted)
    results.write_bytes(lines[0][:50] + b"\n" + lines[1])
    with pytest.raises(UserError, match="line 1: not a result record"):
        read_records(results)


def test_records_from_before_trials_were_called_so_are_not_measured_again(
    uninterrupted: Path, tiny: Tiny, text_file: Path, tmp_path: Path
) -> None:
    lines = (uninterrupted / "results.jsonl").read_text().replace('"trial": ', '"cell": ')
    (tmp_path / "results.jsonl").write_text(lines)
    run = subprocess.run(command(tiny("llama"), text_file, tmp_path), capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert (tmp_path / "results.jsonl").read_text() == lines
    assert not (tmp_path / "checkpoints").exists()


def killed(trial: Trial, out: Path) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_worker_that_is_killed_is_an_error_with_advice(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(trials, "measure", killed)
    trial = Trial("model", "0123", None, Measurement(("pydoc",)), "cpu", 1)
    with pytest.raises(SetupError, match="perhaps for want of memory"), trials._in_processes(1) as pool:
        pool.submit(trial, tmp_path).result()


def test_massive_tokens_unquantized_is_part_of_a_key_only_where_it_is_asked_for() -> None:
    measurement = Measurement(("pydoc",), against="model")
    trial = Trial("model", "0123", None, measurement, "cpu", 1)
    asked = dataclasses.replace(trial, measurement=dataclasses.replace(measurement, massive_unquantized=True))
    parts = {**dataclasses.asdict(trial), "dfrot": __version__}
    del parts["memory"], parts["measurement"]["massive_unquantized"]  # the key's parts before there was that field
    assert trial.key == hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]
    assert trial.key != asked.key


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of a Ray cluster of two workers."""
    ray = pytest.importorskip("ray", reason="ray is not installed")
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("RAY_DISABLE_IMPORT_WARNING", "1")
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    made.add_node(num_cpus=1)
    yield made.address
    ray.shutdown()
    made.shutdown()


@pytest.mark.filterwarnings("ignore")  # ray's own
def test_a_ray_cluster_of_two_workers_gives_identical_numbers(
    uninterrupted: Path, cluster: str, tiny: Tiny, text_file: Path, tmp_path: Path
) -> None:
    run = subprocess.run(command(tiny("llama"), text_file, tmp_path, "--ray", cluster), capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert measured(tmp_path) == measured(uninterrupted)


def test_rotations_are_fitted_once_for_all_weight_quantizers_and_caches(
    tiny: Tiny, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fitted: list[DFRot] = []
    fit = DFRot.fit

    def counted(method: DFRot, on: FitContext) -> Fit:
        fitted.append(method)
        return fit(method, on)

    monkeypatch.setattr(DFRot, "fit", counted)
    words: dict[str, Any] = {"calib": str(text_file), "calib_seq_len": 32, "gamma": 10.0, "steps": 3, "tune": "none"}
    made = [
        Recipe.parse("dfrot", weights, spec, calib_tokens=tokens, **words)
        for weights, spec, tokens in (
            ("gptq", "w4a4kv4", 256),
            ("rtn", "w4a4kv4", 32),
            ("rtn", "w8a4kv16", 32),
            ("gptq", "w4a4kv16", 256),
        )
    ]
    for number, recipe in enumerate(made):
        dfrot.quantize(tiny("qwen3"), recipe, tmp_path / f"shared{number}", reuse_dir=tmp_path / "shared")
    assert len(fitted) == 1
    for number, recipe in enumerate(made):  # sharing changes nothing
        dfrot.quantize(tiny("qwen3"), recipe, tmp_path / f"alone{number}")
        for file in (tmp_path / f"alone{number}").iterdir():
            assert file.read_bytes() == (tmp_path / f"shared{number}" / file.name).read_bytes(), file.name
    assert len(fitted) == 5
    other = Recipe.parse("dfrot", "rtn", "w4a8kv4", calib_tokens=32, **words)  # fitted to another grid
    dfrot.quantize(tiny("qwen3"), other, tmp_path / "other", reuse_dir=tmp_path / "shared")
    assert len(fitted) == 6


def test_a_source_is_checked_until_a_trial_has_made_a_checkpoint_of_it(
    tiny: Tiny, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checked: list[Source] = []
    monkeypatch.setattr(pipeline, "require_same_logits", checked.append)
    measurement = Measurement(texts=(str(text_file),), seq_len=32, max_tokens=64)
    for method in ("none", "quarot"):
        trial = Trial(str(tiny("llama")), "0" * 16, Recipe.parse(method, "rtn", "w4a4kv4"), measurement, "cpu", 1, None)
        assert isinstance(measure(trial, tmp_path), Record)
    assert len(checked) == 1


def test_blocks_are_quantized_once_for_recipes_that_differ_in_the_cache_alone(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = [Recipe.parse("quarot", "rtn", spec) for spec in ("w4a4kv4", "w4a4kv16", "w4a4kv8")]
    dfrot.quantize(tiny("llama"), made[0], tmp_path / "0", reuse_dir=tmp_path / "shared")
    monkeypatch.setattr(loop.Loop, "quantize_block", None)  # would be called, and cannot be
    for number in (1, 2):
        dfrot.quantize(tiny("llama"), made[number], tmp_path / str(number), reuse_dir=tmp_path / "shared")
        for shard in (tmp_path / "0").glob("*.safetensors"):
            assert shard.samefile(tmp_path / str(number) / shard.name)
        found = read_checkpoint(tmp_path / str(number))
        assert found is not None
        assert found.recipe == made[number].to_json()
        dfrot.load(tmp_path / str(number))


def test_every_combination_is_tried_once() -> None:
    made = recipes(("none", "duquant"), ("rtn", "gptq"), ("w4a4kv4", "w16a4kv16"), ("0", "1"))
    assert len(made) == 2 * 2 * 2 + 2 * 2  # weights that are left alone need no quantizer
    assert {recipe.spec.weights.symmetric for recipe in made if recipe.method.name == "duquant"} == {False}
    words = recipes(("RO", "RH", "quarot"), ("rtn",), ("w4a4kv4",), ("0",))
    assert words == [Recipe.parse("quarot", "rtn", rotation=rotation) for rotation in ("orthogonal", "hadamard")]
    tuned = recipes(("none",), ("rtn",), ("w4a4kv4",), ("0",), tunes=("none", "biases+gains"), tuning={"tune_steps": 3})
    assert [recipe.tuning.parts for recipe in tuned] == [(), ("biases", "gains")]
    assert tuned[1].tuning.steps == 3
    with pytest.raises(UserError, match="got 'one'"):
        recipes(("none",), ("rtn",), ("w4a4kv4",), ("one",))
    with pytest.raises(UserError, match="at least one method"):
        recipes((), ("rtn",), ("w4a4kv4",), ("0",))


def test_the_table_shows_what_papers_report_and_fits_a_terminal() -> None:
    shown_recipes = [None, Recipe.parse("dfrot", "gptq")]
    console = Console(width=60, file=io.StringIO())
    table = LiveTable(shown_recipes, console)
    metrics = {"perplexity/a": 3.0, "acc/a": 0.25, "acc/b": 0.5, "acc_norm/b": 0.75, "zero_shot_average": 0.5}
    for recipe in shown_recipes:
        trial = Trial("m", "", recipe, Measurement(("pydoc",)), "cpu", 1)
        table.on_trial(trial, Record("m", None, metrics, {"weight_bytes": 5e6}, {}, {}))
    console.print(table.table())
    shown = [line.split() for line in console.file.getvalue().splitlines()]  # type: ignore[attr-defined]
    rows = [[word for word in line if word != "│"] for line in shown if line and line[0] == "│"]
    assert rows == [
        ["acc/a", "0.2500", "0.2500"],
        ["acc_norm/b", "0.7500", "0.7500"],
        ["zero_shot_average", "0.5000", "0.5000"],
        ["MB", "5.0", "5.0"],
        ["done", "done"],
    ]


def test_a_trial_that_fails_is_reported_and_the_others_go_on(tiny: Tiny, text_file: Path, tmp_path: Path) -> None:
    heard: dict[str, Any] = {}

    def on_trial(trial: Trial, outcome: Record | Exception | None) -> None:
        heard[str(trial.recipe and trial.recipe.spec)] = outcome

    made = [Recipe.parse("none", "rtn", "w4g100a4kv4"), None]  # 100 divides no width
    measurement = Measurement((str(text_file),), seq_len=32, max_tokens=32)
    records = compare(str(tiny("llama")), made, measurement, tmp_path, on_trial=on_trial)
    assert [record.recipe for record in records] == [None]
    assert isinstance(heard["w4g100a4kv4"], UserError)
    assert "group_size must divide" in str(heard["w4g100a4kv4"])
    assert heard["None"] == records[0]


def test_a_fault_of_dfrot_in_one_trial_is_that_trials(
    tiny: Tiny, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise IndexError("index 7 is out of bounds")

    monkeypatch.setattr(trials, "evaluate", broken)
    trial = Trial(str(tiny("llama")), "f", None, Measurement((str(text_file),)), "cpu", torch.get_num_threads())
    outcome = trials.measure(trial, tmp_path)
    assert isinstance(outcome, SetupError)
    assert "IndexError: index 7" in str(outcome)
    (file,) = tmp_path.glob("error-*.txt")
    assert "in broken" in file.read_text()


def test_a_checkpoint_of_another_version_or_device_is_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    trial = Trial("m", "f", Recipe.parse("none", "rtn"), Measurement(("pydoc",)), "cpu", 2)
    others = [dataclasses.replace(trial, threads=1), dataclasses.replace(trial, device="cuda")]
    assert dataclasses.replace(trial, measurement=Measurement(("c4",))).checkpoint_key == trial.checkpoint_key
    found = {each.checkpoint_key for each in (trial, *others)}
    monkeypatch.setattr(trials, "__version__", "9.9.9")
    assert len(found | {trial.checkpoint_key}) == 4


def test_a_text_that_there_is_not_is_said_before_anything_is_quantized(tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"there is no text 'typo\.txt'"):
        compare(str(tiny("llama")), [Recipe.parse("none", "rtn")], Measurement(("typo.txt",)), tmp_path / "out")
    assert not (tmp_path / "out" / "checkpoints").exists()


def test_two_comparisons_in_one_folder_are_refused(tiny: Tiny, text_file: Path, tmp_path: Path) -> None:
    with (tmp_path / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another process works in"):
            compare(str(tiny("llama")), [None], Measurement((str(text_file),)), tmp_path)


LLAMA, WIKITEXT2 = "meta-llama/Llama-2-7b-hf", Measurement(("wikitext2",))
# the released commands: DFRot's README and scripts, DuQuant's run.sh and run_lwc.sh
UNCLIPPED: dict[str, Any] = {"act_clip": 1.0, "kv_clip": 1.0}
GPTQ: dict[str, Any] = {"weights": "gptq", "act_order": False, "calib_tokens": 128 * 2048, **UNCLIPPED}
DFROT: dict[str, Any] = {"method": "dfrot", "objective": "paper", **GPTQ}


def published_value(metric: str = "ppl/wikitext2", measurement: Measurement = WIKITEXT2, **words: Any) -> float | None:
    found = published(LLAMA, Recipe.parse(**{"tune": "none", **words}), measurement).get(metric)
    return None if found is None else found["value"]


@pytest.mark.parametrize(
    ("words", "value"),
    [
        (DFROT, 6.21),
        (DFROT | {"gamma": 100.0, "massive": "relative"}, 6.21),  # the defaults, given
        (DFROT | {"seed": 3, "calib": "/data/wiki.train.raw"}, 6.21),
        (DFROT | {"spec": "w4a4kv16", "kv_clip": None}, 6.14),  # of what is not quantized, the clip ratio is nothing
        (GPTQ | {"method": "quarot"}, 6.27),
        (GPTQ | {"method": "quarot", "rotation": "orthogonal"}, 7.96),
        ({"method": "quarot", "weights": "rtn", "kv_clip": 1.0}, 9.04),
        ({"method": "dfrot", "weights": "rtn", "kv_clip": 1.0, "objective": "paper"}, 7.68),
        ({"method": "duquant", "weights": "rtn", "preset": "duquant"}, 6.28),
        ({"method": "duquant", "weights": "lwc", "preset": "duquant", "calib_tokens": 128 * 2048}, 6.08),
    ],
)
def test_a_published_number_stands_beside_the_recipe_that_it_is_of(words: dict[str, Any], value: float) -> None:
    assert published_value(**words) == value


@pytest.mark.parametrize(
    "deviation",
    [
        *(
            {"gamma": 10.0},
            {"objective": "recipe"},
            {"method": "rangerot", "objective": None},
            {"steps": 50},
            {"massive": "rotation"},
        ),
        *({"sequences": 2}, {"rotation": "orthogonal"}, {"fold_only": True}),
        *({"act_clip": 0.9}, {"kv_clip": 0.95}, {"value_clip": 0.95}, {"act_symmetric": True}, {"weight_clip": 0.9}),
        *({"weight_symmetric": False}, {"spec": "w4g128a4kv4"}, {"spec": "w4a8kv4"}, {"quantize_queries": True}),
        *({"weights": "lwc", "act_order": None}, {"act_order": True}, {"percdamp": 0.1}),
        *({"calib_tokens": 65536}, {"calib_seq_len": 1024}, {"calib": "c4"}),
        *({"target": "original"}, {"tune": "biases"}),
    ],
)
def test_no_published_number_stands_beside_a_recipe_that_deviates(deviation: dict[str, Any]) -> None:
    assert published_value(**DFROT) is not None
    assert published_value(**DFROT | deviation) is None


def test_published_numbers_are_of_the_papers_measurement() -> None:
    source = "Xiang and Zhang 2024, arXiv 2412.00648"
    assert published(LLAMA, None, WIKITEXT2) == {"ppl/wikitext2": {"value": 5.47, "source": source}}
    local = Measurement(("a/wiki.test.raw",))
    assert published("/models/Mistral-7B-v0.3/", None, local)["ppl/wiki.test.raw"]["value"] == 5.32
    assert published("/models/Mistral-7B-v0.3/", Recipe.parse(**DFROT), local) == {}  # its rule is another
    assert published("smollm2-135m", None, WIKITEXT2) == {}
    changes: list[dict[str, Any]] = [{"seq_len": 1024}, {"max_tokens": 20480}, {"texts": ("c4",)}]
    for change in changes:
        assert published(LLAMA, None, dataclasses.replace(WIKITEXT2, **change)) == {}
    tasks = ("arc_challenge", "arc_easy", "hellaswag", "lambada_openai", "piqa", "winogrande")
    zero_shot = Measurement(tasks=tasks)
    assert published_value("zero_shot_average", zero_shot, **DFROT) == 0.6615
    assert published_value("zero_shot_average", Measurement(tasks=tasks[1:]), **DFROT) is None
    assert published_value("zero_shot_average", dataclasses.replace(zero_shot, limit=100), **DFROT) is None
    words = GPTQ | {"method": "quarot", "rotation": "orthogonal"}
    assert published_value("ppl_massive_unquantized/wikitext2", **words) == 6.17


def test_every_published_recipe_is_one_that_dfrot_can_make() -> None:
    """Every part is in some recipe, so that no option's name has changed without published.json."""
    parts = json.loads((Path(trials.__file__).parent / "published.json").read_text())["parts"]
    methods: list[dict[str, Any]] = [
        *({"method": "quarot", "rotation": rotation} for rotation in ("hadamard", "orthogonal")),
        *({"method": "dfrot", "objective": "paper", "massive": massive} for massive in ("relative", "rotation")),
        *({"method": "duquant", "preset": "duquant", "alpha": alpha} for alpha in (0.5, 0.6)),
    ]
    roundings: list[dict[str, Any]] = [{"weights": "rtn"}, {"weights": "lwc"}, {"weights": "gptq", "act_order": False}]
    made = [
        Recipe.parse(**words | rounding | clips, spec=spec, calib_tokens=128 * 2048, tune="none")
        for words in methods
        for rounding in roundings
        for spec in ("w4a4kv4", "w4a8kv4", "w4a4kv16")
        for clips in ({}, UNCLIPPED)
    ]
    for part in parts:
        assert any(is_recipe(recipe.to_json(), [part]) for recipe in made), part


def test_the_jobs_divide_the_memory_and_it_changes_no_trial(tiny: Tiny, text_file: Path, tmp_path: Path) -> None:
    heard: list[Any] = []
    measurement = Measurement((str(text_file),), seq_len=32, max_tokens=64)
    compare(
        str(tiny("llama")),
        [Recipe.parse("quarot", "rtn")],
        measurement,
        tmp_path,
        jobs=2,
        memory=10**8,
        on_trial=lambda trial, outcome: heard.append((trial, outcome)),
    )
    trial, failure = heard[-1]
    assert isinstance(failure, UserError)
    assert "the budget is 0.05 GB" in str(failure)
    assert dataclasses.replace(trial, memory=None).key == trial.key
