"""A checkpoint under transformers' other classes: no head, or a head of another kind."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    pipeline,
)

import dfrot
from dfrot.runtime.linear import QuantLinear
from dfrot.system.errors import UserError
from tests.tiny_models import CONFIGS

Tiny = Callable[[str], Path]
TOKENS = torch.randint(1, 96, (2, 24), generator=torch.Generator().manual_seed(5))


@pytest.fixture
def checkpoint(request: pytest.FixtureRequest, tiny: Tiny, tmp_path: Path) -> Path:
    recipe = dfrot.Recipe.parse("quarot", "rtn", "w4a4kv4")
    return dfrot.quantize(tiny(request.param), recipe, tmp_path / "checkpoint").path


every_family = pytest.mark.parametrize("checkpoint", CONFIGS, indirect=True)


@torch.no_grad()
def hidden(model: Any) -> torch.Tensor:
    return model(TOKENS).last_hidden_state


@every_family
def test_without_a_head_a_checkpoint_computes_the_decoder_of_the_language_model(checkpoint: Path) -> None:
    language_model, tokenizer = dfrot.load(checkpoint)
    assert torch.equal(hidden(AutoModel.from_pretrained(checkpoint)), hidden(language_model.model))
    features = pipeline("feature-extraction", model=str(checkpoint))("the fox", return_tensors=True)
    ids = tokenizer("the fox", return_tensors="pt").input_ids
    with torch.no_grad():
        assert torch.equal(features, language_model.model(ids).last_hidden_state)


@pytest.mark.parametrize("name", CONFIGS)
def test_without_a_head_and_without_quantization_it_is_the_original(tiny: Tiny, tmp_path: Path, name: str) -> None:
    path = dfrot.quantize(tiny(name), dfrot.Recipe.parse("none", "rtn", "w16a16kv16"), tmp_path / "out").path
    # norms and activation functions are rounded once here, in transformers' own modules several times
    torch.testing.assert_close(hidden(AutoModel.from_pretrained(path)), hidden(AutoModel.from_pretrained(tiny(name))))


@every_family
@pytest.mark.parametrize("kind", [AutoModelForSequenceClassification, AutoModelForTokenClassification])
def test_another_head_is_new_and_reads_the_quantized_decoder(checkpoint: Path, kind: Any) -> None:
    model, report = kind.from_pretrained(checkpoint, num_labels=3, output_loading_info=True)
    assert {name.partition(".")[0] for name in report["missing_keys"]} == {"score"}
    with torch.no_grad():
        expected = model.score(hidden(dfrot.load(checkpoint)[0].model))
        found = model(TOKENS).logits
    assert torch.equal(found, expected if found.ndim == 3 else expected[:, -1])


@every_family
@pytest.mark.parametrize("kind", [AutoModel, AutoModelForSequenceClassification, AutoModelForCausalLM])
def test_a_saved_model_loads_again(checkpoint: Path, tmp_path: Path, kind: Any) -> None:
    model = kind.from_pretrained(checkpoint)
    model.save_pretrained(tmp_path / "saved")
    again, report = kind.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not any(report.values())
    assert any(isinstance(module, QuantLinear) for module in again.modules())
    with torch.no_grad():
        assert torch.equal(again(TOKENS)[0], model(TOKENS)[0])


@pytest.mark.parametrize("checkpoint", ["llama"], indirect=True)
def test_a_class_under_which_transformers_would_find_no_tensor_is_refused(checkpoint: Path) -> None:
    with pytest.raises(UserError, match="LlamaForQuestionAnswering has no 'model'"):
        AutoModelForQuestionAnswering.from_pretrained(checkpoint)


@pytest.mark.parametrize("checkpoint", ["mistral"], indirect=True)
def test_a_class_that_calls_the_decoder_as_checkpoints_do_is_not(checkpoint: Path) -> None:
    model, report = AutoModelForQuestionAnswering.from_pretrained(checkpoint, output_loading_info=True)
    assert {name.partition(".")[0] for name in report["missing_keys"]} == {"qa_outputs"}
    with torch.no_grad():
        expected = model.qa_outputs(hidden(dfrot.load(checkpoint)[0].model))[..., 0]
        assert torch.equal(model(TOKENS).start_logits, expected)
