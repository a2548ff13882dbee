"""dfrot's plugin for vLLM: what `dfrot export --to vllm --plugin` wrote is computed as written, or not at all.

vLLM by itself, on a CPU, has no product for online rotations, leaves 4-bit activations unquantized, and quantizes those
beside 4-bit weights to 8 bits; on a GPU it may take a kernel that computes activations in 16 bits. It says so nowhere.

It finds `register` by the entry point `vllm.general_plugins` and calls it in each of its processes. For models of other
quantization methods nothing changes but that their transforms run on a CPU too. Written for vLLM 0.32.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.kernels.linear.mixed_precision.humming import HummingLinearKernel
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import CompressedTensorsConfig
from vllm.model_executor.layers.quantization.compressed_tensors.schemes import (
    CompressedTensorsScheme,
    CompressedTensorsWNA4Int,
    CompressedTensorsWNA16,
)
from vllm.model_executor.layers.quantization.compressed_tensors.transform.module import HadamardTransform
from vllm.platforms import current_platform

from dfrot.export.vllm import PLUGIN_METHOD
from dfrot.kernels.linear import bound
from dfrot.kernels.lowering import NO_PASSES
from dfrot.quant.spec import TensorSpec
from dfrot.runtime.linear import QuantLinear


def register() -> None:
    """Make `PLUGIN_METHOD` known to vLLM, and give its online transforms the product that they lack on a CPU."""
    HadamardTransform.cpu_linear = staticmethod(nn.functional.linear)
    register_quantization_config(PLUGIN_METHOD)(AsWritten)


class AsWritten(CompressedTensorsConfig):
    """compressed-tensors, where every 4-bit scheme computes with the activations that the checkpoint asks for."""

    def __init__(self, *arguments: Any, **words: Any) -> None:
        super().__init__(*arguments, **words)
        # By their addresses vLLM remembers for good which matrices it divided by √n; a later model may get the same.
        HadamardTransform.scaled_data_ptrs.clear()

    def get_name(self) -> str:
        return PLUGIN_METHOD

    def get_scheme(self, layer: nn.Module, layer_name: str | None = None) -> CompressedTensorsScheme | None:
        scheme = super().get_scheme(layer, layer_name)
        if isinstance(scheme, CompressedTensorsWNA4Int):
            return FourBitActivations(scheme) if current_platform.is_cpu() else FourBitKernel(scheme)
        if isinstance(scheme, CompressedTensorsWNA16) and current_platform.is_cpu():
            return WideActivations(scheme)
        return scheme


class Wrapped(CompressedTensorsScheme):
    """A scheme that leaves its work to another."""

    def __init__(self, scheme: CompressedTensorsScheme) -> None:
        self.scheme = scheme

    @classmethod
    def get_min_capability(cls) -> int:
        return 0  # the scheme within was asked

    def create_weights(self, layer: nn.Module, *arguments: Any, **words: Any) -> None:
        self.scheme.create_weights(layer, *arguments, **words)

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        self.scheme.process_weights_after_loading(layer)

    def apply_weights(self, layer: nn.Module, x: Tensor, bias: Tensor | None) -> Tensor:
        return self.scheme.apply_weights(layer, x, bias)


class WideActivations(Wrapped):
    """4-bit weights on a CPU, times activations as they come: not in 8 bits."""

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        with _without_8_bit_activations():
            super().process_weights_after_loading(layer)


class FourBitActivations(Wrapped):
    """4-bit weights times 4-bit activations on a CPU, by dfrot's kernels, which take the words as they are.

    Everything is decided when the weights are there, since vLLM compiles what `apply_weights` does.
    """

    def process_weights_after_loading(self, layer: Any) -> None:
        words, scales = layer.weight_packed.data, layer.weight_scale.data
        out_features, width = words.shape
        group = None if self.scheme.group_size == -1 else self.scheme.group_size
        weights, activations = TensorSpec(4, symmetric=True, group=group), TensorSpec(4, symmetric=True)
        with torch.device("meta"):
            reference = QuantLinear(
                8 * width,
                out_features,
                bias=False,
                weights=weights,
                activations=activations,
                rotation=None,
                dtype=scales.dtype,
            )
        reference.qweight, reference.scales = words.view(torch.uint8), scales
        self.multiply = reference.float_product
        if reference.native(scales.new_empty(1, 8 * width)):
            products = bound([reference.packed()[0]], NO_PASSES, weights, activations)
            self.multiply = lambda x: products(x)[0]
        else:
            reference.dense_weight(scales.dtype)

    def apply_weights(self, layer: nn.Module, x: Tensor, bias: Tensor | None) -> Tensor:
        product = self.multiply(x)
        return product if bias is None else product + bias


class FourBitKernel(Wrapped):
    """4-bit weights and activations on a GPU.

    Raises:
        RuntimeError: vLLM took a kernel that would not quantize the activations.
    """

    def create_weights(self, layer: nn.Module, *arguments: Any, **words: Any) -> None:
        super().create_weights(layer, *arguments, **words)
        if not isinstance(self.scheme.kernel, HummingLinearKernel):
            raise RuntimeError(
                f"this model has 4-bit activations, and vLLM took {type(self.scheme.kernel).__name__}, which leaves "
                "them unquantized. Install humming and start vLLM with --linear-backend humming."
            )


@contextmanager
def _without_8_bit_activations() -> Iterator[None]:
    """vLLM reads this switch while it lays out a layer's weights."""
    name = "VLLM_CPU_INT4_W4A8"
    before = os.environ.get(name)
    os.environ[name] = "0"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
