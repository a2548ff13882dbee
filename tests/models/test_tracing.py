"""Architectures without a table: what is traced of them is proved, or refused by name."""

import contextlib
import functools
import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import MODEL_ARCH, GGUFWriter, get_tensor_name_map
from safetensors.torch import load_file
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.models.cohere.modeling_cohere import CohereLayerNorm
from transformers.models.cohere2.modeling_cohere2 import Cohere2LayerNorm

import dfrot
from dfrot.cli import main
from dfrot.evaluation.run import Measurement, evaluate
from dfrot.export import export
from dfrot.gguf.reader import GgufModel
from dfrot.kernels.library import instruction_set
from dfrot.models import graph as graphs
from dfrot.models import tracing
from dfrot.models.graph import GRAPHS, graph_for
from dfrot.models.norms import use_torch_norms_
from dfrot.models.source import open_source
from dfrot.models.tracing import table_of, traced_graph
from dfrot.pipeline.estimate import Estimate
from dfrot.system.errors import UserError
from dfrot.training.descent import Descent
from tests.tiny_models import CONFIGS, TRACED

Tiny = Callable[[str], Path]
TOKENS = torch.randint(1, 96, (2, 24), generator=torch.Generator().manual_seed(7))
SIZES = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}

# Of the tiny Gemma 3 as llama.cpp has them.
GEMMA_KEYS: dict[str, float] = {
    "block_count": 2,
    "context_length": 128,
    "embedding_length": 64,
    "feed_forward_length": 96,
}
GEMMA_KEYS |= {"attention.head_count": 4, "attention.head_count_kv": 2, "attention.key_length": 32}
GEMMA_KEYS |= {"attention.sliding_window": 8, "attention.sliding_window_pattern": 2, "rope.freq_base": 1e6}
GEMMA_KEYS |= {"attention.layer_norm_rms_epsilon": 1e-6, "attention.value_length": 32}

GAINS = traced_graph(TRACED["gemma3_text"])
every_traced = pytest.mark.parametrize("architecture", TRACED)
# One of every structure: the others differ from one of these in numbers alone.
STRUCTURES = ("cohere", "gemma3_text", "glm4", "gpt_neox", "granite", "mixtral", "nemotron", "olmo2", "opt", "phi")

# What stands in the way, where nothing is read wrongly but nothing is supported either.
REFUSED = {
    "apertus": r"'mlp\.act_fn' is a XIELUActivation, with weights of its own",
    "falcon": r"does not run on a stream and positions alone .*'alibi'",
    "gpt2": r"'attn\.c_attn' is a Conv1D, with weights of its own",
    "olmo": r"'model\.norm' is a OlmoLayerNorm, without gains",
    "persimmon": r"the norm 'self_attn\.q_layernorm' of queries or keys subtracts a mean",
    "qwen2_moe": r"'mlp\.gate' is a Qwen2MoeTopKRouter, with weights of its own",
}


@pytest.mark.parametrize("architecture", CONFIGS)
def test_tracing_proposes_the_table_of_every_known_architecture(architecture: str) -> None:
    known = GRAPHS[architecture]
    assert replace(traced_graph(CONFIGS[architecture]), name=known.name, traced=False) == known


@pytest.mark.parametrize("architecture", REFUSED)
def test_what_is_not_supported_is_refused_by_the_module_in_the_way(architecture: str) -> None:
    with pytest.raises(UserError, match=REFUSED[architecture]):
        graph_for(CONFIG_MAPPING[architecture](**SIZES))


@pytest.mark.filterwarnings("ignore")
def test_every_architecture_of_transformers_is_traced_or_refused_in_words() -> None:
    traced = set()
    for architecture in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        try:
            config = CONFIG_MAPPING[architecture]()
        except Exception:  # some have no default
            continue
        with contextlib.suppress(UserError):
            traced_graph(config)
            traced.add(architecture)
    assert CONFIGS.keys() <= traced


@every_traced
def test_a_traced_architecture_is_refused_by_no_one(architecture: str) -> None:
    graph = graph_for(TRACED[architecture])
    assert graph.traced
    row = eval("{" + table_of(graph, architecture) + "}", {"ModelGraph": graphs.ModelGraph})
    assert replace(row[architecture], traced=True) == graph


