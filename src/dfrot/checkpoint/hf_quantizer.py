"""How transformers loads a dfrot checkpoint: a registered quantizer swaps modules before weights are read."""

from pathlib import Path
from typing import Any

from torch import nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from dfrot.models.source import config_json
from dfrot.runtime.config import FORMAT, RuntimeConfig
from dfrot.runtime.install import install_
from dfrot.runtime.kv import ATTENTION
from dfrot.system.errors import UserError


@register_quantization_config("dfrot")
class DfrotConfig(QuantizationConfigMixin):
    """The `quantization_config` of a checkpoint. Raises UserError if its runtime record cannot be read."""

    def __init__(self, **record: Any) -> None:
        record.pop("quant_method", None)
        self.quant_method = "dfrot"
        self.record = {"quant_method": "dfrot", **record}
        self.runtime = RuntimeConfig.of_checkpoint(record)  # everything that loading and computing need
        recipe, size = record.get("recipe"), record.get("unquantized_bytes")
        # how the checkpoint was made, as JSON; loading does not interpret it
        self.recipe: dict[str, Any] = recipe if isinstance(recipe, dict) else {}
        self.unquantized_bytes = size if type(size) is int else 0  # of the source model at 16 bits

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
