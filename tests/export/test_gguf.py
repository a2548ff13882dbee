"""A GGUF file is read by the gguf package, by transformers and by llama.cpp, none of which know dfrot, and compared."""

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import dfrot
from dfrot.cli import main
from dfrot.export import export
from dfrot.export.checkpoint import Checkpoint
from dfrot.export.gguf_file import ARCHITECTURES, choose_type, packed
from dfrot.models.graph import GRAPHS
from dfrot.system.errors import SetupError, UserError
from tests.tiny_models import CONFIGS, write_tiny_model

gguf = pytest.importorskip("gguf", reason="reads and writes GGUF files")

Make = Callable[..., Path]
VOCABULARY = 300
TEXT = "The quick brown fox's 12345 jumps\n\n  over naïve 狐 dogs, isn't IT?\t<tool><|end|> "
TOKENS = torch.randint(1, VOCABULARY, (2, 8), generator=torch.Generator().manual_seed(7))
# What a block of 32 needs; the attention of tiny Mistral looks back 8 tokens, as many as there are
SIZES = {"hidden_size": 64, "head_dim": 16, "intermediate_size": 96, "vocab_size": VOCABULARY}
LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN_2 = LLAMA_3.replace("{1,3}", "")
O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PLAIN = pre_tokenizers.ByteLevel(add_prefix_space=False)
CUT = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)


def split(pattern: str, behavior: str = "isolated") -> Any:
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), behavior), CUT])


PRE_TOKENIZERS = {
    "gpt-2": PLAIN,
    "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), PLAIN]),
    "llama-bpe": split(LLAMA_3),
    "qwen2": split(QWEN_2),
    "gpt-4o": split(O200K),
}


def byte_tokenizer(name: str = "gpt-2", size: int = VOCABULARY - 3) -> Tokenizer:
    """BPE over bytes, with three rows of the embedding left over."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=name == "llama-bpe"))
    tokenizer.pre_tokenizer = PRE_TOKENIZERS[name]
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size - 2, initial_alphabet=alphabet, special_tokens=["<|begin|>"])
    tokenizer.train_from_iterator([TEXT] * 3, trainer)
    tokenizer.add_tokens(["<|end|>", "<tool>"])
    tokenizer.post_processor = processors.TemplateProcessing(single="<|begin|> $A", special_tokens=[("<|begin|>", 0)])
    return tokenizer


def character_tokenizer() -> Tokenizer:
    """SentencePiece's: characters and bytes, ▁ for a space."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    octets = [f"<0x{octet:02X}>" for octet in range(256)]
    known = "The▁quick▁brown▁fox"
    vocabulary = {token: index for index, token in enumerate(["<unk>", "<s>", "</s>", *octets, *dict.fromkeys(known)])}
    merges = [("q", "u"), ("▁", "f"), ("i", "c"), ("T", "h"), ("▁", "Th"), ("qu", "ic"), ("Th", "e"), ("▁", "The")]
    for left, right in [*merges, ("▁Th", "e")]:
        vocabulary.setdefault(left + right, len(vocabulary))
    tokenizer.model = models.BPE(
        vocabulary, [*merges, ("▁Th", "e")], byte_fallback=True, unk_token="<unk>", fuse_unk=True
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path, **special: str) -> None:
    words = special or {"bos_token": "<|begin|>", "eos_token": "<|end|>"}
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **words)
    wrapped.chat_template = "{{ messages }}"
    wrapped.save_pretrained(folder)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """A checkpoint, made on first use. Treat it as read-only."""
    finished: dict[str, Path] = {}

    def get(architecture: str = "llama", spec: str = "w4g32a16kv16", **changed: Any) -> Path:
        if (key := f"{architecture} {spec} {changed}") not in finished:
            folder = tmp_path_factory.mktemp(architecture)
            names = ("weight_symmetric", "method", "fold_only")
            words: dict[str, Any] = {name: changed.pop(name) for name in names if name in changed}
            write_tiny_model(architecture, folder / "model", **{**SIZES, **changed})
            save_tokenizer(byte_tokenizer(), folder / "model")
            words = {"method": "quarot", "fold_only": True, "weight_clip": 1.0, **words}  # a search takes its time
            recipe = dfrot.Recipe.parse(weights="rtn", spec=spec, preset="deploy", **words)
            finished[key] = dfrot.quantize(folder / "model", recipe, folder / "ckpt").path
        return finished[key]

    return get


