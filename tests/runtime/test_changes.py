"""Whatever happens to a loaded model, the next forward pass is that of the model as it now is."""

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import dfrot
from tests.changes import CHANGES, SPECS, fault
from tests.tiny_models import CONFIGS, write_tiny_model

Made = Callable[[str, int | None, str], Path]


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Checkpoints of tiny models, with heads that kernels take (32 channels) or the model's own, by spec."""
    folder = tmp_path_factory.mktemp("changes")
    text = folder / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog; 0123456789! " * 40)

    def make(family: str, head_dim: int | None, spec: str) -> Path:
        source, out = folder / f"{family}-{head_dim}", folder / f"{family}-{head_dim}-{spec}"
        if not source.exists():
            write_tiny_model(family, source, head_dim=head_dim)
        if not out.exists():
            recipe = dfrot.Recipe.parse(weights="rtn", spec=spec, calib=str(text), calib_tokens=32, **SPECS[spec])
            dfrot.quantize(source, recipe, out)
        return out

    return make


STEP = st.tuples(st.sampled_from(sorted(CHANGES)), st.integers(0, 2**16), st.booleans())


@given(
    st.sampled_from(sorted(CONFIGS)),
    st.sampled_from([32, None]),
    st.sampled_from(sorted(SPECS)),
    st.lists(STEP, min_size=1, max_size=5),
)
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_next_forward_is_that_of_the_model_as_it_is(
    made: Made, family: str, head_dim: int | None, spec: str, changes: Sequence[tuple[str, int, bool]]
) -> None:
    assert fault(made(family, head_dim, spec), changes) is None


@pytest.mark.parametrize("change", sorted(CHANGES))
@pytest.mark.parametrize("spec", sorted(SPECS))
def test_every_change_is_seen_by_a_model_that_has_computed(made: Made, spec: str, change: str) -> None:
    for seed in range(3):
        assert fault(made("qwen2", 32, spec), [(change, seed, True), (change, seed + 9, True)]) is None
