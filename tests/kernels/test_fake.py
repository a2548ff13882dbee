"""What the operators say of their results before they compute, as torch.compile asks them, against what comes out."""

import pytest
import torch

from dfrot.kernels import attention, linear
from dfrot.kernels.library import backend, instruction_set
from dfrot.kernels.lowering import NO_PASSES, lower
from dfrot.linalg.rotation import Hadamard
from dfrot.quant.spec import TensorSpec
from dfrot.runtime.kv import KVQuantizer
from tests.kernels.test_linear import random_weight

pytestmark = pytest.mark.skipif(instruction_set() == 0, reason=backend())


@pytest.mark.parametrize("name", ["linear", "rotate", "append", "unpack", "attend"])
def test_results_have_the_sizes_and_strides_that_were_announced_for_an_input_with_turned_axes(
    name: str, generator: torch.Generator
) -> None:
    x = torch.randn(2, 5, 3, 32, generator=generator).transpose(1, 2)
    spec, rotation = TensorSpec(4, False, 0.95), lower(Hadamard(32))
    assert rotation is not None
    keys, values = KVQuantizer(spec, spec, None, 32).rooms(2, 3, 8, x.device)
    weight, _ = random_weight(6, 32, TensorSpec(4, True), generator)
    mask = torch.ones(2, 1, 5, 8, dtype=torch.bool)
    arguments = {
        "linear": (x, [*weight], *rotation, 4, 4, False, 0.9),
        "rotate": (x, *rotation),
        "append": (x, [*keys], 0, *rotation, 4, 0.95, torch.tensor(2)),
        "unpack": ([*keys], 4, torch.float32),
        "attend": (x, [*keys], [*values], mask, None, *NO_PASSES, 0.2, 4),
    }
    operator = getattr(torch.ops.dfrot, name).default
    assert {linear.rotate, attention.append}, "importing them registers the operators"
    torch.library.opcheck(operator, arguments[name], test_utils=("test_schema", "test_faketensor"))
