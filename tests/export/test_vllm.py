"""compressed-tensors' own code is the authority: it unpacks what was packed, and transformers computes with it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import dfrot
from dfrot.errors import UserError
from dfrot.export import export, vllm
from dfrot.runtime.linear import QuantLinear
from dfrot.spec import LEFT_ALONE

Tiny = Callable[[str], Path]
TOKENS = torch.randint(1, 96, (2, 24), generator=torch.Generator().manual_seed(7))


def made(tiny: Tiny, out: Path, spec: str, architecture: str = "llama", **words: Any) -> Path:
    words = {"method": "quarot", "weights": "rtn", "preset": "deploy", "online": False, **words}
    return dfrot.quantize(tiny(architecture), dfrot.Recipe.parse(spec=spec, **words), out).path


@pytest.fixture(autouse=True)
def small_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny models are too narrow for groups of 32."""
    monkeypatch.setattr(vllm, "GROUPS", (16,))


@pytest.mark.parametrize("bits", [4, 8])
def test_words_are_packed_as_compressed_tensors_packs_them(bits: int, generator: torch.Generator) -> None:
    codes = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (6, 40), generator=generator, dtype=torch.int16)
    assert torch.equal(vllm.packed_words(codes, bits), pack_to_int32(codes.to(torch.int8), bits))


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "phi3"])
@pytest.mark.parametrize("spec", ["w4g16a16kv16", "w4a16kv16", "w8a16kv16"])
def test_transformers_computes_what_the_checkpoint_does(
    tiny: Tiny, tmp_path: Path, spec: str, architecture: str
) -> None:
    checkpoint = made(tiny, tmp_path / "ckpt", spec, architecture)
    export(checkpoint, "vllm", tmp_path / "out")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out")(TOKENS).logits.detach()
    ours = dfrot.load(checkpoint)[0](TOKENS).logits.detach()
    assert torch.allclose(theirs, ours, atol=1e-5 * float(ours.abs().max()))  # float32 through two blocks


def test_eight_bit_activations_are_quantized_by_transformers_too(tiny: Tiny, tmp_path: Path) -> None:
    """Its scale is max|x| / 127.5 where ours, and vLLM's, is max|x| / 127, so that some integers differ by one."""
    checkpoint = made(tiny, tmp_path / "ckpt", "w8a8kv16")
    assert export(checkpoint, "vllm", tmp_path / "out") == []
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out")(TOKENS).logits.detach()
    model, _ = dfrot.load(checkpoint)
    ours = model(TOKENS).logits.detach()
    layer = model.get_submodule("model.layers.0.mlp.down_proj")
    assert isinstance(layer, QuantLinear)
    stored = load_file(tmp_path / "out" / "model-00002-of-00003.safetensors")
    assert torch.equal(stored["model.layers.0.mlp.down_proj.weight"].float(), layer.integer_weight(torch.float32))
    assert torch.equal(stored["model.layers.0.mlp.down_proj.weight_scale"], layer.scales)
    for module in model.modules():
        if isinstance(module, QuantLinear):
            module.activations = LEFT_ALONE
    unrounded = model(TOKENS).logits.detach()
    assert (theirs - unrounded).abs().mean() > 0.1 * (ours - unrounded).abs().mean()  # they do round
    assert (theirs - ours).abs().mean() < 2 * (ours - unrounded).abs().mean()  # and not otherwise than twice by that


def test_four_bit_activations_are_written_packed_for_a_gpu(tiny: Tiny, tmp_path: Path) -> None:
    said = export(made(tiny, tmp_path / "ckpt", "w4a4kv4"), "vllm", tmp_path / "out", device="cuda")
    assert "keys are in 4 bits here, and not quantized by vLLM" in said[0]
    assert "not verified" in said[0] or "verified on a GPU" in said[1]
    record = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert (record["quant_method"], record["format"]) == ("compressed-tensors", "pack-quantized")
    assert record["config_groups"]["group_0"]["input_activations"]["num_bits"] == 4


def test_a_cpu_that_quantizes_more_than_was_asked_for_is_said(tiny: Tiny, tmp_path: Path) -> None:
    (said,) = export(made(tiny, tmp_path / "ckpt", "w4a16kv16"), "vllm", tmp_path / "out")
    assert "VLLM_CPU_INT4_W4A8=0" in said


@pytest.mark.parametrize(
    ("spec", "words", "message"),
    [
        ("w4a4kv16", {}, "loads 4-bit activations and, without a word, leaves them unquantized"),
        ("w4a16kv16", {"online": True}, r"rotates the input of mlp\.down_proj.*vLLM cannot.*--online False"),
        ("w16a16kv16", {}, "nothing is quantized: --to huggingface"),
        ("w3a16kv16", {}, r"no kernel for w3a16.*w4a16, w8a16, w8a8, w4a4"),
        ("w8a4kv16", {}, "no kernel for w8a4"),
        ("w4a16kv16", {"weight_symmetric": False}, "weights are asymmetric.*--weight-symmetric True"),
        ("w8a8kv16", {"act_symmetric": False}, "activations are asymmetric.*--preset deploy"),
        ("w8a8kv16", {"act_clip": 0.9}, r"clipped at 0\.9 of their range.*--act-clip 1"),
        ("w8g16a8kv16", {}, "8-bit activations by weights of one scale a channel"),
        ("w4g8a16kv16", {}, "groups of 8; vLLM takes 16, or none"),
    ],
)
def test_what_vllm_would_run_otherwise_is_refused(
    tiny: Tiny, tmp_path: Path, spec: str, words: dict[str, Any], message: str
) -> None:
    checkpoint = made(tiny, tmp_path / "ckpt", spec, **words)
    with pytest.raises(UserError, match=message):
        export(checkpoint, "vllm", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_width_that_words_do_not_divide_is_refused(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = made(tiny, tmp_path / "ckpt", "w4a16kv16")
    monkeypatch.setattr(vllm, "input_widths", lambda graph, config: {"mlp.down_proj": 84})
    with pytest.raises(UserError, match="has 84 inputs; 4-bit weights are packed 8 to a word"):
        export(checkpoint, "vllm", tmp_path / "out")


def test_an_engine_that_is_not_known_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no export to 'onnx'"):
        export(made(tiny, tmp_path / "ckpt", "w4a16kv16"), "onnx", tmp_path / "out")


def test_options_of_another_engine_are_refused(tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--device is for vllm, and means nothing to gguf"):
        export(tmp_path, "gguf", tmp_path / "out", device="cuda")
    with pytest.raises(UserError, match="--type is for gguf, and means nothing to vllm"):
        export(tmp_path, "vllm", tmp_path / "out", kind="f16")
