"""What comes out is loaded by transformers in a process that knows nothing of dfrot, and compared."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import dfrot
from dfrot.export import export
from dfrot.export.checkpoint import Checkpoint, Layer, write_directory
from dfrot.system.errors import UserError
from tests.tiny_models import CONFIGS

Tiny = Callable[[str], Path]
TOKENS = torch.randint(1, 96, (2, 24), generator=torch.Generator().manual_seed(7))

_LOGITS = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
assert "dfrot" not in sys.modules
AutoTokenizer.from_pretrained(sys.argv[1])
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
torch.save(model(torch.load(sys.argv[2])).logits.detach(), sys.argv[3])
"""


def made(tiny: Tiny, out: Path, architecture: str = "llama", **words: str) -> Path:
    recipe = dfrot.Recipe.parse(**{"method": "quarot", "weights": "rtn", "fold_only": True, **words})  # type: ignore[arg-type]
    return dfrot.quantize(tiny(architecture), recipe, out).path


@pytest.mark.parametrize(
    "words", [{"spec": "w4g16a16kv16"}, {"spec": "w8a16kv16"}, {"spec": "w3a16kv16", "weight_symmetric": False}]
)
def test_plain_transformers_computes_what_the_checkpoint_does(
    tiny: Tiny, tmp_path: Path, words: dict[str, Any]
) -> None:
    checkpoint = made(tiny, tmp_path / "ckpt", **words)
    assert export(checkpoint, "huggingface", tmp_path / "plain") == []
    torch.save(TOKENS, tmp_path / "tokens")
    files = [str(tmp_path / name) for name in ("plain", "tokens", "logits")]
    subprocess.run([sys.executable, "-c", _LOGITS, *files], check=True)
    ours = dfrot.load(checkpoint)[0](TOKENS).logits.detach()
    assert torch.allclose(torch.load(tmp_path / "logits"), ours, atol=1e-4)  # float32, two blocks; logits are about 20


@pytest.mark.parametrize("architecture", CONFIGS)
def test_a_model_that_is_only_rotated_is_the_model(tiny: Tiny, tmp_path: Path, architecture: str) -> None:
    checkpoint = made(tiny, tmp_path / "ckpt", architecture, spec="w16a16kv16", dtype="float64")
    export(checkpoint, "huggingface", tmp_path / "plain")
    models = [
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64)
        for path in (tmp_path / "plain", tiny(architecture))
    ]
    rotated, original = (model(TOKENS, use_cache=False).logits.detach() for model in models)
    # transformers' norms compute in float32 whatever the model's dtype
    assert torch.allclose(rotated, original, atol=1e-5 * float(original.abs().max()))


def test_what_plain_transformers_does_not_quantize_is_said(tiny: Tiny, tmp_path: Path) -> None:
    said = export(made(tiny, tmp_path / "ckpt", spec="w4a8kv4"), "huggingface", tmp_path / "plain")
    assert [sentence.split()[0] for sentence in said] == ["activations", "keys"]
    assert "in 8 bits here, and not quantized by transformers" in said[0]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"fold_only": False}, r"rotates at mlp\.down_proj.*--fold-only"),
        (
            {"method": "duquant", "fold_only": None, "block": 16},
            r"duquant, which rotates.*rangerot --fold-only",
        ),
    ],
)
def test_online_rotations_are_refused(
    tiny: Tiny, tmp_path: Path, text_file: Path, words: dict[str, str], message: str
) -> None:
    checkpoint = made(tiny, tmp_path / "ckpt", calib=str(text_file), calib_tokens=64, **words)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=message):
        export(checkpoint, "huggingface", tmp_path / "plain")
    assert not (tmp_path / "plain").exists()


def test_an_interrupted_export_leaves_nothing_behind(tiny: Tiny, tmp_path: Path) -> None:
    checkpoint, blocks = Checkpoint.open(made(tiny, tmp_path / "ckpt")), []

    def interrupted(name: str, layer: Layer) -> dict[str, torch.Tensor]:
        blocks.append(name)
        if len(blocks) == 10:  # in the second block, when the first is written
            raise KeyboardInterrupt
        return {"weight": layer.weight}

    with pytest.raises(KeyboardInterrupt):
        write_directory(checkpoint, tmp_path / "out", interrupted, {})
    assert list((tmp_path / "out").glob("*.*")) == []
    export(checkpoint.path, "huggingface", tmp_path / "out")


def test_a_directory_with_something_in_it_is_left_alone(tiny: Tiny, tmp_path: Path) -> None:
    checkpoint = made(tiny, tmp_path / "ckpt")
    before = {file.name: file.read_bytes() for file in checkpoint.iterdir()}
    with pytest.raises(UserError, match="is not empty"):
        export(checkpoint, "huggingface", checkpoint)
    assert {file.name: file.read_bytes() for file in checkpoint.iterdir()} == before
    with pytest.raises(UserError, match="is a model, but not a dfrot checkpoint"):
        export(tiny("llama"), "huggingface", tmp_path / "plain")
