"""The kernels compile for GPUs that are not here, and nothing is spilled."""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="Triton is not there: pip install 'dfrot[dev]'")

ALLOWED = {100: 80}  # bytes: 17 of the 255 registers of a rotation of 14 336 channels, where no GPU could be tried

SHARED = {80: 163, 89: 99, 90: 227, 100: 227}  # KB that a program can have (CUDA C++ Programming Guide, table 30)


@pytest.mark.parametrize("capability", SHARED)
def test_every_kernel_compiles_fits_and_spills_no_register(capability: int) -> None:
    command = [sys.executable, "-m", "tests.kernels.cuda.compiled", str(capability)]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    kernels = {"quantize", "rotate", "product", "few", "vector", "append", "unpack", "attend", "combine"}
    kernels |= {"grid", "gradient", "columns"}
    assert {line["kernel"] for line in lines} == {f"{name}_kernel" for name in kernels}
    assert not [line for line in lines if line["stack"] > ALLOWED.get(capability, 0)]
    assert not [line for line in lines if line["shared"] > SHARED[capability] << 10]
