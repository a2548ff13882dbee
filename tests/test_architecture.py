"""The shape of the house: who imports whom, who asks for whose type, how large it is, what an import costs."""

import ast
import builtins
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import jaxtyping
import pytest
import torch

import dfrot
from dfrot.methods import METHODS
from dfrot.quant.clip import search_clip
from dfrot.quant.grids import IntGrid, PerChannel
from dfrot.quant.packing import packed_width
from dfrot.rounding import ROUNDINGS

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "dfrot"
# A module may import from its own folder, and from the folders of the floors below.
FLOORS = [
    {"system", "version"},
    {"linalg", "quant"},
    {"kernels"},
    {"models"},
    {"transform", "runtime", "gguf"},
    {"training"},
    {"methods", "rounding", "checkpoint", "fused"},
    {"tuning"},
    {"pipeline"},
    {"evaluation"},
    {"inspect"},
    {"report"},
    {"compare", "export"},
    {"cli", "__init__"},
]
FLOOR = {name: number for number, names in enumerate(FLOORS) for name in names}
# Paper → checkpoint → model in torch. The other folders are rings around it: they import it, never the reverse; but for
# kernels, training and tuning, which it has room for but could do without.
CORE = ("linalg", "quant", "models", "transform", "methods", "rounding", "checkpoint", "runtime", "pipeline", "system")
# From here on the whole grows by whole capabilities only, each of which names its lines in the CHANGELOG.
CORE_BUDGET = 9_984
BUDGET = 19_418


def modules() -> Iterator[tuple[str, Path, ast.Module]]:
    """Folder (or name, at the top), path and syntax tree of every module but the console script by another name."""
    for path in sorted(PACKAGE.rglob("*.py")):
        folder = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if folder != "__main__":
            yield folder, path, ast.parse(path.read_text())


def imports_of(tree: ast.Module) -> set[str]:
    """The first names below `dfrot` that a module imports, anywhere in it."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
        elif isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
    return {name.split(".")[1] for name in found if name.startswith("dfrot.")}


def test_imports_point_down() -> None:
    wrong = [
        f"{path.relative_to(PACKAGE)} imports dfrot.{used}"
        for own, path, tree in modules()
        for used in imports_of(tree) - {own}
        if FLOOR[used] >= FLOOR[own]
    ]
    assert not wrong


def test_linalg_and_quant_know_only_tensors() -> None:
    for own, path, tree in modules():
        if own in ("linalg", "quant"):
            assert imports_of(tree) <= {own, "system"}, path


def test_nobody_asks_which_method_or_rounding_there_is() -> None:
    """No isinstance, no `type(…)`, no `case Class()` and no comparison with a name, outside of the class's own file."""
    home = {kind.__name__: kind.__module__ for kind in (*METHODS.values(), *ROUNDINGS.values())}
    names = {*METHODS, *ROUNDINGS} - {"none", "dfrot"}  # dfrot is the package, too
    asked = []
    for _, path, tree in modules():
        module = f"dfrot.{'.'.join(path.relative_to(PACKAGE).with_suffix('').parts)}"
        for node in (each for each in ast.walk(tree) if isinstance(each, ast.expr | ast.pattern)):
            mentioned = set()
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("isinstance", "issubclass"):
                mentioned = {each.id for each in ast.walk(node.args[1]) if isinstance(each, ast.Name)}
            elif isinstance(node, ast.MatchClass) and isinstance(node.cls, ast.Name):
                mentioned = {node.cls.id}
            elif isinstance(node, ast.Compare):
                mentioned = {each.id for each in ast.walk(node) if isinstance(each, ast.Name)}
                words = {each.value for each in ast.walk(node) if isinstance(each, ast.Constant)}
                own = {name for name, kind in {**METHODS, **ROUNDINGS}.items() if kind.__module__ == module}
                # DuQuant's option `base` names QuaRot
                if words & names - own and module != "dfrot.methods.duquant":
                    asked.append(f"{module}, line {node.lineno}: {sorted(map(str, words & names))}")
            asked += [
                f"{module}, line {node.lineno}: {name}" for name in mentioned & home.keys() if home[name] != module
            ]
    assert not asked


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
    contributing = (ROOT / "CONTRIBUTING.md").read_text()
    names = {path.name for path in PACKAGE.rglob("*.py")} - {"__init__.py", "__main__.py"}
    assert not {name for name in names if f" {name}" not in contributing}


def test_no_file_is_named_after_helpfulness() -> None:
    names = {path.stem for path in ROOT.glob("[!.]*/**/*.py")}
    assert not names & {"utils", "util", "helpers", "misc", "common"}


def test_three_files_stand_outside_of_folders_and_the_console_script_outside_of_the_package() -> None:
    assert {path.name for path in PACKAGE.parent.glob("*.py")} == {"dfrot_command.py"}
    assert {path.name for path in PACKAGE.glob("*.py")} == {"__init__.py", "__main__.py", "version.py"}


def defined(tree: ast.Module) -> set[str]:
    """Every name that a module binds, in whatever scope."""
    found = {*dir(builtins), "__file__", "__name__", "__doc__"}
    for node in ast.walk(tree):
        match node:
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name) | ast.arg(arg=name):
                found.add(name)
            case ast.alias(name=name, asname=asname):
                found.add((asname or name).split(".")[0])
            case ast.Name(id=name, ctx=ast.Store() | ast.Del()):
                found.add(name)
            case ast.ExceptHandler(name=str(name)) | ast.MatchAs(name=str(name)) | ast.MatchStar(name=str(name)):
                found.add(name)
    return found


def test_every_name_is_bound_somewhere() -> None:
    """Linters cannot tell: the names of jaxtyping's axes look the same to them, so the rule is off."""
    for folder in ("src", "tests", "benchmarks", "examples"):
        for path in (ROOT / folder).rglob("*.py"):
            known = defined(tree := ast.parse(path.read_text()))
            used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
            assert not used - known, path


def python_files(path: Path) -> Iterator[Path]:
    return path.rglob("*.py") if path.is_dir() else iter([path])


def lines(*folders: str) -> int:
    return sum(len(path.read_text().splitlines()) for folder in folders for path in python_files(PACKAGE / folder))


def test_the_core_keeps_its_line_budget() -> None:
    assert lines(*CORE) <= CORE_BUDGET


def test_the_whole_keeps_its_line_budget() -> None:
    assert lines(".", "../dfrot_command.py") <= BUDGET


def test_a_shape_that_a_signature_does_not_allow_is_refused_while_tests_run() -> None:
    with pytest.raises(jaxtyping.TypeCheckError):
        search_clip(torch.zeros(3), IntGrid(4, True), PerChannel())
    with pytest.raises(TypeError, match="violates type hint"):
        packed_width("576", 4)  # type: ignore[arg-type]
