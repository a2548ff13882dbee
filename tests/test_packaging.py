"""Files that only other machines run name what exists here."""

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
PYTHONS = ["3.11", "3.12", "3.13", "3.14"]


def workflow(name: str) -> Any:
    return yaml.safe_load((ROOT / ".github" / "workflows" / f"{name}.yml").read_text())


def test_every_python_that_is_promised_is_tested_and_gets_a_wheel() -> None:
    classified = [each.rpartition(" ")[2] for each in PROJECT["project"]["classifiers"] if "Python :: 3." in each]
    built = PROJECT["tool"]["cibuildwheel"]["build"]
    assert classified == workflow("tests")["jobs"]["test"]["strategy"]["matrix"]["python"] == PYTHONS
    assert built == f"cp3{{{','.join(python.partition('.')[2] for python in PYTHONS)}}}-manylinux_x86_64"
    assert PROJECT["project"]["requires-python"] == f">={PYTHONS[0]}"


def test_the_wheel_is_tested_by_tests_that_exist() -> None:
    named = re.findall(r"\{project\}/([\w/.]+)", " ".join(PROJECT["tool"]["cibuildwheel"]["test-command"]))
    assert named
    assert all((ROOT / path).is_file() for path in named)


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_parse_and_call_make_by_targets_that_exist(path: Path) -> None:
    steps = [step for job in yaml.safe_load(path.read_text())["jobs"].values() for step in job.get("steps", ())]
    targets = [word for step in steps for word in re.findall(r"\bmake (\w+)", step.get("run", ""))]
    assert all(re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.M) for target in targets)


def test_the_dockerfile_copies_what_exists_and_what_is_not_ignored() -> None:
    copied = re.findall(r"^COPY (?!--from)(.*) \S+$", (ROOT / "Dockerfile").read_text(), re.M)
    names = {name for line in copied for name in line.split()}
    assert all((ROOT / name).exists() for name in names)
    assert names == {line[1:] for line in (ROOT / ".dockerignore").read_text().split() if line.startswith("!")}
    extras = re.findall(r"\[([\w,]+)\]", (ROOT / "Dockerfile").read_text())
    assert set(extras[0].split(",")) <= PROJECT["project"]["optional-dependencies"].keys()


def test_start_names_every_extra_for_users() -> None:
    page = (ROOT / "docs" / "start.md").read_text()
    named = set(re.findall(r"`pip install '\.\[(\w+)\]'`", page))
    assert named == PROJECT["project"]["optional-dependencies"].keys() - {"dev", "docs"}


def test_what_users_get_is_what_torch_and_transformers_need_and_little_more() -> None:
    needed = {re.split(r"[<>=]", each)[0] for each in PROJECT["project"]["dependencies"]}
    small = {"jaxtyping", "rich", "docstring-parser", "typeguard", "tyro"}
    assert needed - small == {"torch", "transformers", "safetensors", "numpy", "huggingface_hub"}
