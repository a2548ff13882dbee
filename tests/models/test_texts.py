import gzip
import json
import re
import socket
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dfrot.evaluation.perplexity import token_windows
from dfrot.evaluation.record import text_label
from dfrot.models.texts import calibration_windows, check_tokens, read_text
from dfrot.system.errors import SetupError, UserError

ROWS = 1000  # of an embedding that has one for every character here
MARK = b"\xef\xbb\xbf"  # that some editors put before UTF-8


def characters(text: str, **_: Any) -> SimpleNamespace:
    """A tokenizer: one token per character."""
    return SimpleNamespace(input_ids=[ord(character) for character in text])


def test_a_text_file_is_one_stream(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n\ntwo\n")
    assert read_text(str(tmp_path / "a.txt")) == "one\n\ntwo\n"


def test_wikitext_rows_are_joined_as_the_papers_join_them(tmp_path: Path) -> None:
    (tmp_path / "wiki.test.raw").write_text(" \n = Title = \n \n Text. \n")
    assert read_text(str(tmp_path / "wiki.test.raw")) == "\n\n = Title = \n\n\n\n\n Text. \n"


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz", "rows.json", "rows.json.gz"])
@pytest.mark.parametrize("form", ["{0}\n{1}\n", "{0}\n\n{1}\n\n", "{0}\r\n{1}", "[{0},\n {1}]\n"])
@pytest.mark.parametrize("mark", [b"", MARK])
def test_json_lines_and_lists_give_the_field_text(tmp_path: Path, name: str, form: str, mark: bytes) -> None:
    content = mark + form.format(*(json.dumps({"text": text, "id": 1}) for text in ("a", "b"))).encode()
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    assert read_text(str(tmp_path / name)) == "a\n\nb"


@pytest.mark.parametrize("name", ["a.txt", "wiki.test.raw"])
def test_a_mark_before_a_text_is_not_part_of_it(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(MARK + "ärger\n".encode())
    assert read_text(str(tmp_path / name)) == "ärger\n"


def test_the_pydoc_text_is_there_and_its_splits_are_disjoint() -> None:
    train, test = read_text("pydoc", "train"), read_text("pydoc", "test")
    assert len(train) > 2 * len(test) > 100_000
    assert test[:500] not in train


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", b"", "is empty"),
        ("blank.txt", b" \n\t\n", "is empty"),
        ("binary.txt", b"\xff\xfe\x00", "not a text file in UTF-8"),
        ("rows.jsonl", b'{"content": 1}\n', "line 1: expected a JSON object with the field 'text'"),
        ("rows.jsonl", b'{"text": "a"}\nnot json\n', "line 2: expected"),
        ("rows.jsonl.gz", b"not gzip", "not a text file"),
        ("rows.json", b'[{"text": "a"}, 3]', "item 2: expected a JSON object with the field 'text'"),
        ("rows.json", b'[{"text": "a"}', "the list as a whole: expected a JSON object"),
        ("rows.json", b"\xff\xfe", "not a text file in UTF-8"),
    ],
)
def test_a_broken_text_says_what_is_wrong(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=re.escape(message)):
        read_text(str(tmp_path / name))


def test_a_missing_text_names_the_known_ones() -> None:
    with pytest.raises(UserError, match=r"no text 'nowhere\.txt'\. TEXT is wikitext2, c4, pydoc"):
        read_text("nowhere.txt")


def test_a_text_is_labelled_by_its_file() -> None:
    assert (text_label("pydoc"), text_label("/data/wiki.test.raw")) == ("pydoc", "wiki.test.raw")


def test_blocks_do_not_overlap_and_the_tail_is_dropped() -> None:
    blocks = token_windows(characters, "abcdefgh", "x", ROWS, seq_len=3)
    assert blocks.tolist() == [[97, 98, 99], [100, 101, 102]]
    assert token_windows(characters, "abcdefgh", "x", ROWS, seq_len=3, max_tokens=5).tolist() == [[97, 98, 99]]


def test_a_text_shorter_than_a_block_is_refused() -> None:
    with pytest.raises(UserError, match="'x' has 2 tokens, fewer than one block of 3"):
        token_windows(characters, "ab", "x", ROWS, seq_len=3)
    with pytest.raises(UserError, match="one block is 3 tokens long, but only 2"):
        token_windows(characters, "abcdef", "x", ROWS, seq_len=3, max_tokens=2)


def test_calibration_windows_are_pieces_of_the_text_and_follow_the_seed() -> None:
    text = "".join(chr(code) for code in range(200, 400))

    def draw(seed: int) -> torch.Tensor:
        return calibration_windows(characters, text, "x", ROWS, 8, 32, torch.Generator().manual_seed(seed))

    assert draw(0).shape == (4, 8)
    assert (draw(0).diff(dim=1) == 1).all()
    assert torch.equal(draw(0), draw(0))
    assert not torch.equal(draw(0), draw(1))
    with pytest.raises(UserError, match="has 200 tokens, fewer than one sample of 300"):
        calibration_windows(characters, text, "x", ROWS, 300, 300, torch.Generator())


@pytest.mark.parametrize("ids", [[3], [0, 7], [-1], [[0, 1], [2, 3]]])
def test_a_token_beyond_the_embedding_is_refused(ids: list[Any]) -> None:
    with pytest.raises(UserError, match=r"has 3 rows, none for token (3|7|-1)\."):
        check_tokens(torch.tensor(ids), 3)
    check_tokens(torch.tensor(ids).clamp(0, 2), 3)
    check_tokens(torch.empty(0, dtype=torch.long), 3)


def test_without_a_network_a_text_of_the_hub_is_refused_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    datasets = pytest.importorskip("datasets")
    slept: list[float] = []

    def unreachable(*_: Any, **__: Any) -> None:
        raise socket.gaierror("no network")

    monkeypatch.setattr(socket, "getaddrinfo", unreachable)
    monkeypatch.setattr(time, "sleep", slept.append)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path))
    with pytest.raises(SetupError, match="cannot be downloaded from the hub"):
        read_text("wikitext2")
    assert not slept
    assert not caplog.records
