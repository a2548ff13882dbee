"""Loading a checkpoint: a transformers model and its tokenizer."""

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

import dfrot.checkpoint.hf_quantizer  # noqa: F401 — registers the quantizer
from dfrot.linalg.rotation import is_permutation
from dfrot.models.families import graph_for
from dfrot.models.graph import Config
from dfrot.models.source import load_tokenizer, locate, open_safetensors, read_config, stored_tensors, weight_files
from dfrot.pipeline.recipe import Recipe
from dfrot.runtime.config import RuntimeConfig
from dfrot.runtime.install import install_
from dfrot.runtime.norms import BlockRotation
from dfrot.system.errors import SetupError, UserError
from dfrot.system.files import RUN_FILE, read_json

Device = str | torch.device | Mapping[str, int | str]


def checkpoint_recipe(path: Path) -> Recipe | None:
    """The recipe of a dfrot checkpoint; None for a model that is not quantized.

    Raises:
        UserError: the directory holds an interrupted run, or a checkpoint of another tool or version.
    """
    if (path / RUN_FILE).is_file() and not (path / "config.json").is_file():
        raise UserError(
            f"{path} holds an interrupted run of `dfrot quantize`. Finish it: the same command with --resume."
        )
    if not (path / "config.json").is_file():
        raise UserError(f"{path} holds no complete model: config.json is missing.")
    record = read_json(path / "config.json").get("quantization_config")
    if record is None:
        return None
    made_by = record.get("quant_method") if isinstance(record, dict) else record
    if made_by != "dfrot":
        raise UserError(f"{path} was quantized by '{made_by}', which dfrot does not read.")
    RuntimeConfig.from_json(record)
    return Recipe.from_json(record["recipe"])


def usable_device(device: str | torch.device) -> torch.device:
    """A device that is there.

    Raises:
        UserError: torch knows no such device, or this machine has none.
    """
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"the device '{device}' cannot be used: {str(error).splitlines()[0]}") from error
    return torch.device(device)


def _check_shapes(path: Path, config: Config, files: Mapping[str, Path]) -> None:
    """Raise UserError if a tensor has another shape than its config asks for.

    transformers would make it, in the shape of the config, before it compares the two: a small file must not ask for
    gigabytes.
    """
    try:
        with torch.device("meta"):
            skeleton = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        if (record := getattr(config, "quantization_config", None)) is not None:
            install_(skeleton, RuntimeConfig.from_json(record))
    except UserError:
        raise
    except Exception as error:  # what a config may say that no model can be made from has no end
        raise UserError(f"{path / 'config.json'} describes no model that can be made: {error!r}") from error
    wanted = {name: tensor.shape for name, tensor in skeleton.state_dict().items()}
    for name, shape, _ in stored_tensors(set(files.values())):
        if wanted.get(name, shape) != shape:
            raise UserError(
                f"'{name}' in {path} has the shape {tuple(shape)}; its config asks for {tuple(wanted[name])}."
            )


def _check_values(path: Path, model: nn.Module, files: Mapping[str, Path]) -> None:
    """Raise UserError if numbers are none, or orders no permutations, by which a kernel would read from elsewhere."""
    for name, tensor in model.state_dict().items():
        if tensor.is_meta:  # not loaded before it is needed
            with open_safetensors(files[name]) as file:
                tensor = file.get_tensor(name)
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise UserError(f"'{name}' in {path} holds NaN or infinite values.")
    for name, module in model.named_modules():
        if isinstance(module, BlockRotation) and not is_permutation(module.orders):
            raise UserError(f"'{name}.orders' in {path} are no permutations.")


def load(model: str | Path, *, device: Device = "cpu", dtype: torch.dtype | None = None) -> tuple[Any, Any]:
    """Load a checkpoint, or a model that is not quantized.

    Args:
        model: a directory written by `dfrot.quantize`, or whatever `dfrot.quantize` takes.
        device: where to compute. "auto" spreads the decoder blocks over all GPUs, and over the CPU's memory if theirs
            does not hold them; a mapping from modules to devices (accelerate's device map) says it one by one.
        dtype: of the computation; None takes the one in config.json.

    Returns:
        A transformers model in evaluation mode (`generate`, pipelines and lm-eval work on it) and its tokenizer.

    Raises:
        UserError: there is no such checkpoint or model, or it is incomplete or broken.
        SetupError: it has to come from the hub, which cannot be reached; or accelerate is not installed, which
            spreads it.
    """
    there, spread = None, {}
    if isinstance(device, Mapping) or device == "auto":
        spread = {"device_map": device}
        if importlib.util.find_spec("accelerate") is None:
            raise SetupError("spreading a model needs accelerate. Install it: pip install 'dfrot[eval]'")
    else:
        there = usable_device(device)
    if (folder := Path(model).expanduser()).is_dir():
        checkpoint_recipe(folder)
    path = locate(str(model))
    config = read_config(path)
    graph_for(config)
    files = weight_files(path)
    _check_shapes(path, config, files)
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        loaded, report = AutoModelForCausalLM.from_pretrained(
            path,
            dtype="auto" if dtype is None else dtype,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            **spread,
        )
    except SetupError:
        raise
    except Exception as error:  # transformers raises errors of many kinds for files that do not fit together
        raise UserError(f"{path} cannot be loaded: {error}") from error
    finally:
        transformers_logging.set_verbosity(level)
        transformers_logging.enable_progress_bar()
    wrong = {kind: sorted(names) for kind, names in report.items() if names}
    if wrong:
        raise UserError(f"the weights in {path} do not fit its config: {wrong}")
    _check_values(path, loaded, files)
    loaded = loaded.eval().requires_grad_(False)
    return loaded if there is None else loaded.to(there), load_tokenizer(path)
