"""A model on disk: finding, checking and reading it, one part at a time.

Opening a source reads no weight. Its blocks are built from the safetensors files on request and freed by the caller, so
that memory is bounded by one decoder block, whatever the size of the model.
"""

import copy
import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from dfrot.models.configs import building, check_blocks, check_config, check_extent, check_tensors
from dfrot.models.experts import use_experts_
from dfrot.models.files import StoredTensor, of_module
from dfrot.models.graph import Config, ModelGraph, graph_for
from dfrot.models.hub import hub_model
from dfrot.models.multimodal import LanguageModel, read_language_model
from dfrot.models.norms import norm_eps, use_torch_norms_
from dfrot.models.pending import FORMATS, Pending
from dfrot.system.errors import UserError

M = TypeVar("M", bound=nn.Module)


def pending(model: str) -> Pending | None:
    """What MODEL is, if it is no directory: a file of another format, an alias of one, or a hub id.

    Raises:
        UserError: there is no such model.
        SetupError: the hub cannot be reached.
    """
    if (found := next((made for read in FORMATS if (made := read(model)) is not None), None)) is not None:
        return found
    path = Path(model).expanduser()
    if path.is_dir():
        return None
    if path.is_file():
        raise UserError(f"a model file ends in .gguf, got {path}. Give a .gguf file or a directory.")
    if model.count("/") != 1 or model.startswith((".", "/", "~")):  # not the form of a hub id
        raise UserError(
            f"there is no model at '{model}'. MODEL is a directory with safetensors weights, a .gguf file, "
            "a hub id such as 'meta-llama/Llama-2-7b-hf', or smollm2-135m."
        )
    return hub_model(model)


def locate(model: str) -> Path:
    """The directory with the safetensors weights behind MODEL: a directory, a .gguf file, an alias or a hub id.

    Raises:
        UserError: there is no such model, or a GGUF file holds none that is known.
        SetupError: the hub cannot be reached; a GGUF file cannot be unpacked.
    """
    found = pending(model)
    if found is None:
        return Path(model).expanduser()
    if not found.is_there:
        found.fetch()
    return found.folder


