"""How transformers loads a dfrot checkpoint: a registered quantizer swaps modules before weights are read."""

from pathlib import Path
from typing import Any

from torch import nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from dfrot.runtime.config import FORMAT, RuntimeConfig
from dfrot.runtime.install import install_
from dfrot.runtime.kv import ATTENTION
from dfrot.system.errors import UserError
from dfrot.system.files import RUN_FILE, read_json


@register_quantization_config("dfrot")
class DfrotConfig(QuantizationConfigMixin):
    """The `quantization_config` of a checkpoint. Raises UserError if its runtime record cannot be read.

    Attributes:
        runtime: everything that loading and computing need.
        recipe: how the checkpoint was made, as JSON; loading does not interpret it.
        unquantized_bytes: size of the source model at 16 bits.
    """

    def __init__(self, **record: Any) -> None:
        record.pop("quant_method", None)
        self.quant_method = "dfrot"
        self.record = {"quant_method": "dfrot", **record}
        self.runtime = RuntimeConfig.of_checkpoint(record)
        recipe, size = record.get("recipe"), record.get("unquantized_bytes")
        self.recipe: dict[str, Any] = recipe if isinstance(recipe, dict) else {}
        self.unquantized_bytes = size if type(size) is int else 0

    @staticmethod
    def describe(runtime: RuntimeConfig, recipe: dict[str, Any], unquantized_bytes: int) -> dict[str, Any]:
        """The record for config.json."""
        record = {"quant_method": "dfrot", "format": FORMAT, "runtime": runtime.to_json(), "recipe": recipe}
        return record | {"unquantized_bytes": unquantized_bytes}

    def get(self, name: str, default: Any = None) -> Any:
        """transformers treats a given config as if it were the JSON."""
        return self.record.get(name, default)

    def to_dict(self) -> dict[str, Any]:
        return dict(self.record)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        config = cls(**config_dict)
        return (config, kwargs) if return_unused_kwargs else config


def read_checkpoint(path: Path) -> DfrotConfig | None:
    """The `quantization_config` of a dfrot checkpoint; None for a model that is not quantized.

    Raises:
        UserError: the directory holds an interrupted run, or a checkpoint of another tool or version.
    """
    if not (path / "config.json").is_file():
        if (path / RUN_FILE).is_file():
            raise UserError(f"{path} holds an interrupted run of `dfrot quantize`. Repeat the command with --resume.")
        raise UserError(f"{path} holds no complete model: config.json is missing.")
    record = read_json(path / "config.json").get("quantization_config")
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

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        if not self.pre_quantized:
            raise ValueError("dfrot quantizes with dfrot.quantize(model, recipe, out); from_pretrained only loads.")

    def update_attn_implementation(self, config: Any) -> Any:
        if self.quantization_config.runtime.spec.keys.enabled:
            config._attn_implementation = ATTENTION
        return config

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        install_(model, self.quantization_config.runtime)
        return model

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False
