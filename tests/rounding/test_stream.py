"""What weights are fitted to, against the checkpoint that comes out and the model that went in."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import dfrot
from dfrot.models.graph import ModelGraph
from dfrot.models.source import open_source
from dfrot.pipeline import loop
from dfrot.pipeline.estimate import Estimate
from dfrot.rounding.stream import TOGETHER, CalibrationStream, Hessian
from dfrot.runtime.linear import QuantLinear
from dfrot.system.errors import SetupError, UserError
from dfrot.system.files import read_json
from tests.tiny_models import CONFIGS

Tiny = Callable[[str], Path]


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The stream, the calibration tokens and the Hessians of the next run."""
    found: dict[str, Any] = {"hessians": {}, "crosses": {}}

    class Watched(CalibrationStream):
        def __init__(self, source: Any, plan: Any, embeddings: Any, token_ids: Tensor, *rest: Any) -> None:
            super().__init__(source, plan, embeddings, token_ids, *rest)
            found.update(stream=self, tokens=token_ids)

    def hessian(stream: CalibrationStream, index: int, block: nn.Module, linear: str) -> Hessian:
        hessian = original(stream, index, block, linear)
        found["hessians"][index, linear], found["crosses"][index, linear] = hessian.inputs.clone(), hessian.cross
        return hessian

    original = CalibrationStream.hessian
    monkeypatch.setattr(loop, "CalibrationStream", Watched)
    monkeypatch.setattr(CalibrationStream, "hessian", hessian)
    return found


SEQUENCES: dict[str, Any] = {"calib_tokens": 144, "calib_seq_len": 24}


def run(tiny: Tiny, text: Path, out: Path, architecture: str, **words: Any) -> dfrot.Recipe:
    recipe = dfrot.Recipe.parse(**{"tune": "none", "calib": str(text), **SEQUENCES, **words})
    dfrot.quantize(tiny(architecture), recipe, out)
    return recipe


def inputs_of(model: nn.Module, name: str, tokens: Tensor) -> Tensor:
    """What the named module of a model reads."""
    caught: list[Tensor] = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda _, args: caught.append(args[0]))
    with torch.no_grad():
        model(tokens, use_cache=False)
    handle.remove()
    return caught[0]


def loaded(path: Path) -> nn.Module:
    """A checkpoint that adds in the order in which calibration does: weights alone by torch, not by the kernels."""
    model, _ = dfrot.load(path)
    for layer in model.modules():
        if isinstance(layer, QuantLinear):
            layer.by_reference = not layer.activations.enabled
    return model


@pytest.mark.parametrize("architecture", CONFIGS)
@pytest.mark.parametrize("method", ["quarot", "duquant"])
@pytest.mark.parametrize(
    ("weights", "spec"), [("gptq", "w4a16kv16"), ("lwc", "w4a4kv16")], ids=["gptq-w4a16", "lwc-w4a4"]
)
def test_the_stream_ends_where_the_checkpoint_does(
    tiny: Tiny,
    tmp_path: Path,
    text_file: Path,
    seen: dict[str, Any],
    architecture: str,
    method: str,
    weights: str,
    spec: str,
) -> None:
    """GPTQ's stream leaves activations alone, so the checkpoint it is compared with does; that of LWC does not."""
    options: dict[str, Any] = {"epochs": 1} if weights == "lwc" else {}
    options |= {"greedy_steps": 4} if method == "duquant" else {}
    run(tiny, text_file, tmp_path / "out", architecture, method=method, weights=weights, spec=spec, **options)
    model = loaded(tmp_path / "out")
    torch.testing.assert_close(seen["stream"].hidden_states, inputs_of(model, "model.norm", seen["tokens"]))


@pytest.mark.parametrize("architecture", ["llama", "phi3"])
@pytest.mark.parametrize("together", [1, 5 * 24])
def test_hessians_are_those_of_the_inputs_that_the_checkpoint_computes(
    tiny: Tiny,
    tmp_path: Path,
    text_file: Path,
    seen: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    architecture: str,
    together: int,
) -> None:
    monkeypatch.setitem(TOGETHER, "cpu", together)
    run(
        tiny,
        text_file,
        tmp_path / "out",
        architecture,
        method="quarot",
        weights="gptq",
        spec="w4a16kv16",
        head_mixing=True,
    )
    model = loaded(tmp_path / "out")
    graph: ModelGraph = seen["stream"].source.graph
    assert len(seen["tokens"].unique(dim=0)) > 1
    assert set(seen["hessians"]) == {(index, stage[0]) for index in range(2) for stage in graph.stages}
    for (index, linear), hessian in seen["hessians"].items():
        name = f"model.layers.{index}.{linear}"
        layer = model.get_submodule(name)
        assert isinstance(layer, QuantLinear)
        x = layer.quantize_input(inputs_of(model, name, seen["tokens"])).flatten(0, 1)
        # float32 sums in another order: relative to the largest entries
        torch.testing.assert_close(hessian, x.T @ x, rtol=1e-4, atol=float(hessian.abs().max()) * 1e-5)


