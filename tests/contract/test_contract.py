"""What every method × architecture must do. A new method or architecture joins by its row in the tables."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import dfrot
from dfrot.models.graph import GRAPHS
from dfrot.models.norms import use_torch_norms_
from tests.tiny_models import CONFIGS

Tiny = Callable[[str], Path]
METHODS: dict[str, dict[str, Any]] = {
    "none": {"method": "none"},
    "quarot": {"method": "quarot"},
    "quarot-ro": {"method": "quarot", "rotation": "orthogonal"},
    "quarot-heads": {"method": "quarot", "head_mixing": True},
    "dfrot": {"method": "dfrot", "steps": 3, "calib_tokens": 64, "calib_seq_len": 32},
    "rangerot": {"method": "rangerot", "steps": 3, "calib_tokens": 64, "calib_seq_len": 32},
    "learned": {"method": "learned", "steps": 3, "learn_steps": 3, "learn_tokens": 32}
    | {"calib_tokens": 128, "calib_seq_len": 32},
    "duquant": {"method": "duquant", "block": 8, "greedy_steps": 4, "calib_tokens": 64, "calib_seq_len": 32},
    "duquant-quarot": {"method": "duquant", "base": "quarot", "permutations": 2, "greedy_steps": 4, "calib_tokens": 64},
}
WEIGHTS: dict[str, dict[str, Any]] = {
    "rtn": {},
    "gptq": {"calib_tokens": 128, "calib_seq_len": 32},
    "lwc": {"calib_tokens": 64, "calib_seq_len": 32, "epochs": 2},
}
FLOATS = ("wnvfp4anvfp4kv8", "mxfp4")
TOKENS = torch.randint(1, 96, (2, 24), generator=torch.Generator().manual_seed(7))

every_architecture = pytest.mark.parametrize("architecture", CONFIGS)
every_method = pytest.mark.parametrize("method", METHODS)


def make(tiny: Tiny, out: Path, architecture: str, method: str, text: Path, **options: Any) -> Path:
    recipe = dfrot.Recipe.parse(**{"weights": "rtn", "tune": "none", **METHODS[method], "calib": str(text), **options})
    return dfrot.quantize(tiny(architecture), recipe, out).path


def logits(path: Path, tokens: torch.Tensor = TOKENS, **load: Any) -> torch.Tensor:
    model, _ = dfrot.load(path, **load)
    with torch.no_grad():
        return model(tokens, use_cache=False).logits


def original_logits(path: Path) -> torch.Tensor:
    """transformers in float64, its norms computed in float64 too."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64)
    use_torch_norms_(model, GRAPHS[model.config.model_type])
    with torch.no_grad():
        return model(TOKENS, use_cache=False).logits


@every_architecture
@every_method
def test_rotation_leaves_logits_unchanged_and_the_error_falls_with_precision(
    tiny: Tiny, tmp_path: Path, text_file: Path, architecture: str, method: str
) -> None:
    expected = original_logits(tiny(architecture))
    error = {}
    for dtype in ("float32", "float64"):
        path = make(tiny, tmp_path / dtype, architecture, method, text_file, spec="w16a16kv16", dtype=dtype)
        error[dtype] = ((logits(path).double() - expected).norm() / expected.norm()).item()
    assert error["float64"] <= error["float32"] / 1e4
    assert 0 < error["float32"] < 1e-4  # 2⁻²³ times the outlier's 400 and a few dozen additions


@pytest.mark.parametrize(
    ("architecture", "method", "weights"),
    [
        *(("llama", method, "gptq") for method in METHODS),
        *(("llama", "dfrot", weights) for weights in WEIGHTS if weights != "gptq"),
        *((architecture, "dfrot", "gptq") for architecture in CONFIGS if architecture != "llama"),
    ],
)
def test_the_same_seed_gives_the_same_bytes(
    tiny: Tiny, tmp_path: Path, text_file: Path, architecture: str, method: str, weights: str
) -> None:
    """Every method, every weight quantizer and every architecture."""
    words = {"weights": weights, **WEIGHTS[weights]}
    first, second = (
        make(tiny, tmp_path / run, architecture, method, text_file, **words) for run in ("first", "second")
    )
    names = sorted(file.name for file in first.iterdir())
    assert names == sorted(file.name for file in second.iterdir())
    assert all((first / name).read_bytes() == (second / name).read_bytes() for name in names)


@every_method
def test_a_run_that_shares_with_one_of_another_cache_makes_what_it_makes_alone(
    tiny: Tiny, tmp_path: Path, text_file: Path, method: str
) -> None:
    made = []
    for name, specs in {"alone": ["w4a4kv8"], "shared": ["w4a4kv4", "w4a4kv8"]}.items():
        for spec in specs:
            words = {"weights": "rtn", "spec": spec, **METHODS[method], "calib": str(text_file), "tune": "none"}
            recipe, out = dfrot.Recipe.parse(**words), tmp_path / f"{name}-{spec}"
            dfrot.quantize(tiny("llama"), recipe, out, reuse_dir=tmp_path / name)
        made.append(out)
    alone, shared = ({file.name: file.read_bytes() for file in out.iterdir()} for out in made)
    assert alone == shared


