"""dfrot's plugin for vLLM: what `dfrot export --to vllm --plugin` wrote is computed as written, or not at all.

vLLM alone, on a CPU, lacks the product for online rotations, leaves 4-bit activations unquantized, and rounds others
beside 4-bit weights to 8 bits of a grid of its own; on a GPU it may take a kernel that computes activations in 16 bits.
It reports none of this. vLLM calls `register` in each of its processes (entry point `vllm.general_plugins`). Models of
other quantization methods stay as they are, except that their transforms run on a CPU too. Written for vLLM 0.32.
"""

import os
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.kernels.linear.mixed_precision.humming import HummingLinearKernel
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.compressed_tensors import schemes
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import CompressedTensorsConfig
from vllm.model_executor.layers.quantization.compressed_tensors.transform.module import HadamardTransform
from vllm.platforms import current_platform

from dfrot.export.vllm import PLUGIN_METHOD
from dfrot.kernels.linear import linear
from dfrot.kernels.lowering import NO_PASSES
from dfrot.quant.spec import TensorSpec
from dfrot.runtime.linear import QuantLinear


def register() -> None:
    """Make `PLUGIN_METHOD` known to vLLM, and give its online transforms the product that they lack on a CPU."""
    HadamardTransform.cpu_linear = staticmethod(nn.functional.linear)
    register_quantization_config(PLUGIN_METHOD)(AsWritten)


# bits of activations → what vLLM takes for them beside 4-bit weights
ACTIVATIONS = {4: schemes.CompressedTensorsWNA4Int, 8: schemes.CompressedTensorsWNA8Int}


class AsWritten(CompressedTensorsConfig):
    """compressed-tensors, where every 4-bit scheme computes with the activations that the checkpoint asks for."""

    def __init__(self, *arguments: Any, **words: Any) -> None:
        super().__init__(*arguments, **words)
        # vLLM remembers by address, for good, which matrices it divided by √n; a later model may get the same address
        HadamardTransform.scaled_data_ptrs.clear()

    def get_name(self) -> str:
        return PLUGIN_METHOD

    def get_scheme(self, layer: nn.Module, layer_name: str | None = None) -> schemes.CompressedTensorsScheme | None:
        scheme = super().get_scheme(layer, layer_name)
        for bits, kind in ACTIVATIONS.items():
            if isinstance(scheme, kind):
                return Activations(scheme, bits) if current_platform.is_cpu() else Kernel(scheme, bits)
        if isinstance(scheme, schemes.CompressedTensorsWNA16) and current_platform.is_cpu():
            return WideActivations(scheme)
        return scheme


class Wrapped(schemes.CompressedTensorsScheme):
    """A scheme that leaves its work to another."""

    def __init__(self, scheme: schemes.CompressedTensorsScheme) -> None:
        self.scheme = scheme

    @classmethod
    def get_min_capability(cls) -> int:
        return 0  # vLLM asked the inner scheme

    def create_weights(self, layer: nn.Module, *arguments: Any, **words: Any) -> None:
        self.scheme.create_weights(layer, *arguments, **words)

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        self.scheme.process_weights_after_loading(layer)

    def apply_weights(self, layer: nn.Module, x: Tensor, bias: Tensor | None) -> Tensor:
        return self.scheme.apply_weights(layer, x, bias)


class WideActivations(Wrapped):
    """4-bit weights on a CPU, times activations in 16 bits instead of 8."""

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        name = "VLLM_CPU_INT4_W4A8"  # vLLM reads it now, and not again; other models may want it as it was
        before = os.environ.get(name)
        os.environ[name] = "0"
        try:
            super().process_weights_after_loading(layer)
        finally:
            del os.environ[name]
            os.environ.update({} if before is None else {name: before})


class Activations(Wrapped):
    """4-bit weights times activations of so many bits on a CPU, by dfrot's kernels, which take the words unchanged."""

    def __init__(self, scheme: schemes.CompressedTensorsScheme, bits: int) -> None:
        super().__init__(scheme)
        self.bits = bits

    def process_weights_after_loading(self, layer: Any) -> None:
        """Choose the product once: vLLM compiles `apply_weights`, which then must not branch."""
        words, scales = layer.weight_packed.data, layer.weight_scale.data
        inputs, dtype = 8 * words.shape[1], scales.dtype
        group = None if self.scheme.group_size == -1 else self.scheme.group_size
        weights, activations = TensorSpec(4, symmetric=True, group=group), TensorSpec(self.bits, symmetric=True)
        with torch.device("meta"):  # its own buffers are replaced by vLLM's
            reference = QuantLinear(
                inputs, len(words), bias=False, weights=weights, activations=activations, rotation=None, dtype=dtype
            )
        reference.qweight, reference.scales = words.view(torch.uint8), scales
        if reference.native(scales.new_empty(1, inputs)):
            packed = reference.packed
            self.multiply = lambda x: linear(x, [packed], NO_PASSES, weights, activations)[0]
        else:
            reference.dense_weight(dtype)  # unpacked now, not while vLLM compiles
            self.multiply = reference.float_product

    def apply_weights(self, layer: nn.Module, x: Tensor, bias: Tensor | None) -> Tensor:
        product = self.multiply(x)
        return product if bias is None else product + bias


class Kernel(Wrapped):
    """4-bit weights and quantized activations on a GPU; RuntimeError if vLLM took a kernel that quantizes none."""

    def __init__(self, scheme: schemes.CompressedTensorsScheme, bits: int) -> None:
        super().__init__(scheme)
        self.bits = bits

    def create_weights(self, layer: nn.Module, *arguments: Any, **words: Any) -> None:
        super().create_weights(layer, *arguments, **words)
        if not isinstance(self.scheme.kernel, HummingLinearKernel):
            raise RuntimeError(
                f"this model has {self.bits}-bit activations, and vLLM took {type(self.scheme.kernel).__name__}, which "
                "leaves them unquantized. Install humming and start vLLM with --linear-backend humming."
            )
