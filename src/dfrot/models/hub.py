"""Models on the Hugging Face Hub: small files and headers first, weights when they are read."""

import contextlib
import functools
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import huggingface_hub
import torch
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)

from dfrot.models.files import SINGLE_FILE, StoredTensor, dtype_named, weight_map
from dfrot.models.multimodal import LanguageModel, read_language_model
from dfrot.models.pending import Pending
from dfrot.system.errors import SetupError, UserError

_SMALL = ["*.json", "*.model", "*.txt", "*.jinja"]  # no pickles, no code
_AT_ONCE = 16  # requests of headers


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

    @functools.cached_property
    def _shards(self) -> list[str]:
        found = weight_map(self.folder)
        return [SINGLE_FILE] if found is None else sorted(set(found.values()))

    @property
    def is_there(self) -> bool:
        return all((self.folder / shard).is_file() for shard in self._shards)

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
        nbytes, free = self.described.nbytes, shutil.disk_usage(self.folder).free
        if nbytes > free:
            raise SetupError(
                f"'{self.name}' takes {nbytes / 1e9:.2f} GB; the disk of the Hub's cache, {self.folder}, has "
                f"{free / 1e9:.2f} GB. Make room, or set HF_HOME to a folder on another disk."
            )

    def fetch(self) -> None:
        with _explained(self.name):  # of the weights, those that the index names: some repositories have others, too
            patterns = [*_SMALL, *self._shards]
            huggingface_hub.snapshot_download(self.name, revision=self.folder.name, allow_patterns=patterns)


@contextlib.contextmanager
def _explained(name: str) -> Iterator[None]:
    """Say what is wrong when the hub does not give a model; nothing that was sent to it is repeated."""
    unreachable = SetupError(
        f"'{name}' is neither a local directory nor in the local cache, and the hub cannot be reached. "
        "Give a local directory, a .gguf file or smollm2-135m."
    )
    try:
        yield
    except UserError:
        raise
    except LocalEntryNotFoundError as error:  # which is an EntryNotFoundError, too
        raise unreachable from error
    except GatedRepoError as error:
        raise UserError(f"'{name}' is gated: accept its licence on the hub, then `hf auth login`.") from error
    except RepositoryNotFoundError as error:
        raise UserError(f"the hub has no model '{name}', and there is no such directory.") from error
    except EntryNotFoundError as error:
        raise UserError(f"'{name}' has no safetensors weights on the hub ({SINGLE_FILE} or an index).") from error
    except Exception as error:  # of the libraries below, each with errors of its own
        raise unreachable from error
