"""The bias of keys stays out of the cache, and is turned to where its keys are when they are read."""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AutoModelForCausalLM
from transformers.cache_utils import Cache, DynamicLayer
from transformers.models.qwen2.modeling_qwen2 import apply_rotary_pos_emb, eager_attention_forward

import dfrot
from dfrot.linalg.rotation import Hadamard
from dfrot.quant.affine import SCALE_DTYPE, fake_quantize
from dfrot.quant.grids import IntGrid, PerToken
from dfrot.runtime.cache import QuantizedCacheLayer
from dfrot.runtime.key_bias import positions_of_all
from dfrot.runtime.kv import quantized_attention
from tests.tiny_models import write_biased_model

NORM = 300.0  # of the bias, as in Qwen2.5; keys without it have a norm near 1
TOKENS = torch.randint(1, 96, (2, 20), generator=torch.Generator().manual_seed(3))
Made = Callable[..., Path]


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Tiny models whose keys have biases of norm NORM."""

    return lambda name="qwen2", **words: write_biased_model(name, tmp_path_factory.mktemp("biased"), NORM, **words)


def checkpoint(source: Path, out: Path, spec: str = "w16a16kv4", dtype: torch.dtype | None = None, **words: Any) -> Any:
    recipe = dfrot.Recipe.parse(**{"method": "quarot", "weights": "rtn", "spec": spec, **words})
    return dfrot.load(dfrot.quantize(source, recipe, out).path, dtype=dtype)[0]


@torch.no_grad()
def logits(model: Any, tokens: Tensor = TOKENS, **arguments: Any) -> Tensor:
    return model(tokens, **arguments).logits


def plain_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, position_ids: Any, **words: Any
) -> Any:
    """Keys without the bias, rotated, in four bits, and the bias beside them: transformers' functions, in float64."""
    cos, sin = module.rotary(key, position_ids)
    heads = module.k_proj.bias.view(1, -1, 1, key.shape[-1]).expand_as(key)
    _, turned = apply_rotary_pos_emb(query, heads, cos, sin)
    r3 = Hadamard(key.shape[-1]).as_matrix()
    grid = IntGrid(4, False), PerToken(), 0.95, SCALE_DTYPE
    keys = fake_quantize((key - turned) @ r3, *grid) + turned @ r3
    mask = torch.zeros(key.shape[2], key.shape[2]).masked_fill(torch.ones(key.shape[2], key.shape[2]).triu(1) > 0, -1e9)
    return eager_attention_forward(module, query @ r3, keys, fake_quantize(value, *grid), mask, words["scaling"])


@pytest.mark.parametrize("name", ["qwen2", "llama"])
def test_a_checkpoint_computes_keys_in_four_bits_beside_their_bias(made: Made, tmp_path: Path, name: str) -> None:
    source = made(name)
    model = checkpoint(source, tmp_path / "out", dtype=torch.float64, method="none")
    AttentionInterface.register("plain", plain_attention)
    plain: Any = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float64)
    plain.set_attn_implementation("plain")
    for attention in (block.self_attn for block in model.model.layers):
        attention.kv_quantizer.rotation = Hadamard(12)
    for attention in (block.self_attn for block in plain.model.layers):
        attention.__dict__["rotary"] = plain.model.rotary_emb
    expected = logits(plain)
    # norms of transformers compute in float32
    torch.testing.assert_close(
        logits(model, use_cache=False), expected, rtol=0, atol=2**-16 * float(expected.abs().max())
    )


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_few_bits_cost_as_little_as_without_a_bias(made: Made, tmp_path: Path, dtype: torch.dtype) -> None:
    """In front of norm 300, four bits of a key that has the bias within it are off by 20."""
    source = made(head_dim=32)
    whole: Any = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    attention = checkpoint(source, tmp_path / "out", dtype=dtype).model.layers[0].self_attn
    x = whole.model.layers[0].input_layernorm(whole.model.embed_tokens(TOKENS))
    positions = torch.arange(20)[None]
    cos, sin = whole.model.rotary_emb(x, positions)
    keys = whole.model.layers[0].self_attn.k_proj(x).view(2, 20, -1, 32).transpose(1, 2)
    _, wanted = apply_rotary_pos_emb(keys, keys, cos, sin)
    quantizer = attention.kv_quantizer
    content = nn.functional.linear(x, whole.model.layers[0].self_attn.k_proj.weight).view(2, 20, -1, 32).transpose(1, 2)
    _, content = apply_rotary_pos_emb(content, content, cos, sin)
    read = quantizer.unpack(quantizer.pack_keys(content.to(dtype)), dtype)
    read = read.float() + quantizer.key_bias.at(attention.k_proj.bias, positions, dtype).keys(quantizer.rotation)
    off = (read - quantizer.rotate(wanted)).norm(dim=-1)
    rounding = 2**-8 * NORM if dtype == torch.bfloat16 else 0  # of b itself, and of angles
    assert float(off.max()) < 0.3 * float(content.norm(dim=-1).max()) + rounding


