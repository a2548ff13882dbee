"""Comparisons: what is shared, what survives a kill, what a cluster computes."""

import dataclasses
import fcntl
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
from rich.console import Console

import dfrot
from dfrot.checkpoint.load import checkpoint_recipe
from dfrot.compare.published import published
from dfrot.compare.table import LiveTable, recipes
from dfrot.compare.trials import Cell, compare
from dfrot.evaluation.record import Record, read_records
from dfrot.evaluation.run import Measurement
from dfrot.inspect.inspect import inspect
from dfrot.methods.method import Context
from dfrot.pipeline import run as pipeline
from dfrot.pipeline.recipe import Recipe
from dfrot.report import report
from dfrot.system.errors import UserError
from dfrot.transform.transforms import Transforms
from tests.browser import Visit, in_browser

Tiny = Callable[[str], Path]
GRID = ("--methods", "none,quarot", "--weights", "rtn", "--specs", "w4a4kv4,w4a4kv16", "--threads", "1", "--jobs", "2")


def command(model: Path, text: Path, out: Path, *more: str) -> list[str]:
    texts = ("--calib", str(text), "--calib-tokens", "64", "--ppl", str(text), "--seq-len", "32", "--max-tokens", "96")
    return [sys.executable, "-m", "dfrot", "compare", str(model), *GRID, *texts, "-o", str(out), *more]


def measured(out: Path) -> dict[str, dict[str, Any]]:
    """By cell, all of a record but what differs from run to run."""
    records = read_records(out / "results.jsonl")
    found = {}
    for record in records:
        kept = record.to_json()
        for name in ("timings_s", "peak_rss_bytes"):
            del kept[name]
        found[record.conditions["cell"]] = kept
    assert len(found) == len(records), "a cell was measured twice"
    return found


