"""The student computes what the checkpoint computes, and its gradients are those of the plain float path."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dfrot
from dfrot.linalg.rotation import Hadamard
from dfrot.quant.affine import choose_qparams, fake_quantize, quantize
from dfrot.quant.spec import UNQUANTIZED, TensorSpec
from dfrot.runtime.linear import QuantLinear, packed_tensors
from dfrot.training.descent import Descent
from dfrot.training.teacher import Distillation, Teacher, Windows
from dfrot.training.trained import Trained, TrainedIntegers, quantized
from dfrot.tuning.run import TuningRun
from dfrot.tuning.student import Student, StudentLinear

Tiny = Callable[[str], Path]
WORDS: dict[str, Any] = {"calib_tokens": 64, "calib_seq_len": 32, "tune_seq_len": 16, "tune_tokens": 32}


def quant_linear(weights: TensorSpec, activations: TensorSpec, generator: torch.Generator) -> QuantLinear:
    """A layer in float64 whose scales are leaves."""
    layer = QuantLinear(
        64, 24, bias=True, weights=weights, activations=activations, rotation=Hadamard(64), dtype=torch.float64
    )
    weight = torch.randn(24, 64, generator=generator)
    qparams = choose_qparams(weight, weights.grid, weights.weight_granularity, scale_dtype=torch.bfloat16)
    codes = quantize(weight, weights.grid, weights.weight_granularity, qparams)
    tensors = packed_tensors(codes, qparams, weights) | {"bias": torch.randn(24, generator=generator)}
    layer.load_state_dict(tensors)
    return layer.double()


def on_grid(x: Tensor, spec: TensorSpec, clip: Tensor | None = None) -> Tensor:
    """x on a token's grid, for autograd: rounding passes gradients, a clipped entry is the end of the range."""
    ratio = spec.fixed_clip if clip is None else clip
    if spec.symmetric:
        high = x.abs().amax(-1, keepdim=True) * ratio
        step, low = high / spec.grid.highest, high * spec.grid.lowest / spec.grid.highest
    else:
        high, low = x.amax(-1, keepdim=True).clamp(min=0) * ratio, x.amin(-1, keepdim=True).clamp(max=0) * ratio
        step = (high - low) / spec.grid.highest
    zero = torch.round(-low / step) if not spec.symmetric else torch.zeros_like(step)
    codes = (x / step).detach().round() + zero
    rounded = x / step + (codes - zero - x / step).detach()
    clipped = torch.where(codes > spec.grid.highest, high, low)
    value = torch.where((codes >= spec.grid.lowest) & (codes <= spec.grid.highest), rounded * step, clipped)
    ratio = ratio if clip is None else clip.detach()
    return fake_quantize(x.detach(), spec.grid, spec.token_granularity, ratio) + value - value.detach()


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_gradient_of_a_clip_ratio_is_that_of_what_is_clipped(symmetric: bool, generator: torch.Generator) -> None:
    spec = TensorSpec(4, symmetric=symmetric, clip_ratio=0.9)
    x = torch.randn(3, 5, 64, generator=generator, dtype=torch.float64, requires_grad=True)
    clip = torch.tensor([0.7], dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(3, 5, 64, generator=generator, dtype=torch.float64)
    found, expected = quantized(x, spec, clip=clip), on_grid(x, spec, clip)
    torch.testing.assert_close(found, expected)
    for got, wanted in zip(
        torch.autograd.grad(found, [x, clip], upstream), torch.autograd.grad(expected, [x, clip], upstream), strict=True
    ):
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [None, 16])
@pytest.mark.parametrize("moving", [True, False])
@pytest.mark.parametrize("inputs", ["a4", "a4 symmetric", "a16"])
def test_gradients_are_those_of_the_plain_float_path(
    inputs: str, moving: bool, group: int | None, symmetric: bool, keep: bool, generator: torch.Generator
) -> None:
    weights = TensorSpec(4, symmetric=symmetric, group=group)
    activations = TensorSpec(4, symmetric="symmetric" in inputs, clip_ratio=0.8) if "a4" in inputs else UNQUANTIZED
    layer = quant_linear(weights, activations, generator)
    assert layer.bias is not None
    scales = Trained(layer.scales.detach().clone(), torch.float64, None, 1.0)
    bias = Trained(layer.bias.detach().clone(), torch.float64, 0.5, 1.0)
    ends = weights.grid
    codes = TrainedIntegers(layer.codes(), ends.lowest, ends.highest, 1.0) if moving else None
    student = StudentLinear(layer, scales, bias, activations, torch.float64, keep, codes=codes)
    x = torch.randn(3, 5, 64, generator=generator, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(3, 5, 24, generator=generator, dtype=torch.float64)
    found = student(x)
    assert scales.parameter is not None
    assert bias.parameter is not None
    asked = [x, scales.parameter, bias.parameter, *([codes.parameter] if codes is not None else [])]
    of_student = torch.autograd.grad(found, asked, upstream)

    layer.scales = layer.scales.detach().requires_grad_()
    layer.bias.requires_grad_()
    rotated = layer.transformed(x)
    read = on_grid(rotated, activations) if activations.enabled else rotated
    weight = layer.dense_weight(x.dtype)
    wanted = nn.functional.linear(read, weight, layer.bias)
    of_x, of_scales, of_bias, of_weight = torch.autograd.grad(wanted, [x, layer.scales, layer.bias, weight], upstream)
    torch.testing.assert_close(found, wanted)
    # d/dp of s eᵖ is s, of b + 0.5 p is 0.5, of s (w + p) is s
    of_codes = (of_weight.unflatten(1, (layer.scales.shape[1], -1)) * layer.scales[..., None]).flatten(1)
    for got, expected in zip(of_student[:3], (of_x, of_scales * layer.scales, 0.5 * of_bias), strict=True):
        torch.testing.assert_close(got, expected)
    if moving:
        torch.testing.assert_close(of_student[3], of_codes.float())


def test_no_dense_weight_outlives_a_forward_pass(generator: torch.Generator) -> None:
    layer = quant_linear(TensorSpec(4, symmetric=True), UNQUANTIZED, generator)
    scales = Trained(layer.scales.detach(), torch.float64, None, 1.0)
    student = StudentLinear(layer, scales, None, UNQUANTIZED, torch.float64, keep=False)
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        student(torch.randn(2, 64, generator=generator, dtype=torch.float64, requires_grad=True))
    assert kept
    assert max(tensor.numel() for tensor in kept) < 24 * 64
    assert {tensor.data_ptr() for tensor in layer.kept_tensors()} == {
        tensor.data_ptr() for tensor in (*layer.parameters(), *layer.buffers())
    }


def test_integers_move_once_p_has_passed_half_a_step_and_never_off_their_grid() -> None:
    integers = TrainedIntegers(torch.tensor([-8, -8, 0, 0, 7, 7]), -8, 7, 1.0)
    with torch.no_grad():
        integers.parameter.copy_(torch.tensor([-0.6, 0.6, 0.4, -1.6, 0.4, 0.9]))
    assert integers().tolist() == [-8, -7, 0, -2, 7, 7]


def test_values_are_those_that_the_checkpoint_will_have() -> None:
    trained = Trained(torch.tensor([1.0, 2.0], dtype=torch.bfloat16), torch.float32, None, 1.0)
    assert trained.parameter is not None
    with torch.no_grad():
        trained.parameter.fill_(0.001)
    assert torch.equal(trained(), torch.tensor([1.0, 2.0]))  # half of a step of bfloat16 and less
    with torch.no_grad():
        trained.parameter.fill_(0.006)
    assert torch.equal(trained(), trained().to(torch.bfloat16).float())
    assert (trained() > torch.tensor([1.0, 2.0])).all()
    (gradient,) = torch.autograd.grad(trained().sum(), trained.parameter)
    torch.testing.assert_close(gradient, torch.tensor([1.0, 2.0]) * torch.tensor(0.006).exp())


def test_divergence_and_its_gradient_are_those_of_autograd(
    generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dfrot.training.teacher.LOGITS", 7 * 19)  # pieces of seven tokens, the last one smaller
    states = torch.randn(5, 6, 8, generator=generator).bfloat16()
    head = torch.randn(19, 8, generator=generator, dtype=torch.float64)
    hidden = torch.randn(3, 6, 8, generator=generator, dtype=torch.float64, requires_grad=True)
    windows = [4, 0, 2]
    found, slope = Teacher(states, head).divergence(hidden.detach(), windows, gradient=True)
    wanted = (states[windows].double() @ head.T).log_softmax(-1).flatten(0, 1)
    own = (hidden @ head.T).log_softmax(-1).flatten(0, 1)
    expected = nn.functional.kl_div(own, wanted, reduction="batchmean", log_target=True)
    torch.testing.assert_close(found, expected.detach())
    assert slope is not None
    torch.testing.assert_close(slope, torch.autograd.grad(expected, hidden)[0])


def test_a_step_in_parts_has_the_gradient_of_the_whole(
    generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dfrot.training.teacher.windows_at_once", lambda *_: 2)  # of three: the last part is smaller
    windows = Windows.of(torch.arange(60) % 19, "text", 6, 3, 4, seed=0)
    states = torch.randn(len(windows.tokens), 6, 8, generator=generator).bfloat16()
    head = torch.randn(19, 8, generator=generator, dtype=torch.float64)
    moved = torch.randn(19, 8, generator=generator, dtype=torch.float64, requires_grad=True)
    seen = []

    def student(tokens: Tensor) -> Tensor:
        seen.append(len(tokens))
        return moved[tokens]

    found = Distillation(student, Teacher(states, head), windows).loss(1)
    number = windows.step(1)
    wanted = (states[number].double() @ head.T).log_softmax(-1).flatten(0, 1)
    own = (moved[windows.tokens[number]] @ head.T).log_softmax(-1).flatten(0, 1)
    expected = nn.functional.kl_div(own, wanted, reduction="batchmean", log_target=True)
    assert seen == [2, 1]
    torch.testing.assert_close(torch.tensor(found).double(), expected.detach(), check_dtype=False)
    assert moved.grad is not None
    torch.testing.assert_close(moved.grad, torch.autograd.grad(expected, moved)[0])


@pytest.mark.parametrize(
    ("architecture", "words"),
    [
        ("llama", {"method": "quarot"}),
        ("llama", {"method": "none", "spec": "w16a4kv4"}),
        ("mistral", {"method": "quarot", "spec": "w4g16a8kv16"}),  # a sliding window
        ("qwen2", {"method": "duquant", "preset": "duquant", "block": 16}),  # rotated norms, quantized queries
        ("qwen3", {"method": "quarot", "spec": "w4a4kv4"}),  # norms over heads
        ("phi3", {"method": "quarot", "spec": "w4a16kv3"}),  # fused layers
        (
            "llama",
            {"method": "learned", "spec": "w4a4kv4", "steps": 2, "learn_steps": 2, "learn_tokens": 16},
        ),  # offsets
        ("qwen2", {"method": "none", "spec": "w16a16kv4", "tune": "biases"}),
        ("llama", {"method": "quarot", "spec": "w3g16a8kv16", "tune": "biases,roundings"}),
    ],
)
@pytest.mark.parametrize("recompute", [False, True])
def test_a_loaded_checkpoint_computes_what_its_student_did(
    tiny: Tiny,
    tmp_path: Path,
    text: str,
    monkeypatch: pytest.MonkeyPatch,
    architecture: str,
    words: dict[str, Any],
    recompute: bool,
) -> None:
    students: list[Student] = []

    def made(run: TuningRun) -> Student:
        students.append(build(run))
        students[-1].through_blocks.recompute = recompute
        return students[-1]

    build = TuningRun._student
    monkeypatch.setattr(TuningRun, "_student", made)
    monkeypatch.setattr(
        Descent, "_held_out", lambda self: 1 / (1 + len(self.probes) * 10 + self.step)
    )  # the last step is kept
    words = {"weights": "rtn", "calib": text, "tune": "all", "tune_steps": 3, **WORDS, **words}
    recipe = dfrot.Recipe.parse(dtype="float64", **words)
    path = dfrot.quantize(tiny(architecture), recipe, tmp_path / "out").path
    model: Any = dfrot.load(path)[0]
    tokens = torch.randint(1, 96, (2, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model.base_model(tokens, use_cache=False).last_hidden_state
        found = students[0](tokens)
    torch.testing.assert_close(found, expected, rtol=0, atol=2**-40 * float(expected.abs().max()))
    moved = [each for each in students[0].moving if each.parameter is not None and each.parameter.any()]
    assert len(moved) == len(students[0].moving)
