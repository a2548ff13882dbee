"""README and the site: every command parses, every file and number exists, sentences are short."""

import ast
import dataclasses
import functools
import re
import runpy
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import dfrot
import dfrot_command
from dfrot import cli
from dfrot.export import export
from dfrot.pipeline.recipe import Recipe
from dfrot.runtime.config import RuntimeConfig
from tests.tiny_models import write_tiny_model

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
RESULTS = ROOT / "docs" / "results.md"


def fences(page: Path, language: str) -> Iterator[str]:
    for found in re.finditer(rf"^( *)```{language}\n(.*?)^\1```", page.read_text(), re.S | re.M):
        yield found[2]


def commands(page: Path) -> Iterator[str]:
    """Command lines of a page: those in blocks, and those between backticks."""
    for block in (*fences(page, "bash"), *fences(page, "sh")):
        yield from block.replace("\\\n", " ").splitlines()
    for found in re.finditer(r"(?<!`)`([^`]+)`(?!`)", page.read_text()):
        words = " ".join(found[1].split())
        if "…" not in words and "COMMAND" not in words:
            yield from words.split(" && ")


ALL = sorted({(page.name, each.strip()) for page in PAGES for each in commands(page)})


def those_of(program: str) -> list[tuple[str, str]]:
    return [(page, command) for page, command in ALL if command.startswith(f"{program} ") and " " in command]


@pytest.mark.parametrize(("page", "command"), those_of("dfrot"))
def test_every_dfrot_command_of_readme_and_docs_parses(
    page: str, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = shlex.split(command.partition(" > ")[0].partition(" # ")[0])[1:]
    if words[0] in ("--help", "--version", "--tyro-print-completion") or words[-1].startswith("--help"):
        return
    if len(words) == 1 or words[1:2] == ["--json"]:  # only the name of a command
        assert words[0] in cli.COMMANDS
        return
    try:
        parsed = cli.parse(["8" if word == "N" else word for word in words if word != "--debug"])
    except SystemExit:
        # `dfrot eval --json` and its like name a flag in running text
        assert [word for word in words[1:] if not word.startswith("-")] == [], f"{command}\n{capsys.readouterr().err}"
        flags = {flag for flag in re.findall(r"--[a-z][a-z-]+", command)}
        with pytest.raises(SystemExit):
            cli.parse([words[0], "--help-all"])
        assert flags <= set(re.findall(r"--[a-z][a-z-]+", capsys.readouterr().out)), command
        return
    if isinstance(parsed, cli.Quantize):
        assert isinstance(parsed.recipe(), Recipe)


@pytest.mark.parametrize(("page", "command"), [*those_of("python"), *those_of("pip"), *those_of("make")])
def test_every_other_command_names_files_extras_and_targets_that_exist(page: str, command: str) -> None:
    words = shlex.split(command)
    if words[0] == "python" and words[1].endswith(".py"):
        script = ROOT / words[1]
        assert script.is_file()
        flags = {word for word in words[2:] if word.startswith("--")}
        text = script.read_text() + (ROOT / "benchmarks" / "rows.py").read_text()
        assert all(f'"{flag}"' in text for flag in flags), command
    elif words[0] == "make":
        assert all(re.search(rf"^{word}:", (ROOT / "Makefile").read_text(), re.M) for word in words[1:] if word != "&&")
    elif found := re.search(r"\[([a-z,]+)\]", command):
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        assert set(found[1].split(",")) <= project["optional-dependencies"].keys()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_of_the_docs_names_what_exists(page: Path) -> None:
    for block in fences(page, "python"):
        if "--8<--" in block:
            continue
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "dfrot":
                assert hasattr(dfrot, node.attr)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_page_includes_is_included(page: Path) -> None:
    """A formatter of Python once took the scissors apart."""
    assert "8 <" not in page.read_text()
    assert all((ROOT / path).is_file() for path in re.findall(r'--8<-- "(.*)"', page.read_text()))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_paths_between_backticks_exist(page: Path) -> None:
    named = re.findall(r"`((?:src|tests|benchmarks|runs|examples|docs|dev)/[\w/.-]+)`", page.read_text())
    assert not [path for path in named if not (ROOT / path).exists()]


def test_the_format_of_checkpoints_names_every_field_of_the_runtime_record() -> None:
    page = (ROOT / "docs" / "reference" / "checkpoint.md").read_text()
    names = {"grids", *(field.name for field in dataclasses.fields(RuntimeConfig))} - {"spec"}
    assert not {name for name in names if f"`{name}`" not in page}


def test_readme_is_short_and_its_links_lead_somewhere() -> None:
    text = README.read_text()
    assert len(text.splitlines()) <= 130
    links = re.findall(r"\]\((?!https?:)([^)#]+)", text)
    assert links
    assert not [link for link in links if not (ROOT / link).exists()]


def sentences(page: Path) -> Iterator[str]:
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.S)
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text)
    for paragraph in re.split(r"\n\s*\n|\n(?=[-|#]|\d+\. )", text):
        if not paragraph.lstrip().startswith(("|", "#", "!")):
            yield from re.split(r"(?<=[.!?:])\s+", paragraph)