def read(file: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Metadata and tensors."""
    reader = gguf.GGUFReader(file)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    return fields, {tensor.name: tensor for tensor in reader.tensors}


def dequantized(tensor: Any) -> Tensor:
    return torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())


def interleaved(weight: Tensor, heads: int) -> Tensor:
    """Row by row: channel i of the first half of a head goes to 2i, of the second to 2i + 1."""
    rows, half = [], len(weight) // heads // 2
    for head in range(heads):
        for channel in range(half):
            rows += [weight[2 * half * head + channel], weight[2 * half * head + half + channel]]
    return torch.stack(rows)


NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
}


def expected(path: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint by its name in GGUF, in float32."""
    checkpoint = Checkpoint.open(path)
    config = checkpoint.config
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    heads = heads if config.model_type in ("llama", "mistral") else {}
    names = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    found = {}
    for index in checkpoint.shards:
        for full, tensor in checkpoint.tensors(index, lambda _, layer: {"weight": layer.weight}):
            name, part = full.removeprefix(f"model.layers.{index}.").rsplit(".", 1)
            own = names[name] if index is None else NAMES[name]
            ordered = interleaved(tensor, heads[own]) if own in heads else tensor
            found[f"{own}.{part}" if index is None else f"blk.{index}.{own}.{part}"] = ordered
    return {name: tensor.float() for name, tensor in found.items()}


def test_every_known_architecture_has_a_name() -> None:
    assert ARCHITECTURES.keys() == GRAPHS.keys()


@pytest.mark.parametrize(
    ("architecture", "spec", "kind"),
    [
        *((architecture, "w4g32a16kv16", "q4_0") for architecture in CONFIGS),
        *((architecture, "w8a16kv16", "q8_0") for architecture in CONFIGS),
        ("llama", "w4a16kv16", "q4_0"),
        ("llama", "w4g32a16kv16", "q8_0"),
    ],
)
def test_integers_go_over_bit_by_bit(made: Make, tmp_path: Path, architecture: str, spec: str, kind: str) -> None:
    checkpoint = made(architecture, spec)
    export(checkpoint, "gguf", tmp_path / "a.gguf", kind=kind)
    _, tensors = read(tmp_path / "a.gguf")
    wanted = expected(checkpoint)
    assert tensors.keys() == wanted.keys()
    for name, tensor in tensors.items():
        if tensor.tensor_type.name == kind.upper():  # the rest is float
            assert torch.equal(dequantized(tensor), wanted[name]), name
    of_integers = [name for name, tensor in tensors.items() if tensor.tensor_type.name == kind.upper()]
    assert len(of_integers) == 2 * len(Checkpoint.open(checkpoint).graph.linears)


@pytest.mark.parametrize("architecture", CONFIGS)
@pytest.mark.parametrize(("kind", "dtype"), [("f32", None), ("f16", torch.float16), ("bf16", torch.bfloat16)])
def test_floats_are_what_the_integers_stand_for(
    made: Make, tmp_path: Path, architecture: str, kind: str, dtype: torch.dtype | None
) -> None:
    checkpoint = made(architecture)
    export(checkpoint, "gguf", tmp_path / "a.gguf", kind=kind)
    _, tensors = read(tmp_path / "a.gguf")
    for name, tensor in expected(checkpoint).items():
        rounded = tensor if dtype is None or tensor.ndim == 1 else tensor.to(dtype).float()
        assert tensors[name].tensor_type.name == ("F32" if tensor.ndim == 1 else kind.upper())
        assert torch.equal(dequantized(tensors[name]), rounded), name


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("architecture", CONFIGS)
@pytest.mark.parametrize("kind", ["q4_0", "f32"])
def test_transformers_computes_the_same_from_the_file(made: Make, tmp_path: Path, architecture: str, kind: str) -> None:
    # its loader knows no biases in Llama, and only heads of 128 channels in Qwen3
    changed: dict[str, dict[str, Any]] = {"llama": {"attention_bias": False}, "qwen3": {"head_dim": 128}}
    checkpoint = made(architecture, **changed.get(architecture, {}))
    export(checkpoint, "gguf", tmp_path / "a.gguf", kind=kind)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="a.gguf", dtype=torch.float32)
    ours = dfrot.load(checkpoint)[0](TOKENS).logits.detach()
    assert torch.allclose(model(TOKENS).logits.detach(), ours, atol=1e-4 * float(ours.abs().max()))


