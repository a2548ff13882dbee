"""A tokenizer as llama.cpp has it: tokens, their kinds, and how a text is cut before they are looked for.

llama.cpp does not read rules, it knows tokenizers by name, each with rules of its own. So the rules of tokenizer.json
are compared with those behind the names, and one that is behind none is refused: a model that reads other tokens than
it was trained on is wrong without a word.

Two kinds are known: BPE over bytes (GPT-2's), and BPE over characters with ▁ for a space and tokens for single bytes
(SentencePiece's, Llama 2 and Mistral), which llama.cpp merges by scores in place of a list of merges.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dfrot.errors import UserError
from dfrot.json_file import read_json

if TYPE_CHECKING:
    from gguf import GGUFWriter

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_CASED = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    rf"{_CONTRACTIONS}?|[^\r\n\p{{L}}\p{{N}}]?[\p{{Lu}}\p{{Lt}}\p{{Lm}}\p{{Lo}}\p{{M}}]+"
    rf"[\p{{Ll}}\p{{Lm}}\p{{Lo}}\p{{M}}]*{_CONTRACTIONS}?"
)
_WORDS = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+"
_REST = r"\s*[\r\n]+|\s+(?!\S)|\s+"
# Regular expression of the split → llama.cpp's name, and whether a word that is a token is taken without merging.
_SPLITS = {
    rf"{_WORDS}|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_REST}": ("llama-bpe", True),
    rf"{_WORDS}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_REST}": ("qwen2", False),
    rf"{_CASED}|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_REST}": ("gpt-4o", False),
}


def add_vocabulary(writer: "GGUFWriter", path: Path, tokenizer: Any, size: int) -> None:
    """Put the tokenizer of a checkpoint into a GGUF file's metadata.

    Args:
        path: the checkpoint, with tokenizer.json.
        tokenizer: the same, as transformers' tokenizer.
        size: rows of the embedding; those without a token get a name.

    Raises:
        UserError: llama.cpp has no such tokenizer, or it has more tokens than the embedding.
    """
    from gguf import SpecialVocab

    if not (path / "tokenizer.json").is_file():
        raise UserError(f"{path} has no tokenizer.json, from which the vocabulary of a GGUF file is made.")
    rules = read_json(path / "tokenizer.json")
    by_characters = rules["model"].get("type") == "BPE" and bool(rules["model"].get("byte_fallback"))
    if by_characters:
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_add_space_prefix(_space_prefix(rules, path))
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(_pre_tokenizer(rules, path))
    tokens = {**rules["model"]["vocab"], **{added["content"]: added["id"] for added in rules.get("added_tokens", [])}}
    if max(tokens.values()) >= size:
        raise UserError(f"{path} has a token {max(tokens.values())}, and an embedding of only {size} rows.")
    names = {index: token for token, index in tokens.items()}
    writer.add_token_list([names.get(index, f"[PAD{index}]") for index in range(size)])
    writer.add_token_types(_token_types(rules, names, size))
    if by_characters:
        writer.add_token_scores(_scores(rules, names, size))
    special = SpecialVocab(path, load_merges=not by_characters, n_vocab=size)
    # SpecialVocab reads this off the post-processor's template, which need not be there; the tokenizer knows
    around = tokenizer("").input_ids
    bos = around[:1] == [tokenizer.bos_token_id]
    special.add_special_token = {"bos": bos, "eos": around[bos:][-1:] == [tokenizer.eos_token_id]}
    special.add_to_gguf(writer, quiet=True)


def _pre_tokenizer(rules: dict[str, Any], path: Path) -> str:
    """llama.cpp's name for how a text is cut into words before bytes are merged.

    Raises:
        UserError: it has none.
    """
    found, model, normalizer = rules.get("pre_tokenizer"), rules["model"], rules.get("normalizer") or {}
    steps = _steps(found, "pretokenizers")
    kinds = [step.get("type") for step in steps]
    name, whole_words = "", False
    if kinds == ["ByteLevel"] and _is_plain(steps[0], use_regex=True):
        name = "gpt-2"
    elif kinds == ["Digits", "ByteLevel"] and _is_plain(steps[1], use_regex=True) and steps[0].get("individual_digits"):
        name = "smollm"
    elif kinds == ["Split", "ByteLevel"] and _is_plain(steps[1], use_regex=False):
        isolated = steps[0].get("behavior") == "Isolated" and not steps[0].get("invert")
        name, whole_words = (
            _SPLITS.get(steps[0].get("pattern", {}).get("Regex", ""), ("", False)) if isolated else ("", False)
        )
    # NFC is Qwen's; llama.cpp leaves it out, and so text that is not composed is cut otherwise there
    known = model.get("type") == "BPE" and normalizer.get("type") in (None, "NFC")
    if not name or not known or bool(model.get("ignore_merges")) != whole_words:
        raise UserError(
            f"llama.cpp has no tokenizer like that of {path}, a {model.get('type')} with the pre-tokenizer "
            f"{json.dumps(found)}, the normalizer {json.dumps(rules.get('normalizer'))} and ignore_merges "
            f"{json.dumps(bool(model.get('ignore_merges')))}. Known here: gpt-2, smollm, "
            f"{', '.join(known_name for known_name, _ in _SPLITS.values())} and SentencePiece's with byte_fallback. "
            "dfrot export --to huggingface keeps any tokenizer."
        )
    return name


def _is_plain(byte_level: dict[str, Any], *, use_regex: bool) -> bool:
    return not byte_level.get("add_prefix_space") and byte_level.get("use_regex", True) == use_regex


def _steps(found: dict[str, Any] | None, several: str) -> list[dict[str, Any]]:
    """A normalizer or pre-tokenizer as the list that it may be."""
    if found is None:
        return []
    return found[several] if found.get("type") == "Sequence" else [found]


def _space_prefix(rules: dict[str, Any], path: Path) -> bool:
    """Whether a text gets a ▁ in front.

    Raises:
        UserError: it is not SentencePiece's way with spaces.
    """
    normalizers = _steps(rules.get("normalizer"), "normalizers")
    cuts = _steps(rules.get("pre_tokenizer"), "pretokenizers")
    prepend, replace = {"type": "Prepend", "prepend": "▁"}, {"type": "Replace", "pattern": {"String": " "}}
    replaced = [dict(step) for step in normalizers]
    if (
        replaced
        and replaced[-1].pop("content", None) == "▁"
        and not cuts
        and replaced in ([prepend, replace], [replace])
    ):
        return len(replaced) == 2
    if not normalizers and len(cuts) == 1 and cuts[0].get("type") == "Metaspace" and not cuts[0].get("split", True):
        return cuts[0].get("prepend_scheme", "always") != "never"
    raise UserError(
        f"llama.cpp has no tokenizer like that of {path}: its normalizer is {json.dumps(rules.get('normalizer'))} and "
        f"its pre-tokenizer {json.dumps(rules.get('pre_tokenizer'))}, where SentencePiece's only turn spaces into ▁. "
        "dfrot export --to huggingface keeps any tokenizer."
    )


def _scores(rules: dict[str, Any], names: dict[int, str], size: int) -> list[float]:
    """−rank of the first merge that makes a token: llama.cpp merges the pair whose result has the highest score."""
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(rules["model"]["merges"]):
        ranks.setdefault("".join(merge if isinstance(merge, list) else merge.split(" ")), rank)
    return [-float(ranks.get(names.get(index, ""), size)) for index in range(size)]


def _token_types(rules: dict[str, Any], names: dict[int, str], size: int) -> list[int]:
    from gguf import TokenType

    kinds = dict.fromkeys(names, TokenType.NORMAL)
    if rules["model"].get("byte_fallback"):
        for index, token in names.items():
            if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
                kinds[index] = TokenType.BYTE
    for added in rules.get("added_tokens", []):
        kinds[added["id"]] = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
        if added["content"] == rules["model"].get("unk_token"):
            kinds[added["id"]] = TokenType.UNKNOWN
    return [kinds.get(index, TokenType.UNUSED) for index in range(size)]