@pytest.mark.parametrize("page", [README, ROOT / "docs" / "start.md"], ids=lambda page: page.name)
def test_no_sentence_of_readme_and_start_is_longer_than_35_words(page: Path) -> None:
    counted = {sentence: len(re.findall(r"[\w'`./-]+", sentence)) for sentence in sentences(page)}
    assert len(counted) > 10
    assert not {sentence: words for sentence, words in counted.items() if words > 35}


def figures(text: str) -> set[str]:
    """Numbers with a decimal point, and whole numbers of three digits and more."""
    text = re.sub(r"```.*?```|`[^`]*`|\]\([^)]*\)", "", text, flags=re.S)
    return set(re.findall(r"\d+\.\d+|\d{3,}", text))


@pytest.mark.parametrize("page", ["README.md", "docs/choose.md", "docs/how/tuning.md"])
def test_figures_outside_of_the_results_are_those_of_the_results_or_the_log(page: str) -> None:
    measured = figures(RESULTS.read_text()) | figures((ROOT / "dev" / "LOG.md").read_text())
    # versions, papers, and settings that the text names; 40 960 is written with a space
    others = {
        "3.11",
        "2402.17762",
        "2404.00456",
        "2412.00648",
        "2406.01721",
        "2024",
        "200",
        "135",
        "1024",
        "4096",
        "512",
    }
    others |= {"960", "536", "2048", "2.0"}
    assert not figures((ROOT / page).read_text()) - measured - others


def test_every_table_of_results_stands_beside_its_command() -> None:
    sections = re.split(r"^##+ ", RESULTS.read_text(), flags=re.M)[1:]
    tables = [section for section in sections if "\n|---" in section]
    assert len(tables) >= 8
    assert not [
        section.splitlines()[0]
        for section in tables
        if not re.search(r"`(?:\n?python|make|dfrot)\s", section.replace("\n", " "))
    ]


def test_the_list_of_engines_is_what_export_takes() -> None:
    page = (ROOT / "docs" / "guides" / "engines.md").read_text()
    assert all(f"| `{engine}` |" in page for engine in ("huggingface", "vllm", "gguf"))
    with pytest.raises(dfrot.UserError):
        export(ROOT, "tensorrt", ROOT / "nowhere")


def test_the_house_list_finds_its_phrases_in_prose_and_not_in_code() -> None:
    page = "It is so otherwise than\nthat that the the end. `otherwise than` [x](otherwise than)\n```\nis none\n```\n"
    assert runpy.run_path(str(ROOT / "dev" / "prose.py"))["findings"](page) == [
        (1, "otherwise than", "differently from"),
        (2, "the the", "one of the two words"),
    ]


