"""Models of the Hub, from one that runs on this machine."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from huggingface_hub import constants, snapshot_download
from safetensors.torch import load_file, save_file

import dfrot
from dfrot.cli import main
from dfrot.evaluation.record import model_size
from dfrot.models.hub import hub_model
from dfrot.models.source import open_source
from tests.hub import Hub, serving
from tests.sources import split
from tests.tiny_models import write_multimodal_model, write_tiny_model


class Ended(NamedTuple):
    """What a command left."""

    returncode: int
    stdout: str
    stderr: str


Run = Callable[..., Ended]


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    folder = tmp_path_factory.mktemp("hub")
    # large enough that its header is a small part of it
    whole = write_multimodal_model("gemma3", folder / "gemma", hidden_size=256, intermediate_size=512)
    shutil.copytree(whole, folder / "shards")
    tensors = load_file(folder / "shards" / "model.safetensors")
    (folder / "shards" / "model.safetensors").unlink()
    split(folder / "shards", tensors)
    save_file(tensors, folder / "shards" / "consolidated.safetensors")
    shutil.copytree(whole, folder / "pickles")
    (folder / "pickles" / "model.safetensors").rename(folder / "pickles" / "pytorch_model.bin")
    shutil.copytree(whole, folder / "unknown")
    config = json.loads((whole / "config.json").read_text())
    config = config["text_config"] | {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}
    (folder / "unknown" / "config.json").write_text(json.dumps(config))
    shutil.copytree(folder / "shards", folder / "both")
    shutil.copy(whole / "model.safetensors", folder / "both")
    shutil.copytree(whole, folder / "silent")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (folder / "silent" / file).unlink()
    (folder / "ggufs").mkdir()
    (folder / "ggufs" / "model.gguf").write_bytes(b"GGUF")
    shutil.copytree(folder / "shards", folder / "greedy")
    (folder / "greedy" / "model.safetensors.index.json").write_text('{"weight_map": {"a": "*.safetensors"}}')
    dfrot.quantize(whole, dfrot.Recipe.parse("quarot", "rtn", tune="none"), folder / "quantized")
    with serving(**{path.name: path for path in folder.iterdir()}) as hub:
        yield hub


@pytest.fixture
def run(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """`dfrot`, with a cache that is empty at first; `offline`: without the hub."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)

    def run(*words: str, offline: bool = False) -> Ended:
        hub.sent.clear()
        hub_model.cache_clear()  # as in another process
        url = "http://127.0.0.1:9" if offline else hub.url
        monkeypatch.setattr(constants, "ENDPOINT", url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
        status = main([*words])
        return Ended(status, *capsys.readouterr())

    return run


RECIPE = ("--method", "quarot", "--weights", "rtn", "--tune", "none", "--check-source", "always")


@pytest.mark.parametrize("name", ["gemma", "shards"])
def test_it_is_described_without_its_weights_and_fetched_when_it_is_quantized(hub: Hub, run: Run, name: str) -> None:
    described = run("info", f"somebody/{name}")
    found = json.loads(described.stdout)
    assert (found["model_type"], found["part_of"], found["blocks"]) == ("gemma3_text", "gemma3", 2)
    planned = run("quantize", f"somebody/{name}", "-o", "out", *RECIPE, "--dry-run")
    assert planned.returncode == 0, planned.stderr
    assert "downloaded and kept" in planned.stdout
    weights = {file: sent for file, sent in hub.sent.items() if file.endswith(".safetensors")}
    sizes = {file: (hub.folders[f"somebody/{name}"] / file).stat().st_size for file in weights}
    assert weights
    assert all(sent <= 100_001 for sent in weights.values())
    assert sum(sizes.values()) > 3 * sum(weights.values())

    made = run("quantize", f"somebody/{name}", "-o", "out", *RECIPE)
    assert made.returncode == 0, made.stderr
    assert {file for file in hub.sent if file.endswith(".safetensors")} == set(sizes)
    again = run("quantize", f"somebody/{name}", "-o", "again", *RECIPE, offline=True)
    assert again.returncode == 0, again.stderr


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("unknown", "the architecture 'gpt2' has no table"),
        ("pickles", "has no safetensors weights"),
        ("silent", "has no tokenizer that transformers can load"),
        ("ggufs", "'somebody/ggufs' has no config.json on the hub. If it holds .gguf files"),
        ("greedy", "names the shard '*.safetensors', which no safetensors file has"),
        ("nothing", "the hub has no model 'somebody/nothing'"),
    ],
)
def test_what_cannot_be_quantized_is_refused_before_a_weight_is_fetched(
    hub: Hub, run: Run, name: str, message: str
) -> None:
    refused = run("quantize", f"somebody/{name}", "-o", "out", *RECIPE)
    assert refused.returncode == 2
    assert message in " ".join(refused.stderr.split())
    assert all(sent <= 100_001 for file, sent in hub.sent.items() if file.endswith(".safetensors"))  # headers


