"""The shape of the house: who imports whom, what an import costs, what the README shows."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import dfrot

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "dfrot"
# A module may import from its own floor's packages only itself, and anything from the floors below.
FLOORS = [
    {"errors", "lock", "memory", "cache", "processes", "progress", "version", "json_file", "linalg", "quant"},
    {"spec"},
    {"recipe", "kernels"},
    {"models"},
    {"texts", "transform", "runtime"},
    {"methods", "weights", "checkpoint"},
    {"plan"},
    {"results", "pipeline", "export"},
    {"evaluation", "report"},
    {"published", "hub"},
    {"compare"},
    {"grid"},
    {"cli", "__init__"},
]
FLOOR = {name: number for number, names in enumerate(FLOORS) for name in names}
# Neighbours on one floor that may be used by the others.
BASEMENT = {"errors", "version"}


def imports_of(path: Path) -> set[str]:
    """The first names below `dfrot` that a file imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
        elif isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
    return {name.split(".")[1] for name in found if name.startswith("dfrot.")}


def test_imports_point_down() -> None:
    wrong = []
    for path in PACKAGE.rglob("*.py"):
        own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if own == "__main__":  # the console script by another name
            continue
        for used in imports_of(path) - BASEMENT - {own}:
            if FLOOR[used] >= FLOOR[own]:
                wrong.append(f"{path.relative_to(PACKAGE)} imports dfrot.{used}")
    assert not wrong


def test_linalg_and_quant_know_only_tensors() -> None:
    for package in ("linalg", "quant"):
        for path in (PACKAGE / package).glob("*.py"):
            assert imports_of(path) <= {package}, path


def test_importing_dfrot_loads_no_optional_package_and_touches_no_device() -> None:
    script = (
        "import sys, torch, transformers.integrations.sdpa_attention, transformers.cache_utils\n"
        "from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer\n"
        "from transformers.quantizers import base\n"
        "before = set(sys.modules)\n"  # transformers imports accelerate where it finds them
        "import dfrot\n"
        "extras = {'gguf', 'accelerate', 'datasets', 'lm_eval', 'plotly', 'kaleido', 'ray', 'beartype'}\n"
        "assert not extras & set(sys.modules) - before, extras & set(sys.modules) - before\n"
        "assert not torch.cuda.is_initialized()\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_the_public_names_fit_a_phone_screen() -> None:
    assert len(dfrot.__all__) <= 15
    assert all(hasattr(dfrot, name) for name in dfrot.__all__)


def test_the_readme_shows_every_module() -> None:
    readme = (ROOT / "README.md").read_text()
    modules = {path.name for path in PACKAGE.rglob("*.py")} - {"__init__.py", "__main__.py"}
    assert not {name for name in modules if f" {name}" not in readme}


def test_no_file_is_named_after_helpfulness() -> None:
    names = {path.stem for path in ROOT.glob("[!.]*/**/*.py")}
    assert not names & {"utils", "util", "helpers", "misc", "common"}


def test_the_core_keeps_the_line_budget_that_the_readme_names() -> None:
    budget = re.search(r"Core under ([\d,]+) lines of Python", (ROOT / "README.md").read_text())
    assert budget is not None
    lines = sum(len(path.read_text().splitlines()) for path in PACKAGE.rglob("*.py"))
    assert lines < int(budget[1].replace(",", ""))
