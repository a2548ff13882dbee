"""compressed-tensors' own code is the authority: it unpacks what was packed, and transformers computes with it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from compressed_tensors.transform import TransformConfig
from compressed_tensors.utils import is_match
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import dfrot
from dfrot.export import export, vllm
from dfrot.export.checkpoint import Checkpoint
from dfrot.quant.spec import UNQUANTIZED
from dfrot.runtime.config import RuntimeConfig
from dfrot.runtime.linear import QuantLinear
from dfrot.system.errors import UserError
from tests.tiny_models import write_tiny_model

Tiny = Callable[[str], Path]
TOKENS = torch.randint(1, 96, (2, 24), generator=torch.Generator().manual_seed(7))


def made(tiny: Tiny, out: Path, spec: str, architecture: str = "llama", **words: Any) -> Path:
    words = {"method": "quarot", "weights": "rtn", "preset": "deploy", "fold_only": True, **words}
    return dfrot.quantize(tiny(architecture), dfrot.Recipe.parse(spec=spec, **words), out).path


def runtime(checkpoint: Path) -> RuntimeConfig:
    return Checkpoint.open(checkpoint).runtime


@pytest.fixture(autouse=True)
def small_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny models are too narrow for groups and tiles of 32."""
    monkeypatch.setattr(vllm, "GROUPS", (16,))
    monkeypatch.setattr(vllm, "CPU_TILE", 16)


@pytest.mark.parametrize("bits", [4, 8])
def test_words_are_packed_as_compressed_tensors_packs_them(bits: int, generator: torch.Generator) -> None:
    codes = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (6, 40), generator=generator, dtype=torch.int16)
    assert torch.equal(vllm.packed_words(codes, bits), pack_to_int32(codes.to(torch.int8), bits))


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "phi3"])
@pytest.mark.parametrize("spec", ["w4g16a16kv16", "w4a16kv16"])
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
            module.activations = UNQUANTIZED
    unrounded = model(TOKENS).logits.detach()
    assert (theirs - unrounded).abs().mean() > 0.1 * (ours - unrounded).abs().mean()  # they do round
    assert (theirs - ours).abs().mean() < 2 * (ours - unrounded).abs().mean()  # and not otherwise than twice by that


def quantization_config(out: Path) -> dict[str, Any]:
    return json.loads((out / "config.json").read_text())["quantization_config"]


def test_four_bit_activations_are_written_packed_for_a_gpu(tiny: Tiny, tmp_path: Path) -> None:
    """Without a format compressed-tensors infers `int-quantized`; of keys and values nothing is asked."""
    said = export(made(tiny, tmp_path / "ckpt", "w4a4kv4"), "vllm", tmp_path / "out", device="cuda")
    assert "keys are in 4 bits here, and not quantized by vLLM" in said[0]
    assert "--linear-backend humming" in said[1]
    assert "verified on a GPU" in said[2]
    record = quantization_config(tmp_path / "out")
    assert (record["quant_method"], record["format"]) == ("compressed-tensors", "pack-quantized")
    (group,) = record["config_groups"].values()
    assert (group["format"], group["input_activations"]["num_bits"]) == ("pack-quantized", 4)
    assert record["kv_cache_scheme"] is None


@pytest.mark.parametrize("head_mixing", [False, True])
def test_an_online_rotation_is_a_matrix_that_vllm_divides_by_the_root_of_its_size(
    tiny: Tiny, tmp_path: Path, head_mixing: bool
) -> None:
    """transform_config as compressed-tensors reads it; R3, which leaves scores alone, is left out."""
    checkpoint = made(tiny, tmp_path / "ckpt", "w16a16kv4", "mistral", fold_only=False, head_mixing=head_mixing)
    assert runtime(checkpoint).keys is not None
    said = export(checkpoint, "vllm", tmp_path / "out", device="cuda")
    assert "is rotated by a dense matrix" in said[1]
    assert "transformers leaves the rotation out" in said[1]
    config = TransformConfig.model_validate(quantization_config(tmp_path / "out")["transform_config"])
    tensors = load_file(tmp_path / "out" / "model-00002-of-00003.safetensors")
    rotations = runtime(checkpoint).online
    assert len(config.config_groups) == len(rotations) == 1 + head_mixing
    for name, rotation in rotations.items():
        ((scheme, found),) = [
            (scheme, found)
            for scheme, found in config.config_groups.items()
            if is_match(f"model.layers.0.{name}", torch.nn.Linear(1, 1), found.apply[0].targets)
        ]
        assert (found.type, found.apply[0].location) == ("random-hadamard", "input")
        matrix = tensors[f"model.layers.0.{name}.{scheme}_input.weight"].double()
        assert torch.allclose(matrix / rotation.size**0.5, rotation.as_matrix(), rtol=1e-6, atol=0)
    assert tensors["model.layers.0.mlp.down_proj.mlp_down_proj_input.weight"].dtype == torch.int8  # ±1


