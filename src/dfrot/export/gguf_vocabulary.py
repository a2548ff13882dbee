"""A tokenizer in GGUF's metadata: tokens, their types, and how a text is split.

llama.cpp has built-in tokenizers and selects one by name. The rules of the checkpoint's tokenizer are compared with
those behind the names, and refused if no name fits: a model that is fed other tokens than it was trained on gives wrong
answers without any error. The gguf package's own vocabularies check nothing, and order no merges.

Two kinds are known: BPE over bytes (GPT-2's), and BPE over characters with ▁ for a space and tokens for single bytes
(SentencePiece's: Llama 2, Mistral), which llama.cpp merges by scores instead of a list of merges.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dfrot.models.texts import load_tokenizer
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
SENTENCEPIECE = "default"  # its name for all tokenizers of that kind
_WHOLE_WORDS = {"llama-bpe"}  # those that take a word that is a token without merging it (`ignore_merges`)


def add_vocabulary(writer: "GGUFWriter", path: Path, size: int) -> None:
    """Put the tokenizer of a checkpoint, and names for the other rows of an embedding of `size`, into GGUF's metadata.

    Raises:
        UserError: llama.cpp has no such tokenizer, or it has more tokens than the embedding.
    """
    from gguf import SpecialVocab, TokenType

    tokenizer = load_tokenizer(path)  # transformers may change the rules of tokenizer.json
    if not tokenizer.is_fast:
        raise UserError(f"the tokenizer of {path} is not one of the library tokenizers, whose rules can be read.")
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    name, space_prefix = _identified(rules, path)
    vocabulary, merges, added = rules["model"]["vocab"], rules["model"]["merges"], rules["added_tokens"]
    tokens = vocabulary | {token["content"]: token["id"] for token in added}
    if max(tokens.values()) >= size:
        raise UserError(f"{path} has a token {max(tokens.values())}, and an embedding of only {size} rows.")
    rows = {index: f"[PAD{index}]" for index in range(size)} | {index: token for token, index in tokens.items()}
    types = dict.fromkeys(range(size), TokenType.UNUSED) | dict.fromkeys(tokens.values(), TokenType.NORMAL)
    writer.add_tokenizer_pre(name)
    if name == SENTENCEPIECE:
        writer.add_tokenizer_model("llama")
        writer.add_add_space_prefix(space_prefix)
        # llama.cpp merges the pair whose result has the highest score: −rank of the first merge that makes it
        ranks = {"".join(merge): rank for rank, merge in reversed(list(enumerate(merges)))}
        writer.add_token_scores([-float(ranks.get(token, len(merges))) for token in rows.values()])
        types |= {tokens[octet]: TokenType.BYTE for octet in map("<0x{:02X}>".format, range(256)) if octet in tokens}
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_token_merges([" ".join(merge) for merge in merges])
    types |= {token["id"]: TokenType.CONTROL if token["special"] else TokenType.USER_DEFINED for token in added}
    if (unknown := rules["model"]["unk_token"]) in tokens:
        types[tokens[unknown]] = TokenType.UNKNOWN
    writer.add_token_list(list(rows.values()))
    writer.add_token_types(list(types.values()))
    special = SpecialVocab(path, n_vocab=size)
    # SpecialVocab guesses this from the post-processor's template, which not every tokenizer has; so try it out
    around = tokenizer("").input_ids
    bos = around[:1] == [tokenizer.bos_token_id]
    special.add_special_token = {"bos": bos, "eos": around[bos:][-1:] == [tokenizer.eos_token_id]}
    special.add_to_gguf(writer, quiet=True)


def _identified(rules: dict[str, Any], path: Path) -> tuple[str, bool]:
    """llama.cpp's name for a tokenizer, and whether it puts a ▁ before a text; UserError if it knows none like it."""
    model, normalizer, pre_tokenizer = (rules[part] for part in ("model", "normalizer", "pre_tokenizer"))
    steps, byte_fallback = _steps(pre_tokenizer), model["byte_fallback"] if model["type"] == "BPE" else None
    match byte_fallback, _steps(normalizer), steps:
        case True, [{"prepend": "▁"}, {"pattern": {"String": " "}, "content": "▁"}], []:
            return SENTENCEPIECE, True
        case True, [{"pattern": {"String": " "}, "content": "▁"}], []:
            return SENTENCEPIECE, False
        case True, [], [{"replacement": "▁", "prepend_scheme": scheme, "split": False}]:
            return SENTENCEPIECE, scheme != "never"
        # NFC is Qwen's. llama.cpp leaves it out, so text that is not composed is split differently there
        case False, [] | [{"type": "NFC"}], _:
            for name, known in PRE_TOKENIZERS.items():
                if steps == known and model["ignore_merges"] == (name in _WHOLE_WORDS):
                    return name, False
    raise UserError(
        f"llama.cpp has no tokenizer like that of {path}, a {model['type']} with the pre-tokenizer "
        f"{json.dumps(pre_tokenizer)}, the normalizer {json.dumps(normalizer)} and ignore_merges "
        f"{json.dumps(model.get('ignore_merges'))}. Known here: {', '.join(PRE_TOKENIZERS)} and SentencePiece's with "
        "byte_fallback, where only spaces become ▁. dfrot export --to huggingface keeps any tokenizer."
    )


def _steps(part: dict[str, Any] | None) -> Steps:
    """The steps of a normalizer or pre-tokenizer, which may be none, one or a sequence."""
    steps = [] if part is None else next((part[key] for key in ("normalizers", "pretokenizers") if key in part), [part])
    # without `trim_offsets`, which moves tokens' offsets in the text and changes no token
    return [{key: value for key, value in step.items() if key != "trim_offsets"} for step in steps]
