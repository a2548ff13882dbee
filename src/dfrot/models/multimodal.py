"""The language model within a model that reads pictures or sound, too.

It is what dfrot quantizes of such a model, and what comes out is a language model without the rest.
"""

import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import transformers
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM, PreTrainedModel

from dfrot.models.configs import config_json, read_config
from dfrot.models.files import StoredTensor, stored_tensors
from dfrot.models.graph import Config, graph_for
from dfrot.system.errors import UserError

# Decoders that transformers has no language model of its own for, and one that computes the same: on text each token
# has one position instead of three, and RoPE in sections (M-RoPE) is RoPE.
_ON_TEXT = {"qwen2_vl_text": "qwen2", "qwen2_5_vl_text": "qwen2", "qwen3_vl_text": "qwen3"}
_OF_THE_WHOLE = ("quantization_config", "dtype", "bos_token_id", "eos_token_id", "pad_token_id")  # may stand there
_HEAD = "lm_head.weight"


class LanguageModel(NamedTuple):
    """A language model in a directory, as its files describe it.

    Attributes:
        config: its own.
        stored: its tensors, by the names that the config's class of transformers gives them.
        part_of: `model_type` of the model that it is a part of; "" if it is the whole.
        rest: the other tensors of that model.
        key_mapping: for transformers' `from_pretrained`, what turns names in files into those names.
        nbytes: of all tensors.
    """

    config: Config
    stored: dict[str, StoredTensor]
    part_of: str = ""
    rest: tuple[StoredTensor, ...] = ()
    key_mapping: dict[str, str] | None = None

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.stored.values())


def read_language_model(path: Path, read_stored: Callable[[], dict[str, StoredTensor]] | None = None) -> LanguageModel:
    """The language model in `path`, whole or as a part of a multimodal one. No tensor is read.

    Args:
        read_stored: describes the tensors; None: those that lie in `path`.

    Raises:
        UserError: config or files cannot be read; its architecture is not known, or transformers has none such alone.
    """
    config, read = read_config(path), read_stored or functools.partial(stored_tensors, path)
    if "text_config" not in type(config).sub_configs:
        graph_for(config)  # an architecture that cannot be read is refused whatever its weights are
        return LanguageModel(config, read())
    text = _text_config(path, config)
    graph, stored = graph_for(text), read()
    inner = graph.embedding.removeprefix(f"{graph.decoder}.") + ".weight"
    found = [name.removesuffix(inner) for name in stored if f".{name}".endswith(f".{inner}")]
    if len(found) != 1:
        raise UserError(f"the weights in {path} hold {len(found)} tensors '…{inner}': its language model has one.")
    prefix, decoder = found[0], f"{graph.decoder}."
    renamed = {decoder + name.removeprefix(prefix): each for name, each in stored.items() if name.startswith(prefix)}
    mapping = {f"^{re.escape(prefix)}": decoder}
    head = next((name for name in stored if f".{name}".endswith(f".{_HEAD}")), None)
    text.tie_word_embeddings = head is None or bool(getattr(config, "tie_word_embeddings", False))
    if head is not None:
        renamed[_HEAD] = stored[head]
        mapping[f"^{re.escape(head)}$"] = _HEAD
    taken = {tensor.name for tensor in renamed.values()}
    rest = tuple(tensor for tensor in stored.values() if tensor.name not in taken)
    return LanguageModel(text, renamed, config.model_type, rest, mapping)


def _text_config(path: Path, config: Config) -> Config:
    """The config of the language model in a multimodal one."""
    record, whole = config.text_config.to_dict(), config_json(path)
    model_type = record.pop("model_type")
    if (same := _ON_TEXT.get(model_type)) is not None:
        ropes = record.get("rope_parameters") or {}
        apart = ("mrope_section", "mrope_interleaved", "type")
        record["rope_parameters"] = {name: value for name, value in ropes.items() if name not in apart}
    text = AutoConfig.for_model(same or model_type, **record)
    if (language_model := MODEL_FOR_CAUSAL_LM_MAPPING.get(type(text), None)) is None:
        raise UserError(
            f"{path} is a model of text and more ('{config.model_type}'), and transformers has no language model "
            f"'{text.model_type}' that could be taken out of it: dfrot quantizes causal language models."
        )
    text.architectures = [language_model.__name__]
    for name in _OF_THE_WHOLE:
        value = getattr(config, name, None) if name == "dtype" else whole.get(name)
        beyond = isinstance(value, int) and value >= text.vocab_size
        if value is not None and not beyond and (whole.get("text_config") or {}).get(name) is None:
            setattr(text, name, value)
    return text


def from_pretrained(path: Path, model: LanguageModel, **options: Any) -> tuple[Any, dict[str, set[str]]]:
    """transformers' `from_pretrained` of it, and what of config and files does not fit each other, by kind."""
    options |= {"config": model.config, "key_mapping": model.key_mapping, "trust_remote_code": False}
    loaded, report = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True, **options)
    if model.part_of:  # the rest of the whole; a tensor of the part for which there is no place stays in the report
        report["unexpected_keys"] &= model.stored.keys()
        loaded._weight_conversions = None  # or save_pretrained gives tensors the names that they have in the whole
    return loaded, report


def whole_from_pretrained(path: Path, model: LanguageModel, **options: Any) -> Any:
    """The model of transformers that the language model is a part of, or itself if it is the whole."""
    if not model.part_of:
        return from_pretrained(path, model, **options)[0]
    kind: Any = getattr(transformers, next(iter(read_config(path).architectures or ()), ""), None)
    known = isinstance(kind, type) and issubclass(kind, PreTrainedModel)
    if not known:
        raise UserError(f"{path / 'config.json'} does not say what class of transformers its model is (architectures).")
    return kind.from_pretrained(path, trust_remote_code=False, **options)
