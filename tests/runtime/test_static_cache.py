"""A static cache of packed keys and values is the growing one, of one size and written in place."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import StaticCache
from transformers.cache_utils import StaticSlidingWindowLayer

import dfrot
from dfrot.kernels import library
from dfrot.runtime.cache import StaticQuantizedLayer
from tests.fused.test_block import DIFFERENCE
from tests.tiny_models import write_biased_model, write_tiny_model

TOKENS = torch.randint(1, 96, (2, 20), generator=torch.Generator().manual_seed(3))
PADDED = torch.ones_like(TOKENS)
PADDED[0, :6] = 0
CAPACITY = 40
SETTINGS: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
Checkpoint = Callable[..., Path]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """A Llama whose heads the kernels take (32 channels) or leave to the reference (12), with biases of keys or not."""
    made: dict[Any, Path] = {}

    def get(head_dim: int, biased: bool = False) -> Path:
        if (head_dim, biased) not in made:
            write = write_biased_model if biased else write_tiny_model
            folder = tmp_path_factory.mktemp("model")
            source = write("llama", folder / "source", head_dim=head_dim, attention_bias=biased)
            recipe = dfrot.Recipe.parse("quarot", "rtn", "w8a8kv4")
            made[head_dim, biased] = dfrot.quantize(source, recipe, folder / "out").path
        return made[head_dim, biased]

    return get


@pytest.fixture(params=[32, 12], ids=["kernels", "reference"])
def model(request: pytest.FixtureRequest, checkpoint: Checkpoint) -> Any:
    return dfrot.load(checkpoint(request.param))[0]


@torch.no_grad()
def filled(model: Any, tokens: Tensor = TOKENS) -> Any:
    cache = StaticCache(config=model.config, max_cache_len=CAPACITY)
    model(tokens, past_key_values=cache, use_cache=True)
    assert all(type(layer) is StaticQuantizedLayer for layer in cache.layers)
    return cache


def tensors(cache: Any) -> list[Tensor]:
    return [tensor for layer in cache.layers for tensor in layer._tensors()]


@torch.no_grad()
def stepwise(model: Any, cache: Any, tokens: Tensor, **given: Any) -> Tensor:
    """Logits of tokens that arrive 9, 1, 1, 4 and so on at a time."""
    found = [
        model(each, past_key_values=cache, use_cache=True, **given).logits for each in tokens.split([9, 1, 1, 4, 5], 1)
    ]
    return torch.cat(found, 1)


@pytest.mark.parametrize("mask", [torch.ones_like(TOKENS), PADDED], ids=["whole", "padded"])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("head_dim", [32, 12], ids=["kernels", "reference"])
def test_generate_writes_the_same_with_a_static_a_growing_and_no_cache(
    checkpoint: Checkpoint, head_dim: int, biased: bool, mask: Tensor
) -> None:
    model = dfrot.load(checkpoint(head_dim, biased))[0]
    quantizer = model.model.layers[0].self_attn.kv_quantizer
    assert quantizer.native(torch.empty(1, head_dim)) == (head_dim == 32 and library.library()[0] is not None)
    assert (quantizer.key_bias is not None) == biased
    settings = {**SETTINGS, "attention_mask": mask, "return_dict_in_generate": True}
    static = model.generate(TOKENS, cache_implementation="static", **settings)
    assert all(type(layer) is StaticQuantizedLayer for layer in static.past_key_values.layers)
    for others in ({}, {"use_cache": False}):
        assert torch.equal(static.sequences, model.generate(TOKENS, **settings, **others).sequences)


def test_a_static_cache_has_the_bytes_of_its_capacity_packed_and_keeps_its_addresses(model: Any) -> None:
    cache = filled(model, TOKENS[:, :9])
    head_dim, rows = model.config.head_dim, 2 * model.config.num_key_value_heads
    for layer in cache.layers:
        assert layer.nbytes == 2 * rows * CAPACITY * (head_dim // 2 + 3)  # codes, scale, zero point
        assert layer.keys.shape == layer.values.shape == (2, rows // 2, CAPACITY, head_dim)
    assert int(cache.get_seq_length()) == 9
    assert cache.get_max_length() == CAPACITY
    before = [tensor.data_ptr() for tensor in tensors(cache)]
    with torch.no_grad():
        model(TOKENS[:, 9:], past_key_values=cache, use_cache=True)
    cache.reorder_cache(torch.tensor([1, 0]))
    cache.reset()
    assert [tensor.data_ptr() for tensor in tensors(cache)] == before


@pytest.mark.parametrize("biased", [False, True])
def test_steps_with_a_static_cache_are_the_whole_pass_at_any_positions_and_again_after_a_reset(
    checkpoint: Checkpoint, biased: bool
) -> None:
    for head_dim in (32, 12):
        model = dfrot.load(checkpoint(head_dim, biased))[0]
        with torch.no_grad():
            wanted = model(TOKENS, use_cache=False).logits
        bound = (2**-10 if biased else 1e-5) * float(wanted.abs().max())  # scores of hundreds are exponents
        cache = StaticCache(config=model.config, max_cache_len=CAPACITY)
        torch.testing.assert_close(stepwise(model, cache, TOKENS), wanted, rtol=0, atol=bound)
        assert int(cache.get_seq_length()) == 20
        cache.reset()
        assert int(cache.get_seq_length()) == 0
        assert not any(tensor.any() for tensor in tensors(cache))
        torch.testing.assert_close(stepwise(model, cache, TOKENS), wanted, rtol=0, atol=bound)
        cache.reset()
        positions = torch.stack([torch.arange(20) * 3, torch.arange(20) + 40 * (torch.arange(20) > 12)])
        ones = torch.ones_like(TOKENS)  # or transformers would take gaps for the beginning of another text
        pieces = [9, 1, 1, 9]
        with torch.no_grad():
            wanted = model(TOKENS, use_cache=False, position_ids=positions, attention_mask=ones).logits
            found = [
                model(a, position_ids=b, attention_mask=ones[:, :end], past_key_values=cache, use_cache=True).logits
                for a, b, end in zip(TOKENS.split(pieces, 1), positions.split(pieces, 1), (9, 10, 11, 20), strict=True)
            ]
        torch.testing.assert_close(torch.cat(found, 1), wanted, rtol=0, atol=bound)


def test_rows_can_be_reordered_and_beams_are_those_without_a_cache(model: Any) -> None:
    cache, order = filled(model), torch.tensor([1, 0])
    swapped = filled(model, TOKENS[order])
    cache.reorder_cache(order)
    assert all(torch.equal(one, other) for one, other in zip(tensors(cache), tensors(swapped), strict=True))
    settings = {**SETTINGS, "num_beams": 3, "attention_mask": torch.ones_like(TOKENS)}
    static = model.generate(TOKENS, cache_implementation="static", **settings)
    assert torch.equal(static, model.generate(TOKENS, use_cache=False, **settings))


def test_a_static_cache_shows_the_keys_and_values_of_the_growing_one(model: Any) -> None:
    with torch.no_grad():
        growing = model(TOKENS, use_cache=True).past_key_values
    for one, other in zip(filled(model).layers, growing.layers, strict=True):
        for shown, wanted in ((one.keys, other.keys), (one.values, other.values)):
            torch.testing.assert_close(shown[:, :, :20], wanted, rtol=0, atol=1e-4)
            assert not shown[:, :, 20:].any()


def test_tokens_beyond_the_capacity_and_gradients_are_refused(model: Any) -> None:
    cache = filled(model)
    stepwise(model, cache, TOKENS)
    with pytest.raises(IndexError):
        stepwise(model, cache, TOKENS)
    model.get_input_embeddings().weight.requires_grad_()
    with pytest.raises(ValueError, match="a static cache has no gradients"):
        model(TOKENS, past_key_values=StaticCache(config=model.config, max_cache_len=CAPACITY), use_cache=True)


def test_windows_keep_the_layers_of_transformers(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    recipe = dfrot.Recipe.parse("quarot", "rtn", "w16a16kv4")
    model = dfrot.load(dfrot.quantize(tiny("mistral"), recipe, tmp_path / "out").path)[0]
    settings = {**SETTINGS, "attention_mask": PADDED, "return_dict_in_generate": True}
    static = model.generate(TOKENS, cache_implementation="static", **settings)
    assert all(type(layer) is StaticSlidingWindowLayer for layer in static.past_key_values.layers)
    assert torch.equal(static.sequences, model.generate(TOKENS, use_cache=False, **settings).sequences)


# In another process: the suite's own checks of types would be traced too.
COMPILED = """
import sys
import torch, dfrot
from torch._dynamo.backends.debugging import aot_eager
from transformers import StaticCache