def steps(model: Any, tokens: Tensor = TOKENS, **given: Tensor) -> Tensor:
    """Logits of tokens that arrive 12, 1, 1, 3 and 3 at a time."""
    cache, found = None, []
    for start, stop in ((0, 12), (12, 13), (13, 14), (14, 17), (17, 20)):
        arguments: dict[str, Any] = {
            name: each[:, start:stop] for name, each in given.items() if name != "attention_mask"
        }
        if "attention_mask" in given:
            arguments["attention_mask"] = given["attention_mask"][:, :stop]
        with torch.no_grad():
            output = model(tokens[:, start:stop], past_key_values=cache, use_cache=True, **arguments)
        cache = output.past_key_values
        found.append(output.logits)
    return torch.cat(found, 1)


SPECS = pytest.mark.parametrize(("spec", "head_dim"), [("w16a16kv4", 12), ("w16a16kv4", 32), ("w8a16kv3", 32)])


def close(found: Tensor, expected: Tensor) -> None:
    """Scores of several hundred, summed in float32, are exponents."""
    torch.testing.assert_close(found, expected, rtol=0, atol=2**-10 * float(expected.abs().max()))


@SPECS
def test_a_cache_gives_what_no_cache_gives_at_any_positions(
    made: Made, tmp_path: Path, spec: str, head_dim: int
) -> None:
    model = checkpoint(made(head_dim=head_dim), tmp_path / "out", spec)
    close(steps(model), logits(model, use_cache=False))
    positions = torch.stack([torch.arange(20) * 3, torch.arange(20) + 40 * (torch.arange(20) > 15)])
    ones = torch.ones_like(TOKENS)  # or transformers would take gaps for the beginning of another text
    whole = logits(model, use_cache=False, position_ids=positions, attention_mask=ones)
    close(steps(model, position_ids=positions, attention_mask=ones), whole)
    assert float((whole - logits(model, use_cache=False)).abs().max()) > 0.1
    mask = torch.ones_like(TOKENS)
    mask[0, 5:9] = 0  # in the middle, at positions of their own
    looked = mask.bool()
    close(steps(model, attention_mask=mask)[looked], logits(model, attention_mask=mask, use_cache=False)[looked])


@SPECS
def test_padding_on_the_left_does_not_change_what_follows(made: Made, tmp_path: Path, spec: str, head_dim: int) -> None:
    model = checkpoint(made(head_dim=head_dim), tmp_path / "out", spec)
    padded = torch.cat([torch.zeros(1, 6, dtype=torch.long), TOKENS[:1, :14]], 1)
    mask = (torch.arange(20) >= 6).long()[None]
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    expected = logits(model, TOKENS[:1, :14], use_cache=False)
    close(steps(model, padded, attention_mask=mask, position_ids=positions)[:, 6:], expected)
    settings: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    both = torch.cat([padded, TOKENS[1:]])
    masks = torch.cat([mask, torch.ones_like(mask)])
    written = [model.generate(both, attention_mask=masks, use_cache=use, **settings) for use in (True, False)]
    assert torch.equal(*written)
    for tokens, mask in ((both, masks), (both[1:], masks[1:]), (both[1:, :6], masks[1:, :6])):
        settings["attention_mask"] = mask
        static = model.generate(tokens, cache_implementation="static", **settings)
        assert torch.equal(static, model.generate(tokens, **settings))


@SPECS
def test_a_cache_of_floats_counts_positions_back_over_what_is_looked_at(
    made: Made, tmp_path: Path, spec: str, head_dim: int
) -> None:
    model = checkpoint(made(head_dim=head_dim), tmp_path / "out", spec)
    mask = torch.ones_like(TOKENS)
    mask[0, :4] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    cache = Cache(layer_class_to_replicate=DynamicLayer)
    found = []
    for start, stop in ((0, 12), (12, 13), (13, 16), (16, 20)):
        given = {"attention_mask": mask[:, :stop], "position_ids": positions[:, start:stop]}
        found.append(logits(model, TOKENS[:, start:stop], past_key_values=cache, use_cache=True, **given))
    expected = logits(model, attention_mask=mask, position_ids=positions, use_cache=False)
    close(torch.cat(found, 1)[mask.bool()], expected[mask.bool()])


