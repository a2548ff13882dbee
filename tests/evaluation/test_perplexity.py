import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

import dfrot
from dfrot.evaluation import perplexity as module
from dfrot.evaluation.record import Record, append_records, model_size
from dfrot.evaluation.run import Measurement, evaluate
from dfrot.system.errors import UserError
from tests.tiny_models import CONFIGS

Tiny = Callable[[str], Path]
BLOCKS = torch.randint(1, 96, (3, 40), generator=torch.Generator().manual_seed(11))


SIZES = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}


@pytest.mark.parametrize(
    ("architecture", "words"),
    [
        ("qwen2", {}),
        ("granite", {"logits_scaling": 0.05}),  # what follows the head: a divisor,
        ("cohere", {"logit_scale": 20.0}),  # a factor,
        ("nanochat", {"final_logit_softcapping": 0.05}),  # a soft cap
    ],
)
def test_perplexity_is_the_exponential_of_transformers_own_loss(
    architecture: str, words: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[architecture](**SIZES, **words)).eval()
    model.get_output_embeddings().weight.data *= 5
    with torch.no_grad():
        losses = [model(block[None], labels=block[None]).loss.item() for block in BLOCKS]
    monkeypatch.setattr(module, "_LOGIT_POSITIONS", 16)  # more than one slice
    assert dfrot.perplexity(model, BLOCKS) == pytest.approx(math.exp(sum(losses) / 3), rel=1e-5)
    found = module.divergence(model, model, BLOCKS)
    assert float(found["nll"].mean()) == pytest.approx(sum(losses) / 3, rel=1e-5)
    assert not found["kl"].any()


def test_a_uniform_model_has_the_vocabulary_as_perplexity(tiny: Tiny) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny("qwen2"))
    torch.nn.init.zeros_(model.lm_head.weight)
    assert dfrot.perplexity(model, BLOCKS) == pytest.approx(96, rel=1e-5)


@pytest.mark.parametrize(("times", "overflows"), [(10.0, False), (200.0, False), (1000.0, True), (1e6, True)])
def test_a_perplexity_that_no_float_holds_is_infinite(tiny: Tiny, times: float, overflows: bool) -> None:
    """exp overflows beyond 709.78 nats a token; a model that is sure of the wrong tokens gets there."""
    model = AutoModelForCausalLM.from_pretrained(tiny("qwen2"))
    model.lm_head.weight.data *= times
    with torch.no_grad():
        mean = sum(model(block[None], labels=block[None]).loss.item() for block in BLOCKS) / 3
    assert (mean > 709.78) == overflows
    assert mean < 690 or overflows
    expected = math.inf if overflows else math.exp(mean)
    assert dfrot.perplexity(model, BLOCKS) == pytest.approx(expected, rel=1e-3)  # 700 nats at float32's 2⁻²³, ten times


def test_nan_logits_are_an_error_and_not_a_number(tiny: Tiny) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny("qwen2"))
    torch.nn.init.constant_(model.model.norm.weight, torch.nan)
    with pytest.raises(UserError, match="logits are NaN"):
        dfrot.perplexity(model, BLOCKS)
    with pytest.raises(UserError, match="needs two tokens"):
        dfrot.perplexity(model, BLOCKS[:, :1])


def test_a_record_holds_numbers_and_conditions(tiny: Tiny, tmp_path: Path, text_file: Path) -> None:
    recipe = dfrot.Recipe.parse("quarot", "rtn", seed=5)
    path = dfrot.quantize(tiny("llama"), recipe, tmp_path / "out").path
    record = evaluate(str(path), Measurement((str(text_file),), seq_len=32, max_tokens=100))
    assert set(record.metrics) == {"ppl/text.txt"}
    assert record.recipe == recipe.to_json()
    assert record.conditions["tokens"] == {"text.txt": 96}
    assert (record.conditions["seed"], record.conditions["dtype"]) == (5, "float32")
    append_records(tmp_path / "results.jsonl", [record, record])
    lines = (tmp_path / "results.jsonl").read_text().splitlines()
    assert [Record.from_json(json.loads(line)) for line in lines] == [record, record]
    with pytest.raises(UserError, match="schema 1, got 2"):
        Record.from_json({"schema": 2})


def test_two_texts_of_one_name_are_refused(text_file: Path) -> None:
    with pytest.raises(UserError, match="names must differ"):
        Measurement((str(text_file), f"{text_file.parent}/./{text_file.name}"))


@pytest.mark.parametrize("architecture", CONFIGS)
def test_sizes_are_those_of_the_weights(tiny: Tiny, tmp_path: Path, architecture: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny(architecture))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    plain = model_size(tiny(architecture))
    assert plain["weight_bytes"] == 4 * parameters
    assert plain["unquantized_bytes"] == 2 * parameters
    assert plain["decoder_bits_per_weight"] == 32

    packed = model_size(dfrot.quantize(tiny(architecture), dfrot.Recipe.parse("none", "rtn"), tmp_path / "out").path)
    assert packed["unquantized_bytes"] == plain["unquantized_bytes"]
    linears = [m for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) and "layers" in name]
    stored = sum(m.weight.numel() // 2 + 2 * m.out_features for m in linears)  # nibbles and bfloat16 scales
    assert packed["decoder_bits_per_weight"] == 8 * stored / sum(m.weight.numel() for m in linears)
