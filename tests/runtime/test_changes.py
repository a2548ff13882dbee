"""Whatever happens to a loaded model, the next forward pass is that of the model as it now is."""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.changes import CHANGES, SPECS, fault, write_checkpoint
from tests.tiny_models import CONFIGS

Made = Callable[[str, int | None, str], Path]


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Checkpoints of tiny models, with heads that kernels take (32 channels) or the model's own, by spec."""
    return functools.partial(write_checkpoint, tmp_path_factory.mktemp("changes"))


STEP = st.tuples(st.sampled_from(sorted(CHANGES)), st.integers(0, 2**16), st.booleans())


@pytest.mark.parametrize("spec", sorted(SPECS))
@given(
    family=st.sampled_from(sorted(CONFIGS)),
    head_dim=st.sampled_from([32, None]),
    changes=st.lists(STEP, min_size=1, max_size=5),
)
@settings(
    max_examples=-(-200 // len(SPECS)), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_the_next_forward_is_that_of_the_model_as_it_is(
    made: Made, family: str, head_dim: int | None, spec: str, changes: Sequence[tuple[str, int, bool]]
) -> None:
    assert fault(made(family, head_dim, spec), changes) is None


@pytest.mark.parametrize("change", sorted(CHANGES))
@pytest.mark.parametrize("spec", sorted(SPECS))
def test_every_change_is_seen_by_a_model_that_has_computed(made: Made, spec: str, change: str) -> None:
    for seed in range(3):
        assert fault(made("qwen2", 32, spec), [(change, seed, True), (change, seed + 9, True)]) is None