@pytest.fixture(scope="module")
def uninterrupted(tiny: Tiny, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("compare") / "out"
    run = subprocess.run(command(tiny("llama"), text_file, out), capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "quarot rtn w4a4kv16 0: ppl/text.txt " in run.stdout
    return out


def test_every_cell_of_the_grid_and_the_model_as_it_is_are_measured(uninterrupted: Path, tiny: Tiny) -> None:
    found = measured(uninterrupted).values()
    cells = {(record["recipe"] or {}).get("method"): 0 for record in found}
    assert len(found) == 5
    assert set(cells) == {None, "none", "quarot"}
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
            assert not before or (out / "results.jsonl").read_bytes().startswith(before), "a finished cell was touched"
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
    fitted: list[Recipe] = []
    method = pipeline.METHODS["dfrot"]

    def counted(context: Context) -> Transforms:
        fitted.append(context.recipe)
        return method(context)

    monkeypatch.setitem(pipeline.METHODS, "dfrot", counted)
    words: dict[str, Any] = {"calib": str(text_file), "calib_seq_len": 32, "gamma": 10.0, "steps": 3}
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
        dfrot.quantize(tiny("qwen3"), recipe, tmp_path / f"shared{number}", share=tmp_path / "shared")
    assert len(fitted) == 1
    for number, recipe in enumerate(made):  # sharing changes nothing
        dfrot.quantize(tiny("qwen3"), recipe, tmp_path / f"alone{number}")
        for file in (tmp_path / f"alone{number}").iterdir():
            assert file.read_bytes() == (tmp_path / f"shared{number}" / file.name).read_bytes(), file.name
    assert len(fitted) == 5
    other = Recipe.parse("dfrot", "rtn", "w4a8kv4", calib_tokens=32, **words)  # fitted to another grid
    dfrot.quantize(tiny("qwen3"), other, tmp_path / "other", share=tmp_path / "shared")
    assert len(fitted) == 6


def test_blocks_are_quantized_once_for_recipes_that_differ_in_the_cache_alone(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = [Recipe.parse("quarot", "rtn", spec) for spec in ("w4a4kv4", "w4a4kv16", "w4a4kv8")]
    dfrot.quantize(tiny("llama"), made[0], tmp_path / "0", share=tmp_path / "shared")
    monkeypatch.setattr(pipeline, "quantize_block", None)  # would be called, and cannot be
    for number in (1, 2):
        dfrot.quantize(tiny("llama"), made[number], tmp_path / str(number), share=tmp_path / "shared")
        for shard in (tmp_path / "0").glob("*.safetensors"):
            assert shard.samefile(tmp_path / str(number) / shard.name)
        assert checkpoint_recipe(tmp_path / str(number)) == made[number]
        dfrot.load(tmp_path / str(number))


def test_a_grid_has_every_combination_once() -> None:
    made = recipes(("none", "duquant"), ("rtn", "gptq"), ("w4a4kv4", "w16a4kv16"), ("0", "1"))
    assert len(made) == 2 * 2 * 2 + 2 * 2  # weights that are left alone need no quantizer
    assert {recipe.spec.weights.symmetric for recipe in made if recipe.method_name == "duquant"} == {False}
    with pytest.raises(UserError, match="got 'one'"):
        recipes(("none",), ("rtn",), ("w4a4kv4",), ("one",))
    with pytest.raises(UserError, match="at least one method"):
        recipes((), ("rtn",), ("w4a4kv4",), ("0",))


def test_the_table_shows_what_papers_report_and_fits_a_terminal() -> None:
    cells = [None, Recipe.parse("dfrot", "gptq")]
    console = Console(width=60, file=io.StringIO())
    table = LiveTable(cells, console)
    metrics = {"perplexity/a": 3.0, "acc/a": 0.25, "acc/b": 0.5, "acc_norm/b": 0.75, "zero_shot_average": 0.5}
    for recipe in cells:
        cell = Cell("m", "", recipe, Measurement(("pydoc",)), "cpu", 1)
        table.hear(cell, Record("m", None, metrics, {"weight_bytes": 5e6}, {}, {}))
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


def test_a_cell_that_fails_is_said_and_the_others_go_on(tiny: Tiny, text_file: Path, tmp_path: Path) -> None:
    heard: dict[str, Any] = {}

    def listen(cell: Cell, outcome: Record | Exception | None) -> None:
        heard[str(cell.recipe and cell.recipe.spec)] = outcome

    cells = [Recipe.parse("none", "rtn", "w4g100a4kv4"), None]  # 100 divides no width
    records = compare(
        str(tiny("llama")), cells, Measurement((str(text_file),), seq_len=32, max_tokens=32), tmp_path, listener=listen
    )
    assert [record.recipe for record in records] == [None]
    assert isinstance(heard["w4g100a4kv4"], UserError)
    assert "group_size must divide" in str(heard["w4g100a4kv4"])
    assert heard["None"] == records[0]


def test_two_comparisons_in_one_folder_are_refused(tiny: Tiny, text_file: Path, tmp_path: Path) -> None:
    with (tmp_path / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another process works in"):
            compare(str(tiny("llama")), [None], Measurement((str(text_file),)), tmp_path)


def test_published_numbers_stand_beside_the_cells_that_they_are_of() -> None:
    recipe = Recipe.parse("dfrot", "gptq", "w4a4kv4")
    source = "Xiang and Zhang 2024, arXiv 2412.00648"
    assert published("meta-llama/Llama-2-7b-hf", recipe) == {"ppl/wikitext2": {"value": 6.21, "source": source}}
    assert published("/models/Mistral-7B-v0.3/", None, "a/wiki.test.raw")["ppl/wiki.test.raw"]["value"] == 5.32
    assert published("smollm2-135m", recipe) == {}
    assert json.dumps(published("meta-llama/Llama-2-7b-hf", Recipe.parse("dfrot", "lwc", "w4a4kv4"))) == "{}"


def test_the_jobs_divide_the_memory_and_it_changes_no_cell(tiny: Tiny, text_file: Path, tmp_path: Path) -> None:
    heard: list[Any] = []
    measurement = Measurement((str(text_file),), seq_len=32, max_tokens=64)
    compare(
        str(tiny("llama")),
        [Recipe.parse("quarot", "rtn")],
        measurement,
        tmp_path,
        jobs=2,
        memory=10**8,
        listener=lambda cell, outcome: heard.append((cell, outcome)),
    )
    cell, failure = heard[-1]
    assert isinstance(failure, UserError)
    assert "the budget is 0.05 GB" in str(failure)
    assert dataclasses.replace(cell, memory=None).key == cell.key
