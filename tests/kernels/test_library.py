"""Which instructions the kernels use."""

import os
import subprocess
import sys

import pytest

from dfrot.kernels.library import backend, instruction_set

PROGRAM = "from dfrot.kernels.library import backend, instruction_set; print(instruction_set(), backend())"


def told(isa: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "DFROT_ISA": isa}
    return subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True)


@pytest.mark.skipif(instruction_set() < 2, reason=f"nothing newer than AVX2 here: {backend()}")
def test_a_lower_instruction_set_can_be_asked_for() -> None:
    assert told("avx2").stdout == "1 native kernels with AVX2 (DFROT_ISA=avx2)\n"


def test_a_higher_one_than_the_processor_has_changes_nothing() -> None:
    assert told("amx").stdout == f"{instruction_set()} {backend()}\n"


def test_a_word_that_names_none_is_refused() -> None:
    assert "DFROT_ISA is one of avx2, avxvnni, avx512vnni, amx, got 'sse'" in told("sse").stderr
