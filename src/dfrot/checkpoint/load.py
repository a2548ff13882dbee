"""Loading a checkpoint: a transformers model and its tokenizer.

A quantizer that is registered with transformers swaps modules before the weights are read.
"""

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from dfrot.models.configs import building, check_shapes, config_json, silent_transformers
from dfrot.models.files import StoredTensor
from dfrot.models.multimodal import from_pretrained, read_language_model
from dfrot.models.source import locate
from dfrot.models.texts import load_tokenizer
from dfrot.runtime.config import FORMAT, RuntimeConfig
from dfrot.runtime.install import install_
from dfrot.runtime.kv import ATTENTION
from dfrot.runtime.norms import BlockRotation
from dfrot.system.errors import SetupError, UserError

Device = str | torch.device | Mapping[str, int | str]

# For a `quant_method` that it does not know transformers only warns, and draws the weights that it misses at random. A
# fusion that it does not know is an error: config.json asks for one, which the quantizer takes out again.
NEEDS_DFROT = {"dfrot (run `import dfrot` before loading this checkpoint)": True}


@register_quantization_config("dfrot")
class DfrotConfig(QuantizationConfigMixin):
    """The `quantization_config` of a checkpoint. Raises UserError if its runtime record cannot be read."""

    def __init__(self, **record: Any) -> None:
        self.quant_method, self.record = "dfrot", record
        self.runtime = RuntimeConfig.of_checkpoint(record)  # everything that loading and computing need
        recipe, size = record.get("recipe"), record.get("unquantized_bytes")
        # how the checkpoint was made, as JSON; loading does not interpret it
        self.recipe: dict[str, Any] = recipe if isinstance(recipe, dict) else {}
        self.unquantized_bytes = size if type(size) is int else 0  # of the source model at 16 bits

    @staticmethod
    def describe(runtime: RuntimeConfig, recipe: dict[str, Any], unquantized_bytes: int) -> dict[str, Any]:
        """What config.json says beside the model's own."""
        record = {"quant_method": "dfrot", "format": FORMAT, "runtime": runtime.to_json(), "recipe": recipe}
        return {"quantization_config": record | {"unquantized_bytes": unquantized_bytes}, "fusion_config": NEEDS_DFROT}

    def get(self, name: str, default: Any = None) -> Any:
        """transformers treats a given config as if it were the JSON."""
        return self.record.get(name, default)

    def to_dict(self) -> dict[str, Any]:
        return dict(self.record)


def read_checkpoint(path: Path) -> DfrotConfig | None:
    """The `quantization_config` of a dfrot checkpoint; None for a model that is not quantized.

    Raises:
        UserError: the directory holds an interrupted run, or a checkpoint of another tool or version.
    """
    record = config_json(path).get("quantization_config")
    if record is None:
        return None
    made_by = record.get("quant_method") if isinstance(record, dict) else record
    if made_by != "dfrot":
        raise UserError(f"{path} was quantized by '{made_by}', which dfrot does not read.")
    return DfrotConfig(**record)


@register_quantizer("dfrot")
class DfrotQuantizer(HfQuantizer):
    """Builds the runtime modules on the meta device; transformers then fills them from the shards."""

    quantization_config: DfrotConfig
    is_trainable = False
    is_compileable = True  # `generate` compiles with a static cache on a GPU, unless told to `disable_compile`

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        if not self.pre_quantized:
            raise ValueError("dfrot quantizes with dfrot.quantize(model, recipe, out); from_pretrained only loads.")

    def update_attn_implementation(self, config: Any) -> Any:
        config.__dict__.pop("fusion_config", None)
        if self.quantization_config.runtime.spec.keys.enabled:
            config._attn_implementation = ATTENTION
        return config

    def update_weight_conversions(self, weight_conversions: Any, model: Any = None) -> list[Any]:  # 5.19: one
        return []  # a checkpoint has the names of the modules; transformers would merge experts

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        install_(model, self.quantization_config.runtime)
        return model

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        for parameter in model.parameters():  # transformers 5.19 leaves those of AutoModel in the dtype of the files
            parameter.data = parameter.data.to(model.config.dtype)
        model.config.fusion_config = NEEDS_DFROT  # for save_pretrained
        return model

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        return True


def usable_device(device: str | torch.device) -> torch.device:
    """The device, if this machine has it. Raises UserError if it does not, or if torch does not know the name."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(
            f"the device '{device}' cannot be used: {str(error).splitlines()[0].split('. ')[0]}. "
            "Give --device cpu, or cuda where torch sees a GPU."
        ) from error
    return torch.device(device)


def _check_values(path: Path, model: nn.Module, stored: Mapping[str, StoredTensor]) -> None:
    """Raise UserError for NaN, infinities, and orders that are no permutations: kernels would read stray memory."""
    for name, tensor in model.state_dict().items():
        values = stored[name].read() if tensor.is_meta else tensor  # accelerate leaves it on disk until it is needed
        if values.is_floating_point() and not torch.isfinite(values).all():
            raise UserError(f"'{name}' in {path} holds NaN or infinite values.")
    for name, module in model.named_modules():
        if not isinstance(module, BlockRotation):
            continue
        channels = torch.arange(module.orders.shape[-1]).to(module.orders)
        if not torch.equal(module.orders.sort().values, channels.expand_as(module.orders)):
            raise UserError(f"'{name}.orders' in {path} are no permutations.")


@torch.inference_mode(False)  # nothing that is derived from inference tensors is kept, so such a model would be slow
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
    device_map = None
    if isinstance(device, Mapping) or device == "auto":
        device_map = device
        if importlib.util.find_spec("accelerate") is None:
            raise SetupError("spreading a model needs accelerate. Install it: pip install 'dfrot[eval]'")
    else:
        usable_device(device)
    path = locate(str(model))
    checkpoint, found = read_checkpoint(path), read_language_model(path)
    config, stored = found.config, found.stored
    if checkpoint is not None:
        config.quantization_config = checkpoint  # read once, for the check below and for transformers
    # transformers allocates in the shapes of the config before it compares: a small file must not ask for gigabytes
    with building(path):
        skeleton = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        if checkpoint is not None:
            install_(skeleton, checkpoint.runtime)
    check_shapes(path, skeleton.state_dict(), stored)
    try:
        with silent_transformers():
            loaded, report = from_pretrained(path, found, dtype=dtype or "auto", device_map=device_map)
    except Exception as error:  # transformers raises errors of many kinds for files that do not fit together
        raise UserError(f"{path} cannot be loaded: {error}") from error
    if wrong := {kind: sorted(names) for kind, names in report.items() if names}:
        raise UserError(f"the weights in {path} do not fit its config: {wrong}")
    _check_values(path, loaded, stored)
    loaded = loaded.eval().requires_grad_(False)
    return loaded if device_map is not None else loaded.to(device), load_tokenizer(path)
