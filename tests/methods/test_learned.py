"""Learned transforms: the student that learns them computes what the checkpoint will."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import dfrot
from dfrot.checkpoint.load import read_checkpoint
from dfrot.export import export
from dfrot.methods import learned
from dfrot.methods.learned_student import Student
from dfrot.methods.method import FitContext
from dfrot.methods.rangerot import RangeRot
from dfrot.models.source import open_source
from dfrot.pipeline.estimate import Estimate
from dfrot.pipeline.run import calibration_tokens
from dfrot.runtime.config import RuntimeConfig
from dfrot.system.errors import UserError
from dfrot.training.descent import Descent
from dfrot.training.trained import Trained, TrainedRotation
from dfrot.transform.transforms import Transforms
from tests.tiny_models import CONFIGS, write_biased_model
from tests.tuning.test_tuning import contents, kill

Tiny = Callable[[str], Path]
WORDS: dict[str, Any] = {"calib_tokens": 128, "calib_seq_len": 32, "steps": 3, "learn_steps": 4, "learn_tokens": 32}
CPU = torch.device("cpu")
TOKENS = torch.randint(1, 96, (2, 24), generator=torch.Generator().manual_seed(7))


@pytest.fixture
def students(monkeypatch: pytest.MonkeyPatch) -> list[Student]:
    """Those of the next runs; whatever they have learned, all that is trained moves at last."""
    found: list[Student] = []

    class Watched(Student):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            found.append(self)

        def transforms(self) -> Transforms:
            generator = torch.Generator().manual_seed(0)
            for each in self.trained:
                assert each.parameter is not None
                each.parameter.data = 0.1 * torch.randn(each.parameter.shape, generator=generator)
            return super().transforms()

    monkeypatch.setattr(learned, "Student", Watched)
    return found


def in_float64(student: Student) -> Student:
    """The same with what it has learned as a start: in float32 codes flip at ties."""
    how: Any = (student.spec, torch.float64, torch.float64, student.device, False)
    wide = Student(student.source, student.transforms(), *how)
    for block, of_student in zip(wide.inputs, student.inputs, strict=True):
        for name, through in block.items():
            for part in ("scale", "offset", "clip"):
                if (learned_part := getattr(of_student[name], part)) is not None:
                    setattr(through, part, Trained(learned_part().detach().double(), torch.float64, None, None))
    return wide


@pytest.mark.parametrize("architecture", [*CONFIGS, "biased"])
@pytest.mark.parametrize(
    "words", [{"fold_only": True}, {"spec": "w16a4kv4"}, {"spec": "w16a16kv4"}, {"spec": "w16a4kv16"}]
)
def test_the_student_computes_what_the_checkpoint_computes(
    tiny: Tiny,
    tmp_path: Path,
    text_file: Path,
    students: list[Student],
    architecture: str,
    words: dict[str, Any],
) -> None:
    words = WORDS | {"spec": "w16a4kv4", "dtype": "float64", "calib": str(text_file)} | words
    biased = architecture == "biased"  # in the keys
    model_path = write_biased_model("qwen2", tmp_path / "model") if biased else tiny(architecture)
    result = dfrot.quantize(model_path, dfrot.Recipe.parse("learned", "rtn", **words), tmp_path / "out")
    (student,) = students
    assert min(result.notes["learned"]["held_kl"].values()) <= result.notes["learned"]["held_kl"]["0"]
    model, _ = dfrot.load(tmp_path / "out")
    with torch.no_grad():
        wide = in_float64(student)
        logits = wide(TOKENS) @ wide.source.head().double().T
        torch.testing.assert_close(logits, model(TOKENS, use_cache=False).logits, rtol=1e-7, atol=1e-7)


def test_what_is_computed_again_backward_changes_nothing(
    tiny: Tiny, tmp_path: Path, text_file: Path, students: list[Student]
) -> None:
    words: dict[str, Any] = {"spec": "w16a4kv16", "dtype": "float64"} | WORDS | {"calib": str(text_file)}
    recipe = dfrot.Recipe.parse("learned", "rtn", **words)
    source, outcomes = open_source(str(tiny("llama"))), []
    for budget in (0, 1 << 40):
        on = FitContext(source, recipe.spec.activations, lambda: calibration_tokens(source, recipe), CPU, budget=budget)
        outcomes.append(recipe.method.fit(on).notes["learned"])
    assert [student.through_blocks.recompute for student in students] == [True, False]
    assert outcomes[0] == outcomes[1]


def test_a_trained_rotation_is_one_wherever_it_goes(generator: torch.Generator) -> None:
    start = torch.linalg.qr(torch.randn(12, 12, generator=generator, dtype=torch.float64)).Q
    rotation = TrainedRotation(start, 1.0, torch.float64)
    torch.testing.assert_close(rotation.matrix.detach(), start)
    rotation.parameter.data = torch.randn(12, 12, generator=generator, dtype=torch.float64)
    rotation.refresh()
    identity = torch.eye(12, dtype=torch.float64)
    torch.testing.assert_close(rotation.matrix.detach() @ rotation.matrix.detach().T, identity)

    def matrix(parameter: torch.Tensor) -> torch.Tensor:
        made = TrainedRotation(start, 1.0, torch.float64)
        del made.parameter
        made.parameter = parameter  # type: ignore[assignment]
        made.refresh()
        return made.matrix

    assert torch.autograd.gradcheck(matrix, (rotation.parameter.detach().clone().requires_grad_(),))


def test_scales_survive_being_written_down(generator: torch.Generator) -> None:
    scales = tuple({"a": torch.rand(4, generator=generator), "b": torch.rand(6, generator=generator)} for _ in range(2))
    tensors: dict[str, torch.Tensor] = {}
    again = Transforms.from_description(Transforms(scales=scales).describe(tensors), tensors)
    assert [dict(block) for block in again.scales] == list(scales)


def test_offsets_and_clip_ratios_are_part_of_the_checkpoint_and_known_to_the_plan(
    tiny: Tiny, tmp_path: Path, text_file: Path
) -> None:
    recipe = dfrot.Recipe.parse("learned", "rtn", "w4a4kv4", calib=str(text_file), **WORDS)
    source = open_source(str(tiny("qwen3")))
    path = dfrot.quantize(tiny("qwen3"), recipe, tmp_path / "out").path
    found = read_checkpoint(path)
    assert found is not None
    sites = {*source.graph.norms, "mlp.down_proj"}
    assert set(found.runtime.offsets) == sites
    assert {site: len(clips) for site, clips in found.runtime.clips.items()} == dict.fromkeys(
        sites | {"self_attn.o_proj", "keys", "values"}, 2
    )
    assert RuntimeConfig.from_json(found.runtime.to_json()).to_json() == found.runtime.to_json()
    assert set(found.runtime.biases) == set(source.graph.linears)
    tensors = {name: tensor for shard in path.glob("*.safetensors") for name, tensor in load_file(shard).items()}
    assert Estimate.of(source, recipe).checkpoint == sum(tensor.nbytes for tensor in tensors.values())
    assert all(tensors[f"model.layers.1.{site}.offset"].any() for site in sites)
    for engine in ("huggingface", "gguf"):
        with pytest.raises(UserError, match=r"subtracts an offset at input_layernorm, .*--fold-only"):
            export(path, engine, tmp_path / engine)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("offsets", ["self_attn.q_proj"], "'self_attn.q_proj' is no norm and no linear layer without one"),
        ("clips", {"lm_head": [0.5, 0.5]}, "'lm_head' is no norm and no linear layer without one"),
        ("clips", {"mlp.down_proj": [0.5]}, "other than 2 values for 'mlp.down_proj'"),
        ("clips", {"mlp.down_proj": [0.5, 1.5]}, "a clip ratio is above 0 and at most 1, got 1.5"),
        ("clips", {"mlp.down_proj": ["0.5", 0.5]}, "clip_ratio is a number or left out, got '0.5'"),
        ("offsets", 3, "this is not the runtime record"),
    ],
)
def test_a_record_with_other_sites_is_refused(tiny: Tiny, tmp_path: Path, name: str, value: Any, message: str) -> None:
    path = dfrot.quantize(tiny("llama"), dfrot.Recipe.parse("none", "rtn", "w4a4kv4"), tmp_path / "out").path
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"]["runtime"][name] = value
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=message):
        dfrot.load(path)


def test_too_short_a_text_is_refused_before_the_work(
    tiny: Tiny, tmp_path: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(learned.RangeRot, "fit", None)
    recipe = dfrot.Recipe.parse("learned", "rtn", "w16a4kv16", calib=str(text_file), calib_tokens=600)
    with pytest.raises(UserError, match=r"training needs two windows, of 512 tokens"):
        dfrot.quantize(tiny("llama"), recipe, tmp_path / "out")


@pytest.mark.parametrize("number", [3, 12, 17, 24])
def test_a_killed_run_that_is_resumed_equals_one_that_was_not(
    tiny: Tiny, tmp_path: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    words = WORDS | {"spec": "w16a4kv4", "calib": str(text_file), "learn_steps": 20}
    recipe = dfrot.Recipe.parse("learned", "rtn", **words)
    whole = contents(dfrot.quantize(tiny("llama"), recipe, tmp_path / "whole").path)
    kill(monkeypatch, Descent, "_advance", number, of=lambda: dfrot.quantize(tiny("llama"), recipe, tmp_path / "out"))
    monkeypatch.setattr(RangeRot, "fit", None)  # what it found is kept, too
    assert contents(dfrot.quantize(tiny("llama"), recipe, tmp_path / "out", resume=True).path) == whole
