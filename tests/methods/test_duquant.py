import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import dfrot
from dfrot.methods.duquant import DuQuant, block_rotations, block_size, greedy_rotation, smoothing, spreading, zigzag
from dfrot.models.texts import load_tokenizer
from dfrot.pipeline.recipe import Recipe
from dfrot.transform.transforms import InputTransform


def test_channels_are_dealt_to_the_blocks_in_zigzag() -> None:
    """8 7 | 6 5 | 4 3 | 2 1 dealt to and fro: blocks (8, 5, 4, 1) and (7, 6, 3, 2), both of sum 18."""
    peaks = torch.tensor([8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0])
    assert zigzag(peaks, 2).tolist() == [0, 3, 4, 7, 1, 2, 5, 6]
    shuffled = torch.tensor([3, 0, 7, 1, 6, 2, 5, 4])
    assert peaks[shuffled][zigzag(peaks[shuffled], 2)].tolist() == [8, 5, 4, 1, 7, 6, 3, 2]


@pytest.mark.parametrize("size", [2, 3, 8, 128])
def test_a_spreading_step_is_orthogonal_and_its_first_row_uniform(size: int, generator: torch.Generator) -> None:
    step = spreading(size, generator)
    torch.testing.assert_close(step[0], torch.full((size,), size**-0.5, dtype=torch.float64), rtol=0, atol=1e-14)
    torch.testing.assert_close(step @ step.T, torch.eye(size, dtype=torch.float64), rtol=0, atol=1e-13)


def test_the_greedy_search_by_hand(generator: torch.Generator) -> None:
    """Two channels: the first step turns (4, 0) into (4, 4)/√2; a second one would gather it again, so one is kept."""
    x = torch.tensor([[4.0, 0.0], [0.0, 1.0]])
    rotation = greedy_rotation(x, 256, generator).float()
    expected = torch.tensor([[4.0, 4.0], [1.0, 1.0]]) / math.sqrt(2)
    torch.testing.assert_close((x @ rotation).abs(), expected)
    flat = torch.tensor([[1.0, -1.0], [-1.0, -1.0]])  # nothing sticks out: no step lowers the peak but by rounding
    torch.testing.assert_close(greedy_rotation(flat, 256, generator).abs(), torch.eye(2, dtype=torch.float64))


def test_rows_that_are_left_out_of_the_search_do_not_matter(generator: torch.Generator) -> None:
    x = torch.randn(400, 16, generator=generator)
    x[7, 3] = 60
    with_all = greedy_rotation(x, 20, torch.Generator().manual_seed(1))
    longest = x[x.norm(dim=1) >= x.norm(dim=1).max() / 4]
    assert len(longest) < len(x)
    assert torch.equal(with_all, greedy_rotation(longest, 20, torch.Generator().manual_seed(1)))


def test_each_transformation_lowers_the_peak_of_a_planted_outlier(generator: torch.Generator) -> None:
    """One channel of 64 is 100 times the others: a block of 8 can spread it by √8, two rotations by √64."""
    x = torch.randn(50, 64, generator=generator).clamp(-1, 1)
    x[:, 5] = 100
    peaks = [x.abs().max().item()]
    for permutations in (0, 1):
        options = DuQuant(block=8, permutations=permutations)
        transform = InputTransform(None, *block_rotations(x, options, torch.Generator().manual_seed(0)))
        peaks.append(transform.rotation.apply(x).abs().max().item())
    # beside the outlier's share there are at most √8 or √64 of the others' ones
    assert 100 / math.sqrt(8) <= peaks[1] <= 100 / math.sqrt(8) + math.sqrt(8)
    assert 100 / math.sqrt(64) <= peaks[2] <= 2 * 100 / math.sqrt(64)


def test_without_an_order_two_rotations_leave_an_outlier_in_its_block(generator: torch.Generator) -> None:
    x = torch.zeros(1, 64)
    x[0, 5] = 100
    peaks = {}
    for order in ("none", "random", "zigzag"):
        options = DuQuant(block=8, order=order)
        matrices, orders = block_rotations(x, options, torch.Generator().manual_seed(0))
        assert sorted(orders[0].tolist()) == list(range(64))
        peaks[order] = InputTransform(None, matrices, orders).rotation.apply(x).abs().max().item()
    assert peaks["none"] >= 100 / math.sqrt(8) * (1 - 1e-6)
    assert peaks["random"] < peaks["none"]
    assert peaks["zigzag"] == pytest.approx(100 / math.sqrt(64), rel=1e-5)


