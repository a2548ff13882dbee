"""Broken files are refused: a short run of benchmarks/fuzz.py, which has ten thousand inputs for each reader."""

from pathlib import Path

import pytest

pytest.importorskip("gguf", reason="writes a GGUF file")

from tests.readers import Reader, fuzz, readers

NAMES = (
    *("recipe", "plan", "config", "index", "safetensors", "source", "checkpoint", "fit", "run", "records", "report"),
    *("texts", "gguf", "load", "tokenizer", "changed whole", "changed sharded", "changed gguf"),
    "changed model",
)


@pytest.fixture(scope="module")
def every(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Reader]:
    return readers(tmp_path_factory.mktemp("readers"))


def test_all_readers_are_fuzzed_here(every: dict[str, Reader]) -> None:
    assert set(every) == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_reader_accepts_what_is_valid_and_refuses_what_is_broken(
    every: dict[str, Reader], tmp_path: Path, name: str
) -> None:
    reader = every[name]
    (tmp_path / "valid").mkdir()
    for file, content in reader.files.items():
        (tmp_path / "valid" / file).write_bytes(content)
    reader.read(tmp_path / "valid")
    tally = fuzz(name, reader, range(300 if reader.whose == "dfrot" else 20), seed=1, scratch=tmp_path / "broken")
    assert tally.failures == []
    assert tally.refused > tally.accepted / 10 or not reader.refuses
