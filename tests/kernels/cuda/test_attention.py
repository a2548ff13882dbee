"""The kernels of the cache for GPUs against the reference and SDPA in float64."""

import dataclasses

import pytest
import torch
from torch import Tensor

from dfrot.kernels.lowering import NO_PASSES, lower
from dfrot.linalg.rotation import Hadamard
from dfrot.quant.spec import TensorSpec
from dfrot.runtime.cache import QuantizedCacheLayer
from dfrot.runtime.kv import KVQuantizer, PackedKV
from tests.kernels.test_attention import reference

pytest.importorskip("triton", reason="Triton is not there: pip install 'dfrot[dev]'")

from dfrot.kernels.cuda.attention import append, attend, unpack

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPS = {torch.float32: 2**-23, torch.bfloat16: 2**-7, torch.float16: 2**-10}
BATCH, HEADS, LENGTH = 2, 2, 70
SPEC = TensorSpec(4, False, 0.95)


def cached(x: Tensor, spec: TensorSpec, rotation: Hadamard | None) -> PackedKV:
    """All tokens but the last ones in one piece, and these one by one, in a cache with room."""
    layer = QuantizedCacheLayer(KVQuantizer(spec, spec, None, x.shape[-1]))
    layer.lazy_initialization(x.to(DEVICE), x.to(DEVICE))
    room, _ = layer.reserve(BATCH, HEADS, LENGTH)
    passes = NO_PASSES if rotation is None else lower(rotation)
    assert passes is not None
    for begin, end in [(0, LENGTH - 3), *((at, at + 1) for at in range(LENGTH - 3, LENGTH))]:
        append(x[:, :, begin:end].to(DEVICE), [*room], begin, *passes, spec.bits, spec.fixed_clip)
    return room.first(LENGTH)


@pytest.mark.parametrize("dtype", EPS)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("head_dim", [80, 128])
def test_tokens_are_packed_and_unpacked_as_by_the_reference(
    head_dim: int, bits: int, dtype: torch.dtype, generator: torch.Generator
) -> None:
    spec = dataclasses.replace(SPEC, bits=bits)
    x = torch.randn(BATCH, HEADS, LENGTH, head_dim, generator=generator).to(dtype)
    x[0, 0, 5], x[1, 0, 7, 3], x[1, 1, 8, 0] = 0, torch.nan, torch.inf
    packed, expected = cached(x, spec, None), KVQuantizer(spec, spec, None, head_dim).pack(x, spec)
    finite = x.isfinite().all(-1, keepdim=True)
    assert torch.equal(packed.scale.cpu().isfinite(), finite)
    for part, whole in zip(packed, expected, strict=True):
        assert torch.equal(part.cpu()[finite.squeeze(-1)], whole[finite.squeeze(-1)])
    restored, wide = unpack([*packed], bits, dtype).cpu(), reference(packed, spec, head_dim)
    bound = (EPS[dtype] if DEVICE == "cpu" else EPS[dtype] / 2) * wide.abs()  # the interpreter cuts off
    assert torch.equal(restored.isnan(), ~finite.expand_as(x))
    assert ((restored.double() - wide).abs() <= bound)[finite.expand_as(x)].all()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("tokens", [1, 19])
def test_tokens_go_where_a_tensor_says_and_never_behind_the_room(
    tokens: int, bits: int, generator: torch.Generator
) -> None:
    quantizer = KVQuantizer(dataclasses.replace(SPEC, bits=bits), dataclasses.replace(SPEC, bits=bits), None, 32)
    x = torch.randn(BATCH, HEADS, tokens, 32, generator=generator).to(DEVICE)
    for at in (0, 5, LENGTH - tokens, LENGTH - tokens + 1, LENGTH + 3):
        wanted, found = quantizer.rooms(BATCH, HEADS, LENGTH, x.device)
        fitting = x[:, :, : max(0, LENGTH - at)]
        if fitting.shape[2]:
            append(fitting, [*wanted], at, *NO_PASSES, bits, 0.95)
        append(x, [*found], 0, *NO_PASSES, bits, 0.95, torch.tensor(at, device=x.device))
        assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))
        found = quantizer.room(BATCH, HEADS, LENGTH, x.device)
        append(x, [*found], 2, *NO_PASSES, bits, 0.95, torch.tensor([at - 2], device=x.device))
        assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))


