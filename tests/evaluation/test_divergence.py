import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import dfrot
from dfrot.evaluation.perplexity import divergence
from dfrot.evaluation.run import Measurement, evaluate
from dfrot.system.errors import UserError

Tiny = Callable[[str], Path]
BLOCKS = torch.randint(1, 96, (2, 20), generator=torch.Generator().manual_seed(3))


def test_a_model_does_not_diverge_from_itself(tiny: Tiny) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny("llama"))
    found = divergence(model, model, BLOCKS)
    assert (found["kl"] == 0).all()
    assert found["agrees"].all()
    assert torch.equal(found["nll"], found["original_nll"])


def test_a_case_worked_by_hand(tiny: Tiny) -> None:
    """The original gives the first of 96 tokens half of the probability, the model a quarter; the rest is even."""
    original, model = (AutoModelForCausalLM.from_pretrained(tiny("qwen2")) for _ in range(2))
    for one, odds in ((original, 95.0), (model, 95 / 3)):
        torch.nn.init.zeros_(one.lm_head.weight)
        one.lm_head.bias = torch.nn.Parameter(torch.zeros(96))
        one.lm_head.bias.data[0] = math.log(odds)
    found = divergence(model, original, BLOCKS)
    kl = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    assert found["kl"].allclose(torch.full((2, 19), kl), rtol=1e-5)
    assert found["nll"].allclose(torch.full((2, 19), -math.log(0.75 / 95)), rtol=1e-5)
    assert found["agrees"].all()
    model.lm_head.bias.data[:2] = torch.tensor([0.0, 1.0])
    assert not divergence(model, original, BLOCKS)["agrees"].any()


def test_a_record_has_the_means_and_the_file_every_token(tiny: Tiny, tmp_path: Path, text_file: Path) -> None:
    path = dfrot.quantize(tiny("qwen3"), dfrot.Recipe.parse("quarot", "rtn"), tmp_path / "out").path
    plain = evaluate(str(path), Measurement((str(text_file),), seq_len=32, max_tokens=96)).metrics
    measurement = Measurement((str(text_file),), seq_len=32, max_tokens=96, against=str(tiny("qwen3")))
    record = evaluate(str(path), measurement, per_token=tmp_path / "tokens.safetensors")
    tokens = load_file(tmp_path / "tokens.safetensors")
    assert record.metrics["ppl/text.txt"] == pytest.approx(plain["ppl/text.txt"], rel=1e-6)
    assert record.metrics["kl/text.txt"] == pytest.approx(float(tokens["text.txt/kl"].mean()), rel=1e-5)
    assert record.metrics["kl/text.txt"] > 0
    assert record.metrics["top1/text.txt"] == pytest.approx(float(tokens["text.txt/agrees"].float().mean()))
    assert tokens["text.txt/token_ids"].shape == (3, 32)
    assert tokens["text.txt/kl"].shape == (3, 31)


def test_models_with_other_vocabularies_are_not_compared(tiny: Tiny, tmp_path: Path, text_file: Path) -> None:
    other = AutoModelForCausalLM.from_pretrained(tiny("llama"))
    other.resize_token_embeddings(100)
    other.save_pretrained(tmp_path)
    for file in tiny("llama").glob("tokenizer*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(UserError, match="the model has 96 tokens"):
        evaluate(str(tiny("llama")), Measurement((str(text_file),), seq_len=32, against=str(tmp_path)))


def test_what_does_not_go_together_is_said() -> None:
    with pytest.raises(UserError, match="give texts for perplexity, or tasks"):
        Measurement()
    with pytest.raises(UserError, match="predictions are compared on texts"):
        Measurement(tasks=("piqa",), against="somewhere")
    with pytest.raises(UserError, match="--against MODEL"):
        evaluate("somewhere", Measurement(("pydoc",)), per_token=Path("tokens.safetensors"))