def test_the_default_keeps_the_integers_where_gguf_has_them(made: Make, tmp_path: Path) -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({}, "q4_0"),
        ({"spec": "w3a16kv16"}, "q4_0"),
        ({"spec": "w8a16kv16"}, "q8_0"),
        ({"spec": "w6g64a16kv16", "intermediate_size": 128}, "q8_0"),
        ({"spec": "w4g16a16kv16"}, "f16"),
        ({"weight_symmetric": False}, "f16"),
        ({"spec": "w16a16kv16"}, "f16"),
        ({"spec": "w4a16kv16", "intermediate_size": 80}, "f16"),
    ]
    for words, kind in cases:
        assert choose_type(Checkpoint.open(made(**words)), None) == kind, words
    export(made(), "gguf", tmp_path / "a.gguf")
    fields, tensors = read(tmp_path / "a.gguf")
    assert tensors["blk.1.ffn_down.weight"].tensor_type.name == "Q4_0"
    assert fields["general.file_type"] == gguf.LlamaFileType.MOSTLY_Q4_0


@pytest.mark.parametrize(
    ("words", "kind", "message"),
    [
        ({"spec": "w4g16a16kv16"}, "q4_0", r"4 bits, in groups of 16, for layers that read 64, 96 channels. Take --ty"),
        ({"weight_symmetric": False}, "q8_0", r"up to 8 bits.*in 4 bits, asymmetric.*Take --type f16 or bf16 or f32"),
        ({"spec": "w8a16kv16"}, "q4_0", r"in 8 bits.*Take --type q8_0 or f16.*--preset deploy --spec w4g32a16kv16"),
        ({"spec": "w16a16kv16"}, "q8_0", r"are not quantized"),
        (
            {"spec": "w4a16kv16", "intermediate_size": 80},
            "q4_0",
            r"read 64, 80 channels. Take --type f16 or bf16 or f32.$",
        ),
    ],
)
def test_integers_that_are_not_the_checkpoints_are_refused(
    made: Make, tmp_path: Path, words: dict[str, Any], kind: str, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        export(made(**words), "gguf", tmp_path / "a.gguf", kind=kind)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["q4_0", "q8_0"])
def test_all_integers_of_a_block_and_all_scales_of_float16_survive(kind: str) -> None:
    lowest = -8 if kind == "q4_0" else -128
    codes = torch.arange(lowest, -lowest, dtype=torch.int16).repeat(32)[: 32 * -lowest].view(4, -1)
    scales = torch.tensor([[1.0], [2.0**-24], [65280.0], [0.0078125 * 255]])
    blocks = packed(kind, codes, scales).numpy()
    found = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[kind.upper()])
    assert np.array_equal(found, (codes * scales).numpy())


@pytest.mark.parametrize("scale", [2.0**-25, 65536.0, 3 * 2.0**-25])
def test_a_scale_that_float16_does_not_have_is_refused(scale: float) -> None:
    codes = torch.zeros(1, 32, dtype=torch.int16)
    with pytest.raises(UserError, match=r"which has no .* \(1 of 1 scales of a layer\). Take --type bf16 or f32"):
        packed("q4_0", codes, torch.tensor([[scale]]))