@pytest.mark.parametrize("method", ["rangerot", "duquant"])
@pytest.mark.parametrize("weights", WEIGHTS)
def test_no_tensor_depends_on_how_keys_and_values_are_kept(
    tiny: Tiny, tmp_path: Path, text_file: Path, method: str, weights: str
) -> None:
    words = {"weights": weights, **WEIGHTS[weights]}
    packed, plain = (
        make(tiny, tmp_path / spec, "llama", method, text_file, spec=spec, **words) for spec in ("w4a4kv4", "w4a4kv16")
    )
    shards = [file.name for file in packed.glob("*.safetensors")]
    assert len(shards) > 2
    assert all((packed / name).read_bytes() == (plain / name).read_bytes() for name in shards)


@every_architecture
@pytest.mark.parametrize("spec", ["w4a4kv4", "w3g16a8kv2", "wnvfp4anvfp4kv8"])
def test_generating_with_the_quantized_cache_equals_generating_without_a_cache(
    tiny: Tiny, tmp_path: Path, text_file: Path, architecture: str, spec: str
) -> None:
    words = {"spec": spec, "calib_tokens": 64}
    model, _ = dfrot.load(make(tiny, tmp_path / "out", architecture, "quarot", text_file, **words))
    settings = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    prompt = {"input_ids": TOKENS, "attention_mask": torch.ones_like(TOKENS)}
    with_cache = model.generate(**prompt, use_cache=True, **settings)
    without = model.generate(**prompt, use_cache=False, **settings)
    assert with_cache.shape == (2, 36)
    assert torch.equal(with_cache, without)


@every_method
@pytest.mark.parametrize("weights", WEIGHTS)
def test_every_method_with_every_weight_quantizer_loads_and_generates(
    tiny: Tiny, tmp_path: Path, text_file: Path, method: str, weights: str
) -> None:
    """The tokens that are most likely, one after the other, by whole passes."""
    path = make(tiny, tmp_path / "out", "qwen3", method, text_file, **{"weights": weights, **WEIGHTS[weights]})
    model, _ = dfrot.load(path)
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    made = model.generate(TOKENS, attention_mask=torch.ones_like(TOKENS), **settings)
    assert made.shape == (2, 32)
    assert torch.equal(made[:, :24], TOKENS)
    with torch.no_grad():
        whole = model(made, use_cache=False).logits
    assert whole.isfinite().all()
    assert torch.equal(made[:, 24:], whole[:, 23:-1].argmax(-1))


@pytest.mark.parametrize("spec", FLOATS)
@pytest.mark.parametrize(
    ("method", "weights"), [*((method, "rtn") for method in METHODS), ("quarot", "gptq"), ("duquant", "gptq")]
)
def test_every_method_takes_floats_of_4_bits(
    tiny: Tiny, tmp_path: Path, text_file: Path, method: str, weights: str, spec: str
) -> None:
    words = {"weights": weights, "spec": spec, **WEIGHTS[weights]}
    found = logits(make(tiny, tmp_path / "out", "qwen3", method, text_file, **words))
    expected = original_logits(tiny("qwen3"))
    assert 0 < (found - expected).norm() < expected.norm()


@pytest.mark.parametrize("method", [method for method in METHODS if method != "none"])
def test_rotation_helps_a_model_with_outliers(tiny: Tiny, tmp_path: Path, text_file: Path, method: str) -> None:
    expected = original_logits(tiny("llama"))
    error = {
        name: (logits(make(tiny, tmp_path / name, "llama", name, text_file, spec="w16a4kv16")) - expected).norm()
        for name in ("none", method)
    }
    assert error[method] < error["none"]


_LOGITS_IN_A_NEW_PROCESS = """
import sys, torch, dfrot
from transformers import AutoModelForCausalLM
tokens = torch.load(sys.argv[1])
torch.save([AutoModelForCausalLM.from_pretrained(path)(tokens).logits for path in sys.argv[3:]], sys.argv[2])
"""


def test_a_new_process_loads_every_family_through_transformers_with_identical_logits(
    tiny: Tiny, tmp_path: Path, text_file: Path
) -> None:
    paths = [make(tiny, tmp_path / name, name, "quarot", text_file) for name in CONFIGS]
    torch.save(TOKENS, tmp_path / "tokens.pt")
    arguments = [tmp_path / "tokens.pt", tmp_path / "logits.pt", *paths]
    subprocess.run([sys.executable, "-c", _LOGITS_IN_A_NEW_PROCESS, *map(str, arguments)], check=True)
    for path, theirs in zip(paths, torch.load(tmp_path / "logits.pt"), strict=True):
        assert torch.equal(logits(path), theirs)
