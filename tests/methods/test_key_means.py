"""The mean key stays out of the quantized cache, where that helps, and is added where keys are read."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import dfrot
from dfrot.kernels.library import instruction_set
from dfrot.linalg.rotation import Identity
from dfrot.quant.spec import UNQUANTIZED
from dfrot.runtime.linear import QuantLinear
from dfrot.system.errors import UserError
from tests.tiny_models import write_tiny_model

Tiny = Callable[..., Path]
TOKENS = torch.randint(1, 96, (2, 24), generator=torch.Generator().manual_seed(7))


def made(source: Path, out: Path, text: Path, **words: Any) -> dfrot.QuantizeResult:
    how = {"calib": str(text), "calib_tokens": 64, "calib_seq_len": 32, "tune": "none", "weights": "rtn", **words}
    return dfrot.quantize(source, dfrot.Recipe.parse(**{"method": "quarot", "spec": "w16a16kv4", **how}), out)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS, use_cache=False).logits


@pytest.mark.parametrize("bias", [True, False])
def test_what_a_layer_keeps_apart_and_what_it_puts_out_are_the_whole(bias: bool) -> None:
    how: Any = {"weights": UNQUANTIZED, "activations": UNQUANTIZED, "rotation": Identity(8), "dtype": torch.float64}
    layer = QuantLinear(8, 6, bias=bias, leaves_out=True, apart=True, **how).requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(each.shape, generator=generator).double() for name, each in layer.state_dict().items()}
    layer.load_state_dict(tensors)
    x = torch.randn(3, 8, generator=generator).double()
    expected = torch.nn.functional.linear(x, tensors["weight"], tensors.get("bias"))
    assert layer.left_out is layer.apart
    torch.testing.assert_close(layer(x) + layer.left_out, expected, rtol=0, atol=1e-14)


def test_keys_that_have_much_in_common_lose_less(tmp_path: Path, text_file: Path) -> None:
    source = write_tiny_model("mistral", tmp_path / "model")
    tensors = load_file(source / "model.safetensors")
    for name, tensor in tensors.items():  # a channel that is the same for all tokens, and is read by the keys alone
        if name.endswith("embed_tokens.weight"):
            tensor[:, 5] = 4.0
        elif name.endswith("k_proj.weight"):
            tensor[:, 5] += 3.0
        elif name.endswith(("q_proj.weight", "v_proj.weight", "gate_proj.weight", "up_proj.weight", "lm_head.weight")):
            tensor[:, 5] = 0
        elif name.endswith(("o_proj.weight", "down_proj.weight")):
            tensor[5] = 0
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    exact = logits(dfrot.load(source, dtype=torch.float64)[0])
    errors = []
    for mean_keys in (False, True):
        out = tmp_path / str(mean_keys)
        result = made(source, out, text_file, dtype="float64", mean_keys=mean_keys)
        errors.append(float((logits(dfrot.load(out)[0]) - exact).norm() / exact.norm()))
    assert errors[1] < 0.5 * errors[0]
    assert result.summary()[0].startswith("the mean key stays out of the cache in 2 of 2 blocks")
    assert all(with_mean < 0.5 * without for without, with_mean in result.notes["key_means"]["error"])


@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen2"])
def test_kernels_cache_and_tuning_know_of_it(
    tmp_path: Path, text_file: Path, architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tune = {"tune": "all", "tune_steps": 2, "tune_tokens": 32, "tune_seq_len": 16}
    how = {"spec": "w4a4kv4", "dtype": "float32", "mean_keys": True, **tune}
    made(write_tiny_model(architecture, tmp_path / "model", head_dim=32), tmp_path / "out", text_file, **how)
    found = []
    for used in (instruction_set(), 0):
        monkeypatch.setattr("dfrot.kernels.library.instruction_set", lambda used=used: used)
        model, _ = dfrot.load(tmp_path / "out")
        assert all(layer.self_attn.k_proj.apart.any() for layer in model.model.layers)
        with torch.no_grad():
            steps = [model(TOKENS[:, :20], use_cache=True)]
            for at in range(20, 24):
                steps.append(model(TOKENS[:, at : at + 1], past_key_values=steps[-1].past_key_values))
        found += [logits(model), torch.cat([step.logits for step in steps], 1)]
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-4, atol=1e-4 * float(found[0].abs().max()))


@pytest.mark.parametrize("architecture", ["qwen3", "phi3"])
def test_it_is_refused_where_a_mean_cannot_be_taken(
    tiny: Tiny, tmp_path: Path, text_file: Path, architecture: str
) -> None:
    with pytest.raises(UserError, match=r"a norm follows it, it makes queries and values too"):
        made(tiny(architecture), tmp_path / "out", text_file, mean_keys=True)


def test_it_is_refused_where_keys_are_not_quantized() -> None:
    with pytest.raises(UserError, match="is about quantized keys"):
        dfrot.Recipe.parse("quarot", spec="w4a4kv16", mean_keys=True)


def test_it_goes_with_learned_scales_of_keys(tiny: Tiny, tmp_path: Path, text_file: Path) -> None:
    learned = {"method": "learned", "steps": 3, "learn_steps": 3, "learn_tokens": 32, "calib_tokens": 128}
    source = tiny("mistral")
    made(source, tmp_path / "out", text_file, spec="w16a16kv8", dtype="float64", mean_keys=True, **learned)
    found, exact = logits(dfrot.load(tmp_path / "out")[0]), logits(dfrot.load(source, dtype=torch.float64)[0])
    assert (found - exact).norm() < 0.05 * exact.norm()
