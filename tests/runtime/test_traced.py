"""What torch.compile and torch.export make of a checkpoint, and that tracing leaves nothing behind."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import dfrot
from dfrot.linalg.hadamard import scaled_factor
from dfrot.quant.affine import SCALE_DTYPE, choose_qparams
from dfrot.quant.grids import IntGrid, PerToken
from tests.fused.test_block import DIFFERENCE
from tests.tiny_models import write_biased_model

TOKENS = torch.arange(1, 13).view(2, 6)
SPECS = {"w4a4kv4": "quarot", "w4a16kv16": "quarot", "w16a4kv4": "quarot", "w8a8kv8": "duquant", "w8a16kv4": "quarot"}
BIASED = "w8a16kv4"  # of a model whose keys have large biases
Load = Callable[[str], Any]


@pytest.fixture
def load(tiny: Callable[[str], Path], tmp_path: Path, text_file: Path) -> Load:
    """A checkpoint of the tiny Qwen3, whose heads reach the kernels, or of Qwen2."""
    biased = write_biased_model("qwen2", tmp_path / "biased", head_dim=32)

    def loaded(spec: str) -> Any:
        options: Any = {"block": 16, "greedy_steps": 2} if SPECS[spec] == "duquant" else {}
        recipe = dfrot.Recipe.parse(SPECS[spec], "rtn", spec, calib=str(text_file), calib_tokens=32, **options)
        return dfrot.load(dfrot.quantize(biased if spec == BIASED else tiny("qwen3"), recipe, tmp_path / spec).path)[0]

    return loaded


# Compiled in another process: the suite's own checks of types would be traced too.
COMPILED = """
import sys
import torch, dfrot
from dfrot.quant.affine import SCALE_DTYPE, choose_qparams
from dfrot.quant.grids import IntGrid, PerToken
from transformers import CompileConfig

tokens = torch.arange(1, 13).view(2, 6)
settings = {"attention_mask": torch.ones_like(tokens), "max_new_tokens": 4, "eos_token_id": None, "do_sample": False}
static = CompileConfig(fullgraph=True, dynamic=False, backend="eager", mode=None)
static._compile_all_devices = True  # as generate does on a GPU
with torch.no_grad():
    for path in sys.argv[1:]:
        model = dfrot.load(path)[0]
        torch._dynamo.reset()
        got = torch.compile(model, fullgraph=True, backend="eager")(tokens, use_cache=False).logits
        wanted = model(tokens, use_cache=False).logits
        print(float((got - wanted).abs().max() / wanted.abs().max()))
        if path in sys.argv[-2:]:
            got = model.generate(tokens, cache_implementation="static", compile_config=static, **settings)
            assert hasattr(model, "_compiled_call"), "generate left it as it is"
            assert torch.equal(got, model.generate(tokens, **settings))
x = torch.randn(64, 32) * torch.logspace(-30, 30, 64)[:, None]
scales = lambda x: choose_qparams(x, IntGrid(4, False), PerToken(), 0.95, SCALE_DTYPE).scale * 1
print(float(not torch.equal(torch.compile(scales)(x), scales(x))))  # by inductor, which leaves out casts
"""


def test_a_compiled_model_is_one_graph_that_computes_and_generates_the_same_scales_rounded_as_well(load: Load) -> None:
    paths = [load(spec).name_or_path for spec in SPECS]
    done = subprocess.run([sys.executable, "-c", COMPILED, *paths], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    *models, scales = map(float, done.stdout.split())
    assert len(models) == len(SPECS)
    assert max(models) <= DIFFERENCE
    assert scales == 0


@pytest.mark.parametrize("spec", SPECS)
@torch.no_grad()
def test_a_model_can_be_exported_and_is_as_before_then(load: Load, spec: str) -> None:
    model = load(spec)
    program = torch.export.export(model, (), {"input_ids": TOKENS, "use_cache": False}, strict=False)
    wanted = model(TOKENS, use_cache=False).logits
    assert type(wanted) is torch.Tensor
    got = program.module()(input_ids=TOKENS, use_cache=False).logits
    torch.testing.assert_close(got, wanted, rtol=0, atol=DIFFERENCE * float(wanted.abs().max()))


def test_rounding_up_to_bfloat16_is_the_least_number_that_is_not_below() -> None:
    x = torch.tensor([1.0, 1 + 2**-20, 3.1, 2**-130, 3.4e38, torch.inf, torch.nan])
    scale = choose_qparams(x[:, None], IntGrid(8, False), PerToken(), 255.0, SCALE_DTYPE).scale[:, 0]
    narrow = scale.bfloat16()
    assert torch.equal(narrow.float(), scale) or scale.isnan().any()
    finite = x.isfinite() & narrow.isfinite()
    assert (scale[finite] >= x[finite]).all()
    below = torch.nextafter(narrow, torch.full_like(narrow, -torch.inf)).float()
    assert (below[finite] < x[finite]).all()


def test_a_factor_that_is_first_asked_for_while_torch_traces_is_a_plain_tensor() -> None:
    dtype, device = torch.float32, torch.device("cpu")
    with FakeTensorMode():
        scaled_factor(28, dtype, device)
    with torch.inference_mode():
        scaled_factor(44, dtype, device)
    with torch.device("meta"):
        scaled_factor(52, dtype, device)
    for size in (28, 44, 52):
        factor = scaled_factor(size, dtype, device)
        assert type(factor) is torch.Tensor
        assert not factor.is_inference()
        torch.testing.assert_close(factor @ factor.T, torch.eye(size), rtol=0, atol=1e-5)
