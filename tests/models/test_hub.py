"""Models of the Hub, from one that runs on this machine."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

from dfrot.cli import main
from dfrot.models.hub import hub_model
from tests.hub import Hub, serving
from tests.sources import split
from tests.tiny_models import write_multimodal_model


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
    names = ("gemma", "shards", "pickles", "unknown")
    with serving(**{name: folder / name for name in names}) as hub:
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
    assert not any("consolidated" in file for file in hub.sent)
    again = run("quantize", f"somebody/{name}", "-o", "again", *RECIPE, offline=True)
    assert again.returncode == 0, again.stderr


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("unknown", "the architecture 'gpt2' has no table"),
        ("pickles", "has no safetensors weights on the hub"),
        ("nothing", "the hub has no model 'somebody/nothing'"),
    ],
)
def test_what_cannot_be_quantized_is_refused_before_a_weight_is_fetched(
    hub: Hub, run: Run, name: str, message: str
) -> None:
    refused = run("quantize", f"somebody/{name}", "-o", "out", *RECIPE)
    assert refused.returncode == 2
    assert message in " ".join(refused.stderr.split())
    assert not any(file.endswith(".safetensors") for file in hub.sent)


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
