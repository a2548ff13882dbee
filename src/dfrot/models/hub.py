"""Models on the Hugging Face Hub: small files and headers first, weights when they are read."""

import contextlib
import errno
import functools
import re
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    HTTPError,
    RepositoryNotFoundError,
    SafetensorsParsingError,
)

from dfrot.models.files import INDEX_FILE, SINGLE_FILE, StoredTensor, dtype_named, weight_map
from dfrot.models.multimodal import LanguageModel, read_language_model
from dfrot.models.pending import Pending
from dfrot.system.errors import SetupError, UserError

_SMALL = ["*.json", "*.model", "*.txt", "*.jinja"]  # no pickles, no code
_AT_ONCE = 16  # requests of headers
_PLAIN = re.compile(r"[^/\\*?\[\x00]+\.safetensors")


@functools.cache
def hub_model(name: str) -> "HubModel":
    """The model with a hub id. Its files are those of one commit, for as long as this process lives.

    Raises:
        UserError: there is none, or its licence has not been accepted.
        SetupError: the hub cannot be reached, and the local cache has nothing of it.
    """
    return HubModel(name)


class HubModel(Pending):
    """A model on the Hub, in the local cache once it has been fetched."""

    comes = "downloaded"

    def __init__(self, name: str) -> None:
        self.name = name
        with _explained(name):
            self.folder = self.path = Path(huggingface_hub.snapshot_download(name, allow_patterns=_SMALL))
        if not (self.folder / "config.json").is_file():
            raise UserError(
                f"'{name}' has no config.json on the hub. If it holds .gguf files, download one and give its path."
            )

    @functools.cached_property
    def _shards(self) -> list[str]:
        """Of the weights the files that are read; some repositories have others, too."""
        found = weight_map(self.folder)
        whole = found is None or (self.folder / SINGLE_FILE).is_file()  # which comes first where weights are read
        shards = [SINGLE_FILE] if whole else sorted(set((found or {}).values()))
        if odd := [shard for shard in shards if not _PLAIN.fullmatch(shard)]:  # the library takes patterns
            raise UserError(f"{INDEX_FILE} of '{self.name}' names the shard '{odd[0]}', which no safetensors file has.")
        return shards

    @property
    def is_there(self) -> bool:
        if all((self.folder / shard).is_file() for shard in self._shards):
            return True
        if self.to_come:
            return False
        self.fetch()  # downloads nothing: another commit has the same files
        return True

    @functools.cached_property
    def to_come(self) -> int:
        with _explained(self.name):
            files = huggingface_hub.snapshot_download(**self._weights, dry_run=True)
        return sum(file.file_size or 1 for file in files if file.will_download)

    @property
    def _weights(self) -> dict[str, Any]:
        return {"repo_id": self.name, "revision": self.folder.name, "allow_patterns": self._shards}

    @functools.cached_property
    def described(self) -> LanguageModel:
        """From config and headers, which the Hub gives without the weights."""
        return read_language_model(self.folder, self._stored)

    def _stored(self) -> dict[str, StoredTensor]:
        with _explained(self.name), ThreadPoolExecutor(_AT_ONCE) as pool:
            headers = [*pool.map(self._header, self._shards)]
        return {name: tensor for header in headers for name, tensor in header.items()}

    def _header(self, shard: str) -> dict[str, StoredTensor]:
        file, commit = self.folder / shard, self.folder.name
        found = huggingface_hub.HfApi().parse_safetensors_file_metadata(self.name, shard, revision=commit).tensors
        return {
            name: StoredTensor(file, name, torch.Size(each.shape), dtype_named(each.dtype, name, file))
            for name, each in found.items()
        }

    def require_disk(self) -> None:
        if self.to_come > (free := shutil.disk_usage(self.folder).free):
            raise SetupError(
                f"'{self.name}' takes {self.to_come / 1e9:.2f} GB more; the disk of the Hub's cache, {self.folder}, "
                f"has {free / 1e9:.2f} GB. Make room, or set HF_HOME to a folder on another disk."
            )

    def fetch(self) -> None:
        with _explained(self.name):
            huggingface_hub.snapshot_download(**self._weights)


@contextlib.contextmanager
def _explained(name: str) -> Iterator[None]:
    """Say what is wrong when the hub does not give a model; nothing that was sent to it is repeated."""
    try:
        yield
    except GatedRepoError as error:
        raise UserError(f"'{name}' is gated: accept its licence on the hub, then `hf auth login`.") from error
    except RepositoryNotFoundError as error:
        raise UserError(f"the hub has no model '{name}', and there is no such directory.") from error
    except HFValidationError as error:
        raise UserError(f"'{name}' is no directory, and no name that a model on the hub can have.") from error
    except SafetensorsParsingError as error:
        raise UserError(f"'{name}' has a file on the hub that is not a complete safetensors file: {error}") from error
    except (OSError, HTTPError) as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise SetupError(f"the disk is full of what was downloaded of '{name}': {error.strerror}.") from error
        status = getattr(getattr(error, "response", None), "status_code", None)
        why = "cannot be reached" if status is None else f"answers with status {status}"
        raise SetupError(
            f"'{name}' is neither a local directory nor in the local cache, and the hub {why}. "
            "Give a local directory, a .gguf file or smollm2-135m."
        ) from error
