"""4-bit floats in the real vLLM on a CPU, which has no kernel for them: its validator, loader and emulation."""

import json
import math
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import dfrot
from dfrot.export import export
from tests.export.test_in_vllm import BLOCKS, PYTHON, answers, log_likelihoods, pytestmark
from tests.tiny_models import write_tiny_model

__all__ = ["pytestmark"]  # which skips these, too, where vLLM is not installed

SPECS = {"nvfp4": "CompressedTensorsW4A4Fp4", "wnvfp4a16kv16": "CompressedTensorsW4A4Fp4"}
SPECS |= {"mxfp4": "CompressedTensorsW4A4Mxfp4"}


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """Checkpoint and export by spec."""
    folder = tmp_path_factory.mktemp("floats")
    source = write_tiny_model("llama", folder / "llama", head_dim=32, hidden_size=128, intermediate_size=384)
    (text := folder / "text").write_text("The quick brown fox jumps over the lazy dog; 0123456789 times. " * 40)
    made = {}
    for spec in SPECS:
        words: dict[str, Any] = {"fold_only": True, "block": 16, "calib": str(text), "calib_tokens": 256}
        recipe = dfrot.Recipe.parse("quarot", "rtn", spec, tune="none", **words)
        made[spec] = dfrot.quantize(source, recipe, folder / spec).path, folder / f"{spec}-vllm"
        export(*made[spec][:1], "vllm", made[spec][1], device="cuda")
    return made


def test_its_emulation_of_nvfp4_predicts_what_we_do(exported: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    """In float32; its scales come from a product with 1/6 and a reciprocal, so some codes at ties differ."""
    checkpoint, out = exported["nvfp4"]
    job = {"model": str(out), "dtype": "float32", "blocks": BLOCKS.tolist(), "emulate": True}
    (answer,) = answers([job], tmp_path)
    assert "error" not in answer, answer["error"]
    theirs, ours = torch.tensor(answer["log_probabilities"], dtype=torch.float64), log_likelihoods(checkpoint)
    assert abs(math.expm1(float(ours.mean() - theirs.mean()))) < 1e-3
    assert (theirs - ours).abs().mean() < 3e-3 * ours.std()


_LAYER = """
import json, sys, torch
import vllm.model_executor.layers.quantization.compressed_tensors.schemes.compressed_tensors_w4a4_mxfp4 as mxfp4
import vllm.model_executor.layers.quantization.compressed_tensors.schemes.compressed_tensors_w4a4_nvfp4 as nvfp4
import vllm.model_executor.parameter as parameter
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import CompressedTensorsConfig
nvfp4.init_nvfp4_linear_kernel = mxfp4.init_mxfp4_linear_kernel = lambda **words: None  # CPUs have none
nvfp4.expose_input_quant_key = lambda *arguments: None
parameter.get_tensor_model_parallel_rank, parameter.get_tensor_model_parallel_world_size = lambda: 0, lambda: 1
with open(sys.argv[1]) as file:
    config = CompressedTensorsConfig.from_config(json.load(file)["quantization_config"])
group = config.target_scheme_map["Linear"]
scheme = config._get_scheme_from_parts(group["weights"], group["input_activations"], None, group["format"])
layer = torch.nn.Module()
scheme.create_weights(layer, [384], 128, torch.float32, lambda *arguments, **words: None)
parts = {name: [list(each.shape), str(each.dtype)] for name, each in layer.named_parameters()}
print("ANSWER", json.dumps([type(scheme).__name__, parts]))
"""


@pytest.mark.parametrize("spec", SPECS)
def test_its_validator_takes_the_scheme_and_asks_for_these_tensors(
    exported: dict[str, tuple[Path, Path]], spec: str
) -> None:
    out = exported[spec][1]
    run = subprocess.run([str(PYTHON), "-c", _LAYER, str(out / "config.json")], capture_output=True, text=True)
    found = [line.removeprefix("ANSWER") for line in run.stdout.splitlines() if line.startswith("ANSWER")]
    assert found, run.stderr[-2000:]
    name, parts = json.loads(found[0])
    assert name == SPECS[spec]
    stored = load_file(out / "model-00002-of-00003.safetensors")
    prefix = "model.layers.0.mlp.gate_proj."
    assert parts == {
        name.removeprefix(prefix): [list(tensor.shape), str(tensor.dtype)]
        for name, tensor in stored.items()
        if name.startswith(prefix)
    }


@pytest.mark.parametrize("spec", ["nvfp4", "mxfp4"])
def test_a_cpu_without_emulation_refuses_to_load_them(
    exported: dict[str, tuple[Path, Path]], tmp_path: Path, spec: str
) -> None:
    job = {"model": str(exported[spec][1]), "dtype": "float32", "blocks": BLOCKS.tolist()}
    (answer,) = answers([job], tmp_path)
    assert f"Failed to find a kernel that can implement the {spec.upper()} linear layer" in answer["error"]
