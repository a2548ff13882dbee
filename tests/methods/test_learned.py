"""Learned transforms: the student that learns them computes what the checkpoint will."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import dfrot
from dfrot.methods import learned
from dfrot.system.errors import UserError
from dfrot.training.trained import TrainedRotation
from dfrot.transform.transforms import Transforms
from tests.tiny_models import CONFIGS

Tiny = Callable[[str], Path]
WORDS: dict[str, Any] = {"calib_tokens": 128, "calib_seq_len": 32, "steps": 3, "learn_steps": 4, "learn_tokens": 32}
TOKENS = torch.randint(1, 96, (2, 24), generator=torch.Generator().manual_seed(7))


@pytest.fixture
def students(monkeypatch: pytest.MonkeyPatch) -> list[learned.Student]:
    """Those of the next runs; whatever they have learned, all that is trained moves at last."""
    found: list[learned.Student] = []

    class Watched(learned.Student):
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


def in_float64(student: learned.Student) -> learned.Student:
    """The same with what it has learned as a start: in float32 codes flip at ties."""
    how: Any = (student.spec, torch.float64, torch.float64, student.device, 32)
    wide = learned.Student(student.source, student.transforms(), *how)
    for block, of_student in zip(wide.scales, student.scales, strict=True):
        for name, through in block.items():
            through.scale.start = of_student[name].scale().detach().double()
    return wide


@pytest.mark.parametrize("architecture", CONFIGS)
@pytest.mark.parametrize("fold_only", [False, True])
def test_the_student_computes_what_the_checkpoint_computes(
    tiny: Tiny,
    tmp_path: Path,
    text_file: Path,
    students: list[learned.Student],
    architecture: str,
    fold_only: bool,
) -> None:
    words = WORDS | {"spec": "w16a4kv16", "dtype": "float64", "fold_only": fold_only, "calib": str(text_file)}
    result = dfrot.quantize(tiny(architecture), dfrot.Recipe.parse("learned", "rtn", **words), tmp_path / "out")
    (student,) = students
    assert min(result.notes["learned"]["held_kl"].values()) <= result.notes["learned"]["held_kl"]["0"]
    model, _ = dfrot.load(tmp_path / "out")
    with torch.no_grad():
        wide = in_float64(student)
        logits = wide(TOKENS) @ wide.source.head().double().T
        torch.testing.assert_close(logits, model(TOKENS, use_cache=False).logits, rtol=1e-7, atol=1e-7)


def test_what_is_computed_again_backward_changes_nothing(
    tiny: Tiny, tmp_path: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = dfrot.Recipe.parse("learned", "rtn", spec="w16a4kv16", dtype="float64", **WORDS, calib=str(text_file))
    notes = []
    for kept in (0, 1 << 40):
        monkeypatch.setattr(learned, "KEPT_BYTES", kept)
        notes.append(dfrot.quantize(tiny("llama"), recipe, tmp_path / str(kept)).notes["learned"])
    assert notes[0] == notes[1]


def test_a_trained_rotation_is_one_wherever_it_goes(generator: torch.Generator) -> None:
    start = torch.linalg.qr(torch.randn(12, 12, generator=generator, dtype=torch.float64)).Q
    rotation = TrainedRotation(start, 1.0)
    torch.testing.assert_close(rotation.matrix.detach(), start)
    rotation.parameter.data = torch.randn(12, 12, generator=generator, dtype=torch.float64)
    rotation.refresh()
    identity = torch.eye(12, dtype=torch.float64)
    torch.testing.assert_close(rotation.matrix.detach() @ rotation.matrix.detach().T, identity)

    def matrix(parameter: torch.Tensor) -> torch.Tensor:
        made = TrainedRotation(start, 1.0)
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


def test_too_short_a_text_is_refused_before_the_work(
    tiny: Tiny, tmp_path: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(learned.RangeRot, "fit", None)
    recipe = dfrot.Recipe.parse("learned", "rtn", "w16a4kv16", calib=str(text_file), calib_tokens=600)
    with pytest.raises(UserError, match=r"training needs two windows, of 512 tokens"):
        dfrot.quantize(tiny("llama"), recipe, tmp_path / "out")
