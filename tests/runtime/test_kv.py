from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.cache_utils import Cache, DynamicLayer
from transformers.models.llama.modeling_llama import eager_attention_forward

import dfrot
from dfrot.evaluation.record import kv_bytes_per_token
from dfrot.linalg.rotation import Hadamard
from dfrot.models.configs import read_config
from dfrot.quant.affine import fake_quantize
from dfrot.quant.grids import IntGrid, PerToken
from dfrot.quant.spec import UNQUANTIZED, TensorSpec
from dfrot.runtime.cache import QuantizedCacheLayer
from dfrot.runtime.kv import KVQuantizer, quantized_attention

Tiny = Callable[[str], Path]
SPEC = TensorSpec(4, symmetric=False, clip_ratio=0.95)
TOKENS = torch.randint(1, 96, (2, 20), generator=torch.Generator().manual_seed(3))


@pytest.fixture
def model(tiny: Tiny, tmp_path: Path) -> Any:
    recipe = dfrot.Recipe.parse("quarot", spec="w16a16kv4")
    return dfrot.load(dfrot.quantize(tiny("llama"), recipe, tmp_path / "out").path)[0]


def logits(model: Any, tokens: torch.Tensor, **arguments: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(tokens, **arguments).logits


def test_rotating_queries_and_keys_leaves_scores_unchanged() -> None:
    quantizer = KVQuantizer(SPEC, SPEC, Hadamard(12), 12)
    q, k = torch.randn(2, 1, 3, 5, 12, dtype=torch.float64)
    scores = quantizer.rotate(q) @ quantizer.rotate(k).mT
    torch.testing.assert_close(scores, q @ k.mT, rtol=0, atol=1e-13)


def test_queries_are_quantized_per_head_and_token_after_rotation() -> None:
    q = torch.randn(2, 3, 5, 12, dtype=torch.float64)
    rotated = q @ Hadamard(12).as_matrix()
    left_alone = KVQuantizer(SPEC, SPEC, Hadamard(12), 12)
    torch.testing.assert_close(left_alone.quantize_queries(q), rotated, rtol=0, atol=1e-14)
    low, high = (0.95 * rotated.clamp(max=0).amin(-1, True)), (0.95 * rotated.clamp(min=0).amax(-1, True))
    step = (high - low) / 15
    codes = ((rotated / step).round() + (-low / step).round()).clamp(0, 15)
    expected = (codes - (-low / step).round()) * step
    quantized = KVQuantizer(SPEC, SPEC, Hadamard(12), 12, queries=SPEC).quantize_queries(q)
    torch.testing.assert_close(quantized, expected, rtol=0, atol=1e-12)


def test_a_checkpoint_quantizes_queries_where_its_recipe_does(model: Any, tiny: Tiny, tmp_path: Path) -> None:
    recipe = dfrot.Recipe.parse("quarot", spec="w16a16kv4", quantize_queries=True)
    with_queries = dfrot.load(dfrot.quantize(tiny("llama"), recipe, tmp_path / "queries").path)[0]
    assert not torch.equal(logits(with_queries, TOKENS), logits(model, TOKENS))
    for attention in (block.self_attn for block in with_queries.model.layers):
        attention.kv_quantizer.queries = UNQUANTIZED
    assert torch.equal(logits(with_queries, TOKENS), logits(model, TOKENS))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_unpacking_gives_what_quantizing_leaves(bits: int) -> None:
    spec = TensorSpec(bits, False, 0.95)
    quantizer = KVQuantizer(spec, spec, None, 16)
    x = torch.randn(2, 3, 7, 16)
    packed = quantizer.pack_values(x)
    assert packed.codes.shape == (2, 3, 7, 2 * bits)
    error = (quantizer.unpack(packed, torch.float32) - x).abs()
    ideal = (fake_quantize(x, IntGrid(bits, False), PerToken(), 0.95) - x).abs()
    # the step is rounded up to bfloat16, and the zero point to a whole step
    assert (error.amax(-1) <= ideal.amax(-1) + packed.scale.squeeze(-1)).all()


def test_the_bytes_of_a_cached_token_are_those_of_the_record(model: Any) -> None:
    cache = model(TOKENS, use_cache=True).past_key_values
    assert all(isinstance(layer, QuantizedCacheLayer) for layer in cache.layers)
    config = read_config(Path(model.name_or_path))
    stored = sum(packed.nbytes for layer in cache.layers for packed in layer.packed)
    assert stored == TOKENS.numel() * kv_bytes_per_token(config, [SPEC] * config.num_hidden_layers)
    layer = cache.layers[0]
    layer._room = layer.packed
    assert layer.nbytes == stored / 2 + 4 * TOKENS.numel()  # the positions at which the keys' bias is turned


def test_a_step_with_the_packed_cache_equals_the_whole_pass(model: Any) -> None:
    cache = model(TOKENS[:, :15], use_cache=True).past_key_values
    stepwise = logits(model, TOKENS[:, 15:], past_key_values=cache)
    torch.testing.assert_close(stepwise, logits(model, TOKENS, use_cache=False)[:, 15:], rtol=0, atol=1e-4)


def test_a_cache_in_full_precision_gives_the_same_numbers(model: Any) -> None:
    cache = Cache(layer_class_to_replicate=DynamicLayer)
    logits(model, TOKENS[:, :15], past_key_values=cache, use_cache=True)
    assert cache.layers[0].keys.dtype == torch.float32
    stepwise = logits(model, TOKENS[:, 15:], past_key_values=cache)
    torch.testing.assert_close(stepwise, logits(model, TOKENS, use_cache=False)[:, 15:], rtol=0, atol=1e-4)


def test_the_packed_cache_shows_keys_and_values_as_another_cache_does(model: Any) -> None:
    floats = Cache(layer_class_to_replicate=DynamicLayer)
    logits(model, TOKENS, past_key_values=floats, use_cache=True)
    layer = model(TOKENS, use_cache=True).past_key_values.layers[0]
    keys, values = floats.layers[0].keys, floats.layers[0].values
    # rounding moves a float by half a step, a whole zero point by another half, clipping by 5 % of 15 steps
    furthest = [1.75 * packed.scale.float() for packed in layer.packed]
    assert ((layer.values - values).abs() <= furthest[1]).all()
    assert ((layer.keys - keys).norm(dim=-1, keepdim=True) <= furthest[0] * 12**0.5).all()  # R3 keeps lengths
    with pytest.raises(AttributeError):
        layer.keys = keys
    layer.reset()
    assert layer.keys is layer.values is None


def heads(count: int, tokens: int) -> torch.Tensor:
    return torch.randn(2, count, tokens, 32, generator=torch.Generator().manual_seed(count))


@pytest.mark.parametrize("tokens", [1, 3, 12])
@pytest.mark.parametrize("masked", [False, True])
def test_attention_hands_out_its_weights(tokens: int, masked: bool) -> None:
    module: Any = torch.nn.Module()
    module.kv_quantizer = quantizer = KVQuantizer(SPEC, SPEC, Hadamard(32), 32)
    module.num_key_value_groups, module.is_causal = 2, True
    length = 12 if tokens == 1 or masked else tokens
    q, k, v = heads(4, tokens), quantizer.pack_keys(heads(2, length)), quantizer.pack_values(heads(2, length))
    allowed = torch.ones(2, 1, tokens, length, dtype=torch.bool).tril(length - tokens)
    if masked:
        allowed[0, ..., 1:3] = False
        allowed |= torch.eye(tokens, length, dtype=torch.bool)
    added = torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)
    read = (quantizer.unpack(packed, torch.float32) for packed in (k, v))
    wanted = eager_attention_forward(module, quantizer.rotate(q), *read, added, 0.2)
    mask = allowed if masked else None
    got = quantized_attention(module, q, k, v, mask, output_attentions=True, scaling=0.2)
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5)
    attended, weights = quantized_attention(module, q, k, v, mask, scaling=0.2)
    assert weights is None
    torch.testing.assert_close(attended, got[0], rtol=0, atol=1e-5)


