"""Mixtures of experts: their layers are folded, rounded and computed like any others, each on the tokens it sees."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

import dfrot
from dfrot.evaluation.run import Measurement, evaluate
from dfrot.models.experts import MixtureOfExperts, use_experts_
from dfrot.models.files import in_file, of_module
from dfrot.models.source import open_source
from dfrot.models.stream import captured_inputs
from dfrot.pipeline import loop
from dfrot.rounding.stream import CalibrationStream, Hessian
from dfrot.runtime.linear import QuantLinear
from dfrot.system.errors import UserError
from dfrot.transform.invariance import InvarianceError
from dfrot.transform.transforms import Transforms
from tests.tiny_models import TRACED, write_tiny_model

Tiny = Callable[[str], Path]
TOKENS = torch.randint(1, 96, (2, 24), generator=torch.Generator().manual_seed(7))
MIXTURES = [name for name in TRACED if name in ("mixtral", "olmoe", "qwen3_moe")]
every_mixture = pytest.mark.parametrize("architecture", MIXTURES)


def made(tiny: Tiny, out: Path, architecture: str, text: Path, **words: Any) -> dfrot.QuantizeResult:
    calibration = {"calib": str(text), "calib_tokens": 64, "calib_seq_len": 32, "tune": "none"}
    recipe = dfrot.Recipe.parse(**{"method": "quarot", "weights": "rtn", **calibration, **words})
    return dfrot.quantize(tiny(architecture), recipe, out, check_source="never")


@every_mixture
@pytest.mark.parametrize("normalized", [True, False])
def test_a_mixture_computes_what_transformers_does(architecture: str, normalized: bool) -> None:
    config = CONFIG_MAPPING[architecture](**{**TRACED[architecture].to_diff_dict(), "norm_topk_prob": normalized})
    theirs: Any = AutoModelForCausalLM.from_config(config).model.layers[0].mlp.eval()
    generator = torch.Generator().manual_seed(2)
    for parameter in theirs.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) / 4
    root: Any = nn.ModuleDict({"mlp": theirs})
    tensors = dict(theirs.state_dict())
    x = torch.randn(2, 9, config.hidden_size, generator=generator)
    with torch.no_grad():
        expected = theirs(x)
        use_experts_(root, config)
        ours: Any = root["mlp"]
        assert isinstance(ours, MixtureOfExperts)
        ours.to_empty(device="cpu")
        ours.gate.weight.copy_(tensors["gate.weight"])
        for number, expert in enumerate(list[Any](ours.experts)):
            gate, up = tensors["experts.gate_up_proj"][number].chunk(2)
            expert.gate_proj.weight.copy_(gate)
            expert.up_proj.weight.copy_(up)
            expert.down_proj.weight.copy_(tensors["experts.down_proj"][number])
        torch.testing.assert_close(ours(x), expected, rtol=1e-5, atol=1e-6)


@every_mixture
def test_names_in_files_come_back(tiny: Tiny, architecture: str) -> None:
    source = open_source(str(tiny(architecture)))
    for name, tensor in source.stored.items():
        assert in_file(architecture, name) == tensor.name
        assert of_module(architecture, tensor.name) == name


@every_mixture
@pytest.mark.parametrize("target", ["inputs", "original"])
def test_an_expert_is_fitted_to_the_tokens_that_choose_it_and_to_others_where_these_are_few(
    tiny: Tiny, tmp_path: Path, text_file: Path, architecture: str, target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[Hessian, Tensor]] = []

    class Watched(CalibrationStream):
        def hessian(self, index: int, block: nn.Module, linear: str) -> Hessian:
            found = super().hessian(index, block, linear)
            if index == 0 and linear.endswith(("gate_proj", "down_proj")):
                width = int(block.get_submodule(linear).weight.shape[1])  # type: ignore[index]
                with captured_inputs({"own": block.get_submodule(linear)}) as inputs, torch.no_grad():
                    self.run(block, index, self.hidden_states)  # all of the block, as it is without quantization
                read = [each.flatten(0, -2) for each in inputs["own"]]
                own = torch.cat(read) if read else torch.empty(0, width, dtype=torch.float64)
                seen.append((Hessian(found.inputs.clone(), found.cross, found.filled), own))
            return found

    monkeypatch.setattr(loop, "CalibrationStream", Watched)
    words = {"method": "none", "weights": "gptq", "dtype": "float64", "calib_tokens": 192, "target": target}
    made(tiny, tmp_path / "out", architecture, text_file, spec="w4a16kv16", **words)
    assert len(seen) == 2 * TRACED[architecture].num_local_experts
    hidden = TRACED[architecture].hidden_size
    for hessian, own in seen:
        others = hessian.inputs - own.T @ own
        assert hessian.filled == max(0, hidden - len(own))
        assert torch.linalg.matrix_rank(others, atol=1e-9 * float(hessian.inputs.norm())) <= hessian.filled
        assert torch.linalg.eigvalsh(others).min() >= -1e-12 * hessian.inputs.norm()
        assert bool(others.norm() > 1e-6 * hessian.inputs.norm()) == (hessian.filled > 0)
        assert (hessian.cross is not None) == (target == "original")


def test_of_64_experts_those_that_few_tokens_chose_are_spoken_of(tmp_path: Path, text_file: Path) -> None:
    def many(name: str) -> Path:
        return write_tiny_model(name, tmp_path / name, num_local_experts=64, num_experts_per_tok=4)

    words = {"weights": "gptq", "calib_tokens": 192}
    result = made(many, tmp_path / "out", "qwen3_moe", text_file, **words)
    (said,) = [line for line in result.recipe.rounding.summary(result.notes["weights_by_block"]) if "experts" in line]
    assert said.startswith("256 layers of experts that fewer tokens chose than they have channels")


def test_64_experts_folded_compute_what_transformers_does(tmp_path: Path, text_file: Path) -> None:
    def many(name: str) -> Path:
        return write_tiny_model(name, tmp_path / name, num_local_experts=64, num_experts_per_tok=4)

    path = made(many, tmp_path / "out", "qwen3_moe", text_file, spec="w16a16kv16", dtype="float64").path
    eager = {"dtype": torch.float64, "experts_implementation": "eager"}
    original = AutoModelForCausalLM.from_pretrained(tmp_path / "qwen3_moe", **eager)
    with torch.no_grad():
        found, expected = dfrot.load(path)[0](TOKENS).logits, original(TOKENS).logits
    assert (found - expected).norm() <= 1e-6 * expected.norm()  # transformers chooses, and norms, in float32


@every_mixture
@pytest.mark.parametrize(
    "words",
    [
        {"method": "rangerot", "steps": 3, "weights": "gptq", "target": "original"} | {"calib_tokens": 192},
        {"method": "duquant", "block": 8, "greedy_steps": 4, "weights": "lwc", "epochs": 1},
    ],
    ids=lambda words: words["weights"],
)
def test_every_rounding_takes_them(
    tiny: Tiny, tmp_path: Path, text_file: Path, architecture: str, words: dict[str, Any]
) -> None:
    path = made(tiny, tmp_path / "out", architecture, text_file, **words).path
    model, _ = dfrot.load(path)
    with torch.no_grad():
        assert model(TOKENS).logits.isfinite().all()


@every_mixture
def test_only_chosen_experts_are_computed(tiny: Tiny, tmp_path: Path, text_file: Path, architecture: str) -> None:
    model, _ = dfrot.load(made(tiny, tmp_path / "out", architecture, text_file).path)
    with torch.no_grad():
        expected = model(TOKENS[:1, :1]).logits
        spared = 0
        for block in model.model.layers:
            with captured_inputs({"mlp": block.mlp}) as inputs:
                model(TOKENS[:1, :1])
            chosen = set(block.mlp.shares(inputs["mlp"][0])[1].flatten().tolist())
            for number, expert in enumerate(block.mlp.experts):
                if number not in chosen:
                    expert.down_proj.scales.fill_(float("nan"))
                    spared += 1
        assert spared == sum(len(block.mlp.experts) - block.mlp.chosen for block in model.model.layers)
        assert torch.equal(model(TOKENS[:1, :1]).logits, expected)


@every_mixture
def test_experts_are_packed_and_the_router_is_not(
    tiny: Tiny, tmp_path: Path, text_file: Path, architecture: str
) -> None:
    model, _ = dfrot.load(made(tiny, tmp_path / "out", architecture, text_file).path)
    for block in model.model.layers:
        assert type(block.mlp.gate) is nn.Linear
        layers = [layer for expert in block.mlp.experts for layer in expert.children() if layer is not expert.act_fn]
        assert all(isinstance(layer, QuantLinear) and layer.weight is None for layer in layers)


@pytest.mark.parametrize("wrong", ["mlp.experts.3.down_proj", "mlp.experts.7.up_proj", "mlp.gate"])
def test_a_wrong_fold_of_any_expert_or_the_router_is_found(
    tiny: Tiny, tmp_path: Path, text_file: Path, wrong: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = Transforms.folds

    def folds(*args: Any) -> Mapping[str, Any]:
        found = right(*args)
        name = "output_rotation" if wrong.endswith("down_proj") else "input_rotation"
        return {**found, wrong: replace(found[wrong], **{name: None})}  # type: ignore[arg-type]

    monkeypatch.setattr(Transforms, "folds", folds)
    with pytest.raises((InvarianceError, UserError), match="folding changed what block 0 computes"):
        made(tiny, tmp_path / "out", "qwen3_moe", text_file)


@every_mixture
@pytest.mark.parametrize("spec", ["w4a4kv4", "w16a16kv4"])
def test_what_is_saved_again_loads_again(
    tiny: Tiny, tmp_path: Path, text_file: Path, architecture: str, spec: str
) -> None:
    model, _ = dfrot.load(made(tiny, tmp_path / "out", architecture, text_file, spec=spec).path)
    model.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    with torch.no_grad():
        assert torch.equal(again(TOKENS).logits, model(TOKENS).logits)


def test_it_is_measured_beside_the_original(tiny: Tiny, tmp_path: Path, text_file: Path) -> None:
    path = made(tiny, tmp_path / "out", "mixtral", text_file, spec="w16a16kv16", dtype="float64").path
    measured = Measurement((str(text_file),), 32, 64, str(tiny("mixtral")))
    (kl,) = [value for name, value in evaluate(str(path), measured).metrics.items() if name.startswith("kl/")]
    assert abs(kl) < 1e-6  # nothing is quantized


def test_blocks_with_and_without_experts_are_refused(tmp_path: Path) -> None:
    config = TRACED["qwen3_moe"]
    mixed = type(config)(**{**config.to_diff_dict(), "mlp_only_layers": [1]})
    AutoModelForCausalLM.from_config(mixed).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"blocks of more than one kind: only one of blocks 0 and 1 has a 'mlp\."):
        open_source(str(tmp_path))


def test_duquant_fits_an_expert_that_few_tokens_chose_to_others_too(
    tiny: Tiny, tmp_path: Path, text_file: Path
) -> None:
    words: dict[str, Any] = {"method": "duquant", "block": 8, "greedy_steps": 4, "calib_tokens": 64}
    peaks = made(tiny, tmp_path / "out", "qwen3_moe", text_file, calib_seq_len=64, **words).notes["peaks"]
    filled = {
        peak["input"]: peak.get("filled", 0) for peak in peaks if peak["block"] == 0 and "experts" in peak["input"]
    }
    downs = {name: missing for name, missing in filled.items() if name.endswith("down_proj")}
    chosen = 64 * 2  # choices of all tokens
    assert len(downs) == 8
    assert sum(64 - missing for missing in downs.values()) == chosen
    assert max(downs.values()) > 0
