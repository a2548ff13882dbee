"""NVFP4 and MXFP4 for vLLM. compressed-tensors' own code is the authority, and transformers computes with it."""

import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors.mxfp4 import MXFP4PackedCompressor
from compressed_tensors.compressors.nvfp4 import NVFP4PackedCompressor
from compressed_tensors.quantization import QuantizationScheme
from compressed_tensors.quantization.quant_scheme import preset_name_to_scheme
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import dfrot
from dfrot.export import export
from dfrot.export.checkpoint import Checkpoint
from dfrot.system.errors import UserError

Tiny = Callable[[str], Path]
TOKENS = torch.randint(1, 96, (2, 24), generator=torch.Generator().manual_seed(7))
COMPRESSORS: Any = {"nvfp4": NVFP4PackedCompressor, "mxfp4": MXFP4PackedCompressor}
every_format = pytest.mark.parametrize("word", COMPRESSORS)


def made(tiny: Tiny, out: Path, text: Path, spec: str, architecture: str = "qwen3", **words: Any) -> Path:
    words = {"method": "quarot", "weights": "rtn", "fold_only": True, "calib": str(text), **words}
    recipe = dfrot.Recipe.parse(spec=spec, calib_tokens=128, calib_seq_len=32, tune="none", **words)
    return dfrot.quantize(tiny(architecture), recipe, out).path


def scheme_of(out: Path) -> QuantizationScheme:
    (group,) = json.loads((out / "config.json").read_text())["quantization_config"]["config_groups"].values()
    return QuantizationScheme.model_validate(group)


@pytest.mark.parametrize(
    ("spec", "architecture", "weights"),
    [
        ("nvfp4", "llama", "rtn"),
        ("nvfp4", "qwen3", "gptq"),
        ("nvfp4", "phi3", "rtn"),
        ("mxfp4", "qwen3", "gptq"),
        ("mxfp4", "phi3", "rtn"),
        ("wnvfp4a16kv16", "qwen3", "rtn"),
        ("wmxfp4a16kv16", "qwen3", "rtn"),
    ],
)
def test_transformers_computes_what_the_checkpoint_does(
    tiny: Tiny, tmp_path: Path, text_file: Path, spec: str, architecture: str, weights: str
) -> None:
    checkpoint = made(tiny, tmp_path / "ckpt", text_file, spec, architecture, weights=weights)
    export(checkpoint, "vllm", tmp_path / "out", device="cuda")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        # its weights are unpacked while it first runs, to bfloat16, which holds them exactly
        with suppress(RuntimeError):
            model(TOKENS)
        torch.nn.Module.float(model)
        theirs, ours = model(TOKENS).logits, dfrot.load(checkpoint)[0](TOKENS).logits
    assert torch.allclose(theirs, ours, atol=1e-5 * float(ours.abs().max()))  # float32 through two blocks


@every_format
def test_the_scheme_is_compressed_tensors_preset(tiny: Tiny, tmp_path: Path, text_file: Path, word: str) -> None:
    export(made(tiny, tmp_path / "ckpt", text_file, word), "vllm", tmp_path / "out", device="cuda")
    found, preset = scheme_of(tmp_path / "out"), preset_name_to_scheme(word.upper(), ["Linear"])
    for kind in ("weights", "input_activations"):
        ours, theirs = (getattr(each, kind).model_dump(exclude={"observer"}) for each in (found, preset))
        assert ours == theirs
    assert found.format == f"{word}-pack-quantized"


@every_format
def test_tensors_are_laid_out_as_compressed_tensors_does(
    tiny: Tiny, tmp_path: Path, text_file: Path, word: str
) -> None:
    """It unpacks to our weights, and packs these to the same bytes."""
    path = made(tiny, tmp_path / "ckpt", text_file, word)
    export(path, "vllm", tmp_path / "out", device="cuda")
    stored, scheme = load_file(tmp_path / "out" / "model-00002-of-00003.safetensors"), scheme_of(tmp_path / "out")
    prefix = "model.layers.0.mlp.gate_proj."
    parts = {name.removeprefix(prefix): tensor for name, tensor in stored.items() if name.startswith(prefix)}
    names = COMPRESSORS[word].compression_param_names(scheme)
    factor = {"input_global_scale"} if word == "nvfp4" else set()  # which belongs to the input
    assert parts.keys() == {*names} | factor
    weight = Checkpoint.open(path).layer(0, "mlp.gate_proj").weight
    unpacked = COMPRESSORS[word].decompress(parts, scheme)
    assert torch.equal(unpacked["weight"].float(), weight)
    again = COMPRESSORS[word].compress(unpacked | {"weight": weight + 0.0}, scheme)  # without the zeros' signs
    assert again.keys() == parts.keys()
    for name, tensor in parts.items():
        assert torch.equal(again[name].float(), tensor.float()), name
        assert again[name].dtype == tensor.dtype


