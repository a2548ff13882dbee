"""The page as a reader meets it: in a browser, from a file, without a network."""

import builtins
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dfrot.cli import main
from dfrot.evaluation.record import append_records
from dfrot.pipeline.recipe import Recipe
from dfrot.report.page import report
from dfrot.system.errors import SetupError, UserError
from tests.browser import Visit, in_browser
from tests.report.records import TEXT, record, records, write_inspection, write_results

SURFACES = ("none", "RH")  # each takes a second to draw without a GPU
HOSTILE = (
    "<script>alert(1)</script>",
    "</script><img src=x onerror=alert(2)>",
    "\"' onmouseover='alert(3)'",
    "$plotly ${script} {{title}} %{x}",
    "\u202eright to left \u05d0\u05d1",
    "a" * 10_000,
)


@pytest.fixture(scope="module")
def page_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("report")
    write_results(directory)
    write_inspection(directory, blocks=3, tokens=64, width=48, names=SURFACES)
    return report(directory)


@pytest.fixture(scope="module")
def visit(browser: Any, page_file: Path) -> Iterator[Visit]:
    opened = Visit(browser, page_file)
    yield opened
    opened.context.close()


@in_browser
def test_every_chart_is_drawn_without_an_error_or_a_request(visit: Visit, page_file: Path) -> None:
    assert (visit.errors, visit.requests) == ([], [page_file.as_uri()])
    drawn = visit.page.evaluate(
        """() => [...document.querySelectorAll(".plot")].map((plot) => {
          const boxes = [...plot.querySelectorAll("canvas, .plot path, .scatterlayer path")];
          const sizes = boxes.map((box) => box.getBoundingClientRect());
          return sizes.some(({ width, height }) => width + height > 0);
        })"""
    )
    assert len(drawn) == 15
    assert all(drawn)
    assert visit.page.locator(".plot canvas").count() >= len(SURFACES)


@in_browser
def test_headers_sort_by_number_both_ways_and_say_so(visit: Visit) -> None:
    page = visit.page
    head = page.get_by_role("columnheader", name="perplexity")
    column = page.evaluate("(head) => head.cellIndex", head.element_handle())
    shown = (
        f"() => [...document.querySelectorAll('tbody:not([hidden]) tr.row')].map(r => +r.cells[{column}].dataset.value)"
    )
    wanted = sorted(r.metrics[f"ppl/{TEXT}"] for r in records())
    head.get_by_role("button").click()
    assert page.evaluate(shown) == wanted
    assert head.get_attribute("aria-sort") == "ascending"
    head.get_by_role("button").press("Enter")
    assert page.evaluate(shown) == wanted[::-1]
    assert head.get_attribute("aria-sort") == "descending"
    assert "descending" in page.locator("#status").inner_text()


@in_browser
def test_filters_hide_rows_and_folding_shows_means(visit: Visit) -> None:
    page = visit.page
    rows = page.locator("#results-table tbody:visible")
    assert rows.count() == len(records())
    page.get_by_label("filter", exact=True).fill("DUQUANT")
    assert rows.count() == 2
    page.get_by_label("filter", exact=True).fill("")
    page.locator("[name=method]").select_option("dfrot")
    page.locator("[name=spec]").select_option("w4a4kv4")
    assert rows.count() == 5
    page.get_by_label("fold seeds").check()
    assert rows.count() == 3
    assert rows.filter(has_text="34.21 (33.99 … 34.56)").count() == 1
    page.get_by_label("fold seeds").uncheck()
    page.locator("[name=method]").select_option("")
    page.locator("[name=spec]").select_option("")
    assert page.locator("#status").inner_text().startswith(f"{len(records())} of {len(records())} rows")


@in_browser
def test_a_row_opens_to_its_recipe_and_conditions(visit: Visit) -> None:
    row = visit.page.locator("#results-table tbody:not(.folded)").nth(3)
    button = row.get_by_role("button")
    assert not row.locator("dl").first.is_visible()
    button.press("Enter")
    assert button.get_attribute("aria-expanded") == "true"
    assert row.get_by_text("0123456789ab").is_visible()
    button.press("Enter")
    assert not row.locator("dl").first.is_visible()