def test_left_padding_does_not_change_what_follows(model: Any) -> None:
    plain = logits(model, TOKENS[:1])
    padded = torch.cat([torch.zeros(1, 6, dtype=torch.long), TOKENS[:1]], dim=1)
    mask = (torch.arange(26) >= 6).long()[None]
    position_ids = (mask.cumsum(-1) - 1).clamp(min=0)
    with_padding = logits(model, padded, attention_mask=mask, position_ids=position_ids)[:, 6:]
    torch.testing.assert_close(with_padding, plain, rtol=0, atol=1e-4)


def test_beam_search_reorders_the_packed_cache(model: Any) -> None:
    settings = {"max_new_tokens": 8, "num_beams": 3, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    mask = torch.ones_like(TOKENS)
    with_cache = model.generate(TOKENS, attention_mask=mask, use_cache=True, **settings)
    assert torch.equal(with_cache, model.generate(TOKENS, attention_mask=mask, use_cache=False, **settings))


def test_cropping_forgets_the_last_tokens(model: Any) -> None:
    cache = model(TOKENS, use_cache=True).past_key_values
    cache.crop(-8)
    assert cache.get_seq_length() == 12
    torch.testing.assert_close(
        logits(model, TOKENS[:, 12:], past_key_values=cache),
        logits(model, TOKENS, use_cache=False)[:, 12:],
        rtol=0,
        atol=1e-4,
    )


def test_rows_of_the_batch_can_be_repeated_selected_and_forgotten(model: Any) -> None:
    layer = model(TOKENS, use_cache=True).past_key_values.layers[0]
    layer.batch_repeat_interleave(3)
    assert sum(packed.nbytes for packed in layer.packed) == 3 * layer.get_seq_length() * 2 * 2 * 2 * (
        6 + 3
    )  # rows, K and V, batch, heads, bytes
    layer.batch_select_indices(torch.tensor([0, 5]))
    assert layer.packed[0].codes.shape[0] == 2
    layer.reset()
    assert (layer.get_seq_length(), layer.nbytes) == (0, 0)


def test_another_attention_is_refused(model: Any) -> None:
    model.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match=r"the attention 'sdpa' cannot do: set_attn_implementation\('dfrot'\)"):
        model(TOKENS)


def test_nan_keys_are_not_hidden() -> None:
    quantizer = KVQuantizer(SPEC, SPEC, None, 16)
    x = torch.randn(1, 1, 2, 16)
    x[0, 0, 1, 3] = torch.nan
    restored = quantizer.unpack(quantizer.pack_values(x), torch.float32)
    assert restored[0, 0, 0].isfinite().all()
    assert restored[0, 0, 1].isnan().all()