def test_for_the_plugin_it_is_a_method_that_only_the_plugin_knows(tiny: Tiny, tmp_path: Path) -> None:
    said = export(made(tiny, tmp_path / "ckpt", "w4a4kv16", fold_only=False), "vllm", tmp_path / "out", plugin=True)
    assert "only with dfrot's plugin: pip install 'dfrot[vllm]'" in said[1]
    record = quantization_config(tmp_path / "out")
    assert record["quant_method"] == "dfrot-compressed-tensors"
    assert set(record["transform_config"]["config_groups"]) == {"mlp_down_proj"}


def test_split_layers_that_have_scales_of_their_own_are_said(tiny: Tiny, tmp_path: Path) -> None:
    checkpoint = made(tiny, tmp_path / "ckpt", "w8a8kv16")
    said = export(checkpoint, "vllm", tmp_path / "out", device="cuda", tensor_parallel=2)
    assert "each GPU chooses the scales for its own part" in said[0]


def test_a_cpu_that_quantizes_more_than_was_asked_for_is_said(tiny: Tiny, tmp_path: Path) -> None:
    (said,) = export(made(tiny, tmp_path / "ckpt", "w4a16kv16"), "vllm", tmp_path / "out")
    assert "VLLM_CPU_INT4_W4A8=0" in said


def test_eight_bits_beside_four_are_packed_words_and_dynamic_tokens(tiny: Tiny, tmp_path: Path) -> None:
    """On a CPU on another grid, on a GPU by one kernel, which is said."""
    checkpoint = made(tiny, tmp_path / "ckpt", "w4g16a8kv16")
    (said,) = export(checkpoint, "vllm", tmp_path / "out")
    assert "8 bits of its own grid" in said
    assert "--plugin has this grid" in said
    record = quantization_config(tmp_path / "out")
    (group,) = record["config_groups"].values()
    assert (record["format"], group["input_activations"]["num_bits"]) == ("pack-quantized", 8)
    assert (group["weights"]["strategy"], group["weights"]["group_size"]) == ("group", 16)
    assert (group["input_activations"]["strategy"], group["input_activations"]["dynamic"]) == ("token", True)
    said = export(checkpoint, "vllm", tmp_path / "gpu", device="cuda")[0]
    assert "only vLLM's kernel Humming quantizes activations to 8 bits beside 4-bit weights" in said