@pytest.mark.parametrize("architecture", ["llama", "phi3"])
@pytest.mark.parametrize("together", [1, 5 * 24])
def test_the_teachers_inputs_are_those_of_the_original_model(
    tiny: Tiny,
    tmp_path: Path,
    text_file: Path,
    seen: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    architecture: str,
    together: int,
) -> None:
    """Without rotations its layers read what transformers' do, up to the norm's gain, which is not folded."""
    monkeypatch.setitem(TOGETHER, "cpu", together)
    words = {"method": "none", "weights": "gptq", "spec": "w4a16kv16", "target": "original", "dtype": "float32"}
    run(tiny, text_file, tmp_path / "out", architecture, **words)
    original = AutoModelForCausalLM.from_pretrained(tiny(architecture), dtype=torch.float32)
    model = loaded(tmp_path / "out")
    assert len(seen["crosses"]) == 8
    for (index, linear), cross in seen["crosses"].items():
        name = f"model.layers.{index}.{linear}"
        x0, x = (inputs_of(each, name, seen["tokens"]).flatten(0, 1) for each in (original, model))
        torch.testing.assert_close(cross, x0.T @ x, rtol=1e-4, atol=float(cross.abs().max()) * 1e-5)
    target = inputs_of(original, "model.norm", seen["tokens"])
    torch.testing.assert_close(seen["stream"].teacher_states, target, rtol=1e-5, atol=float(target.abs().max()) * 1e-5)


def test_attention_is_computed_once_a_sequence_for_the_checkpoint_and_once_for_the_teacher(
    tiny: Tiny, tmp_path: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    attend, lengths = nn.functional.scaled_dot_product_attention, []

    def counted(query: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        lengths.append(query.shape[-2])
        return attend(query, *args, **kwargs)

    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", counted)
    words = {"method": "none", "weights": "gptq", "spec": "w4a16kv16", "target": "original"}
    run(tiny, text_file, tmp_path / "out", "llama", **words)
    assert lengths.count(24) == 2 * 2 * 6  # checkpoint and teacher, blocks, sequences


@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen3"])
def test_clipping_is_learned_towards_the_original_model(
    tiny: Tiny, tmp_path: Path, text_file: Path, seen: dict[str, Any], architecture: str
) -> None:
    words = {"method": "none", "weights": "lwc", "spec": "w4a4kv16", "epochs": 4, "dtype": "float32"}
    run(tiny, text_file, tmp_path / "out", architecture, **words)
    original = AutoModelForCausalLM.from_pretrained(tiny(architecture), dtype=torch.float32)
    target = inputs_of(original, "model.norm", seen["tokens"])
    torch.testing.assert_close(seen["stream"].teacher_states, target)
    got = inputs_of(loaded(tmp_path / "out"), "model.norm", seen["tokens"])
    reached = float((got - target).square().mean() / target.square().mean())
    last = read_json(tmp_path / "out" / "fit.json")["weights_by_block"][-1]["loss_by_epoch"][-1]
    assert reached == pytest.approx(last, rel=0.05)  # the shares still move a little in the last epoch


@pytest.mark.parametrize("name", ["mlp.down_proj", "self_attn.o_proj", "mlp.gate_proj"])
def test_a_layer_of_zeros_stays_one(tiny: Tiny, tmp_path: Path, text_file: Path, name: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny("qwen2"))
    nn.init.zeros_(model.get_submodule(f"model.layers.1.{name}").weight)
    model.save_pretrained(tmp_path / "model")
    for file in tiny("qwen2").glob("token*"):
        (tmp_path / "model" / file.name).write_bytes(file.read_bytes())
    run(lambda _: tmp_path / "model", text_file, tmp_path / "out", "", method="none", weights="gptq")
    layer = dfrot.load(tmp_path / "out")[0].get_submodule(f"model.layers.1.{name}")
    assert isinstance(layer, QuantLinear)
    assert not layer.dense_weight(torch.float32).any()


def test_a_full_disk_is_a_message_when_states_are_spilled(
    tiny: Tiny, tmp_path: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    recipe = dfrot.Recipe.parse("none", "gptq", tune="none", calib=str(text_file), calib_tokens=96)
    without_states = Estimate.of(open_source(str(tiny("llama"))), recipe).resident
    with pytest.raises(SetupError, match=r"hidden states, 0\.0 GB, cannot be put into"):
        dfrot.quantize(tiny("llama"), recipe, tmp_path / "out", memory=without_states)


def test_resuming_with_another_calibration_text_is_refused(
    tiny: Tiny, tmp_path: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = tmp_path / "text.txt"
    text.write_text(text_file.read_text())
    recipe = dfrot.Recipe.parse("none", "gptq", tune="none", calib=str(text), calib_tokens=96)
    monkeypatch.setattr(loop.Loop, "quantize_block", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        dfrot.quantize(tiny("llama"), recipe, tmp_path / "out")
    monkeypatch.undo()
    text.write_text(text_file.read_text().upper())
    with pytest.raises(UserError, match="interrupted run whose calibration text was another"):
        dfrot.quantize(tiny("llama"), recipe, tmp_path / "out", resume=True)
