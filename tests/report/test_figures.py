import dataclasses
import json
from pathlib import Path

import numpy as np
import plotly.graph_objects as go
import pytest

from dfrot.evaluation.record import read_records
from dfrot.inspect.inspection import Inspection, read_inspection
from dfrot.pipeline.recipe import Recipe
from dfrot.report.inspection_figures import inspection_figures, max_pooled, sampled_ranks, surfaces, token_errors
from dfrot.report.page import figures
from dfrot.report.records import by_seeds, deviations, record_figures
from dfrot.report.words import number
from dfrot.system.errors import UserError
from tests.report.records import TEXT, record, records, write_inspection, write_results


@pytest.fixture(scope="module")
def inspection(tmp_path_factory: pytest.TempPathFactory) -> Inspection:
    directory = tmp_path_factory.mktemp("inspection")
    write_inspection(directory, blocks=4, tokens=512, width=64)
    found = read_inspection(directory)
    assert found is not None
    return found


def test_every_figure_is_valid_for_plotly_and_has_a_caption_and_data(inspection: Inspection) -> None:
    drawn = figures(records(), inspection)
    assert len(drawn) == 18
    for figure in drawn:
        go.Figure(figure.plot)  # raises on anything that plotly does not know
        assert figure.caption.endswith(".")
        assert len({len(entries) for _, entries in figure.columns}) == 1
        json.dumps(figure.plot, allow_nan=False)


def test_a_rotation_looks_the_same_in_all_figures(inspection: Inspection) -> None:
    seen: dict[str, set[str]] = {}
    for figure in figures(records(), inspection):
        for trace in figure.plot["data"]:
            if "marker" in trace and trace["name"] in ("none", "RH", "quarot", "dfrot", "duquant"):
                seen.setdefault(trace["name"], set()).add(trace["marker"]["color"])
    assert len(seen) == 5
    assert all(len(colours) == 1 for colours in seen.values())
    assert seen["RH"] == seen["quarot"] != seen["dfrot"]


def test_marks_are_the_numbers_of_the_records() -> None:
    made = records()
    wanted = sorted(r.metrics[f"ppl/{TEXT}"] for r in made if r.recipe)
    by_recipe, against_bits = (f for f in record_figures(made) if f.name.startswith("ppl-wiki-test-raw-"))
    for figure, axis in ((by_recipe, "x"), (against_bits, "y")):
        assert sorted(value for trace in figure.plot["data"] for value in trace[axis]) == wanted
        assert [shape[f"{axis}0"] for shape in figure.plot["layout"]["shapes"]] == [20.97]
    assert "Best 28.16 (dfrot rtn w16a4kv16)" in by_recipe.caption


def test_bars_are_the_means_of_the_seeds() -> None:
    values = (0.25, 0.35, 0.6)
    made = [record(Recipe.parse("quarot", "rtn", seed=seed), 30.0) for seed in range(3)]
    for one, value in zip(made, values, strict=True):
        one.metrics = {"acc/task": value}
    (figure,) = record_figures(made)
    assert figure.plot["data"][0]["y"] == [0.4]


def test_infinite_and_missing_metrics_are_left_out() -> None:
    made = [record(Recipe.parse("none", "rtn"), 30.0), record(Recipe.parse("quarot", "rtn"), 40.0)]
    made[0].metrics = {"ppl/a": float("inf"), "ppl/b": float("nan")}
    made[1].metrics = {"ppl/a": 40.0}
    (figure,) = record_figures(made)
    assert [trace["x"] for trace in figure.plot["data"]] == [[40.0]]


def test_metrics_whose_names_make_one_slug_are_two_figures() -> None:
    made = [record(Recipe.parse("none", "rtn"), 30.0)]
    made[0].metrics = {"ppl/a.b": 1.0, "ppl/a-b": 2.0, "ppl/a b": 3.0}
    assert len({figure.name for figure in figures(made, None)}) == 3


def test_curves_are_the_sorted_errors_with_both_ends(inspection: Inspection) -> None:
    figure = token_errors(inspection)
    for name, errors in inspection.errors.items():
        curve = next(t for t in figure.plot["data"] if t["name"] == name)
        descending = np.sort(errors.ravel())[::-1]
        ranks = np.array(curve["x"])
        assert len(ranks) <= 600
        assert (ranks[0], ranks[-1]) == (1, errors.size)
        np.testing.assert_allclose(curve["y"], descending[ranks - 1], rtol=5e-4)  # four digits


def test_marks_on_a_curve_are_its_massive_tokens(inspection: Inspection) -> None:
    norm = inspection.stats["norms"][5]
    figure = token_errors(inspection, norm)
    marks = next(t for t in figure.plot["data"] if t["name"] == "RH, massive")
    errors = inspection.errors["RH"][5]
    wanted = [(int((errors > errors[i]).sum()) + 1, errors[i]) for i in np.flatnonzero(inspection.is_massive[5])]
    ranks, values = zip(*sorted(wanted), strict=True)
    assert marks["x"] == list(ranks)
    np.testing.assert_allclose(marks["y"], values, rtol=5e-4)


def test_kurtosis_is_drawn_as_three_more_than_the_excess_at_its_own_norm(inspection: Inspection) -> None:
    (figure,) = (figure for figure in inspection_figures(inspection) if figure.name == "kurtosis")
    upper, lower = (t for t in figure.plot["data"] if t["name"] == "RO")
    wanted = np.array(inspection.stats["kurtosis"]["RO"]) + 3
    np.testing.assert_allclose(upper["y"], wanted[0::2], rtol=5e-4)  # input norms, then those after attention
    np.testing.assert_allclose(lower["y"], wanted[1::2], rtol=5e-4)
    assert (upper["x"], lower["yaxis"]) == (["0", "1", "2", "3"], "y2")


