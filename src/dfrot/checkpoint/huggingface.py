"""How transformers loads a dfrot checkpoint: a registered quantizer that swaps modules before weights are read."""

from typing import Any

import torch
from torch import nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from dfrot.models.families import graph_for
from dfrot.models.source import use_torch_norms_
from dfrot.runtime.kv import ATTENTION, install_kv_
from dfrot.runtime.linear import QuantLinear
from dfrot.runtime.plan import RuntimePlan


@register_quantization_config("dfrot")
class DfrotConfig(QuantizationConfigMixin):
    """The `quantization_config` of a checkpoint: a recipe and the online rotations, as JSON."""

    def __init__(self, **record: Any) -> None:
        record.pop("quant_method", None)
        self.quant_method = "dfrot"
        self.record = {"quant_method": "dfrot", **record}

    @property
    def plan(self) -> RuntimePlan:
        return RuntimePlan.from_json(self.record)

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
        if self.quantization_config.plan.kv.quantizes:
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


def install_(model: nn.Module, plan: RuntimePlan) -> None:
    """Put the runtime's modules into a transformers model that is still on the meta device."""
    config = model.config
    graph = graph_for(config)
    use_torch_norms_(model, graph)
    attentions = []
    for index in range(config.num_hidden_layers):  # type: ignore[union-attr,arg-type]
        block = model.get_submodule(f"{graph.blocks}.{index}")
        attentions.append(block.get_submodule(graph.attention))
        for name in graph.linears:
            rotation = plan.online.get(name)
            if rotation is None and not plan.weights.quantizes and not plan.activations.quantizes:
                continue
            linear = block.get_submodule(name)
            assert isinstance(linear, nn.Linear), f"{name} is a {type(linear).__name__}"
            with torch.device("meta"):
                quantized = QuantLinear(
                    linear.in_features,
                    linear.out_features,
                    bias=linear.bias is not None,
                    weights=plan.weights,
                    activations=plan.activations,
                    rotation=rotation,
                    dtype=linear.weight.dtype,
                )
            block.set_submodule(name, quantized)
    if plan.kv.quantizes:
        install_kv_(model.get_submodule(graph.decoder), attentions, plan.kv, plan.keys)
