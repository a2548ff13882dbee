"""How transformers loads a dfrot checkpoint: a registered quantizer that swaps modules before weights are read."""

from typing import Any

from torch import nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from dfrot.runtime.config import RuntimeConfig
from dfrot.runtime.install import install_
from dfrot.runtime.kv import ATTENTION


@register_quantization_config("dfrot")
class DfrotConfig(QuantizationConfigMixin):
    """The `quantization_config` of a checkpoint: a recipe and the online rotations, as JSON."""

    def __init__(self, **record: Any) -> None:
        record.pop("quant_method", None)
        self.quant_method = "dfrot"
        self.record = {"quant_method": "dfrot", **record}

    @property
    def plan(self) -> RuntimeConfig:
        return RuntimeConfig.from_json(self.record)

    def to_dict(self) -> dict[str, Any]:
        return dict(self.record)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        config = cls(**config_dict)
        return (config, kwargs) if return_unused_kwargs else config


@register_quantizer("dfrot")
class DfrotQuantizer(HfQuantizer):
    """Builds the runtime modules on the meta device; transformers then fills them from the shards."""

    quantization_config: DfrotConfig

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        if not self.pre_quantized:
            raise ValueError("dfrot quantizes with dfrot.quantize(model, recipe, out); from_pretrained only loads.")

    def update_attn_implementation(self, config: Any) -> Any:
        if self.quantization_config.plan.spec.keys.enabled:
            config._attn_implementation = ATTENTION
        return config

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        install_(model, self.quantization_config.plan)
        return model

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False