def test_smoothing_is_smoothquants_and_shared_by_the_heads_that_read_one_value_head(generator: torch.Generator) -> None:
    x, w = torch.randn(20, 24, generator=generator), torch.randn(5, 24, generator=generator)
    expected = [max(x[:, j].abs()) ** 0.6 / max(w[:, j].abs()) ** 0.4 for j in range(24)]
    torch.testing.assert_close(smoothing(x, w, 0.6, None, 4), torch.stack(expected))
    shared = smoothing(x, w, 0.6, 2, 4).view(2, 3, 4)  # 6 heads of 4 channels read 2 value heads
    assert torch.equal(shared, shared[:, :1].expand(-1, 3, -1))
    assert (shared.flatten() >= smoothing(x, w, 0.6, None, 4).min()).all()


@pytest.mark.parametrize(
    ("weights", "given", "alpha"), [("lwc", None, 0.5), ("rtn", None, 0.6), ("gptq", None, 0.6), ("lwc", 0.3, 0.3)]
)
def test_beside_learned_clipping_smoothing_is_milder(
    tiny: Callable[[str], Path], tmp_path: Path, weights: str, given: float | None, alpha: float
) -> None:
    """What the norms of a checkpoint keep of their gains is the original's over s, s by hand from what layers read."""
    text = tmp_path / "text.txt"
    text.write_text("a" * 200)  # every sequence of it is the same
    words: dict[str, Any] = {"calib": str(text), "calib_tokens": 128, "calib_seq_len": 32, "block": 16, "alpha": given}
    words |= {"tune": "none"} | ({"epochs": 1} if weights == "lwc" else {})
    recipe = Recipe.parse("duquant", weights, greedy_steps=2, dtype="float32", **words)
    made = safetensors_of(dfrot.quantize(tiny("qwen2"), recipe, tmp_path / "out").path)

    model = AutoModelForCausalLM.from_pretrained(tiny("qwen2"))
    read: dict[torch.nn.Module, torch.Tensor] = {}
    block = model.model.layers[0]
    stages = {
        "input_layernorm": [block.self_attn.q_proj, block.self_attn.k_proj, block.self_attn.v_proj],
        "post_attention_layernorm": [block.mlp.gate_proj, block.mlp.up_proj],
    }
    for first, *_ in stages.values():
        first.register_forward_pre_hook(lambda layer, args: read.update({layer: args[0][0]}))
    with torch.no_grad():
        model(load_tokenizer(tiny("qwen2"))("a" * 32, return_tensors="pt").input_ids)
    for norm, layers in stages.items():
        of_x = read[layers[0]].abs().amax(0)
        of_w = torch.cat([layer.weight.detach() for layer in layers]).abs().amax(0)
        expected = block.get_submodule(norm).weight.detach() * of_w ** (1 - alpha) / of_x**alpha
        torch.testing.assert_close(made[f"model.layers.0.{norm}.weight"], expected, rtol=1e-5, atol=0)


def safetensors_of(checkpoint: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for shard in checkpoint.glob("*.safetensors") for name, tensor in load_file(shard).items()}


@pytest.mark.parametrize(
    ("width", "wanted", "size"),
    [(4096, 128, 128), (576, 128, 64), (1536, 128, 128), (80, 128, 16), (48, 8, 8), (96, 48, 48)],
)
def test_a_block_that_does_not_divide_becomes_the_largest_power_of_two_that_does(
    width: int, wanted: int, size: int
) -> None:
    assert block_size(width, wanted) == size


def test_peaks_before_and_after_are_in_the_notes(tiny: Callable[[str], Path], text_file: Path, tmp_path: Path) -> None:
    words: dict[str, Any] = {"calib": str(text_file), "calib_tokens": 32, "block": 16}
    report = dfrot.quantize(tiny("llama"), Recipe.parse("duquant", "rtn", preset="duquant", **words), tmp_path / "out")
    assert len(report.notes["peaks"]) == 2 * 4
    assert all(peak["after"] <= peak["before"] for peak in report.notes["peaks"])