def test_layers_that_vllm_fuses_have_one_factor(tiny: Tiny, tmp_path: Path, text_file: Path) -> None:
    """It takes the largest of theirs for all of them."""
    export(made(tiny, tmp_path / "ckpt", text_file, "nvfp4", weights="gptq"), "vllm", tmp_path / "out", device="cuda")
    for shard in ("model-00002-of-00003.safetensors", "model-00003-of-00003.safetensors"):
        stored = load_file(tmp_path / "out" / shard)
        block = next(name for name in stored if name.endswith("q_proj.weight_packed")).split("self_attn")[0]
        for stage in (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj")):
            for kind in ("weight_global_scale", "input_global_scale"):
                assert len({float(stored[f"{block}{name}.{kind}"]) for name in stage}) == 1
        scales = stored[f"{block}mlp.down_proj.weight_scale"].float()
        assert 224 < scales.max() <= 448  # the factor uses E4M3's range as far as a power of two can


@pytest.mark.parametrize(
    ("spec", "words", "export_words", "message"),
    [
        ("nvfp4", {}, {}, "no kernel for NVFP4 on a CPU. Give --device cuda"),
        (
            "mxfp4",
            {},
            {"device": "cuda", "plugin": True},
            "no kernel for MXFP4 on a CPU. The plugin knows integers only",
        ),
        (
            "nvfp4",
            {"fold_only": False},
            {"device": "cuda"},
            r"mlp\.down_proj is rotated.*NVFP4. Quantize with --fold-only",
        ),
        ("wnvfp4a8kv16", {}, {"device": "cuda"}, "no kernel for wnvfp4a8.*wnvfp4anvfp4, wnvfp4a16, wmxfp4amxfp4"),
        ("wnvfp4amxfp4kv16", {}, {"device": "cuda"}, "no kernel for wnvfp4amxfp4"),
        ("nvfp4", {"act_clip": 0.9}, {"device": "cuda"}, r"clipped at 0\.9 of the range.*--act-clip 1"),
    ],
)
def test_what_vllm_would_run_otherwise_is_refused(
    tiny: Tiny,
    tmp_path: Path,
    text_file: Path,
    spec: str,
    words: dict[str, Any],
    export_words: dict[str, Any],
    message: str,
) -> None:
    checkpoint = made(tiny, tmp_path / "ckpt", text_file, spec, **words)
    with pytest.raises(UserError, match=message):
        export(checkpoint, "vllm", tmp_path / "out", **export_words)


def test_gpus_that_do_not_multiply_floats_of_4_bits_are_said(tiny: Tiny, tmp_path: Path, text_file: Path) -> None:
    said = export(made(tiny, tmp_path / "ckpt", text_file, "nvfp4"), "vllm", tmp_path / "out", device="cuda")
    assert "only GPUs that multiply NVFP4" in said[0]
    assert "verified on a GPU" in said[1]


def test_other_exports_take_floats_for_what_they_stand_for(tiny: Tiny, tmp_path: Path, text_file: Path) -> None:
    checkpoint = made(tiny, tmp_path / "ckpt", text_file, "wnvfp4a16kv16")
    export(checkpoint, "huggingface", tmp_path / "plain")
    with torch.no_grad():
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")(TOKENS).logits
        ours = dfrot.load(checkpoint)[0](TOKENS).logits
    assert torch.allclose(plain, ours, atol=1e-5 * float(ours.abs().max()))
    with pytest.raises(UserError, match=r"the weights of .* are in NVFP4"):
        export(checkpoint, "gguf", tmp_path / "gguf", kind="q4_0")
