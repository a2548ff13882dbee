"""Loading a checkpoint: a transformers model and its tokenizer."""

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from dfrot.checkpoint.hf_quantizer import read_checkpoint
from dfrot.models.families import graph_for
from dfrot.models.graph import Config
from dfrot.models.source import (
    building,
    check_shapes,
    load_tokenizer,
    locate,
    open_safetensors,
    read_config,
    stored_tensors,
    weight_files,
)
from dfrot.runtime.config import RuntimeConfig
from dfrot.runtime.install import install_
from dfrot.runtime.norms import BlockRotation
from dfrot.system.errors import SetupError, UserError

Device = str | torch.device | Mapping[str, int | str]


def usable_device(device: str | torch.device) -> torch.device:
    """The device, if this machine has it. Raises UserError if it does not, or if torch does not know the name."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"the device '{device}' cannot be used: {str(error).splitlines()[0]}") from error
    return torch.device(device)


def _check_shapes(path: Path, config: Config, runtime: RuntimeConfig | None, files: Mapping[str, Path]) -> None:
    """Raise UserError if a tensor does not have the shape of its config.

    transformers allocates in the shape of the config before it compares: a small file must not ask for gigabytes.
    """
    with building(path):
        skeleton = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        if runtime is not None:
            install_(skeleton, runtime)
    check_shapes(path, skeleton.state_dict(), stored_tensors(set(files.values())))


def _check_values(path: Path, model: nn.Module, files: Mapping[str, Path]) -> None:
    """Raise UserError for NaN, infinities, and orders that are no permutations: kernels would read stray memory."""
    for name, tensor in model.state_dict().items():
        if tensor.is_meta:  # accelerate leaves it on disk until it is needed
            with open_safetensors(files[name]) as file:
                tensor = file.get_tensor(name)
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise UserError(f"'{name}' in {path} holds NaN or infinite values.")
    for name, module in model.named_modules():
        if not isinstance(module, BlockRotation):
            continue
        channels = torch.arange(module.orders.shape[-1]).to(module.orders)
        if not torch.equal(module.orders.sort().values, channels.expand_as(module.orders)):
            raise UserError(f"'{name}.orders' in {path} are no permutations.")


def load(model: str | Path, *, device: Device = "cpu", dtype: torch.dtype | None = None) -> tuple[Any, Any]:
    """Load a checkpoint, or a model that is not quantized.

    Args:
        model: a directory written by `dfrot.quantize`, or any model that `dfrot.quantize` takes.
        device: where to compute. "auto" spreads the decoder blocks over all GPUs, and over the CPU's memory if theirs
            does not hold them; a mapping from modules to devices is accelerate's device map.
        dtype: of the computation; None takes the one in config.json.

    Returns:
        A transformers model in evaluation mode (`generate`, pipelines and lm-eval work on it) and its tokenizer.

    Raises:
        UserError: there is no such checkpoint or model, or it is incomplete or broken.
        SetupError: the hub cannot be reached, or accelerate, which spreads a model, is not installed.
    """
    single, spread = None, {}
    if isinstance(device, Mapping) or device == "auto":
        spread = {"device_map": device}
        if importlib.util.find_spec("accelerate") is None:
            raise SetupError("spreading a model needs accelerate. Install it: pip install 'dfrot[eval]'")
    else:
        single = usable_device(device)
    # before `locate`, which would only miss the config.json of an interrupted run
    checkpoint = read_checkpoint(folder) if (folder := Path(model).expanduser()).is_dir() else None
    path = locate(str(model))
    if path != folder:  # from the hub, or converted
        checkpoint = read_checkpoint(path)
    config = read_config(path)
    graph_for(config)
    if checkpoint is not None:
        config.quantization_config = checkpoint  # read once, for the check below and for transformers
    files = weight_files(path)
    _check_shapes(path, config, checkpoint and checkpoint.runtime, files)
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        options: dict[str, Any] = {"use_safetensors": True, "trust_remote_code": False, "output_loading_info": True}
        loaded, report = AutoModelForCausalLM.from_pretrained(
            path, config=config, dtype=dtype or "auto", **options, **spread
        )
    except SetupError:
        raise
    except Exception as error:  # transformers raises errors of many kinds for files that do not fit together
        raise UserError(f"{path} cannot be loaded: {error}") from error
    finally:
        transformers_logging.set_verbosity(level)
        transformers_logging.enable_progress_bar()
    if wrong := {kind: sorted(names) for kind, names in report.items() if names}:
        raise UserError(f"the weights in {path} do not fit its config: {wrong}")
    _check_values(path, loaded, files)
    loaded = loaded.eval().requires_grad_(False)
    return loaded if single is None else loaded.to(single), load_tokenizer(path)