def test_a_weight_beyond_float16_is_refused(made: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = Checkpoint.tensor
    monkeypatch.setattr(Checkpoint, "tensor", lambda self, name: tensor(self, name).float() * 1e6)
    with pytest.raises(UserError, match=r"f16 ends at 65504, which a weight exceeds. Take --type bf16"):
        export(made(), "gguf", tmp_path / "a.gguf")
    assert not list(tmp_path.iterdir())


def test_hyperparameters_are_those_of_the_config(made: Make, tmp_path: Path) -> None:
    export(made("qwen3", head_dim=32), "gguf", tmp_path / "a.gguf")
    fields, tensors = read(tmp_path / "a.gguf")
    wanted = {
        "general.architecture": "qwen3",
        "general.description": "quarot rtn w4g32a16kv16",
        "general.quantized_by": "dfrot",
        "general.file_type": 2,
        "general.quantization_version": 2,
        "qwen3.vocab_size": VOCABULARY,
        "qwen3.context_length": 128,
        "qwen3.embedding_length": 64,
        "qwen3.block_count": 2,
        "qwen3.feed_forward_length": 96,
        "qwen3.attention.head_count": 4,
        "qwen3.attention.head_count_kv": 2,
        "qwen3.attention.key_length": 32,
        "qwen3.attention.value_length": 32,
        "qwen3.attention.layer_norm_rms_epsilon": pytest.approx(1e-6),
        "qwen3.rope.dimension_count": 32,
        "qwen3.rope.freq_base": 10000.0,
    }
    assert {name: fields.get(name) for name in wanted} == wanted
    assert "output.weight" in tensors  # rotated: its head is not its embedding


def test_a_tied_head_stays_tied(made: Make, tmp_path: Path) -> None:
    export(made("llama", method="none", fold_only=None), "gguf", tmp_path / "a.gguf")
    assert "output.weight" not in read(tmp_path / "a.gguf")[1]


def test_llama_3s_wavelengths_are_a_tensor_of_factors(made: Make, tmp_path: Path) -> None:
    export(made("llama", rope_parameters=LLAMA3_ROPE), "gguf", tmp_path / "a.gguf")
    fields, tensors = read(tmp_path / "a.gguf")
    assert "llama.rope.scaling.type" not in fields
    factors = []
    for channel in range(8):  # as Llama 3.1's model card has it
        wavelength = 2 * np.pi * 10000.0 ** (2 * channel / 16)
        smooth = np.clip((64 / wavelength - 1) / (4 - 1), 0, 1)
        factors.append(1 / (smooth + (1 - smooth) / 8))
    assert min(factors) == 1 and max(factors) == 8  # noqa: PT018
    assert np.allclose(tensors["rope_freqs.weight"].data, factors, rtol=1e-5)


def test_rope_scaling_is_carried_over_or_refused(made: Make, tmp_path: Path) -> None:
    export(made("qwen2", rope_parameters=LINEAR), "gguf", tmp_path / "linear.gguf")
    fields, _ = read(tmp_path / "linear.gguf")
    assert (fields["qwen2.rope.scaling.type"], fields["qwen2.rope.scaling.factor"]) == ("linear", 4.0)
    yarn = made("qwen2", rope_parameters={**LINEAR, "rope_type": "yarn", "original_max_position_embeddings": 32})
    with pytest.raises(UserError, match=r"scaled by 'yarn', which is not known as GGUF for qwen2. Known: default, lin"):
        export(yarn, "gguf", tmp_path / "yarn.gguf")


def test_another_activation_function_is_refused(made: Make, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"activation function silu, and this model has gelu"):
        export(made("llama", hidden_act="gelu"), "gguf", tmp_path / "a.gguf")


@pytest.mark.parametrize("name", PRE_TOKENIZERS)
def test_the_tokenizer_is_carried_over(made: Make, tmp_path: Path, name: str) -> None:
    tokenizer = with_tokenizer(made(), tmp_path / "ckpt", byte_tokenizer(name))
    export(tmp_path / "ckpt", "gguf", tmp_path / "a.gguf")
    fields, _ = read(tmp_path / "a.gguf")
    assert (fields["tokenizer.ggml.model"], fields["tokenizer.ggml.pre"]) == ("gpt2", name)
    tokens = fields["tokenizer.ggml.tokens"]
    assert tokens[:297] == tokenizer.convert_ids_to_tokens(list(range(297)))
    assert tokens[297:] == ["[PAD297]", "[PAD298]", "[PAD299]"]
    kinds = fields["tokenizer.ggml.token_type"]
    control, normal, user_defined, unused = 3, 1, 4, 5
    found = [kinds[index] for index in (0, 1, 295, 296, 297)]
    assert found == [control, normal, control, user_defined, unused]
    rules = json.loads((tmp_path / "ckpt" / "tokenizer.json").read_text())
    assert fields["tokenizer.ggml.merges"] == [" ".join(merge) for merge in rules["model"]["merges"]]
    assert (fields["tokenizer.ggml.bos_token_id"], fields["tokenizer.ggml.eos_token_id"]) == (0, 295)
    assert (fields["tokenizer.ggml.add_bos_token"], fields["tokenizer.ggml.add_eos_token"]) == (True, False)
    assert fields["tokenizer.chat_template"] == "{{ messages }}"


def with_tokenizer(checkpoint: Path, copy: Path, tokenizer: Tokenizer, **special: str) -> Any:
    """A checkpoint with another tokenizer, and what transformers reads from it."""
    copy.mkdir()
    for file in checkpoint.iterdir():
        if "token" not in file.name:
            (copy / file.name).symlink_to(file)
    save_tokenizer(tokenizer, copy, **special)
    return AutoTokenizer.from_pretrained(copy)


SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_sentencepieces_merges_become_scores(made: Make, tmp_path: Path) -> None:
    ours = with_tokenizer(made(), tmp_path / "ckpt", character_tokenizer(), **SPECIAL)
    export(tmp_path / "ckpt", "gguf", tmp_path / "a.gguf")
    fields, _ = read(tmp_path / "a.gguf")
    assert fields["tokenizer.ggml.model"] == "llama"
    assert fields["tokenizer.ggml.add_space_prefix"] is True
    assert fields["tokenizer.ggml.token_type"][:4] == [2, 3, 3, 6]  # unknown, control, control, byte
    scores = dict(zip(fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.scores"], strict=True))
    assert [scores[token] for token in ("qu", "▁f", "ic", "▁Th", "▁The", "T")] == [0, -1, -2, -4, -7, -9]
    theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file="a.gguf")
    for text in ("The quick brown fox", "quic The  Thé fo", "TheThe"):
        assert ours.convert_ids_to_tokens(ours(text).input_ids) == [
            token for token in theirs.convert_ids_to_tokens(theirs(text).input_ids) if token != "<s>"
        ]


def without_regex(tokenizer: Tokenizer) -> None:
    tokenizer.pre_tokenizer = split(r"\w+")


def merged(tokenizer: Tokenizer) -> None:
    tokenizer.pre_tokenizer = split(QWEN_2, "merged_with_next")


def prefixed(tokenizer: Tokenizer) -> None:
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)


def lowered(tokenizer: Tokenizer) -> None:
    tokenizer.normalizer = normalizers.Lowercase()


def taken_whole(tokenizer: Tokenizer) -> None:
    tokenizer.model.ignore_merges = True


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (without_regex, r"w\+"),
        (merged, "MergedWithNext"),
        (prefixed, '"add_prefix_space": true'),
        (lowered, "Lowercase"),
        (taken_whole, "ignore_merges true"),
    ],
)
def test_a_tokenizer_that_llama_cpp_does_not_have_is_refused(
    made: Make, tmp_path: Path, change: Callable[[Tokenizer], None], found: str
) -> None:
    tokenizer = byte_tokenizer()
    change(tokenizer)
    with_tokenizer(made(), tmp_path / "ckpt", tokenizer)
    with pytest.raises(
        UserError, match=rf"(?s)llama.cpp has no tokenizer like that of.*{found}.*Known here: gpt-2, sm"
    ):
        export(tmp_path / "ckpt", "gguf", tmp_path / "a.gguf")
    assert not (tmp_path / "a.gguf").exists()