def original_logits(path: Path) -> torch.Tensor:
    """transformers in float64, its norms computed in float64 too."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64, experts_implementation="eager")
    if not graph_for(model.config).centred:
        use_torch_norms_(model, graph_for(model.config))
    for name, module in list(model.named_modules()):
        if isinstance(module, CohereLayerNorm | Cohere2LayerNorm):  # which cast to float32
            norm = nn.LayerNorm(module.weight.shape, eps=module.variance_epsilon, bias=False)
            norm.weight = module.weight
            model.set_submodule(name, norm)
    with torch.no_grad():
        return model(TOKENS, use_cache=False).logits


def made(tiny: Tiny, out: Path, architecture: str, text: Path, **words: Any) -> Path:
    calibration = {"calib": str(text), "calib_tokens": 64, "calib_seq_len": 32, "tune": "none"}
    recipe = dfrot.Recipe.parse(**{"method": "quarot", "weights": "rtn", **calibration, **words})
    return dfrot.quantize(tiny(architecture), recipe, out, check_source="auto").path


@pytest.fixture(scope="module")
def quantized(tiny: Tiny, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A checkpoint of an architecture, made on first use."""
    folder = tmp_path_factory.mktemp("quantized")
    return functools.cache(lambda name: made(tiny, folder / name, name, text_file, dtype="float32"))


METHODS: dict[str, dict[str, Any]] = {
    "quarot": {"head_mixing": True},
    "duquant": {"block": 8, "greedy_steps": 4},
    "learned": {"steps": 3, "learn_steps": 3, "learn_tokens": 32, "calib_tokens": 128},
    "none": {},
}


@pytest.mark.parametrize(
    ("architecture", "method"),
    [
        *itertools.product(TRACED, ("quarot", "duquant")),
        *itertools.product(STRUCTURES, ("learned", "none")),
    ],
)
def test_folding_leaves_the_logits_of_transformers(
    tiny: Tiny, tmp_path: Path, text_file: Path, architecture: str, method: str
) -> None:
    graph, words = graph_for(TRACED[architecture]), {"method": method, **METHODS[method]}
    if method == "learned" and (graph.experts or not graph.rotates_stream):
        wrong = r"the norm 'post_\w+norm' stands between layers and the residual stream|has experts, for whose inputs"
        with pytest.raises(UserError, match=wrong):
            made(tiny, tmp_path / "out", architecture, text_file, **words)
        return
    path = made(tiny, tmp_path / "out", architecture, text_file, spec="w16a16kv16", dtype="float64", **words)
    model, _ = dfrot.load(path)
    with torch.no_grad():
        found, expected = model(TOKENS, use_cache=False).logits, original_logits(tiny(architecture))
    bound = 1e-6 if graph.experts else 1e-10  # routers of transformers choose in float32
    assert (found - expected).norm() <= bound * expected.norm()


@every_traced
def test_it_generates_with_a_packed_cache_as_without_one(quantized: Callable[[str], Path], architecture: str) -> None:
    model, _ = dfrot.load(quantized(architecture), dtype=torch.float64)
    how: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    assert torch.equal(model.generate(TOKENS, **how), model.generate(TOKENS, use_cache=False, **how))


@every_traced
def test_kernels_compute_what_the_reference_computes(
    quantized: Callable[[str], Path], architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[torch.Tensor] = []
    for used in (instruction_set(), 0):
        monkeypatch.setattr("dfrot.kernels.library.instruction_set", lambda used=used: used)
        model, _ = dfrot.load(quantized(architecture))
        with torch.no_grad():
            found.append(model(TOKENS).logits)
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5 * float(found[1].abs().max()))


@pytest.mark.parametrize("architecture", STRUCTURES)
def test_tuning_takes_it(tiny: Tiny, tmp_path: Path, text_file: Path, architecture: str) -> None:
    words = {"tune": "all", "tune_steps": 2, "tune_tokens": 32, "tune_seq_len": 16}
    path = made(tiny, tmp_path / "out", architecture, text_file, **words)
    model, _ = dfrot.load(path)
    assert model(TOKENS).logits.isfinite().all()


@pytest.mark.parametrize("architecture", ["cohere", "gpt_neox", "opt", "phi"])
@pytest.mark.parametrize("weights", ["gptq", "lwc"])
def test_weights_are_fitted_where_layers_stand_side_by_side_or_attention_is_called_otherwise(
    tiny: Tiny, tmp_path: Path, text_file: Path, architecture: str, weights: str
) -> None:
    words = {"spec": "w8a16kv16", "weights": weights, "dtype": "float64", "calib_tokens": 256}
    model, _ = dfrot.load(made(tiny, tmp_path / "out", architecture, text_file, **words))
    with torch.no_grad():
        found, expected = model(TOKENS, use_cache=False).logits, original_logits(tiny(architecture))
    assert (found - expected).norm() <= 0.1 * expected.norm()  # steps of 2⁻⁷ of the largest weight of a channel


@pytest.mark.parametrize("architecture", ["opt", "phi"])
def test_they_are_inspected_and_their_massive_tokens_left_alone(
    tiny: Tiny, tmp_path: Path, text_file: Path, architecture: str
) -> None:
    path, source = made(tiny, tmp_path / "out", architecture, text_file), tiny(architecture)
    assert (
        main(["inspect", str(source), "--text", str(text_file), "--seq-len", "64", "-o", str(tmp_path / "seen")]) == 0
    )
    measured = Measurement((str(text_file),), 64, 128, against=str(source), massive_unquantized=True)
    assert all(value > 0 for value in evaluate(str(path), measured).metrics.values())