def backend(graph, inputs):
    assert not [node for node in graph.graph.nodes if str(node.target) == "item"], "the graph waits for a GPU"
    return aot_eager(graph, inputs)

tokens = torch.arange(1, 17).view(2, 8)
with torch.no_grad():
    for path in sys.argv[1:]:
        model = dfrot.load(path)[0]
        caches = [StaticCache(config=model.config, max_cache_len=24) for _ in range(2)]
        for cache in caches:
            model(tokens[:, :4], past_key_values=cache, use_cache=True)
        step = torch.compile(model, fullgraph=True, dynamic=False, backend=backend)
        with torch._dynamo.config.patch(error_on_recompile=True):
            for at in range(4, 8):
                both = [
                    f(tokens[:, at:at + 1], past_key_values=cache, use_cache=True).logits
                    for f, cache in zip((step, model), caches)
                ]
                print(float((both[0] - both[1]).abs().max() / both[1].abs().max()))
        for one, other in zip(*(cache.layers for cache in caches)):
            assert all(torch.equal(*pair) for pair in zip(one._tensors(), other._tensors()))
        torch._dynamo.reset()
"""


@pytest.mark.parametrize("kernels", ["", "reference"])
def test_a_compiled_step_is_one_graph_for_all_steps_and_writes_and_computes_the_same(
    checkpoint: Checkpoint, kernels: str
) -> None:
    paths = [str(checkpoint(32, biased)) for biased in (False, True)]
    environment = {**os.environ, "DFROT_KERNELS": kernels}
    command = [sys.executable, "-c", COMPILED, *paths]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    found = [float(word) for word in done.stdout.split()]
    assert len(found) == 8
    assert max(found) <= DIFFERENCE