def test_other_refusals_about_tokenizers(made: Make, tmp_path: Path) -> None:
    of_words = Tokenizer(models.WordLevel({"<|begin|>": 0, "<|end|>": 1}, unk_token="<|end|>"))
    of_words.pre_tokenizer = PLAIN
    with_tokenizer(made(), tmp_path / "words", of_words)
    with pytest.raises(UserError, match=r"a WordLevel with the pre-tokenizer"):
        export(tmp_path / "words", "gguf", tmp_path / "a.gguf")
    with_tokenizer(made(), tmp_path / "large", byte_tokenizer(size=VOCABULARY + 1))
    with pytest.raises(UserError, match=r"has a token 300, and an embedding of only 300 rows"):
        export(tmp_path / "large", "gguf", tmp_path / "a.gguf")
    spaced = character_tokenizer()
    spaced.normalizer = normalizers.NFKC()
    with_tokenizer(made(), tmp_path / "spaced", spaced, **SPECIAL)
    with pytest.raises(UserError, match=r"pre-tokenizer null, the normalizer {\"type\": \"NFKC\"}.*spaces become ▁"):
        export(tmp_path / "spaced", "gguf", tmp_path / "a.gguf")


def test_what_llama_cpp_computes_otherwise_is_said(made: Make, tmp_path: Path) -> None:
    said = export(made("mistral", "w4a8kv4"), "gguf", tmp_path / "a.gguf")
    assert len(said) == 3
    assert said[0].startswith("activations are in 8 bits here, and rounded to 8 bits by llama.cpp where it multiplies")
    assert said[1].startswith("keys are in 4 bits here, and not quantized by llama.cpp")
    assert said[2] == "attention is to the last 8 tokens here, and to all of them in llama.cpp."
    said = export(made("mistral", "w4a8kv4"), "gguf", tmp_path / "b.gguf", kind="f16")
    assert said[0].startswith("activations are in 8 bits here, and not quantized by llama.cpp")
    assert export(made("llama", "w16a16kv16"), "gguf", tmp_path / "c.gguf") == []


