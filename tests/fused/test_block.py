"""A block in one go against the block layer by layer."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig

import dfrot
from dfrot.fused.block import FusedBlock
from dfrot.kernels import structures
from dfrot.kernels.library import backend, instruction_set
from dfrot.linalg.rotation import Hadamard
from tests.tiny_models import CONFIGS, write_biased_model, write_tiny_model

TOKENS = torch.randint(1, 96, (2, 20), generator=torch.Generator().manual_seed(3))
# Between the two ways, relative to the largest logit. What quantizers are handed is equal to the last bit; only float32
# sums of heads differ.
DIFFERENCE = 2**-17
UNPADDED = [*range(8), *range(12, 28)]  # of what `stepwise` returns
pytestmark = pytest.mark.skipif(instruction_set() == 0, reason=backend())


@pytest.fixture(scope="session")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Tiny models whose heads have 32 channels, as the kernels want them."""
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            made[name] = write_tiny_model(name, tmp_path_factory.mktemp(name), head_dim=32)
        return made[name]

    return get


def checkpoint(model: Path, out: Path, text: Path, **words: Any) -> Any:
    recipe = dfrot.Recipe.parse(
        **{"method": "quarot", "weights": "rtn", "calib": str(text), "calib_tokens": 64, **words}
    )
    return dfrot.load(dfrot.quantize(model, recipe, out).path)[0]


