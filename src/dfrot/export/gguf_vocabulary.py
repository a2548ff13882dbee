"""A tokenizer in GGUF's metadata: tokens, their types, and the name of llama.cpp's pre-tokenizer.

llama.cpp has tokenizers with built-in rules and selects them by name. The rules of the checkpoint's tokenizer are
compared with those behind the names, and refused if no name fits: a model that is fed other tokens than it was trained
on gives wrong answers without any error. The gguf package's vocabularies do not check this, and give every merge of
SentencePiece the same score; llama.cpp's converter knows only the exact tokenizers of released models.

Two kinds are known: BPE over bytes (GPT-2's), and BPE over characters with ▁ for a space and tokens for single bytes
(SentencePiece's: Llama 2, Mistral), which llama.cpp merges by scores instead of a list of merges.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dfrot.system.errors import UserError

if TYPE_CHECKING:
    from gguf import GGUFWriter

Steps = list[dict[str, Any]]
_BYTES: dict[str, Any] = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}


def _split(words: str, digits: str, line_ends: str) -> Steps:
    """Words, numbers, punctuation with the line ends after it, and white space; then bytes."""
    regex = rf"{words}|{digits}| ?[^\s\p{{L}}\p{{N}}]+{line_ends}|\s*[\r\n]+|\s+(?!\S)|\s+"
    split = {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}
    return [split, _BYTES | {"use_regex": False}]


_CONTRACTIONS, _BEFORE = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)", r"[^\r\n\p{L}\p{N}]?"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_WORDS = rf"{_CONTRACTIONS}|{_BEFORE}\p{{L}}+"
_CASED_WORDS = rf"{_BEFORE}{_UPPER}*{_LOWER}+{_CONTRACTIONS}?|{_BEFORE}{_UPPER}+{_LOWER}*{_CONTRACTIONS}?"
# llama.cpp's name → the pre-tokenizer's steps, as tokenizer.json writes them
PRE_TOKENIZERS: dict[str, Steps] = {
    "gpt-2": [_BYTES],
    "smollm": [{"type": "Digits", "individual_digits": True}, _BYTES],
    "llama-bpe": _split(_WORDS, r"\p{N}{1,3}", r"[\r\n]*"),
    "qwen2": _split(_WORDS, r"\p{N}", r"[\r\n]*"),
    "gpt-4o": _split(_CASED_WORDS, r"\p{N}{1,3}", r"[\r\n/]*"),
}
_WHOLE_WORDS = {"llama-bpe"}  # those that take a word that is a token without merging it (`ignore_merges`)


def add_vocabulary(writer: "GGUFWriter", path: Path, tokenizer: Any, size: int) -> None:
    """Put the tokenizer of a checkpoint into a GGUF file's metadata.

    Args:
        path: the checkpoint.
        tokenizer: its tokenizer as transformers loads it, which may change the rules of tokenizer.json.
        size: rows of the embedding; those without a token get a name.

    Raises:
        UserError: llama.cpp has no such tokenizer, or it has more tokens than the embedding.
    """
    from gguf import SpecialVocab, TokenType

    if not tokenizer.is_fast:
        raise UserError(f"the tokenizer of {path} is not one of the library tokenizers, whose rules can be read.")
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    model, added = rules["model"], rules["added_tokens"]
    by_characters = model["type"] == "BPE" and model["byte_fallback"]
    if by_characters:
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_add_space_prefix(_space_prefix(rules, path))
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(_pre_tokenizer(rules, path))
    tokens = model["vocab"] | {token["content"]: token["id"] for token in added}
    if max(tokens.values()) >= size:
        raise UserError(f"{path} has a token {max(tokens.values())}, and an embedding of only {size} rows.")
    names = {index: token for token, index in tokens.items()}
    types = dict.fromkeys(names, TokenType.NORMAL)
    if by_characters:
        # llama.cpp merges the pair whose result has the highest score: −rank of the first merge that makes it
        ranks = {"".join(merge): rank for rank, merge in reversed(list(enumerate(model["merges"])))}
        writer.add_token_scores(
            [-float(ranks.get(names.get(index, ""), len(model["merges"]))) for index in range(size)]
        )
        types |= {tokens[octet]: TokenType.BYTE for octet in map("<0x{:02X}>".format, range(256)) if octet in tokens}
    else:
        writer.add_token_merges([" ".join(merge) for merge in model["merges"]])
    types |= {token["id"]: TokenType.CONTROL if token["special"] else TokenType.USER_DEFINED for token in added}
    types |= {tokens[token]: TokenType.UNKNOWN for token in [model["unk_token"]] if token in tokens}
    writer.add_token_list([names.get(index, f"[PAD{index}]") for index in range(size)])
    writer.add_token_types([types.get(index, TokenType.UNUSED) for index in range(size)])
    special = SpecialVocab(path, n_vocab=size)
    # SpecialVocab guesses this from the post-processor's template, which not every tokenizer has; so try it out
    around = tokenizer("").input_ids
    bos = around[:1] == [tokenizer.bos_token_id]
    special.add_special_token = {"bos": bos, "eos": around[bos:][-1:] == [tokenizer.eos_token_id]}
    special.add_to_gguf(writer, quiet=True)


def _pre_tokenizer(rules: dict[str, Any], path: Path) -> str:
    """llama.cpp's name for how a text is split into words before bytes are merged; UserError if it has none."""
    model, normalizer = rules["model"], rules["normalizer"]
    # `trim_offsets` changes which characters a token is said to come from, not the tokens
    steps = [
        {key: value for key, value in step.items() if key != "trim_offsets"}
        for step in _steps(rules["pre_tokenizer"], "pretokenizers")
    ]
    # NFC is Qwen's. llama.cpp leaves it out, so text that is not composed is split differently there
    if model["type"] == "BPE" and normalizer in (None, {"type": "NFC"}):
        for name, known in PRE_TOKENIZERS.items():
            if steps == known and model["ignore_merges"] == (name in _WHOLE_WORDS):
                return name
    raise UserError(
        f"llama.cpp has no tokenizer like that of {path}, a {model['type']} with the pre-tokenizer "
        f"{json.dumps(rules['pre_tokenizer'])}, the normalizer {json.dumps(normalizer)} and ignore_merges "
        f"{json.dumps(model.get('ignore_merges'))}. Known here: {', '.join(PRE_TOKENIZERS)} and SentencePiece's with "
        "byte_fallback. dfrot export --to huggingface keeps any tokenizer."
    )


def _space_prefix(rules: dict[str, Any], path: Path) -> bool:
    """Whether SentencePiece puts a ▁ before a text; UserError if it does more than turn spaces into ▁."""
    normalizer, pre_tokenizer = rules["normalizer"], rules["pre_tokenizer"]
    match _steps(normalizer, "normalizers"), _steps(pre_tokenizer, "pretokenizers"):
        case [{"type": "Prepend", "prepend": "▁"}, {"pattern": {"String": " "}, "content": "▁"}], []:
            return True
        case [{"type": "Replace", "pattern": {"String": " "}, "content": "▁"}], []:
            return False
        case [], [{"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": False}]:
            return scheme != "never"
    raise UserError(
        f"llama.cpp has no tokenizer like that of {path}: its normalizer is {json.dumps(normalizer)} and its "
        f"pre-tokenizer {json.dumps(pre_tokenizer)}, where SentencePiece's only turn spaces into ▁. "
        "dfrot export --to huggingface keeps any tokenizer."
    )


def _steps(found: dict[str, Any] | None, several: str) -> Steps:
    """The steps of a normalizer or pre-tokenizer, which may be a single one or a sequence."""
    if found is None:
        return []
    return found[several] if found["type"] == "Sequence" else [found]
