"""Every statistic against a direct computation on the transformers model, in float64."""

import functools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.cache_utils import DynamicCache
from transformers.models.qwen2.modeling_qwen2 import apply_rotary_pos_emb

import dfrot
from dfrot.cli import main
from dfrot.inspect.inspect import as_quantized, inspect
from dfrot.linalg.rotation import Hadamard, random_hadamard, random_orthogonal
from dfrot.methods.method import FitContext
from dfrot.models.source import open_source
from dfrot.models.texts import load_tokenizer
from dfrot.pipeline.recipe import Recipe
from dfrot.pipeline.run import calibration_tokens
from dfrot.quant.spec import Spec
from dfrot.transform.transforms import Transforms
from tests.tiny_models import write_planted_model

Tiny = Callable[[str], Path]
CPU = torch.device("cpu")
TOKENS, HIDDEN, BLOCKS, CHANNEL = 60, 48, 2, 5
NORMS = ("input_layernorm", "post_attention_layernorm")


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model in which the token "q", and no other, has a massive activation, in one channel."""
    return write_planted_model(tmp_path_factory.mktemp("planted"), CHANNEL)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """At these sizes threads only wait for one another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def out(planted: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return inspect(str(planted), tmp_path_factory.mktemp("out"), text=str(text_file), seq_len=TOKENS, seed=3)


@pytest.fixture(scope="module")
def found(out: Path) -> dict[str, Any]:
    return json.loads((out / "inspect.json").read_text())


@pytest.fixture(scope="module")
def tensors(out: Path) -> dict[str, Tensor]:
    return load_file(out / "inspect.safetensors")


@pytest.fixture(scope="module")
def token_ids(planted: Path, text_file: Path) -> Tensor:
    return load_tokenizer(planted)(text_file.read_text(), return_tensors="pt").input_ids[:, :TOKENS]


@pytest.fixture(scope="module")
def model(planted: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(planted, dtype=torch.float64).eval().requires_grad_(False)


def norms_of(model: Any) -> list[Any]:
    return [getattr(block, name) for block in model.model.layers for name in NORMS]


@pytest.fixture(scope="module")
def outputs(model: Any, token_ids: Tensor) -> list[np.ndarray]:
    """Norm outputs without gain, (tokens, hidden) for every norm."""
    inputs: list[Tensor] = []
    handles = [norm.register_forward_pre_hook(lambda _, args: inputs.append(args[0][0])) for norm in norms_of(model)]
    model(token_ids)
    for handle in handles:
        handle.remove()
    return [(x / (x.square().mean(-1, keepdim=True) + model.config.rms_norm_eps).sqrt()).numpy() for x in inputs]


def fitted_by(method: str, planted: Path, text_file: Path) -> Transforms:
    """What the method fits in `quantize`."""
    source = open_source(str(planted))
    recipe = dfrot.Recipe.parse(method, "rtn", calib=str(text_file), calib_tokens=TOKENS, seed=3)
    calibration = functools.cache(lambda: calibration_tokens(source, recipe))
    return recipe.method.fit(
        FitContext(source, recipe.spec.activations, calibration, torch.device("cpu"), recipe.seed)
    ).transforms


@pytest.fixture(scope="module")
def rotated(planted: Path, text_file: Path, model: Any, outputs: list[np.ndarray]) -> dict[str, list[np.ndarray]]:
    """The norm outputs under every rotation, by matrix products."""
    matrices = {
        "none": np.eye(HIDDEN),
        "RO": random_orthogonal(HIDDEN, torch.Generator().manual_seed(3)).as_matrix().numpy(),
        "RH": random_hadamard(HIDDEN, torch.Generator().manual_seed(3)).as_matrix().numpy(),
    }
    for method in ("dfrot", "rangerot"):
        refined = fitted_by(method, planted, text_file).residual
        assert refined is not None
        matrices[method] = refined.as_matrix().numpy()
    views = {name: [x @ matrix for x in outputs] for name, matrix in matrices.items()}
    fitted = fitted_by("duquant", planted, text_file).inputs
    views["duquant"] = []
    for number, (x, norm) in enumerate(zip(outputs, norms_of(model), strict=True)):
        transform = fitted[number // 2][("self_attn.q_proj", "mlp.gate_proj")[number % 2]]
        assert transform.smooth is not None
        smoothed = x * norm.weight.numpy() / transform.smooth.double().numpy()
        views["duquant"].append(smoothed @ transform.rotation.as_matrix().numpy())
    return views


def stored(scale: np.ndarray) -> np.ndarray:
    """Scales in bfloat16, rounded up."""
    bits = scale.astype(np.float32).view(np.uint32)
    return ((bits + 0xFFFF) & 0xFFFF0000).astype(np.uint32).view(np.float32)


def in_four_bits(x: np.ndarray, clip: float, *, kept: bool = False) -> np.ndarray:
    """Asymmetric, one scale for a row; `kept` as a cache keeps it."""
    low, high = clip * np.minimum(x.min(-1, keepdims=True), 0), clip * np.maximum(x.max(-1, keepdims=True), 0)
    scale = stored((high - low) / 15) if kept else (high - low) / 15
    zero = np.round(-low / scale)
    return scale * (np.clip(np.round(x / scale) + zero, 0, 15) - zero)


def relative(x: np.ndarray, clip: float, *, kept: bool = False) -> np.ndarray:
    return np.linalg.norm(x - in_four_bits(x, clip, kept=kept), axis=-1) / np.linalg.norm(x, axis=-1)


def test_the_files_hold_what_the_contract_says(
    found: dict[str, Any], tensors: dict[str, Tensor], planted: Path
) -> None:
    assert set(found) == {
        *("schema", "model", "conditions", "norms", "tokens", "massive", "channels", "rotations", "kurtosis"),
        *("error", "sensitivity", "weights", "kv", "surface"),
    }
    assert (found["schema"], found["model"]) == (2, str(planted))
    assert found["rotations"] == ["none", "RO", "RH", "dfrot", "rangerot", "duquant"]
    assert found["norms"] == [f"{block}.{norm}" for block in range(BLOCKS) for norm in NORMS]
    assert "".join(found["tokens"]).startswith("thequickbrownfox")
    conditions = found["conditions"]
    expected = {"text": "text.txt", "tokens": TOKENS, "sensitivity_tokens": TOKENS, "seq_len": TOKENS, "seed": 3}
    expected |= {"spec": "a4", "clip": 0.9, "device": "cpu", "dtype": "float32"}
    assert {key: conditions[key] for key in expected} == expected
    assert set(found["massive"][0]) == {"block", "norm", "position", "token", "token_id", "channel", "peak_over_rms"}
    assert set(found["channels"][0]) == {"median", "largest"}
    assert len(found["channels"]) == len(found["norms"])
    assert set(found["kurtosis"]) == set(found["error"]) == set(found["rotations"])
    assert list(found["sensitivity"]) == ["none", "RO", "RH", "dfrot", "rangerot"]
    assert len(found["weights"]) == 7 * BLOCKS
    assert set(found["weights"][0]) == {"block", "layer", "error"}
    assert list(found["weights"][0]["error"]) == ["none", "RO", "RH", "dfrot", "rangerot"]
    assert set(found["kv"]) == {"keys", "values"}
    assert all(set(by_how) == {"plain", "rotated"} for by_how in found["kv"].values())
    assert {len(errors) for by_how in found["kv"].values() for errors in by_how.values()} == {BLOCKS}
    assert found["surface"] in found["norms"]
    shapes = {f"error/{name}": (len(found["norms"]), TOKENS) for name in found["rotations"]}
    shapes |= {f"surface/{name}": (TOKENS, HIDDEN) for name in found["rotations"]}
    types = dict.fromkeys(shapes, torch.float32) | {"massive": torch.uint8}
    shapes["massive"] = (len(found["norms"]), TOKENS)
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == shapes
    assert {name: tensor.dtype for name, tensor in tensors.items()} == types


def test_the_planted_token_is_massive_wherever_it_stands_and_no_other(
    found: dict[str, Any], tensors: dict[str, Tensor]
) -> None:
    positions = [position for position, token in enumerate(found["tokens"]) if token == "q"]
    listed = {(entry["position"], entry["token"], entry["channel"]) for entry in found["massive"]}
    assert listed == {(position, "q", CHANNEL) for position in positions}
    for mask in tensors["massive"]:
        assert mask.nonzero().flatten().tolist() == positions
    assert len(found["massive"]) == len(positions) * len(found["norms"])


def test_outlier_channels_are_those_with_the_largest_entries(found: dict[str, Any], outputs: list[np.ndarray]) -> None:
    for entry, x in zip(found["channels"], outputs, strict=True):
        peaks = np.abs(x).max(0)
        order = np.argsort(-peaks)[:8]
        assert [channel["channel"] for channel in entry["largest"]] == order.tolist()
        assert [channel["value"] for channel in entry["largest"]] == pytest.approx(peaks[order], rel=1e-5)
        assert entry["median"] == pytest.approx(np.sort(peaks)[HIDDEN // 2 - 1], rel=1e-5)


@pytest.mark.parametrize("rotation", ["none", "RO", "RH", "dfrot", "rangerot", "duquant"])
def test_errors_kurtosis_and_surface_are_those_of_the_rotated_norm_outputs(
    found: dict[str, Any], tensors: dict[str, Tensor], rotated: dict[str, list[np.ndarray]], rotation: str
) -> None:
    expected = np.stack([relative(y, 0.9) for y in rotated[rotation]])
    error = tensors[f"error/{rotation}"].numpy()
    np.testing.assert_allclose(error, expected, rtol=2e-4)
    massive = tensors["massive"].bool().numpy()
    means = {"ordinary": expected[~massive].mean(), "massive": expected[massive].mean()}
    assert found["error"][rotation] == pytest.approx(means, rel=1e-4)
    kurtosis = [scipy.stats.kurtosis(y, axis=-1).mean() for y in rotated[rotation]]
    assert found["kurtosis"][rotation] == pytest.approx(kurtosis, rel=1e-4, abs=1e-5)
    peaks = [np.abs(y).max() for y in rotated["none"]]
    assert found["surface"] == found["norms"][int(np.argmax(peaks))]
    surface = np.abs(rotated[rotation][found["norms"].index(found["surface"])])
    np.testing.assert_allclose(tensors[f"surface/{rotation}"].numpy(), surface, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("rotation", "block"), [("none", 0), ("none", 1), ("RH", 0), ("RH", 1)])
def test_the_sensitivity_of_a_block_is_the_divergence_of_a_model_with_only_its_norm_outputs_quantized(
    found: dict[str, Any], model: Any, token_ids: Tensor, rotation: str, block: int
) -> None:
    matrix = torch.eye(HIDDEN, dtype=torch.float64)
    if rotation == "RH":
        matrix = random_hadamard(HIDDEN, torch.Generator().manual_seed(3)).as_matrix()

    def hook(norm: Any, args: tuple[Tensor], output: Tensor) -> Tensor:
        x = output / norm.weight @ matrix
        return torch.from_numpy(in_four_bits(x.numpy(), 0.9)) @ matrix.T * norm.weight

    original = model(token_ids).logits.log_softmax(-1)
    handles = [getattr(model.model.layers[block], name).register_forward_hook(hook) for name in NORMS]
    changed = model(token_ids).logits.log_softmax(-1)
    for handle in handles:
        handle.remove()
    expected = (original.exp() * (original - changed)).sum(-1).mean().item()
    assert found["sensitivity"][rotation][block] == pytest.approx(expected, rel=1e-3)


def test_weight_errors_are_those_of_rounding_to_nearest(found: dict[str, Any], model: Any) -> None:
    signs = random_hadamard(HIDDEN, torch.Generator().manual_seed(3)).as_matrix().numpy()
    for entry in found["weights"]:
        block = model.model.layers[entry["block"]]
        weight = block.get_submodule(entry["layer"]).weight.numpy()
        weights = {"none": weight}
        if entry["layer"] in ("mlp.gate_proj", "mlp.up_proj"):
            weights["RH"] = weight * block.post_attention_layernorm.weight.numpy() @ signs
        if entry["layer"] == "mlp.down_proj":
            weights["RH"] = signs.T @ weight @ Hadamard(80).as_matrix().numpy()
        for rotation, w in weights.items():
            scale = stored(np.abs(w).max(-1, keepdims=True) / 7)
            left = w - scale * np.round(w / scale)
            expected = np.linalg.norm(left) / np.linalg.norm(w)
            assert entry["error"][rotation] == pytest.approx(expected, rel=1e-4)


def test_kv_errors_are_those_of_the_models_own_cache(found: dict[str, Any], model: Any, token_ids: Tensor) -> None:
    cache = DynamicCache()
    model(token_ids, past_key_values=cache)
    for block, layer in enumerate(cache.layers):
        own = model.model.layers[block].self_attn.k_proj.bias.view(1, -1, 1, layer.keys.shape[-1])
        angles = model.model.rotary_emb(own, torch.arange(layer.keys.shape[2])[None])
        _, turned = apply_rotary_pos_emb(own, own, *angles)  # which stays out of the cache
        for kind, states in (("keys", layer.keys - turned), ("values", layer.values)):
            x = states[0].detach().numpy()  # (heads, tokens, head_dim)
            views = {"plain": x, "rotated": x @ Hadamard(x.shape[-1]).as_matrix().numpy()}
            expected = {name: relative(y, 0.95, kept=True).mean() for name, y in views.items()}
            assert {how: found["kv"][kind][how][block] for how in views} == pytest.approx(expected, rel=1e-4)


def test_the_same_seed_gives_the_same_files(planted: Path, text_file: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        inspect(str(planted), tmp_path / name, text=str(text_file), seq_len=TOKENS)
    for name in ("inspect.json", "inspect.safetensors"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    assert {path.name for path in (tmp_path / "one").iterdir()} == {"inspect.json", "inspect.safetensors"}


def test_whoever_may_read_the_statistics_may_read_the_tensors(out: Path) -> None:
    assert (out / "inspect.safetensors").stat().st_mode == (out / "inspect.json").stat().st_mode


@pytest.mark.parametrize("architecture", ["mistral", "qwen3", "phi3", "gemma3_text"])
def test_every_architecture_can_be_inspected(tiny: Tiny, text_file: Path, tmp_path: Path, architecture: str) -> None:
    rotations = ("duquant", "RH")
    out = inspect(str(tiny(architecture)), tmp_path, rotations=rotations, text=str(text_file), seq_len=TOKENS)
    found = json.loads((out / "inspect.json").read_text())
    assert found["rotations"] == ["RH", "duquant"]
    assert list(found["sensitivity"]) == ["RH"]


@pytest.mark.parametrize("architecture", ["qwen3", "gemma3_text"])
@pytest.mark.parametrize("method", ["quarot", "duquant"])
def test_a_norms_output_is_shown_as_the_folded_layer_reads_it(
    tiny: Tiny, generator: torch.Generator, architecture: str, method: str
) -> None:
    source = open_source(str(tiny(architecture)))
    grid, text = Spec.parse("w4a4kv4").activations, torch.randint(1, 90, (1, TOKENS), generator=generator)
    transforms = Recipe.parse(method, "rtn").method.fit(FitContext(source, grid, lambda: text, CPU)).transforms
    block = source.block(1).double()
    for norm, (reader, *_) in source.graph.norms.items():
        gain, weight = (block.get_parameter(f"{name}.weight") for name in (norm, reader))
        x = torch.randn(5, 64, generator=generator, dtype=torch.float64)
        folded = transforms.folds(1, source.graph, source.config, block)[reader].weight(weight)
        torch.testing.assert_close(as_quantized(x, transforms, 1, reader, gain) @ folded.T, (x * gain) @ weight.T)


def test_where_no_norm_stands_before_layers_there_is_nothing_to_inspect(
    tiny: Tiny, text_file: Path, tmp_path: Path
) -> None:
    with pytest.raises(dfrot.UserError, match="what norms hand to linear layers; in Olmo2ForCausalLM, traced none"):
        inspect(str(tiny("olmo2")), tmp_path / "out", text=str(text_file), seq_len=TOKENS)


def test_without_massive_tokens_their_error_is_null(
    planted: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dfrot.methods.massive.DOMINANT_SHARE", 1.1)
    out = inspect(str(planted), tmp_path, rotations=("duquant",), text=str(text_file), seq_len=TOKENS)
    found = json.loads((out / "inspect.json").read_text())
    assert (found["massive"], found["error"]["duquant"]["massive"]) == ([], None)
    assert (found["weights"], found["sensitivity"]) == ([], {})


def test_a_quantized_checkpoint_is_refused(tiny: Tiny, text_file: Path, tmp_path: Path) -> None:
    recipe = dfrot.Recipe.parse("quarot", "rtn")
    checkpoint = dfrot.quantize(tiny("llama"), recipe, tmp_path / "ckpt").path
    with pytest.raises(dfrot.UserError, match=r"quantized already.*give the original model"):
        inspect(str(checkpoint), tmp_path / "out", text=str(text_file), seq_len=TOKENS)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"rotations": ("R4",)}, "rotations are some of none, RO, RH, dfrot, rangerot, duquant; got R4"),
        ({"rotations": ()}, "got none at all"),
        ({"spec": "w4a4kv16"}, "has a grid for each; got 'w4a4kv16'"),
        ({"seq_len": 10**6}, "fewer than one block"),
    ],
)
def test_what_does_not_fit_is_refused(
    tiny: Tiny, text_file: Path, tmp_path: Path, given: dict[str, Any], message: str
) -> None:
    with pytest.raises(dfrot.UserError, match=message):
        inspect(str(tiny("llama")), tmp_path / "out", text=str(text_file), **{"seq_len": TOKENS, **given})
    assert not (tmp_path / "out").exists()


def test_the_command_prints_a_row_for_every_rotation_and_the_first_massive_tokens(
    planted: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["inspect", planted, "-o", tmp_path / "out", "--text", text_file, "--seq-len", TOKENS]
    assert main([str(word) for word in [*words, "--rotations", "none", "RO", "duquant"]]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert all(f"│ {name} │" in printed for name in ("none", "RO", "duquant"))
    assert "8 norm outputs of 4 norms with massive activations" in printed
    assert "position 3 'q', channel 5: in 4 norms" in printed
