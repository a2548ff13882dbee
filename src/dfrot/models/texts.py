"""Texts by name, tokenizers, and tokens.

A text is `wikitext2`, `c4`, `pydoc` or a path. A text file is one stream; the rows of `wiki.*.raw` are joined with two
newlines, as in the quantization papers; `.jsonl`, a list in a `.json`, and both as `.gz` give their field `text`.
"""

import contextlib
import gzip
import shutil
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import huggingface_hub
import torch
from huggingface_hub import constants
from jaxtyping import Int
from torch import Tensor
from transformers import AutoTokenizer

from dfrot.system.errors import SetupError, UserError
from dfrot.system.files import parse_json, read_json, translate_io_errors

Split = Literal["train", "test"]
_FEW_TOKENS = 32  # without files transformers makes some tokenizers of special tokens alone
NAMED = ("wikitext2", "c4", "pydoc")


def read_text(name: str, split: Split = "test") -> str:
    """The text called `name`.

    Args:
        split: of wikitext2 and c4: train for calibration, test for evaluation (in c4 the validation part). Of pydoc,
            train is the first three quarters and test the rest.

    Raises:
        UserError: there is no such text, or it is empty or not text.
        SetupError: the hub cannot be reached.
    """
    text = _read(name, split)
    if not text.strip():
        raise UserError(f"the text '{name}' is empty.")
    return text


def _read(name: str, split: Split) -> str:
    if name == "pydoc":
        from pydoc_data.topics import topics  # the help that comes with CPython: English prose about Python

        text = "\n\n".join(topics[key] for key in sorted(topics))
        cut = text.rindex("\n\n", 0, len(text) * 3 // 4)
        return text[:cut] if split == "train" else text[cut:]
    if name == "wikitext2":
        return "\n\n".join(_hub_rows("Salesforce/wikitext", "wikitext-2-raw-v1", split))
    if name == "c4":
        part = {"train": "en/c4-train.00000-of-01024.json.gz", "test": "en/c4-validation.00000-of-00008.json.gz"}
        return " ".join(_hub_rows("allenai/c4", None, "train", data_files=part[split]))
    path = Path(name).expanduser()
    if not path.is_file():
        raise UserError(f"there is no text '{name}'. TEXT is {', '.join(NAMED)}, or the path of a text file.")
    try:  # utf-8-sig takes away the mark that some editors put first
        if path.name.endswith((".json", ".jsonl", ".json.gz", ".jsonl.gz")):
            return "\n\n".join(_json_rows(path))
        if path.name.startswith("wiki.") and path.suffix == ".raw":
            with path.open(encoding="utf-8-sig", newline="\n") as lines:  # one data set row per line, "\n" included
                return "\n\n".join(line if line.strip() else "" for line in lines)
        return path.read_text(encoding="utf-8-sig")
    except (UnicodeDecodeError, OSError, zlib.error, EOFError) as error:
        raise UserError(f"{path} is not a text file in UTF-8: {error}") from error


def _json_rows(path: Path) -> Iterable[str]:
    """The field `text` of every object: one a line, whatever the file's name, or all in one list."""
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt", encoding="utf-8-sig") as file:
        listed, where = file.read(1) == "[", "the list as a whole"
        file.seek(0)
        try:
            for number, entry in enumerate(parse_json(file.read()) if listed else file, start=1):
                where = f"{'item' if listed else 'line'} {number}"
                if listed or entry.strip():
                    row = (entry if listed else parse_json(entry))["text"]
                    row.encode()  # only a string has it, and it refuses half a character, which JSON can spell
                    yield row
        except UnicodeDecodeError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path}, {where}: expected a JSON object with the field 'text'.") from error


@contextlib.contextmanager
def _offline_if_unreachable(repository: str) -> Iterator[None]:
    """Without a network, datasets finds at once what it has downloaded before, and does not retry for half a minute."""
    before = constants.HF_HUB_OFFLINE
    try:
        huggingface_hub.dataset_info(repository, timeout=10)
    except Exception:  # of whatever kind: the data set is not to be had from the hub
        constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def _hub_rows(repository: str, config: str | None, split: str, **options: Any) -> list[str]:
    try:
        from datasets import load_dataset

        with _offline_if_unreachable(repository):
            return list(load_dataset(repository, config, split=split, **options)["text"])
    except ImportError as error:
        raise SetupError(
            f"reading {repository} needs the package datasets: pip install 'dfrot[eval]'. "
            "Without it give 'pydoc' or the path of a text file."
        ) from error
    except Exception as error:  # datasets has many backends with errors of their own
        raise SetupError(
            f"{repository} cannot be downloaded from the hub ({type(error).__name__}). Give 'pydoc', which needs no "
            "network, or the path of a text file."
        ) from error


def load_tokenizer(path: Path) -> Any:
    """The tokenizer of a model directory. Raises UserError if there is none, or it cannot be read."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # transformers and tokenizers raise errors of many kinds for broken files
        raise UserError(f"{path} has no tokenizer that transformers can load: {error}") from error
    names = {"tokenizer.json", *tokenizer.vocab_files_names.values()}
    if len(tokenizer) < _FEW_TOKENS and path.is_dir() and not any((path / name).is_file() for name in names):
        raise UserError(f"{path} has no tokenizer that transformers can load: none of {', '.join(sorted(names))}.")
    return tokenizer


def copy_tokenizer(path: Path, to: Path) -> None:
    """Copy tokenizer and settings; UserError if names in them lead elsewhere, SetupError if `to` cannot be written."""
    tokenizer = load_tokenizer(path)
    if not tokenizer.chat_template and (older := path / "chat_template.json").is_file():  # as processors had it
        tokenizer.chat_template = read_json(older).get("chat_template")
    with translate_io_errors(to):
        try:
            tokenizer.save_pretrained(to)
        except ValueError as error:
            raise UserError(f"the tokenizer of {path} cannot be kept: {error}") from error
        if (settings := path / "generation_config.json").is_file():
            shutil.copyfile(settings, to / settings.name)


def token_ids(tokenizer: Any, text: str, rows: int) -> Int[Tensor, " tokens"]:
    """The tokens of a text, for a model whose embedding has so many rows. Raises UserError as `check_tokens` does."""
    ids = torch.tensor(tokenizer(text, verbose=False).input_ids, dtype=torch.long)
    check_tokens(ids, rows)
    return ids


def check_tokens(ids: Int[Tensor, "..."], rows: int) -> None:
    """Raise UserError for a token that an embedding of so many rows has none for."""
    if (outside := ids[(ids < 0) | (ids >= rows)]).numel():
        raise UserError(
            f"the model's embedding has {rows} rows, none for token {int(outside[0])}. Take the model's own tokenizer; "
            "if tokens were added to it, resize_token_embeddings of the unquantized model comes first."
        )


def calibration_windows(
    tokenizer: Any, text: str, name: str, rows: int, seq_len: int, tokens: int, generator: torch.Generator
) -> Int[Tensor, "blocks seq_len"]:
    """⌊tokens / seq_len⌋ windows at random places of the text, as the papers draw their calibration samples.

    Raises:
        UserError: the text is shorter than one window, or the embedding, of so many rows, has none for a token.
    """
    ids = token_ids(tokenizer, text, rows)
    if len(ids) < seq_len:
        raise UserError(f"the calibration text '{name}' has {len(ids)} tokens, fewer than one sample of {seq_len}.")
    starts = torch.randint(len(ids) - seq_len + 1, (tokens // seq_len,), generator=generator)
    return torch.stack([ids[start : start + seq_len] for start in starts.tolist()])
