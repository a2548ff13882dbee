"""The kernels of the cache against the reference and SDPA in float64."""

import dataclasses

import pytest
import torch

from dfrot.kernels import attention
from dfrot.kernels.lowering import NO_PASSES, lower
from dfrot.linalg.rotation import Hadamard
from dfrot.quant.affine import QParams, dequantize
from dfrot.quant.packing import unpack
from dfrot.quant.spec import TensorSpec
from dfrot.runtime.cache import QuantizedCacheLayer
from dfrot.runtime.kv import KVQuantizer, PackedKV

EPS = {torch.float32: 2**-23, torch.bfloat16: 2**-7}
BATCH, HEADS, LENGTH = 2, 3, 201


def reference(packed: PackedKV, spec: TensorSpec, head_dim: int) -> torch.Tensor:
    codes = unpack(packed.codes, spec.bits, head_dim).double()
    return dequantize(codes, spec.token_granularity, QParams(packed.scale.double(), packed.zero.double()))


def filled(quantizer: KVQuantizer, keys: torch.Tensor, values: torch.Tensor) -> tuple[PackedKV, PackedKV]:
    """The cache after a long piece and single tokens."""
    layer = QuantizedCacheLayer(quantizer)
    packed = layer.update(keys[:, :, :150], values[:, :, :150])
    for at in range(150, LENGTH):
        packed = layer.update(keys[:, :, at : at + 1], values[:, :, at : at + 1])
    return packed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("head_dim", [32, 64, 128])
def test_tokens_are_packed_and_unpacked_as_by_the_reference(
    isa: int, head_dim: int, bits: int, dtype: torch.dtype, generator: torch.Generator
) -> None:
    spec = TensorSpec(bits, False, 0.95)
    quantizer = KVQuantizer(spec, dataclasses.replace(spec, clip_ratio=1.0), None, head_dim)
    keys, values = torch.randn(2, BATCH, HEADS, LENGTH, head_dim, generator=generator).to(dtype)
    values[0, 0, 5], values[1, 2, 7, 3] = 0, torch.nan
    by_reference = (quantizer.keys, keys), (quantizer.values, values)
    for packed, (grid, x) in zip(filled(quantizer, keys, values), by_reference, strict=True):
        expected = quantizer.pack(x, grid)
        finite = x.isfinite().all(-1, keepdim=True)
        assert torch.equal(packed.scale.isfinite(), finite)
        for part, whole in zip(packed, expected, strict=True):
            assert torch.equal(part[finite.squeeze(-1)], whole[finite.squeeze(-1)])
        restored = quantizer.unpack(packed, dtype)
        torch.testing.assert_close(
            restored, reference(packed, spec, head_dim).to(dtype), rtol=0, atol=0, equal_nan=True
        )


def test_tokens_go_where_a_tensor_says_or_are_refused_where_there_is_no_room(
    isa: int, generator: torch.Generator
) -> None:
    spec = TensorSpec(4, False, 0.95)
    wanted, found = KVQuantizer(spec, spec, None, 32).rooms(BATCH, HEADS, LENGTH, torch.device("cpu"))
    x = torch.randn(BATCH, HEADS, 3, 32, generator=generator)
    attention.append(x, [*wanted], LENGTH - 3, *NO_PASSES, 4, 0.95)
    attention.append(x, [*found], 1, *NO_PASSES, 4, 0.95, torch.tensor(LENGTH - 4))
    assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))
    assert found.codes[:, :, -3:].any()
    with pytest.raises(IndexError, match="a cache of 201 tokens has no room for 202"):
        attention.append(x, [*found], 0, *NO_PASSES, 4, 0.95, torch.tensor(LENGTH - 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("head_dim", [32, 64, 128])
@pytest.mark.parametrize(("tokens", "repeats"), [(1, 1), (1, 4), (3, 2)])
def test_attention_over_the_cache_is_sdpa_over_what_it_stands_for(
    isa: int, tokens: int, repeats: int, head_dim: int, bits: int, dtype: torch.dtype, generator: torch.Generator
) -> None:
    spec = TensorSpec(bits, False, 0.95)
    rotation = Hadamard(head_dim)
    keys, values = torch.randn(2, BATCH, HEADS, LENGTH, head_dim, generator=generator).to(dtype)
    packed = filled(KVQuantizer(spec, spec, rotation, head_dim), keys, values)
    k, v = (reference(part, spec, head_dim).repeat_interleave(repeats, 1) for part in packed)
    query = torch.randn(BATCH, HEADS * repeats, tokens, head_dim, generator=generator).to(dtype)
    mask = None if tokens == 1 else torch.rand(BATCH, 1, tokens, LENGTH, generator=generator) > 0.3
    passes = lower(rotation)
    assert passes is not None
    y = attention.attend(query, *map(list, packed), mask, None, *passes, head_dim**-0.5, spec.bits)
    rotated = query.double() @ rotation.as_matrix()
    expected = torch.nn.functional.scaled_dot_product_attention(rotated, k, v, attn_mask=mask).transpose(1, 2)
    # scores are sums of head_dim products, and the output a mean of values
    assert (y.double() - expected).abs().max() <= (EPS[dtype] / 2 + head_dim * EPS[torch.float32]) * v.abs().max()


def test_a_query_that_may_look_nowhere_gets_zeros_and_nan_is_not_hidden(isa: int, generator: torch.Generator) -> None:
    spec = TensorSpec(4, False, 0.95)
    keys, values = torch.randn(2, BATCH, HEADS, LENGTH, 32, generator=generator)
    values[1, 1, 9, 0] = torch.nan
    packed = filled(KVQuantizer(spec, spec, None, 32), keys, values)
    mask = torch.ones(BATCH, 1, 2, LENGTH, dtype=torch.bool)
    mask[0, 0, 0] = False
    query = torch.randn(BATCH, HEADS, 2, 32, generator=generator)
    y = attention.attend(query, *map(list, packed), mask, None, *NO_PASSES, 1.0, spec.bits)
    assert (y[0, 0] == 0).all()
    assert y[1, :, 1].isnan().all()
    assert y[0, 1].isfinite().all()
    assert y[1, :, 0].isfinite().all()
