import pytest

from dfrot.kernels.library import INSTRUCTION_SETS, backend, library


@pytest.fixture(params=range(1, len(INSTRUCTION_SETS)), ids=INSTRUCTION_SETS[1:])
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Every instruction set that this machine has, one after the other."""
    found, _ = library()
    if found is None or not found.dfrot_has(request.param):
        pytest.skip(f"no {INSTRUCTION_SETS[request.param]} here: {backend()}")
    monkeypatch.setattr("dfrot.kernels.library.instruction_set", lambda: request.param)
    return int(request.param)
