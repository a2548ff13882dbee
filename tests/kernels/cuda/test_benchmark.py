"""What is run on a GPU before anything is said of it runs through here, on tiny shapes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not there: pip install 'dfrot[dev]'")

ROOT = Path(__file__).parents[3]


def test_the_benchmark_checks_every_kernel_and_finds_nothing_wrong(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), str(tmp_path), "--tiny"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "TRITON_INTERPRET": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads((tmp_path / "gpu.json").read_text())
    assert not record["wrong"]
    assert {row[0] for row in record["rows"]} == {"check", "product", "quantizer", "attention", "calibration"}