def test_positions_are_counted_over_the_keys_that_some_query_sees() -> None:
    seen = torch.tensor([[0, 0, 1, 1, 0, 1, 1, 0]]).bool()  # padding, three tokens, a hole, …, room in a static cache
    mask = seen[:, None, None].expand(-1, 1, 2, -1) & torch.ones(2, 8, dtype=torch.bool).tril(5)
    found = positions_of_all(torch.tensor([[2, 3]]), 8, mask)
    assert found[seen].tolist() == [0, 1, 2, 3]
    added = torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)
    assert torch.equal(positions_of_all(torch.tensor([[2, 3]]), 8, added), found)
    assert positions_of_all(torch.tensor([[7]]), 4, None).tolist() == [[4, 5, 6, 7]]
    assert positions_of_all(torch.tensor([[7, 9]]), 3, None)[:, :2].tolist() == [[7, 9]]  # and room


@SPECS
def test_beams_and_rows_take_their_positions_along(made: Made, tmp_path: Path, spec: str, head_dim: int) -> None:
    model = checkpoint(made(head_dim=head_dim), tmp_path / "out", spec)
    settings: dict[str, Any] = {"max_new_tokens": 6, "num_beams": 3, "do_sample": False, "pad_token_id": 0}
    settings |= {"attention_mask": torch.ones_like(TOKENS), "eos_token_id": None}
    written = [model.generate(TOKENS, use_cache=use, **settings) for use in (True, False)]
    assert torch.equal(*written)
    positions = torch.stack([torch.arange(20), torch.arange(20) * 2])
    ones = torch.ones_like(TOKENS)  # or transformers would take gaps for the beginning of another text
    whole = logits(model, use_cache=False, position_ids=positions, attention_mask=ones)
    with torch.no_grad():
        cache = model(TOKENS, position_ids=positions, attention_mask=ones, use_cache=True).past_key_values
    cache.crop(-8)
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([3, 0]))
    cache.layers[0].offload()
    cache.layers[0].prefetch()
    rest = logits(model, TOKENS[[1, 0], 12:], past_key_values=cache, position_ids=positions[[1, 0], 12:])
    close(rest, whole[[1, 0], 12:])
    layer = cache.layers[0]
    assert isinstance(layer, QuantizedCacheLayer)
    assert torch.equal(layer.positions, positions[[1, 0]].int())  # type: ignore[arg-type]
    cache.reset()
    assert layer.positions is None


def test_the_gradient_reaches_the_bias(made: Made, tmp_path: Path) -> None:
    model = checkpoint(made(num_hidden_layers=1, layer_types=["full_attention"]), tmp_path / "out", dtype=torch.float64)
    layer = model.model.layers[0].self_attn.k_proj
    layer.bias.data *= 0.01  # so that attention looks at more than one token
    upstream = torch.randn(2, 20, 96, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    layer.bias.requires_grad_()
    (model(TOKENS, use_cache=False).logits * upstream).sum().backward()
    along = torch.randn(layer.bias.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    step, start, sums = 1e-5, layer.bias.detach().clone(), []
    layer.bias.requires_grad_(False)
    for sign in (1, -1):  # one layer: nothing that is quantized depends on the bias
        layer.bias.copy_(start + sign * step * along)
        sums.append(float((logits(model, use_cache=False) * upstream).sum()))
    torch.testing.assert_close(float(layer.bias.grad @ along), (sums[0] - sums[1]) / (2 * step), rtol=1e-6, atol=0)


def test_the_gradient_reaches_the_bias_where_few_tokens_would_go_to_the_kernel(made: Made, tmp_path: Path) -> None:
    model = checkpoint(made(head_dim=32), tmp_path / "out")
    mask, gradients = torch.tensor([[0, 1, 1], [1, 1, 1]]), []
    for dtype in (torch.float32, torch.float64):
        bias = model.to(dtype).model.layers[1].self_attn.k_proj.bias.requires_grad_()
        model(TOKENS[:, :3], attention_mask=mask, use_cache=True).logits[:, 1:, 5].sum().backward()
        gradients.append(bias.grad.double())
        bias.grad = None
    assert float(gradients[1].abs().max()) > 0
    close(*gradients)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("quantize_queries", [False, True])
def test_attention_of_few_and_of_many_queries_is_that_over_keys_with_the_bias(
    made: Made, tmp_path: Path, dtype: torch.dtype, quantize_queries: bool, generator: torch.Generator
) -> None:
    model = checkpoint(made(head_dim=32), tmp_path / "out", dtype=dtype, quantize_queries=quantize_queries)
    attention = model.model.layers[0].self_attn
    quantizer, bias = attention.kv_quantizer, attention.k_proj.bias
    keys, values = torch.randn(2, 2, 2, 40, 32, generator=generator).to(dtype)
    layer = QuantizedCacheLayer(quantizer)
    positions = torch.stack([torch.arange(40), torch.arange(40) * 7])
    layer.coming = positions
    packed = layer.update(keys, values)
    cos, sin = model.model.rotary_emb(keys, positions)
    heads = bias.double().view(1, -1, 1, 32).expand(2, -1, 40, -1)
    _, turned = apply_rotary_pos_emb(heads, heads, cos.double(), sin.double())
    read, v = (quantizer.unpack(part.packed, torch.float32).double().repeat_interleave(2, 1) for part in packed)
    k = read + quantizer.rotation.apply(turned).repeat_interleave(2, 1)
    for tokens in (1, 3, 12):
        query = (0.05 * torch.randn(2, 4, tokens, 32, generator=generator)).to(dtype)
        mask = torch.ones(2, 1, tokens, 40, dtype=torch.bool).tril(40 - tokens)
        q = quantizer.quantize_queries(query).double()
        expected = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.2).transpose(1, 2)
        found, _ = quantized_attention(attention, query, packed[0], packed[1], mask, scaling=0.2, position_ids=None)
        # the product of 32 numbers, of which those of keys are rounded where there are many queries
        size = 0.2 * q.norm(dim=-1).max() * k.norm(dim=-1).max()
        of_scores = float(size) * torch.finfo(dtype).eps if tokens > 8 else 2**-20
        bound = (2 * of_scores + torch.finfo(dtype).eps) * float(v.abs().max())
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=bound)
        if tokens <= 8:
            by_reference, _ = quantized_attention(attention, query, packed[0], packed[1], mask, True, scaling=0.2)
            rounded = float(size) * torch.finfo(dtype).eps if dtype == torch.bfloat16 else 2**-20
            atol = (2 * rounded + torch.finfo(dtype).eps) * float(v.abs().max())
            torch.testing.assert_close(by_reference.double(), expected, rtol=0, atol=atol)