@pytest.mark.parametrize(("count", "limit"), [(3, 600), (600, 600), (601, 600), (122880, 600), (5000, 7)])
def test_sampled_ranks_rise_and_keep_the_ends(count: int, limit: int) -> None:
    ranks = sampled_ranks(count, limit)
    assert len(ranks) <= min(count, limit)
    assert (ranks[0], ranks[-1]) == (0, count - 1)
    assert (np.diff(ranks) > 0).all()


@pytest.mark.parametrize("shape", [(64, 576), (5, 7), (65, 200), (1, 193)])
def test_pooling_takes_the_maximum_of_each_cell(shape: tuple[int, int]) -> None:
    surface = np.random.default_rng(0).random(shape).astype(np.float32)
    z, rows, columns = max_pooled(surface, (64, 192))
    assert z.shape <= (64, 192)
    for i, top in enumerate(rows):
        for j, left in enumerate(columns):
            bottom = rows[i + 1] if i + 1 < len(rows) else None
            right = columns[j + 1] if j + 1 < len(columns) else None
            assert z[i, j] == surface[top:bottom, left:right].max()


def test_surfaces_share_one_scale(inspection: Inspection) -> None:
    made = list(surfaces(inspection))
    assert len({figure.plot["layout"]["scene"]["zaxis"]["range"][1] for figure in made}) == 1
    assert "largest 23.90 at token 0, channel 59" in made[0].caption  # 507 mod 64


def test_seeds_are_folded_only_where_all_else_is_equal() -> None:
    recipe = Recipe.parse("quarot", "rtn", seed=0)
    seeded = dataclasses.replace(recipe, seed=1)
    other_text = record(seeded, 3.0)
    other_text.conditions["tokens"] = {TEXT: 4096}
    fewer_examples = record(seeded, 3.0)
    fewer_examples.conditions["examples"] = {"piqa": 10}
    groups = by_seeds([record(recipe, 1.0), record(seeded, 2.0), other_text, fewer_examples, record(None, 4.0)])
    assert [len(group) for group in groups] == [2, 1, 1, 1]


def test_deviations_are_the_options_that_are_not_default() -> None:
    assert deviations(Recipe.parse("dfrot", "gptq", tune="none").to_json()) == ""
    assert (
        deviations(Recipe.parse("dfrot", "gptq", tune="none", gamma=10.0, percdamp=0.1).to_json())
        == "gamma 10, percdamp 0.1"
    )
    assert deviations(Recipe.parse("none", "rtn", tune="biases,scales").to_json()) == "biases scales tuned"
    assert deviations({"method": "of tomorrow", "options": {"depth": 3}}) == "depth 3"


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        *((2976.12, "2976"), (33.994, "33.99"), (4.0204, "4.020"), (0.1234567, "0.1235"), (0, "0")),
        *((1e9, "1.00e+09"), (1.5e-5, "1.50e-05"), (float("nan"), "nan"), (None, "–")),
    ],
)
def test_numbers_have_about_four_digits(value: float | None, shown: str) -> None:
    assert number(value) == shown


def test_a_torn_last_line_is_passed_over(tmp_path: Path) -> None:
    made = write_results(tmp_path)
    whole = (tmp_path / "results.jsonl").read_text()
    (tmp_path / "results.jsonl").write_text(whole + '{"schema": 1, "model": "smol')
    assert read_records(tmp_path / "results.jsonl") == made


@pytest.mark.parametrize("line", ["{", "[]", '{"schema": 2}', '{"schema": 1}', '{"schema": 1, "model": "smol'])
def test_a_broken_line_is_a_mistake_with_its_number(tmp_path: Path, line: str) -> None:
    write_results(tmp_path)
    lines = (tmp_path / "results.jsonl").read_text().splitlines()
    (tmp_path / "results.jsonl").write_text("\n".join([*lines[:2], line, *lines[2:], ""]))
    with pytest.raises(UserError, match="line 3: not a result record"):
        read_records(tmp_path / "results.jsonl")


def test_a_metric_that_is_no_number_is_a_mistake(tmp_path: Path) -> None:
    broken = vars(records()[0]) | {"metrics": {"ppl/a": "<b>3</b>"}}
    (tmp_path / "results.jsonl").write_text(json.dumps(broken) + "\n")
    with pytest.raises(UserError, match="the metrics of a result record are an object of numbers"):
        read_records(tmp_path / "results.jsonl")


def test_an_inspection_whose_files_do_not_fit_together_is_a_mistake(tmp_path: Path) -> None:
    write_inspection(tmp_path, blocks=2, tokens=64, width=16)
    found = json.loads((tmp_path / "inspect.json").read_text())
    for changes, message in (
        ({"tokens": found["tokens"][:-1]}, "do not fit together"),
        ({"schema": 9}, "has schema 2, got 9"),
        ({"rotations": ["RZ"]}, "do not fit together"),
    ):
        (tmp_path / "inspect.json").write_text(json.dumps(found | changes))
        with pytest.raises(UserError, match=message):
            read_inspection(tmp_path)
    (tmp_path / "inspect.json").write_text(json.dumps(found))
    (tmp_path / "inspect.safetensors").unlink()
    with pytest.raises(UserError, match="do not fit together"):
        read_inspection(tmp_path)
