"""Of a model of text and pictures the language model is quantized; the authority is the whole model in transformers."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

import dfrot
from dfrot.evaluation.record import model_size
from dfrot.models.source import open_source
from dfrot.models.stream import logits_by_blocks, require_same_logits
from dfrot.pipeline.estimate import Estimate
from dfrot.system.errors import UserError
from tests.tiny_models import MULTIMODAL

TOKENS = torch.arange(1, 49).view(2, 24)
every_model = pytest.mark.parametrize("name", MULTIMODAL)


@torch.no_grad()
def of_the_whole(path: Path) -> torch.Tensor:
    return AutoModelForImageTextToText.from_pretrained(path).eval()(TOKENS).logits


def close(found: torch.Tensor, expected: torch.Tensor, bound: float) -> bool:
    return bool((found - expected).norm() < bound * expected.norm())


@every_model
def test_text_alone_has_the_logits_that_the_whole_model_has(tiny: Callable[[str], Path], name: str) -> None:
    path = tiny(name)
    source, expected = open_source(str(path)), of_the_whole(path)
    assert source.part_of == name
    assert close(logits_by_blocks(source, TOKENS), expected, 1e-6)
    assert close(dfrot.load(path)[0](TOKENS).logits, expected, 1e-6)
    require_same_logits(source)


@every_model
def test_the_checkpoint_is_a_language_model_and_its_folds_leave_logits_alone(
    tiny: Callable[[str], Path], tmp_path: Path, name: str
) -> None:
    path = tiny(name)
    recipe = dfrot.Recipe.parse("quarot", "rtn", "w16a16kv16")
    made = dfrot.quantize(path, recipe, tmp_path / "out").path
    config = json.loads((made / "config.json").read_text())
    assert not {"vision_config", "text_config"} & config.keys()
    assert config["architectures"][0].endswith("ForCausalLM")
    assert close(dfrot.load(made)[0](TOKENS).logits, of_the_whole(path), 1e-5)


def test_in_four_bits_it_says_that_the_rest_is_left_out(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    path = tiny("gemma3")
    result = dfrot.quantize(path, dfrot.Recipe.parse("quarot", "rtn", "w4a4kv4", tune="none"), tmp_path / "out")
    assert "the language model of gemma3, without the rest: it reads text alone" in result.summary()
    model, tokenizer = dfrot.load(result.path)
    assert model.generate(**tokenizer("ab", return_tensors="pt"), max_new_tokens=3, min_new_tokens=3).shape[1] == 5


@every_model
def test_its_size_is_that_of_the_language_model(tiny: Callable[[str], Path], name: str) -> None:
    path = tiny(name)
    tensors = load_file(path / "model.safetensors")
    others = ("vision", "visual", "multi_modal", "connector")
    of_text = [tensor for key, tensor in tensors.items() if not any(other in key for other in others)]
    assert (
        model_size(path)["weight_bytes"]
        == sum(tensor.nbytes for tensor in of_text)
        < sum(tensor.nbytes for tensor in tensors.values())
    )
    source = open_source(str(path))
    assert len(source.rest) + len(source.stored) == len(tensors)


@every_model
def test_what_was_loaded_can_be_saved_as_a_language_model(
    tiny: Callable[[str], Path], tmp_path: Path, name: str
) -> None:
    dfrot.load(tiny(name))[0].save_pretrained(tmp_path / "saved")
    saved, report = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not any(report.values())
    assert close(saved.eval()(TOKENS).logits, of_the_whole(tiny(name)), 1e-6)


@pytest.mark.parametrize("tied", [True, False])
def test_a_head_of_its_own_is_read_whatever_the_whole_says_of_ties(
    tiny: Callable[[str], Path], tmp_path: Path, tied: bool
) -> None:
    path = changed(tiny("llava"), tmp_path / "new", lambda found: None, tie_word_embeddings=tied)
    found = open_source(str(path))
    assert not found.tied
    assert torch.equal(found.head(), load_file(path / "model.safetensors")["language_model.lm_head.weight"])


def test_tokens_that_end_a_text_and_an_older_chat_template_are_kept(
    tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    path = changed(tiny("gemma3"), tmp_path / "new", lambda found: None, eos_token_id=[1, 7])
    config = json.loads((path / "config.json").read_text())
    del config["text_config"]["eos_token_id"]
    (path / "config.json").write_text(json.dumps(config))
    (path / "chat_template.json").write_text('{"chat_template": "{{ messages }}"}')
    made = dfrot.quantize(path, dfrot.Recipe.parse("quarot", "rtn", tune="none"), tmp_path / "out").path
    model, tokenizer = dfrot.load(made)
    assert model.config.eos_token_id == [1, 7]
    assert tokenizer.chat_template == "{{ messages }}"


def test_the_check_of_a_source_counts_the_whole_model(tiny: Callable[[str], Path]) -> None:
    source, recipe = open_source(str(tiny("llava"))), dfrot.Recipe.parse("quarot", "rtn")
    alone = Estimate.of(replace(source, rest=()), recipe, check_source="always")
    assert Estimate.of(source, recipe, check_source="always").check > alone.check > 0


def changed(path: Path, to: Path, tensors: Callable[[dict[str, Any]], Any], **config: Any) -> Path:
    to.mkdir()
    found = load_file(path / "model.safetensors")
    tensors(found)
    save_file(found, to / "model.safetensors", {"format": "pt"})
    record = json.loads((path / "config.json").read_text())
    (to / "config.json").write_text(json.dumps(record | config))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (to / name).write_bytes((path / name).read_bytes())
    return to


def test_one_that_is_quantized_already_is_refused(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    path = changed(tiny("llava"), tmp_path / "new", lambda found: None, quantization_config={"quant_method": "gptq"})
    with pytest.raises(UserError, match="is quantized already"):
        open_source(str(path))


def test_a_tensor_of_the_language_model_without_place_is_named(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    more = {"language_model.model.layers.0.extra.weight": torch.ones(3), "vision_tower.extra": torch.ones(3)}
    path = changed(tiny("llava"), tmp_path / "new", lambda found: found.update(more))
    with pytest.raises(UserError, match=r"hold 'model\.layers\.0\.extra\.weight'"):
        open_source(str(path))


def test_without_the_language_model_it_is_refused(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    embedding = "language_model.model.embed_tokens.weight"
    path = changed(tiny("llava"), tmp_path / "new", lambda found: found.pop(embedding))
    with pytest.raises(UserError, match=r"hold 0 tensors .…embed_tokens\.weight."):
        open_source(str(path))


def test_one_that_computes_something_else_as_a_whole_is_refused(
    tiny: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_source(str(tiny("llava")))
    whole = transformers.LlavaForConditionalGeneration.forward

    def twice(self: Any, *args: Any, **words: Any) -> Any:
        made = whole(self, *args, **words)
        made.logits = 2 * made.logits
        return made

    monkeypatch.setattr(transformers.LlavaForConditionalGeneration, "forward", twice)
    with pytest.raises(UserError, match="computes something else here than in transformers"):
        require_same_logits(source)


def test_a_decoder_that_transformers_has_no_language_model_of_is_named(
    tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    record = json.loads((tiny("qwen3_vl") / "config.json").read_text())
    record["model_type"] = "qwen3_vl_moe"
    record["text_config"]["model_type"] = "qwen3_vl_moe_text"
    path = changed(tiny("qwen3_vl"), tmp_path / "new", lambda found: None, **record)
    with pytest.raises(UserError, match=r"'qwen3_vl_moe'.* no language model 'qwen3_vl_moe_text'"):
        open_source(str(path))


def test_a_huge_number_of_layers_in_the_text_is_refused(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    record = json.loads((tiny("llava") / "config.json").read_text())
    record["text_config"] |= {"deeper": [{"num_hidden_layers": 10**9}]}
    path = changed(tiny("llava"), tmp_path / "new", lambda found: None, **record)
    with pytest.raises(UserError, match="num_hidden_layers 1000000000; it is an integer"):
        open_source(str(path))