def test_a_licence_that_was_not_accepted_is_said(hub: Hub, run: Run) -> None:
    hub.gated.add("somebody/gemma")
    refused = run("eval", "somebody/gemma")
    hub.gated.clear()
    assert refused.returncode == 2
    assert "'somebody/gemma' is gated: accept its licence" in " ".join(refused.stderr.split())


def test_without_the_hub_and_a_cache_it_says_so(run: Run) -> None:
    refused = run("info", "somebody/gemma", offline=True)
    assert refused.returncode == 1
    assert "the hub cannot be reached" in " ".join(refused.stderr.split())


def test_what_an_interrupted_download_left_is_completed(run: Run, tmp_path: Path) -> None:
    assert run("quantize", "somebody/shards", "-o", "out", *RECIPE).returncode == 0
    snapshot = next((tmp_path / "cache" / "models--somebody--shards" / "snapshots").iterdir())
    (lost := snapshot / "model-00002-of-00003.safetensors").resolve().unlink()
    lost.unlink()
    assert json.loads(run("info", "somebody/shards").stdout)["blocks"] == 2
    assert run("quantize", "somebody/shards", "-o", "again", *RECIPE).returncode == 0


def test_a_new_commit_with_the_same_weights_downloads_none_and_leaves_them_usable(
    hub: Hub, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run("quantize", "somebody/shards", "-o", "out", *RECIPE).returncode == 0
    monkeypatch.setattr(hub, "commit", 40 * "b")
    assert run("info", "somebody/shards").returncode == 0
    assert not any(file.endswith(".safetensors") for file in hub.sent)
    assert run("quantize", "somebody/shards", "-o", "again", *RECIPE, offline=True).returncode == 0


def test_a_single_file_that_is_there_is_enough(run: Run, hub: Hub) -> None:
    assert run("info", "somebody/both").returncode == 0
    snapshot_download("somebody/both", allow_patterns=["model.safetensors"])
    assert run("quantize", "somebody/both", "-o", "out", *RECIPE, offline=True).returncode == 0


def test_a_checkpoint_is_described_without_its_shards(run: Run, hub: Hub) -> None:
    found = json.loads(run("info", "somebody/quantized").stdout)
    assert found["size"] == model_size(hub.folders["somebody/quantized"])
    assert all(sent <= 100_001 for file, sent in hub.sent.items() if file.endswith(".safetensors"))


def test_what_is_to_come_counts_all_of_the_files_and_each_description_is_the_first(run: Run, tmp_path: Path) -> None:
    granite = write_tiny_model("granite", tmp_path / "granite")
    with serving(granite=granite) as other:
        run("info", "somebody/gemma")  # points the library at a hub
        constants.ENDPOINT = other.url
        constants.HUGGINGFACE_CO_URL_TEMPLATE = other.url + "/{repo_id}/resolve/{revision}/{filename}"
        first, second = (open_source("somebody/granite", fetch=False) for _ in range(2))
    assert first.pending == second.pending == (granite / "model.safetensors").stat().st_size
    assert (first.embedding_factor, first.head_factor) == (second.embedding_factor, second.head_factor) == (12, 1 / 8)
