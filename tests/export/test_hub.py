"""Model cards, read back by huggingface_hub; uploads, to a Hub that only writes down what it is asked."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import ModelCard
from huggingface_hub.errors import HfHubHTTPError

import dfrot
from dfrot.cli import main
from dfrot.evaluation.run import Measurement, evaluate
from dfrot.export.hub import model_card, push, read_results
from dfrot.report.words import number
from dfrot.system.errors import SetupError, UserError

Tiny = Callable[[str], Path]


@pytest.fixture(scope="module")
def checkpoint(tiny: Tiny, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    recipe = dfrot.Recipe.parse("quarot", "gptq", tune="none", calib=str(text_file), calib_tokens=96, calib_seq_len=24)
    return dfrot.quantize(tiny("llama"), recipe, tmp_path_factory.mktemp("hub") / "ckpt").path


@pytest.fixture(scope="module")
def results(checkpoint: Path, tiny: Tiny, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("results")
    measurement = Measurement((str(text_file),), seq_len=32, max_tokens=96)
    for name, model in {"own": checkpoint, "whole": tiny("llama")}.items():
        (folder / f"{name}.json").write_text(json.dumps(vars(evaluate(str(model), measurement))))
    return sorted(folder.iterdir())


def test_a_card_has_the_numbers_with_their_conditions_and_no_path(
    checkpoint: Path, results: list[Path], text_file: Path
) -> None:
    records = read_results(results)
    text = model_card(checkpoint, "me/tiny", records, "you/tiny")
    card: Any = ModelCard(text)
    assert card.data.base_model == "you/tiny"
    assert set(card.data.tags) >= {"dfrot", "4-bit", "arxiv:2404.00456", "arxiv:2210.17323"}
    own, whole = (record.metrics["ppl/text.txt"] for record in records)
    assert "| quarot gptq w4a4kv4 |" in text
    assert "| unquantized |" in text
    assert all(f"| {number(ppl)} |" in text for ppl in (own, whole))
    assert "seq_len 32" in text
    assert 'dfrot.load("me/tiny")' in text
    assert '"text": "text.txt"' in text
    assert str(text_file.parent) not in text
    assert str(checkpoint.parent) not in text


def test_a_card_without_results_promises_none(checkpoint: Path) -> None:
    assert "## Results" not in model_card(checkpoint, "me/tiny")


def test_results_of_another_recipe_are_refused(checkpoint: Path, results: list[Path], tiny: Tiny) -> None:
    (whole,) = [path for path in results if path.stem == "whole"]
    with pytest.raises(UserError, match="none of the 1 result records is of the recipe"):
        model_card(checkpoint, "me/tiny", read_results([whole]))
    with pytest.raises(UserError, match="there are no results in"):
        read_results([checkpoint / "nothing.json"])
    with pytest.raises(UserError, match="not a dfrot checkpoint"):
        model_card(tiny("llama"), "me/tiny")


class _Hub:
    """Stands in for HfApi."""

    def __init__(self, **_: Any) -> None:
        self.asked: list[tuple[str, dict[str, Any]]] = calls

    def create_repo(self, repository: str, **words: Any) -> str:
        self.asked.append(("create", {"repo_id": repository, **words}))
        return f"https://huggingface.co/{repository}"

    def upload_file(self, **words: Any) -> None:
        self.asked.append(("file", words))

    def upload_folder(self, **words: Any) -> None:
        self.asked.append(("folder", words))


calls: list[tuple[str, dict[str, Any]]] = []


def test_a_push_ends_with_the_config(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls.clear()
    monkeypatch.setattr(huggingface_hub, "HfApi", _Hub)
    assert main(["push", str(checkpoint), "me/tiny", "--private"]) == 0
    assert [kind for kind, _ in calls] == ["create", "file", "folder", "folder"]
    assert calls[0][1] == {"repo_id": "me/tiny", "private": True, "exist_ok": True}
    assert b"# ckpt, w4a4kv4" in calls[1][1]["path_or_fileobj"]
    assert "config.json" in calls[2][1]["ignore_patterns"]
    assert calls[3][1]["allow_patterns"] == ["config.json"]


@pytest.mark.parametrize(
    ("fault", "kind", "message"),
    [
        (403, UserError, "may not write to 'me/tiny': `hf auth login`"),
        (500, SetupError, r"the Hub refuses 'me/tiny' \(500\)"),
        (None, SetupError, "the Hub cannot be reached: RuntimeError"),
    ],
)
def test_what_the_hub_refuses_is_one_message_without_a_token(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, fault: int | None, kind: type[Exception], message: str
) -> None:
    def refuses(*_: Any, **__: Any) -> None:
        if fault is None:
            raise RuntimeError("hf_secret")  # such as a package for HTTP has its own
        answer: Any = SimpleNamespace(status_code=fault, headers={}, request=None)
        raise HfHubHTTPError("hf_secret", response=answer)

    monkeypatch.setattr(_Hub, "create_repo", refuses)
    monkeypatch.setattr(huggingface_hub, "HfApi", _Hub)
    with pytest.raises(kind, match=message) as caught:
        push(checkpoint, "me/tiny")
    assert "hf_secret" not in str(caught.value)


def test_a_repository_has_an_owner(checkpoint: Path) -> None:
    with pytest.raises(UserError, match="is called owner/name, got 'llama-4bit'"):
        push(checkpoint, "llama-4bit")


def test_a_card_can_be_read_before_anything_is_uploaded(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["push", str(checkpoint), "me/tiny", "--card"]) == 0
    assert capsys.readouterr().out == model_card(checkpoint, "me/tiny")