# What no test can run from the docs, and why.
NOT_RUN = {
    r"^(pip|docker) ": "installs something",
    r"^runs/|^torchrun|--ray|--jobs": "needs hours or other processes; tests/system and tests/compare have small ones",
    r"--to gguf": "needs a tokenizer that llama.cpp knows; tests/export/test_gguf.py",
    r"--tasks|^dfrot push": "needs the Hub; tests/evaluation and tests/export have stand-ins",
    r"^dfrot info$": "times this machine for half a minute; tests/evaluation/test_machine.py",
    r"--tyro-print-completion": "writes into the home directory; tests/test_cli.py",
}
# A tiny model in place of others, little text, few steps, and methods that are quick.
SMALL = {"smollm2-135m": "TINY", "MODEL": "TINY", " wikitext2": " TEXT", "pydoc": "TEXT"}
SMALL |= {" --calib-tokens 8192": "", " --max-tokens 8192": "", " --tune-steps 40 --tune-tokens 512": "", "8GB": "2GB"}
SMALL |= {"quarot,dfrot,rangerot": "none,quarot", "quarot,rangerot": "none,quarot", "rtn,gptq": "rtn"}
FEW = {
    "quantize": "--calib TEXT --calib-tokens 128",
    "eval": "--seq-len 32 --max-tokens 64",
    "compare": "--calib TEXT --calib-tokens 64 --ppl TEXT --seq-len 32 --max-tokens 64",
    "inspect": "--text TEXT --seq-len 64",
}


def shorter(line: str) -> list[str]:
    """The words of a command, about the tiny model."""
    line = functools.reduce(lambda shown, pair: shown.replace(*pair), SMALL.items(), line)
    line = re.sub(r"meta-llama/\S+(?= -o| --json)", "TINY", line)
    words = shlex.split(line)[1:]
    given = {word for word in words if word.startswith("--")}
    few = FEW.get(words[0], "")
    if words[0] == "quantize":
        words = [*(" ".join(words).replace(" --device cuda", "").split()), "--overwrite"]
        few += "" if "--method" in given else " --steps 2"
        few += "" if given & {"--tune", "--spec"} else " --tune-steps 2 --tune-tokens 64"
    for flag, value in re.findall(r"(--\S+) (\S+)", few):
        words += [] if flag in given else [flag, value]
    return words


def shown(page: Path) -> Iterator[str]:
    for block in (*fences(page, "bash"), *fences(page, "sh")):
        lines = [" ".join(line.split()) for line in block.replace("\\\n", " ").splitlines()]
        yield from (line for line in lines if line and not any(re.search(pattern, line) for pattern in NOT_RUN))


RUN = [page for page in PAGES if page.name != "CONTRIBUTING.md" and [*shown(page)]]


@pytest.mark.filterwarnings("ignore")  # of the tiny model, which nobody would quantize in earnest
@pytest.mark.parametrize("page", RUN, ids=lambda page: page.name)
def test_what_the_docs_show_runs_from_the_first_line_to_the_last(
    page: Path, tmp_path: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = write_tiny_model("llama", tmp_path / "tiny", hidden_size=64, intermediate_size=96, head_dim=16)
    names = {"TINY": str(path), "TEXT": str(text_file)}
    if any("CKPT" in line for line in shown(page)):
        recipe = dfrot.Recipe.parse("quarot", "rtn", "w8a8kv16", preset="deploy", fold_only=True)
        dfrot.quantize(names["TINY"], recipe, "CKPT")
    for place, line in enumerate(shown(page)):
        words = [names.get(word, word) for word in shorter(line)]
        words = [f"out{place}" if word == "DIR" else word for word in words]
        assert dfrot_command.main(words) == 0, line
    for block in fences(page, "python") if page in (README, ROOT / "docs" / "start.md") else ():
        block = block.replace('parse(spec="w4a4kv4", ', 'parse("quarot", "rtn", ').replace('"ckpt"', '"py"')
        block = block.replace("smollm2-135m", names["TINY"]).replace("pydoc", names["TEXT"])
        exec(block.replace("calib_tokens=8192", "calib_tokens=128"), {})


def test_reasons_not_to_run_a_command_are_about_commands_that_are_there() -> None:
    lines = [line for page in PAGES for block in fences(page, "bash") for line in block.splitlines()]
    assert all(any(re.search(pattern, line.strip()) for line in lines) for pattern in NOT_RUN)