@in_browser
def test_dark_changes_the_page_and_the_charts(visit: Visit) -> None:
    page = visit.page
    looks = """() => [getComputedStyle(document.body).backgroundColor,
                      getComputedStyle(document.querySelector("#sensitivity .xtick text")).fill]"""
    light = page.evaluate(looks)
    page.get_by_role("button", name="Dark").click()
    dark = page.evaluate(looks)
    assert dark[0] != light[0]
    assert dark[1] != light[1]
    page.get_by_role("button", name="Dark").click()
    assert page.evaluate(looks) == light


@in_browser
def test_a_surface_turns_by_the_arrow_keys(visit: Visit) -> None:
    surface = visit.page.locator("#plot-surface-none")
    eye = "(plot) => plot.layout.scene.camera.eye.x"
    before = surface.evaluate(eye)
    surface.press("ArrowRight")
    assert surface.evaluate(eye) != before


@in_browser
def test_hostile_texts_stay_texts_also_on_a_phone(browser: Any, tmp_path: Path) -> None:
    made = []
    for text in HOSTILE:
        one = record(Recipe.parse("quarot", "rtn"), 30.0, model=text, note=text)
        assert one.recipe is not None
        one.recipe |= {"method": text, "weights": text, "spec": text}
        one.metrics = {f"ppl/{text}": 30.0, f"acc/{text}": 0.5}
        one.conditions["published"] = {f"ppl/{text}": {"value": text, "source": text}}
        made.append(one)
    append_records(tmp_path / "results.jsonl", made)
    found, _ = write_inspection(tmp_path, blocks=2, tokens=16, width=8)
    massive = [
        entry | {"token": text, "norm": text} for entry, text in zip(found["massive"], 9 * HOSTILE, strict=False)
    ]
    norms = [f"0.{HOSTILE[0]}", f"0.{HOSTILE[1]}", f"1.{HOSTILE[0]}", f"1.{HOSTILE[1]}"]
    write_inspection(tmp_path, 2, 16, 8, SURFACES[:1], model=HOSTILE[0], massive=massive, norms=norms)
    visit = Visit(browser, report(tmp_path), width=390)
    assert visit.errors == []
    assert visit.page.locator("script").count() == 3
    assert visit.page.locator("img, [onmouseover], [onerror]").count() == 0
    assert visit.page.locator("tbody th bdi", has_text=HOSTILE[0]).first.is_visible()
    assert visit.page.evaluate("document.documentElement.scrollWidth") == 390
    visit.context.close()


def test_the_page_of_a_real_inspection_is_small_and_complete_without_scripts(tmp_path: Path) -> None:
    write_results(tmp_path)
    write_inspection(tmp_path)
    path = report(tmp_path, tmp_path / "new" / "page.html")
    assert path.stat().st_size <= 8e6
    text = path.read_text(encoding="utf-8")
    head = text[: text.index('<script type="application/json"')]
    assert "http:" not in head
    assert "https:" not in head
    assert "published 6.21 (<bdi>DFRot, Table 2</bdi>)" in head
    assert '<strong>28.16</strong><span class="unseen"> best</span>' in head
    assert "The first 200 are shown." in head
    assert "script-src 'sha256-" in head
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["page.html"]


@pytest.mark.parametrize("part", ["results.jsonl", "inspect.json"])
def test_either_part_is_enough(tmp_path: Path, part: str) -> None:
    write_results(tmp_path)
    write_inspection(tmp_path, blocks=2, tokens=16, width=8)
    (tmp_path / part).unlink()
    report(tmp_path)


def test_nothing_to_report_is_a_mistake_that_names_the_commands(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match=r"dfrot compare.*dfrot inspect"):
        report(tmp_path)
    assert main(["report", str(tmp_path)]) == 2
    write_results(tmp_path)
    capsys.readouterr()
    assert main(["report", str(tmp_path)]) == 0
    assert "report.html" in capsys.readouterr().out


def test_missing_packages_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_results(tmp_path)
    real = builtins.__import__

    def without(package: str) -> Any:
        def importing(name: str, *rest: Any, **words: Any) -> Any:
            if name.partition(".")[0] == package:
                raise ImportError(name)
            return real(name, *rest, **words)

        return importing

    monkeypatch.setattr(builtins, "__import__", without("plotly"))
    with pytest.raises(SetupError, match=r"the package plotly. Install it: pip install 'dfrot\[report\]'"):
        report(tmp_path)
