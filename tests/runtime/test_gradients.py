"""Gradients pass straight through every quantizer: they are those of the float function at the quantized values."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dfrot
from dfrot.linalg.rotation import Hadamard
from dfrot.quant.affine import choose_qparams, quantize
from dfrot.quant.spec import UNQUANTIZED, TensorSpec
from dfrot.runtime.cache import QuantizedCacheLayer
from dfrot.runtime.kv import KVQuantizer, quantized_attention
from dfrot.runtime.linear import QuantLinear, packed_tensors

CLOSE: Any = {"rtol": 2**-10, "atol": 2**-14}  # float32 sums of a hundred terms near 1, against float64


class Attention(nn.Module):
    """What transformers' attention modules hand to an attention function."""

    is_causal = True
    num_key_value_groups = 2

    def __init__(self, quantizer: KVQuantizer) -> None:
        super().__init__()
        self.kv_quantizer = quantizer


@pytest.mark.parametrize("head_dim", [32, 12])  # with kernels, and without
@pytest.mark.parametrize("bits", [4, 8, 3])
@pytest.mark.parametrize("cached", [0, 6])
@pytest.mark.parametrize("queries", [False, True])
def test_the_gradient_of_attention_is_that_at_the_quantized_keys_and_values(
    head_dim: int, bits: int, cached: int, queries: bool, generator: torch.Generator
) -> None:
    spec, rotation = TensorSpec(bits, symmetric=False, clip_ratio=0.95), Hadamard(head_dim)
    quantizer = KVQuantizer(spec, spec, rotation, head_dim, spec if queries else UNQUANTIZED)
    query = torch.randn(1, 4, 4, head_dim, generator=generator, requires_grad=True)
    keys, values = (torch.randn(1, 2, cached + 4, head_dim, generator=generator) for _ in range(2))
    new_keys, new_values = (states[:, :, cached:].clone().requires_grad_() for states in (keys, values))
    layer = QuantizedCacheLayer(quantizer)
    if cached:
        layer.update(keys[:, :, :cached], values[:, :, :cached])
    seen = torch.ones(4, cached + 4, dtype=torch.bool).tril(cached)[None, None]
    upstream = torch.randn(1, 4, 4, head_dim, generator=generator)
    packed_keys, packed_values = layer.update(new_keys, new_values)
    module = Attention(quantizer)
    attended, _ = quantized_attention(module, query, packed_keys, packed_values, seen, scaling=0.2)
    attended.backward(upstream)

    at = [
        quantizer.quantize_queries(query),
        quantizer.unpack(quantizer.pack_keys(keys), torch.float32),
        quantizer.unpack(quantizer.pack_values(values), torch.float32),
    ]
    q, k, v = (states.detach().double().requires_grad_() for states in at)
    scores = 0.2 * q @ k.repeat_interleave(2, 1).transpose(-1, -2)
    probabilities = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    expected = probabilities @ v.repeat_interleave(2, 1)
    expected.transpose(1, 2).backward(upstream.double())
    torch.testing.assert_close(attended.double(), expected.transpose(1, 2), **CLOSE)
    for got, wanted, back in (
        (query, q.grad, rotation.T.apply),
        (new_keys, k.grad[:, :, cached:], rotation.T.apply),  # type: ignore[index]
        (new_values, v.grad[:, :, cached:], lambda x: x),  # type: ignore[index]
    ):
        assert got.grad is not None
        assert wanted is not None
        torch.testing.assert_close(got.grad.double(), back(wanted), **CLOSE)


@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize("group", [None, 16])
def test_the_gradient_of_a_layer_reaches_input_scales_and_bias(
    bits: int, group: int | None, generator: torch.Generator
) -> None:
    weights = TensorSpec(4, symmetric=True, group=group)
    activations = TensorSpec(bits, symmetric=True) if bits == 16 else TensorSpec(bits, symmetric=False, clip_ratio=0.9)
    layer = QuantLinear(
        64, 24, bias=True, weights=weights, activations=activations, rotation=Hadamard(64), dtype=torch.float32
    )
    weight = torch.randn(24, 64, generator=generator)
    qparams = choose_qparams(weight, weights.grid, weights.weight_granularity, scale_dtype=torch.bfloat16)
    codes = quantize(weight, weights.grid, weights.weight_granularity, qparams)
    tensors = packed_tensors(codes, qparams, weights) | {"bias": torch.randn(24, generator=generator)}
    tensors["scales"] = tensors["scales"].float()
    layer.scales = tensors["scales"]
    layer.load_state_dict(tensors)
    assert layer.bias is not None
    for tensor in (layer.scales, layer.bias.requires_grad_()):
        tensor.requires_grad_()
    x = torch.randn(5, 64, generator=generator, requires_grad=True)
    upstream = torch.randn(5, 24, generator=generator)
    layer(x).backward(upstream)

    read = layer.quantize_input(x).detach().double()
    integers = codes.double().unflatten(-1, (layer.scales.shape[1], -1))
    dense = (integers * layer.scales.detach().double()[..., None]).flatten(1)
    expected: list[tuple[Tensor | None, Tensor]] = [
        (x.grad, Hadamard(64).T.apply(upstream.double() @ dense)),
        (
            layer.scales.grad,
            ((upstream.double().T @ read).unflatten(-1, (layer.scales.shape[1], -1)) * integers).sum(-1),
        ),
        (layer.bias.grad, upstream.double().sum(0)),
    ]
    for got, wanted in expected:
        assert got is not None
        torch.testing.assert_close(got.double(), wanted, **CLOSE)


def test_what_a_forward_pass_keeps_in_inference_mode_does_not_stand_in_a_gradients_way(
    tiny: Callable[[str], Path], tmp_path: Path, text_file: Path
) -> None:
    recipe = dfrot.Recipe.parse("quarot", "rtn", "w4a16kv4", calib=str(text_file), calib_tokens=32)
    model: Any = dfrot.load(dfrot.quantize(tiny("qwen3"), recipe, tmp_path / "out").path)[0]
    tokens = torch.arange(1, 9)[None]
    with torch.inference_mode():
        model(tokens)
    embedded = model.get_input_embeddings()(tokens).detach().requires_grad_()
    model(inputs_embeds=embedded).logits.sum().backward()
    assert embedded.grad.abs().sum() > 0