@torch.no_grad()
def stepwise(model: Any, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Logits of the last tokens, one by one and the last two together."""
    mask = torch.ones_like(TOKENS) if mask is None else mask
    output = model(TOKENS[:, :12], attention_mask=mask[:, :12], use_cache=True)
    logits = []
    for start, stop in ((12, 13), (13, 14), (14, 15), (15, 16), (16, 18), (18, 20)):
        arguments = {"attention_mask": mask[:, :stop], "past_key_values": output.past_key_values}
        output = model(TOKENS[:, start:stop], use_cache=True, **arguments)
        logits.append(output.logits)
    whole = model(TOKENS, attention_mask=mask, use_cache=False).logits
    return torch.cat([*logits, whole], dim=1)


METHODS: dict[str, dict[str, Any]] = {
    "quarot": {"method": "quarot"},
    "heads": {"method": "quarot", "head_mixing": True},
    "duquant": {"method": "duquant", "preset": "duquant", "block": 16, "greedy_steps": 4},
    "learned": {"method": "learned", "calib_seq_len": 16, "steps": 2, "learn_steps": 2, "learn_tokens": 16},  # offsets
    "none": {"method": "none"},
    "16-bit cache": {"method": "quarot", "spec": "w8a8kv16"},
    "weights alone": {"method": "quarot", "spec": "w4a16kv4"},
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", CONFIGS)
def test_a_step_is_the_block_layer_by_layer(
    wide: Callable[[str], Path],
    name: str,
    method: str,
    tmp_path: Path,
    text_file: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Padding is not compared: it attends to nothing."""
    model = checkpoint(wide(name), tmp_path / "out", text_file, **{"spec": "w4a4kv4", **METHODS[method]})
    assert_the_short_way_is_the_long_way(model, monkeypatch)


@pytest.mark.parametrize("words", [{"spec": "w4a4kv4"}, {"spec": "w8a8kv8", "quantize_queries": True}])
@pytest.mark.parametrize("name", ["qwen2", "llama"])
def test_keys_with_large_biases_take_the_short_way_too(
    tmp_path: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch, name: str, words: dict[str, Any]
) -> None:
    model = checkpoint(write_biased_model(name, tmp_path / "model", head_dim=32), tmp_path / "out", text_file, **words)
    assert_the_short_way_is_the_long_way(model, monkeypatch)


@pytest.mark.parametrize("factor", [0.5, 0.75])
def test_channels_that_no_position_turns_are_left_alone(
    tmp_path: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch, factor: float
) -> None:
    """Phi-4-mini turns three quarters of every head."""
    rope = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": factor}
    phi3 = write_tiny_model("phi3", tmp_path / "model", head_dim=32, rope_parameters=rope)
    model = checkpoint(phi3, tmp_path / "out", text_file, spec="w4a4kv4")
    assert model.model.rotary_emb.inv_freq.numel() == 16 * factor  # pairs of channels
    assert_the_short_way_is_the_long_way(model, monkeypatch)


def assert_the_short_way_is_the_long_way(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    mask = torch.ones_like(TOKENS)
    mask[0, :4] = 0
    with monkeypatch.context() as patched:
        count = blocks_by_layers(patched)
        short = stepwise(model, mask)[:, UNPADDED]
        assert not count
    monkeypatch.setattr(FusedBlock, "__call__", lambda *_, **__: None)
    long = stepwise(model, mask)[:, UNPADDED]
    assert long.isfinite().all()
    torch.testing.assert_close(short, long, rtol=0, atol=DIFFERENCE * float(long.abs().max()))


def blocks_by_layers(patched: pytest.MonkeyPatch) -> list[int]:
    """A list that has an entry for every block that is computed layer by layer from now on."""
    count, call = [], FusedBlock.__call__

    def counted(*args: Any, **kwargs: Any) -> Any:
        output = call(*args, **kwargs)
        if output is None:
            count.append(1)
        return output

    patched.setattr(FusedBlock, "__call__", counted)
    return count


def test_the_families_of_the_suite_that_take_the_short_way(
    tiny: Callable[[str], Path], tmp_path: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those whose heads have a multiple of 32 channels, so that what else is tested on them is tested of both ways."""
    models = {name: checkpoint(tiny(name), tmp_path / name, text_file, spec="w4a4kv4") for name in CONFIGS}
    count = blocks_by_layers(monkeypatch)
    short = set()
    for name, model in models.items():
        count.clear()
        stepwise(model)
        short |= set() if count else {name}
    assert short == {"mistral", "qwen3", "phi3"} < set(CONFIGS)


def test_hooks_and_other_caches_take_the_long_way(wide: Callable[[str], Path], tmp_path: Path, text_file: Path) -> None:
    model = checkpoint(wide("llama"), tmp_path / "out", text_file, spec="w4a4kv4")
    seen = []
    handle = model.model.layers[0].self_attn.q_proj.register_forward_hook(lambda *_: seen.append(1))
    watched = stepwise(model)
    assert len(seen) == 8  # forward passes
    handle.remove()
    torch.testing.assert_close(stepwise(model), watched, rtol=0, atol=DIFFERENCE * float(watched.abs().max()))
    assert len(seen) == 8
    with torch.no_grad():
        states = model(TOKENS, output_hidden_states=True, use_cache=True).hidden_states
    assert len(states) == 3


def test_a_block_on_another_device_takes_the_long_way_even_where_that_has_kernels(
    wide: Callable[[str], Path], tmp_path: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton", reason="Triton is not there: pip install 'dfrot[dev]'")
    block = checkpoint(wide("llama"), tmp_path / "out", text_file, spec="w4a4kv4").model.layers[0]
    monkeypatch.setattr("dfrot.kernels.cuda.computable", lambda x: True)
    monkeypatch.setattr("dfrot.kernels.cuda.linear.supported", lambda *_: True)
    monkeypatch.setattr("dfrot.kernels.cuda.attention.supported", lambda *_: True)
    x = torch.empty(1, 1, block.hidden_size, device="meta")
    assert block.fused(block, x, position_embeddings=(x, x)) is None
    with pytest.raises(AssertionError, match="C cannot read a tensor on meta"):
        structures.pointer(x)


@pytest.mark.parametrize("change", ["rotation", "offset"])
def test_a_reader_of_a_norm_with_a_transform_of_its_own_takes_the_long_way(
    wide: Callable[[str], Path], tmp_path: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    model = checkpoint(wide("mistral"), tmp_path / "out", text_file, spec="w4a4kv4")
    before, layer = stepwise(model), model.model.layers[0].self_attn.q_proj
    setattr(layer, change, Hadamard(64) if change == "rotation" else torch.full((64,), 0.5))
    found = stepwise(model)
    assert not torch.allclose(found, before)
    monkeypatch.setattr(FusedBlock, "__call__", lambda *_, **__: None)
    expected = stepwise(model)
    torch.testing.assert_close(found, expected, rtol=0, atol=DIFFERENCE * float(expected.abs().max()))


def test_configurations_have_the_heads_that_they_were_given(wide: Callable[[str], Path]) -> None:
    config: PreTrainedConfig = AutoModelForCausalLM.from_pretrained(wide("phi3")).config
    assert config.head_dim == 32


@torch.no_grad()
@pytest.mark.parametrize("name", ["cache", "past_key_values", "kept"])
def test_a_cache_is_known_by_its_names_and_never_passed_over(
    wide: Callable[[str], Path], tmp_path: Path, text_file: Path, name: str
) -> None:
    """transformers 5.24 calls it differently from 5.23; by a third name the block goes the long way."""
    model = checkpoint(wide("llama"), tmp_path / "out", text_file)
    block, cache = model.model.layers[0], model(TOKENS, use_cache=True).past_key_values
    x = torch.randn(2, 1, model.config.hidden_size, generator=torch.Generator().manual_seed(0))
    positions = torch.full((2, 1), TOKENS.shape[1])
    how = {"position_embeddings": model.model.rotary_emb(x, positions), "position_ids": positions}
    found = block.fused(block, x, **{name: cache}, **how)
    if name == "kept":
        assert found is None
        return
    assert found is not None
    assert cache.layers[0].get_seq_length() == TOKENS.shape[1] + 1