@pytest.mark.parametrize("tokens", [1, 3])
def test_room_that_nobody_looks_at_changes_no_bit_whatever_is_in_it(tokens: int, generator: torch.Generator) -> None:
    room, seen = 70 + 3 * 64, 70  # three blocks of keys, and a part of one
    quantizer = KVQuantizer(SPEC, SPEC, None, 64)
    keys, values = torch.randn(2, BATCH, HEADS, room, 64, generator=generator)
    query = torch.randn(BATCH, 4 * HEADS, tokens, 64, generator=generator).to(DEVICE)
    mask = (torch.arange(room) < seen).expand(BATCH, 1, tokens, room).clone()
    mask[0, ..., :66] = False  # not even the first block
    found = []
    for unseen in (0.0, torch.nan):
        keys[:, :, seen:], values[:, :, seen:] = unseen, unseen
        packed = [*quantizer.pack_keys(keys.to(DEVICE))], [*quantizer.pack_values(values.to(DEVICE))]
        found.append(attend(query, packed[0], packed[1], mask.to(DEVICE), None, *NO_PASSES, 0.125, 4).cpu())
    assert found[0].isfinite().all()
    assert torch.equal(*found)
    k, v = (reference(PackedKV(*part), SPEC, 64)[:, :, :seen].repeat_interleave(4, 1) for part in packed)
    scores = (query.double() @ k.mT * 0.125).masked_fill(~mask[..., :seen].to(DEVICE), -torch.inf)
    expected = (scores.softmax(-1) @ v).transpose(1, 2).cpu()
    assert (found[0].double() - expected).abs().max() <= 80 * 2**-23 * v.abs().max()


@pytest.mark.parametrize("dtype", EPS)
@pytest.mark.parametrize(("bits", "head_dim"), [(4, 64), (8, 80)])
@pytest.mark.parametrize(("tokens", "repeats", "more"), [(1, 1, False), (1, 4, True), (3, 2, True)])
def test_attention_over_the_cache_is_sdpa_over_what_it_stands_for(
    tokens: int,
    repeats: int,
    more: bool,
    bits: int,
    head_dim: int,
    dtype: torch.dtype,
    generator: torch.Generator,
) -> None:
    spec, rotation = dataclasses.replace(SPEC, bits=bits), Hadamard(head_dim)
    keys, values = torch.randn(2, BATCH, HEADS, LENGTH, head_dim, generator=generator).to(dtype)
    packed = cached(keys, spec, rotation), cached(values, spec, None)
    k, v = (reference(part, spec, head_dim).repeat_interleave(repeats, 1) for part in packed)
    query = torch.randn(BATCH, HEADS * repeats, tokens, head_dim, generator=generator).to(dtype)
    mask = None if tokens == 1 else torch.rand(BATCH, 1, tokens, LENGTH, generator=generator) > 0.3
    added = torch.randn(*query.shape[:3], LENGTH, generator=generator).double() if more else None
    passes = lower(rotation)
    assert passes is not None
    look, more_scores = (None if part is None else part.to(DEVICE) for part in (mask, added))
    k_parts, v_parts = map(list, packed)
    y = attend(query.to(DEVICE), k_parts, v_parts, look, more_scores, *passes, head_dim**-0.5, bits).cpu()
    scores = query.double() @ rotation.as_matrix() @ k.mT * head_dim**-0.5 + (0 if added is None else added)
    scores = scores if mask is None else scores.masked_fill(~mask, -torch.inf)
    expected = (scores.softmax(-1) @ v).transpose(1, 2)
    assert y.dtype == dtype
    # in 16 bits queries, probabilities and the output are rounded; scores are sums of head_dim products
    assert (y.double() - expected).abs().max() <= (2 * EPS[dtype] + head_dim * 2**-23) * v.abs().max()


def test_a_query_that_may_look_nowhere_gets_zeros_and_nan_is_not_hidden(generator: torch.Generator) -> None:
    keys, values = torch.randn(2, BATCH, HEADS, LENGTH, 32, generator=generator)
    values[1, 1, 9, 0] = torch.nan
    packed = cached(keys, SPEC, None), cached(values, SPEC, None)
    mask = torch.ones(BATCH, 1, 2, LENGTH, dtype=torch.bool)
    mask[0, 0, 0] = False
    query = torch.randn(BATCH, HEADS, 2, 32, generator=generator)
    y = attend(query.to(DEVICE), list(packed[0]), list(packed[1]), mask.to(DEVICE), None, *NO_PASSES, 1.0, 4).cpu()
    assert (y[0, 0] == 0).all()
    assert y[1, :, 1].isnan().all()
    assert y[0, 1].isfinite().all()
    assert y[1, :, 0].isfinite().all()