def test_only_a_bias_of_the_model_that_nothing_but_its_position_turns_stays_out(
    made: Made, tiny: Callable[[str], Path], tmp_path: Path, text_file: Path
) -> None:
    def outside(model: Any) -> bool:
        attention = model.model.layers[1].self_attn
        assert (attention.kv_quantizer.key_bias is not None) == getattr(attention.k_proj, "leaves_out", False)
        return attention.kv_quantizer.key_bias is not None

    words: dict[str, Any] = {
        "calib": str(text_file),
        "calib_tokens": 64,
        "calib_seq_len": 32,
        "tune_seq_len": 16,
        "tune_tokens": 32,
    }
    tuned = checkpoint(tiny("mistral"), tmp_path / "tuned", tune="biases", tune_steps=1, **words)
    assert tuned.model.layers[1].self_attn.k_proj.bias is not None
    assert not outside(tuned)
    assert not outside(checkpoint(tiny("qwen3"), tmp_path / "qwen3"))
    for rope, expected in (
        ({"rope_type": "linear", "factor": 2.0}, True),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}, True),
        ({"rope_type": "dynamic", "factor": 2.0}, False),
    ):
        source = made(rope_parameters={"rope_theta": 1e4, **rope})
        model = checkpoint(source, tmp_path / rope["rope_type"])  # type: ignore[operator]
        assert outside(model) == expected
        close(steps(model), logits(model, use_cache=False))


def test_copies_pickles_and_saved_models_compute_the_same(made: Made, tmp_path: Path) -> None:
    model = checkpoint(made(head_dim=32), tmp_path / "out", "w4a4kv4")
    expected = steps(model)
    model.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), again):
        assert torch.equal(steps(other), expected)
    before = [block.self_attn.k_proj.bias.clone() for block in model.model.layers]
    for block, bias in zip(model.model.layers, before, strict=True):
        block.self_attn.k_proj.bias = nn.Parameter(bias.flip(0), requires_grad=False)
    assert not torch.equal(steps(model), expected)
    for block, bias in zip(model.model.layers, before, strict=True):
        block.self_attn.k_proj.bias.copy_(bias)
    assert torch.equal(steps(model), expected)


def test_a_layer_may_be_wrapped_or_replaced_by_one_that_adds_its_bias(made: Made, tmp_path: Path) -> None:
    model = checkpoint(made(head_dim=32), tmp_path / "out")
    expected = steps(model)
    attention = model.model.layers[0].self_attn
    layer = attention.k_proj
    attention.k_proj = nn.Sequential(layer)
    close(steps(model), expected)
    attention.k_proj = nn.Linear(layer.in_features, layer.out_features)
    attention.k_proj.weight, attention.k_proj.bias = layer.weight, layer.bias
    within = logits(model, use_cache=False)
    layer.leaves_out, attention.kv_quantizer.key_bias, attention.k_proj = False, None, layer
    close(logits(model, use_cache=False), within)
