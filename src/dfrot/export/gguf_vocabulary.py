"""A tokenizer as llama.cpp has it: tokens, their kinds, and how a text is cut before they are looked for.

llama.cpp does not read rules, it knows tokenizers by name, each with rules of its own. So the rules of the checkpoint's
are compared with those behind the names, and where they are behind none it is refused: a model that reads other tokens
than it was trained on is wrong without a word.

Two kinds are known: BPE over bytes (GPT-2's), and BPE over characters with ▁ for a space and tokens for single bytes
(SentencePiece's, Llama 2 and Mistral), which llama.cpp merges by scores in place of a list of merges.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dfrot.system.errors import UserError

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
        path: the checkpoint.
        tokenizer: its tokenizer, as transformers loads it; that may go by other rules than tokenizer.json.
        size: rows of the embedding; those without a token get a name.

    Raises:
        UserError: llama.cpp has no such tokenizer, or it has more tokens than the embedding.
    """
    from gguf import SpecialVocab

    if not tokenizer.is_fast:
        raise UserError(f"the tokenizer of {path} is not one of the library tokenizers, whose rules can be read.")
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    by_characters = rules["model"]["type"] == "BPE" and rules["model"]["byte_fallback"]
    if by_characters:
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_add_space_prefix(_space_prefix(rules, path))
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(_pre_tokenizer(rules, path))
    tokens = {**rules["model"]["vocab"], **{added["content"]: added["id"] for added in rules["added_tokens"]}}
    if max(tokens.values()) >= size:
        raise UserError(f"{path} has a token {max(tokens.values())}, and an embedding of only {size} rows.")
    names = {index: token for token, index in tokens.items()}
    writer.add_token_list([names.get(index, f"[PAD{index}]") for index in range(size)])
    writer.add_token_types(_token_types(rules, names, size))
    if by_characters:
        writer.add_token_scores(_scores(rules, names, size))
    else:
        writer.add_token_merges([" ".join(merge) for merge in rules["model"]["merges"]])
    special = SpecialVocab(path, n_vocab=size)
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
    cut, model, normalizer = rules["pre_tokenizer"], rules["model"], rules["normalizer"]
    match _steps(cut, "pretokenizers"):
        case [{"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}]:
            name, whole_words = "gpt-2", False
        case [
            {"type": "Digits", "individual_digits": True},
            {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True},
        ]:
            name, whole_words = "smollm", False
        case [
            {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False},
            {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
        ]:
            name, whole_words = _SPLITS.get(regex, ("", False))
        case _:
            name, whole_words = "", False
    # NFC is Qwen's; llama.cpp leaves it out, and so text that is not composed is cut otherwise there
    known = model["type"] == "BPE" and normalizer in (None, {"type": "NFC"})
    if not name or not known or model["ignore_merges"] != whole_words:
        raise UserError(
            f"llama.cpp has no tokenizer like that of {path}, a {model['type']} with the pre-tokenizer "
            f"{json.dumps(cut)}, the normalizer {json.dumps(normalizer)} and ignore_merges "
            f"{json.dumps(model.get('ignore_merges'))}. Known here: gpt-2, smollm, "
            f"{', '.join(known_name for known_name, _ in _SPLITS.values())} and SentencePiece's with byte_fallback. "
            "dfrot export --to huggingface keeps any tokenizer."
        )
    return name


def _space_prefix(rules: dict[str, Any], path: Path) -> bool:
    """Whether a text gets a ▁ in front.

    Raises:
        UserError: it is not SentencePiece's way with spaces.
    """
    normalizer, cut = rules["normalizer"], rules["pre_tokenizer"]
    match _steps(normalizer, "normalizers"), _steps(cut, "pretokenizers"):
        case [{"type": "Prepend", "prepend": "▁"}, {"pattern": {"String": " "}, "content": "▁"}], []:
            return True
        case [{"type": "Replace", "pattern": {"String": " "}, "content": "▁"}], []:
            return False
        case [], [{"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": False}]:
            return scheme != "never"
    raise UserError(
        f"llama.cpp has no tokenizer like that of {path}: its normalizer is {json.dumps(normalizer)} and its "
        f"pre-tokenizer {json.dumps(cut)}, where SentencePiece's only turn spaces into ▁. "
        "dfrot export --to huggingface keeps any tokenizer."
    )


def _steps(found: dict[str, Any] | None, several: str) -> list[dict[str, Any]]:
    """A normalizer or pre-tokenizer as the list that it may be."""
    if found is None:
        return []
    return found[several] if found["type"] == "Sequence" else [found]


def _scores(rules: dict[str, Any], names: dict[int, str], size: int) -> list[float]:
    """−rank of the first merge that makes a token: llama.cpp merges the pair whose result has the highest score."""
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(rules["model"]["merges"]):
        ranks.setdefault("".join(merge), rank)
    return [-float(ranks.get(names.get(index, ""), len(rules["model"]["merges"]))) for index in range(size)]


def _token_types(rules: dict[str, Any], names: dict[int, str], size: int) -> list[int]:
    from gguf import TokenType

    kinds = dict.fromkeys(names, TokenType.NORMAL)
    if rules["model"]["byte_fallback"]:
        octets = {f"<0x{octet:02X}>" for octet in range(256)}
        kinds |= {index: TokenType.BYTE for index, token in names.items() if token in octets}
    for added in rules["added_tokens"]:
        kinds[added["id"]] = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
    kinds |= {index: TokenType.UNKNOWN for index, token in names.items() if token == rules["model"]["unk_token"]}
    return [kinds.get(index, TokenType.UNUSED) for index in range(size)]