@dataclass(frozen=True)
class Source:
    """A causal language model on disk.

    All its norms are RMSNorms as it is read. Where the model's own subtract the mean over channels (LayerNorm), nothing
    that is added to the stream has one: embeddings, the columns of writers' weights and writers' biases are less their
    means (SliceGPT, arXiv 2401.15024, section 3.2). A norm's bias b is part of that of each layer that reads it, as
    W b. Both are computed in float64.
    """

    path: Path  # of the directory
    config: Config
    graph: ModelGraph
    stored: dict[str, StoredTensor]
    skeleton: nn.Module  # the transformers model on the meta device, with SDPA attention and torch.nn.RMSNorm norms
    # Granite's and Cohere's factors, of what embedding and head put out. In the matrices as they are read here they are
    # in already, and in `config` they are 1.
    embedding_factor: float = 1.0
    head_factor: float = 1.0
    pending: int = 0  # bytes that are still to come into `path`
    comes: str = ""  # how they come, as a participle
    part_of: str = ""  # `model_type` of the multimodal model that it is the language model of
    rest: tuple[StoredTensor, ...] = ()  # the other tensors of that

    @property
    def num_blocks(self) -> int:
        return self.config.num_hidden_layers

    @property
    def tied(self) -> bool:
        """Whether the head is the embedding."""
        alike = self.embedding_factor == self.head_factor and not self.graph.centred
        return bool(self.config.tie_word_embeddings) and alike

    @property
    def dtype(self) -> torch.dtype:
        """The stored dtype of the weights: the embedding's, since norms may be wider."""
        return self.stored[f"{self.graph.embedding}.weight"].dtype

    def tensor(self, name: str) -> Tensor:
        """One weight, read from disk. Raises UserError if it holds NaN or infinities."""
        tensor = self.stored[name].read()
        # by pieces: isfinite allocates twice its input, and an embedding may be a gigabyte
        if not all(torch.isfinite(rows).all() for rows in tensor.split(8192)):
            path = self.stored[name].file
            raise UserError(f"the weight '{name}' in {path} holds NaN or infinite values; no quantizer can mend that.")
        return tensor

    def block(self, index: int) -> nn.Module:
        """Decoder block `index` with its weights, in their stored dtype, or a wider one where they are changed."""
        block, prefix = self.empty_block(index), f"{self.graph.blocks}.{index}."
        tensors = {name: self.tensor(prefix + name) for name in block.state_dict() if prefix + name in self.stored}
        for name, module in block.named_modules():
            if isinstance(module, nn.RMSNorm):
                tensors[f"{name}.weight"] = self._gain(tensors[f"{name}.weight"])
        for writer in self.graph.writers if self.graph.centred else ():
            for name in {f"{writer}.weight", f"{writer}.bias"} & tensors.keys():
                tensors[name] = _wide(tensors[name], lambda each: each - each.mean(0))
        for name, readers in self.graph.norms.items():
            for reader in readers if f"{prefix}{name}.bias" in self.stored else ():
                weight = tensors[f"{reader}.weight"]
                more = weight.double() @ self.tensor(f"{prefix}{name}.bias").double()
                own = tensors.get(f"{reader}.bias", torch.zeros_like(weight[:, 0]))
                tensors[f"{reader}.bias"] = _wide(own, more.add)
        return loaded(block, tensors)

    def empty_block(self, index: int) -> nn.Module:
        """Decoder block `index` on the meta device."""
        return copy.deepcopy(self.skeleton.get_submodule(f"{self.graph.blocks}.{index}"))

    @property
    def without_bias(self) -> tuple[str, ...]:
        """The linear layers of a block that have no bias."""
        block = self.empty_block(0)
        return tuple(name for name in self.graph.linears if block.get_submodule(name).bias is None)

    def embedding(self) -> Tensor:
        """The embedding matrix, (vocabulary, hidden)."""
        matrix = _times(self.tensor(f"{self.graph.embedding}.weight"), self.embedding_factor)
        return self._centred(matrix)

    def _centred(self, rows: Tensor) -> Tensor:
        """Rows that are added to the stream, without means if the model's norms subtract them."""
        return _wide(rows, lambda each: each - each.mean(1, keepdim=True)) if self.graph.centred else rows

    def embeddings(self) -> dict[str, Tensor]:
        """The embedding matrix, and that of positions where these are learned, (…, hidden), by their names in files."""
        names = [f"{name}.weight" for name in (self.graph.embedding, self.graph.positions) if name]
        return {name: self.embedding() if name == names[0] else self._centred(self.tensor(name)) for name in names}

    def embedded(
        self, tokens: Int[Tensor, "*batch tokens"], matrices: Mapping[str, Tensor] | None = None
    ) -> Float[Tensor, "*batch tokens hidden"]:
        """What enters the first block: rows of `embeddings`, or of a checkpoint's, as Gemma scales them.

        Raises:
            UserError: there are more tokens than learned positions.
        """
        matrices = self.embeddings() if matrices is None else matrices
        matrix = matrices[f"{self.graph.embedding}.weight"]
        module = self.skeleton.get_submodule(self.graph.embedding)
        rows = _times(matrix[tokens.to(matrix.device)], float(getattr(module, "scalar_embed_scale", 1.0)))
        if not self.graph.positions:
            return rows
        first: Any = getattr(self.skeleton.get_submodule(self.graph.positions), "offset", 0)
        places = matrices[f"{self.graph.positions}.weight"][first : first + tokens.shape[-1]]
        if len(places) < tokens.shape[-1]:
            raise UserError(
                f"the model has learned {len(places)} positions, fewer than the {tokens.shape[-1]} tokens of a "
                "sequence: choose a smaller --calib-seq-len."
            )
        return rows + places

    def head(self) -> Tensor:
        """The matrix of the language-model head, (vocabulary, hidden); the embedding if they are tied."""
        name = self.graph.embedding if self.config.tie_word_embeddings else self.graph.head
        return _times(self.tensor(f"{name}.weight"), self.head_factor)

    def head_bias(self) -> Float[Tensor, " vocabulary"] | None:
        """What is added to the logits, in float64, the last norm's bias included; None if nothing is."""
        own, norm = f"{self.graph.head}.bias", f"{self.graph.final_norm}.bias"
        parts = [self.tensor(own).double() * self.head_factor] if own in self.stored else []
        if norm in self.stored:
            bias = self.tensor(norm).double()
            parts.append(torch.cat([rows.double() @ bias for rows in self.head().split(8192)]))
        return sum(parts[1:], parts[0]) if parts else None

    def final_norm(self) -> nn.RMSNorm:
        norm = copy.deepcopy(self.skeleton.get_submodule(self.graph.final_norm))
        assert isinstance(norm, nn.RMSNorm), "the skeleton has torch's norms"
        return loaded(norm, {"weight": self._gain(self.tensor(f"{self.graph.final_norm}.weight"))})

    @property
    def rotary(self) -> Any:
        """The module that computes RoPE's cosines and sines."""
        return self.skeleton.get_submodule(self.graph.rotary)

    @property
    def eps(self) -> float:
        """ε of the last norm."""
        return norm_eps(self.skeleton.get_submodule(self.graph.final_norm))

    def _gain(self, weight: Tensor) -> Tensor:
        """What a norm multiplies by: 1 + its weight in Gemma, which the weight's own dtype would round."""
        return 1 + weight.double() if self.graph.unit_gains else weight

    def fingerprint(self) -> str:
        """A digest of the names, sizes and modification times of the config and weight files."""
        files = sorted({self.path / "config.json", *(each.file for each in self.stored.values())})
        parts = [f"{file.resolve()} {file.stat().st_size} {file.stat().st_mtime_ns}" for file in files]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def loaded(module: M, tensors: dict[str, Tensor]) -> M:
    """The module with these tensors as its state, for inference."""
    module.load_state_dict(tensors, assign=True)
    return module.eval().requires_grad_(False)