@pytest.mark.parametrize(
    ("spec", "words", "message"),
    [
        ("w4a4kv16", {}, "on a CPU silently keeps activations in 16 bits.*--plugin.*w4a16"),
        ("w4a16kv16", {"fold_only": False}, r"mlp\.down_proj is rotated.*vLLM on a CPU cannot.*--plugin.*--fold-only"),
        ("w8a16kv16", {}, "on a CPU has no kernel for w8a16.*w8a8 or w4a16"),
        ("w16a16kv16", {}, "nothing is quantized: --to huggingface"),
        ("w3a16kv16", {}, r"no kernel for w3a16.*w4a16, w8a16, w8a8, w4a8, w4a4"),
        ("w8a4kv16", {}, "no kernel for w8a4"),
        ("w4a16kv16", {"weight_symmetric": False}, "weights are asymmetric.*--weight-symmetric True"),
        ("w8a8kv16", {"act_symmetric": False}, "activations are asymmetric.*--preset deploy"),
        ("w8a8kv16", {"act_clip": 0.9}, r"clipped at 0\.9 of the range.*--act-clip 1"),
        ("w8g16a8kv16", {}, "8-bit activations by 8-bit weights with one scale per channel"),
        ("w4g8a16kv16", {}, "groups of 8; vLLM takes 16, or no groups"),
    ],
)
def test_what_vllm_would_run_otherwise_is_refused(
    tiny: Tiny, tmp_path: Path, spec: str, words: dict[str, Any], message: str
) -> None:
    checkpoint = made(tiny, tmp_path / "ckpt", spec, **words)
    with pytest.raises(UserError, match=message):
        export(checkpoint, "vllm", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_clip_ratios_that_were_trained_are_refused_by_that_name(tiny: Tiny, tmp_path: Path, text_file: Path) -> None:
    words: dict[str, Any] = {"calib": str(text_file), "tune": "clips", "tune_steps": 1, "tune_tokens": 32}
    checkpoint = made(tiny, tmp_path / "ckpt", "w8a8kv16", act_clip=0.9, **words)
    with pytest.raises(UserError, match="--act-clip 1, and with --fold-only or without --tune clips"):
        export(checkpoint, "vllm", tmp_path / "out")


@pytest.mark.parametrize(
    ("spec", "fold_only", "parts", "message"),
    [
        ("w4a4kv16", False, 2, "rotated while the model runs, which vLLM supports on one GPU only.*--fold-only"),
        ("w4g16a16kv16", True, 2, "o_proj has 24 inputs on each of 2 GPUs, which groups of 16 do not divide"),
        ("w8a8kv16", True, 3, "3 GPUs cannot share 4 heads"),
        ("w4a16kv16", True, 4, "o_proj has 12 inputs on each of 4 GPUs; vLLM takes multiples of 8 for w4"),
    ],
)
def test_what_cannot_be_split_among_gpus_is_refused(
    tiny: Tiny, tmp_path: Path, spec: str, fold_only: bool, parts: int, message: str
) -> None:
    checkpoint = made(tiny, tmp_path / "ckpt", spec, fold_only=fold_only)
    with pytest.raises(UserError, match=message):
        export(checkpoint, "vllm", tmp_path / "out", device="cuda", tensor_parallel=parts)


@pytest.mark.parametrize("words", [{"device": "cuda"}, {"plugin": True}])
def test_rotations_that_differ_from_block_to_block_are_refused(
    tiny: Tiny, tmp_path: Path, text_file: Path, words: dict[str, Any]
) -> None:
    calibration: dict[str, Any] = {"calib": str(text_file), "calib_tokens": 64}
    checkpoint = made(tiny, tmp_path / "ckpt", "w4a4kv16", method="duquant", fold_only=None, block=16, **calibration)
    with pytest.raises(UserError, match=r"made by duquant, which rotates every layer's input.*vLLM cannot"):
        export(checkpoint, "vllm", tmp_path / "out", **words)


@pytest.mark.parametrize("words", [{"device": "cuda"}, {"plugin": True}])
def test_a_bias_beside_an_online_rotation_is_refused(tmp_path: Path, words: dict[str, Any]) -> None:
    source = write_tiny_model("llama", tmp_path / "source", mlp_bias=True)
    recipe = dfrot.Recipe.parse(method="quarot", weights="rtn", preset="deploy", spec="w4a4kv16")
    checkpoint = dfrot.quantize(source, recipe, tmp_path / "ckpt").path
    with pytest.raises(UserError, match=r"mlp\.down_proj has a bias, which vLLM cannot add then.*--fold-only"):
        export(checkpoint, "vllm", tmp_path / "out", **words)


def test_a_width_that_words_do_not_divide_is_refused(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = made(tiny, tmp_path / "ckpt", "w4a16kv16")
    monkeypatch.setattr(vllm, "input_widths", lambda graph, config: {"mlp.down_proj": 84})
    with pytest.raises(UserError, match=r"has 84 inputs; vLLM takes multiples of 8 for w4. Take w8a8"):
        export(checkpoint, "vllm", tmp_path / "out", device="cuda")
    monkeypatch.setattr(vllm, "input_widths", lambda graph, config: {"mlp.down_proj": 88})
    with pytest.raises(UserError, match=r"has 88 inputs; vLLM takes multiples of 16 for w4"):
        export(checkpoint, "vllm", tmp_path / "out")


def test_what_is_no_place_to_run_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    checkpoint = made(tiny, tmp_path / "ckpt", "w8a8kv16")
    with pytest.raises(UserError, match="cpu or cuda, got 'tpu'"):
        export(checkpoint, "vllm", tmp_path / "out", device="tpu")
    with pytest.raises(UserError, match="at least 1 GPU, got 0"):
        export(checkpoint, "vllm", tmp_path / "out", tensor_parallel=0)


def test_an_engine_that_is_not_known_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no export to 'onnx'"):
        export(made(tiny, tmp_path / "ckpt", "w4a16kv16"), "onnx", tmp_path / "out")


def test_options_of_another_engine_are_refused(tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--device is for vllm, and means nothing to gguf"):
        export(tmp_path, "gguf", tmp_path / "out", device="cuda")
    with pytest.raises(UserError, match="--plugin is for vllm, and means nothing to huggingface"):
        export(tmp_path, "huggingface", tmp_path / "out", plugin=True)
    with pytest.raises(UserError, match="--type is for gguf, and means nothing to vllm"):
        export(tmp_path, "vllm", tmp_path / "out", kind="f16")
