"""The shape of the house: who imports whom, what an import costs, what the README shows."""

import ast
import subprocess
import sys
from pathlib import Path

import dfrot

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "dfrot"
# A module may import from its own floor's packages only itself, and anything from the floors below.
FLOORS = [
    {"system", "version", "linalg", "quant"},
    {"kernels"},
    {"models"},
    {"transform", "runtime"},
    {"methods", "rounding", "checkpoint"},
    {"pipeline"},
    {"evaluation"},
    {"inspect"},
    {"report"},
    {"compare", "export"},
    {"cli", "__init__"},
]
FLOOR = {name: number for number, names in enumerate(FLOORS) for name in names}
# Neighbours on one floor that may be used by the others.
BASEMENT = {"system", "version"}


def imports_of(path: Path) -> set[str]:
    """The first names below `dfrot` that a file imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
        elif isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
    found.discard("dfrot.pipeline.recipe")  # holds the options of all papers; until they own them it lies under all
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
            assert imports_of(path) <= {package, "system"}, path


def test_importing_dfrot_loads_no_optional_package_and_touches_no_device() -> None:
    script = (
        "import sys, torch, transformers.integrations.sdpa_attention, transformers.cache_utils\n"
        "from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer\n"
        "from transformers.quantizers import base\n"
        "before = set(sys.modules)\n"  # transformers imports accelerate where it finds them
        "import dfrot\n"
        "extras = {'gguf', 'accelerate', 'datasets', 'lm_eval', 'plotly', 'ray', 'beartype'}\n"
        "assert not extras & set(sys.modules) - before, extras & set(sys.modules) - before\n"
        "assert not torch.cuda.is_initialized()\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_the_public_names_fit_a_phone_screen() -> None:
    assert len(dfrot.__all__) <= 15
    assert all(hasattr(dfrot, name) for name in dfrot.__all__)


def test_contributing_shows_every_module() -> None:
    readme = (ROOT / "CONTRIBUTING.md").read_text()
    modules = {path.name for path in PACKAGE.rglob("*.py")} - {"__init__.py", "__main__.py"}
    assert not {name for name in modules if f" {name}" not in readme}


def test_no_file_is_named_after_helpfulness() -> None:
    names = {path.stem for path in ROOT.glob("[!.]*/**/*.py")}
    assert not names & {"utils", "util", "helpers", "misc", "common"}


CORE = ("linalg", "quant", "models", "transform", "methods", "rounding", "checkpoint", "runtime", "pipeline", "system")


def lines(*folders: str) -> int:
    return sum(len(path.read_text().splitlines()) for folder in folders for path in (PACKAGE / folder).rglob("*.py"))


def test_the_line_budget_is_kept() -> None:
    assert lines(*CORE) <= 7_400
    assert lines(".") <= 13_100
