"""The notebook runs from top to bottom, with a tiny model in place of the real one."""

from collections.abc import Callable
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parents[1] / "examples" / "tour.ipynb"


@pytest.mark.filterwarnings("ignore")  # of jupyter's packages
def test_the_notebook_runs_and_draws(
    tiny: Callable[[str], Path], tmp_path: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    monkeypatch.setenv("PYTHONPATH", str(NOTEBOOK.parents[1] / "src"))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    parameters = next(cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ()))
    parameters.source += (
        f"\nMODEL, TEXT, OUT = {str(tiny('llama'))!r}, {str(text_file)!r}, {str(tmp_path / 'out')!r}"
        "\nSEQ_LEN, CALIB_TOKENS, TUNE_STEPS = 32, 256, 2"
    )
    NotebookClient(notebook, timeout=600, kernel_name="python3").execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 3
    assert any("folding changes the product by" in output.get("text", "") for output in outputs)
    assert not [output for cell in nbformat.read(NOTEBOOK, as_version=4).cells for output in cell.get("outputs", ())]
