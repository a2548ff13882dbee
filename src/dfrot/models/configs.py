"""The config of a model directory, and whether it and the weights beside it fit each other and dfrot."""

import contextlib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig
from transformers.utils import logging as transformers_logging

from dfrot.models.files import StoredTensor
from dfrot.models.graph import Config, ModelGraph
from dfrot.system.errors import UserError
from dfrot.system.files import RUN_FILE, read_json

_COMPUTED = "rotary_emb.inv_freq"  # old Llamas stored RoPE's frequencies; transformers computes them from the config


def config_json(path: Path) -> dict[str, Any]:
    """The config.json of a model directory. Raises UserError where there is none, as in an interrupted run."""
    if (adapter := path / "adapter_config.json").is_file():  # with peft, transformers loads it and the model it names
        base = read_json(adapter).get("base_model_name_or_path")
        raise UserError(f"{path} holds an adapter of {base}: merge it first (peft: merge_and_unload, save_pretrained).")
    if (path / "config.json").is_file():
        return read_json(path / "config.json")
    if (path / RUN_FILE).is_file():
        raise UserError(f"{path} holds an interrupted run of `dfrot quantize`. Repeat the command with --resume.")
    if not path.exists():
        raise UserError(f"there is no directory {path}.")
    if path.suffix == ".gguf":
        raise UserError(f"{path} is a GGUF file, which is a model to start from, not a directory.")
    raise UserError(f"{path} holds no complete model: config.json is missing.")


def read_config(path: Path) -> Config:
    """The config of a model directory. Raises UserError if it cannot be read, or needs code, which is never run."""
    record, most = config_json(path), 10_000
    # transformers makes a list or modules of so many items: a small file must not ask for gigabytes
    for part in _objects(record):
        for name in {"num_hidden_layers", "num_labels"} & part.keys():
            if not isinstance(part[name], int) or part[name] > most:
                raise UserError(f"{path / 'config.json'} has {name} {part[name]!r}; it is an integer, at most {most}.")
    if not isinstance(record.get("quantization_config") or {}, dict):
        raise UserError(f"{path / 'config.json'} has a quantization_config that is no JSON object.")
    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # transformers and huggingface_hub raise errors of many kinds for a broken config
        raise UserError(f"{path / 'config.json'} is not a config that transformers can load: {error}") from error


def _objects(record: Any) -> Iterator[dict[str, Any]]:
    """All objects of some JSON, itself among them."""
    if isinstance(record, dict):
        yield record
    for value in record.values() if isinstance(record, dict) else record if isinstance(record, list) else ():
        yield from _objects(value)


@contextlib.contextmanager
def silent_transformers() -> Iterator[None]:
    """No progress bars, and no messages below errors."""
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        transformers_logging.enable_progress_bar()


@contextlib.contextmanager
def building(path: Path) -> Iterator[None]:
    """Build a model on the meta device; UserError where the config in `path` describes none that can be built."""
    try:
        with torch.device("meta"):
            yield
    except UserError:
        raise
    except Exception as error:  # there is no end to the errors that a config can cause
        raise UserError(f"{path / 'config.json'} describes no model that transformers can make: {error!r}") from error


def check_config(path: Path, config: Config) -> None:
    """Raise UserError unless it is the config of a causal language model that nobody has quantized."""
    if quantized := getattr(config, "quantization_config", None):
        made_by = quantized.get("quant_method") if isinstance(quantized, dict) else quantized
        raise UserError(f"{path} is quantized already (quantization_config: {made_by}): give the original model.")
    if (named := getattr(config, "transformers_weights", None)) is not None:
        raise UserError(f"{path} has its weights in {named!r} (transformers_weights), which dfrot does not read.")
    if getattr(config, "is_causal", True) is not True:
        raise UserError(f"{path} lets tokens attend to later ones (is_causal): dfrot quantizes causal language models.")
    if not isinstance(config.dtype, torch.dtype | None):
        raise UserError(f"{path / 'config.json'} has the dtype {config.dtype!r}, which torch does not know.")
    named = config.architectures or []
    if not isinstance(named, list) or not all(str(name).endswith("ForCausalLM") for name in named):
        raise UserError(f"{path} has the architectures {named}: dfrot quantizes causal language models.")
    for key in ("sliding_window", "layer_types"):  # transformers' masks ignore what the class lacks; its caches do not
        if getattr(config, key, None) is not None and not hasattr(type(config), key):
            raise UserError(f"the config of {path} has a {key}, which {config.model_type} does not know: take it out.")
    if "sliding_attention" in (getattr(config, "layer_types", None) or ()) and config.sliding_window is None:
        raise UserError(f"{path / 'config.json'} has layer_types with sliding_attention, and no sliding_window.")


def check_extent(path: Path, config: Config, graph: ModelGraph, stored: Mapping[str, StoredTensor]) -> None:
    """Raise UserError if the config asks for more than the files can hold; its skeleton could take gigabytes."""
    held = {name.removeprefix(graph.blocks + ".").split(".")[0] for name in stored}
    if (absent := next((i for i in range(config.num_hidden_layers) if str(i) not in held), None)) is not None:
        raise UserError(f"the weights in {path} lack '{graph.blocks}.{absent}.…', which its config needs.")
    most = max((each.shape.numel() for each in stored.values()), default=0)
    for name in ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim"):
        if isinstance(size := getattr(config, name, None), int) and size > most:
            raise UserError(f"{path / 'config.json'} has {name} {size}; no tensor there has so many entries.")


def check_blocks(path: Path, blocks: Any) -> None:
    """Raise UserError unless all blocks have the same layers."""
    layers = [block.state_dict().keys() for block in blocks]
    for index, names in enumerate(layers):
        if differing := sorted(layers[0] ^ names):
            raise UserError(
                f"the model in {path} has blocks of more than one kind: only one of blocks 0 and {index} has a "
                f"'{differing[0]}'. dfrot takes models whose blocks are alike."
            )


def check_tensors(path: Path, skeleton: Any, graph: ModelGraph, stored: Mapping[str, StoredTensor]) -> None:
    """Raise UserError unless the files hold the tensors of the config, and no other block's."""
    expected, unread = skeleton.state_dict(), {name for name in stored if name.endswith(_COMPUTED)}
    if skeleton.config.tie_word_embeddings:
        del expected[f"{graph.head}.weight"]
        unread.add(f"{graph.head}.weight")  # if it is there, it equals the embedding
    if missing := sorted(expected.keys() - stored.keys()):
        raise UserError(f"the weights in {path} lack '{missing[0]}' ({len(missing)} missing), which its config needs.")
    check_shapes(path, expected, stored)
    if wrong := next((stored[name] for name in expected if not stored[name].dtype.is_floating_point), None):
        raise UserError(f"'{wrong.name}' in {path} has the dtype {wrong.dtype}; weights are floating-point numbers.")
    passed_over = skeleton._keys_to_ignore_on_load_unexpected or ()
    unread |= {name for name in stored if any(re.search(pattern, name) for pattern in passed_over)}
    if left := sorted(stored.keys() - expected.keys() - unread):
        raise UserError(f"the weights in {path} hold '{left[0]}', for which its config has no place.")


def check_shapes(path: Path, expected: Mapping[str, Tensor], stored: Mapping[str, StoredTensor]) -> None:
    """Raise UserError if a stored tensor does not have the shape of the expected one of its name."""
    for name in (name for name in expected if name in stored):
        if (shape := stored[name].shape) != (wanted := expected[name].shape):
            raise UserError(f"'{name}' in {path} has the shape {tuple(shape)}; its config asks for {tuple(wanted)}.")