def test_gains_of_norms_behind_writers_are_tuned_too(
    tiny: Tiny, tmp_path: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Descent, "_held_out", lambda descent: 100.0 - descent.step)  # the last step is kept
    words = {"tune": "gains", "tune_steps": 4, "tune_tokens": 64, "tune_seq_len": 32, "calib_tokens": 512}
    tuned = made(tiny, tmp_path / "tuned", "gemma3_text", text_file, **words)
    untuned = made(tiny, tmp_path / "untuned", "gemma3_text", text_file, calib_tokens=512)
    found, before = (
        {name: tensor for file in path.glob("*.safetensors") for name, tensor in load_file(file).items()}
        for path in (tuned, untuned)
    )
    changed = {name.split(".", 3)[3] for name in before if not torch.equal(found[name], before[name])}
    assert changed == {f"{norm}.weight" for norm in (*GAINS.norms, *GAINS.norms_behind)}


@every_traced
def test_its_plain_weights_compute_the_same_in_transformers(
    tiny: Tiny, tmp_path: Path, text_file: Path, architecture: str
) -> None:
    path = made(tiny, tmp_path / "out", architecture, text_file, spec="w4a16kv16", dtype="float32", fold_only=True)
    if graph_for(TRACED[architecture]).centred:
        with pytest.raises(UserError, match="subtract the mean over channels, and those of a rotated model do not"):
            export(path, "huggingface", tmp_path / "plain")
        return
    export(path, "huggingface", tmp_path / "plain")
    model, plain = dfrot.load(path)[0], AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.float32)
    with torch.no_grad():
        found, expected = plain(TOKENS).logits, model(TOKENS).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


def test_gemma_is_read_from_gguf_as_from_safetensors(tiny: Tiny, tmp_path: Path) -> None:
    path = tiny("gemma3_text")
    names, writer = get_tensor_name_map(MODEL_ARCH.GEMMA3, 2), GGUFWriter(tmp_path / "gemma.gguf", "gemma3")
    for key, value in GEMMA_KEYS.items():
        (writer.add_float32 if isinstance(value, float) else writer.add_uint32)(f"gemma3.{key}", value)
    for name, tensor in load_file(path / "model.safetensors").items():
        found = names.get_name(name.removesuffix(".weight"))
        writer.add_tensor(f"{found}.weight", (tensor + ("norm" in name)).numpy())
    for write in (
        writer.write_header_to_file,
        writer.write_kv_data_to_file,
        writer.write_tensors_to_file,
        writer.close,
    ):
        write()
    config, tensors = GgufModel(tmp_path / "gemma.gguf").read
    source = open_source(str(path))
    same = ("layer_types", "sliding_window", "rope_parameters", "head_dim", "hidden_size", "query_pre_attn_scalar")
    assert all(getattr(config, name) == getattr(source.config, name) for name in same)
    assert tensors.keys() == source.stored.keys()
    for name in tensors:
        read = GgufModel(tmp_path / "gemma.gguf")._tensor(name)
        torch.testing.assert_close(read, source.tensor(name), rtol=0, atol=2**-22)


def test_a_wrong_proposal_is_refused(
    tiny: Tiny, tmp_path: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(config: Any) -> graphs.ModelGraph:
        return replace(traced_graph(config), value="self_attn.k_proj", key="self_attn.v_proj")

    monkeypatch.setattr(tracing, "traced_graph", wrong)
    with pytest.raises(UserError, match=r"'seed_oss' has no table, and the one that was traced is wrong"):
        made(tiny, tmp_path / "out", "seed_oss", text_file)


def test_a_traced_source_is_compared_with_transformers_wherever_that_was_not_declined(tiny: Tiny) -> None:
    source, recipe = open_source(str(tiny("granite"))), dfrot.Recipe.parse("none", "rtn")
    checks = [Estimate.of(source, recipe, 1 << 20, check_source=asked).check > 0 for asked in ("auto", "never")]
    assert checks == [True, False]


def test_models_shows_what_was_traced(tiny: Tiny, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", str(tiny("granite"))]) == 0
    assert capsys.readouterr().out.startswith('"granite": ModelGraph(')


@pytest.mark.parametrize("to", ["vllm", "gguf"])
def test_engines_get_no_architecture_that_nobody_looked_at(
    tiny: Tiny, tmp_path: Path, text_file: Path, to: str
) -> None:
    path = made(tiny, tmp_path / "ckpt", "seed_oss", text_file, spec="w8a16kv16", preset="deploy", fold_only=True)
    with pytest.raises(UserError, match="seed_oss has none"):
        export(path, to, tmp_path / "out")