def open_source(model: str, *, fetch: bool = True) -> Source:
    """Open MODEL, as `locate` finds it, without reading its weights (but those that its config says are tied).

    Args:
        fetch: a GGUF file or the Hub's, if that has not been done; else only describe what will be there, which
            suffices for a plan.

    Raises:
        UserError: no such model, an unknown architecture, weights that are missing, truncated or pickled.
        SetupError: the hub cannot be reached; a GGUF file cannot be unpacked.
    """
    if not fetch and (coming := pending(model)) is not None and not coming.is_there:
        found = coming.described
        coming.require_disk()
        return replace(_described(coming.path, found, readable=False), pending=coming.to_come, comes=coming.comes)
    path = locate(model)
    return _described(path, read_language_model(path))


def _described(path: Path, model: LanguageModel, readable: bool = True) -> Source:
    """A source whose config and tensors fit each other; `readable`: whether tensors can be read already."""
    config, stored = copy.deepcopy(model.config), model.stored
    check_config(path, config)
    graph = graph_for(config)
    stored = {of_module(config.model_type, name): tensor for name, tensor in stored.items()}
    check_extent(path, config, graph, stored)
    one, other = f"{graph.embedding}.weight", f"{graph.head}.weight"
    if config.tie_word_embeddings and one in stored and other in stored:
        # as transformers does: only matrices that are equal are one; a plan has room for two
        config.tie_word_embeddings = readable and torch.equal(stored[one].read().float(), stored[other].read().float())
    with building(path):
        skeleton = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", trust_remote_code=False)
        use_experts_(skeleton, config)
    check_blocks(path, skeleton.get_submodule(graph.blocks))
    check_tensors(path, skeleton, graph, stored)
    use_torch_norms_(skeleton, graph)
    factors = _without_factors_(config)
    return Source(path, config, graph, stored, skeleton.eval(), *factors, part_of=model.part_of, rest=model.rest)


def _wide(tensor: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    """The tensor changed in float64, in a dtype wider than its own, which would round it more than it was."""
    made = torch.empty_like(tensor, dtype=torch.float32 if tensor.itemsize == 2 else torch.float64)
    return made.copy_(change(tensor.double()))


def _times(matrix: Tensor, factor: float) -> Tensor:
    """The product, in a wider dtype: the matrix's own would round it."""
    return matrix if factor == 1 else matrix.to(torch.float32 if matrix.itemsize == 2 else torch.float64) * factor


# Fields of configs by which an embedding or logits are multiplied, or (−1) divided.
_OF_EMBEDDING, _OF_HEAD = {"embedding_multiplier": 1}, {"logits_scaling": -1, "logit_scale": 1}


def _without_factors_(config: Config) -> tuple[float, float]:
    """Granite's and Cohere's factors of the embedding and the head, which become 1 in the config."""
    found = []
    for fields in (_OF_EMBEDDING, _OF_HEAD):
        given = {name: power for name, power in fields.items() if hasattr(config, name)}
        found.append(math.prod((float(getattr(config, name)) ** power for name, power in given.items()), start=1.0))
        for name in given:
            setattr(config, name, 1.0)
    return found[0], found[1]