def test_online_rotations_are_refused(tiny: Callable[[str], Path], tmp_path: Path, text_file: Path) -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"method": "quarot"}, r"llama.cpp cannot. Quantize with --fold-only"),
        ({"method": "duquant", "block": 16}, r"llama.cpp cannot. Quantize with --method rangerot --fold-only"),
    ]
    for number, (words, message) in enumerate(cases):
        recipe = dfrot.Recipe.parse(weights="rtn", calib=str(text_file), calib_tokens=64, **words)
        checkpoint = dfrot.quantize(tiny("llama"), recipe, tmp_path / f"{number}").path
        with pytest.raises(UserError, match=message):
            export(checkpoint, "gguf", tmp_path / "a.gguf")


def test_a_file_that_is_there_is_left_alone_and_an_unfinished_one_is_removed(
    made: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.gguf").write_text("mine")
    with pytest.raises(UserError, match=r"a.gguf is there already, and is not touched"):
        export(made(), "gguf", tmp_path / "a.gguf")
    assert (tmp_path / "a.gguf").read_text() == "mine"
    with pytest.raises(SetupError, match="cannot write to"):
        export(made(), "gguf", tmp_path / "nowhere" / "a.gguf")

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", full)
    with pytest.raises(SetupError, match="No space left on device"):
        export(made(), "gguf", tmp_path / "b.gguf")
    assert [file.name for file in tmp_path.iterdir()] == ["a.gguf"]


def test_the_command_line_takes_the_type_for_gguf_only(
    made: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["export", str(made()), "-o", str(tmp_path / "a.gguf"), "--type", "bf16", "--to"]
    assert main([*words, "gguf"]) == 0
    assert read(tmp_path / "a.gguf")[1]["output.weight"].tensor_type.name == "BF16"
    assert main([*words, "huggingface"]) == 2
    assert "means nothing to huggingface" in " ".join(capsys.readouterr().err.split())


LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LONG_ROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0 + 0.1 * channel for channel in range(8)],
    "long_factor": [2.0] * 8,
    "original_max_position_embeddings": 512,
}


CASES: list[tuple[str, dict[str, Any]]] = [
    *((architecture, {}) for architecture in CONFIGS),
    ("llama", {"rope_parameters": LLAMA3_ROPE}),
    ("qwen2", {"rope_parameters": LINEAR}),
    ("phi3", {"rope_parameters": LONG_ROPE, "max_position_embeddings": 1024}),
    ("phi3", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}}),
]


@pytest.mark.skipif(importlib.util.find_spec("xllamacpp") is None, reason="no xllamacpp, which brings llama.cpp")
def test_llama_cpp_reads_and_computes_the_same(made: Make, tmp_path: Path) -> None:
    def run(file: Path, given: str, *words: str) -> Any:
        script = Path(__file__).parents[2] / "benchmarks" / "llama_cpp.py"
        files = [file, tmp_path / given, tmp_path / "found.npy"]
        subprocess.run([sys.executable, script, *files, *words], check=True)
        return np.load(tmp_path / "found.npy")

    np.save(tmp_path / "tokens.npy", TOKENS.numpy())
    for number, (architecture, changed) in enumerate(CASES):
        ours = dfrot.load(made(architecture, **changed))[0](TOKENS).logits.detach()
        for kind, tolerance in (("f32", 1e-3), ("q4_0", 5e-2)):  # the cache in float16; activations in 8 bits
            file = tmp_path / f"{number}-{kind}.gguf"
            export(made(architecture, **changed), "gguf", file, kind=kind)
            theirs = torch.from_numpy(run(file, "tokens.npy"))
            assert float((theirs - ours).norm() / ours.norm()) < tolerance, (architecture, changed, kind)

    (tmp_path / "text.txt").write_text(TEXT, newline="")
    kinds: dict[str, tuple[Tokenizer, dict[str, str]]] = {name: (byte_tokenizer(name), {}) for name in PRE_TOKENIZERS}
    for name, (tokenizer, special) in {**kinds, "llama": (character_tokenizer(), SPECIAL)}.items():
        loaded = with_tokenizer(made(), tmp_path / name, tokenizer, **special)
        export(tmp_path / name, "gguf", tmp_path / f"{name}.gguf")
        assert run(tmp_path / f"{name}.gguf", "text.txt", "--tokenize").tolist() == loaded(TEXT).input_ids, name
