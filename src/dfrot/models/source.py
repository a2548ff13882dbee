"""A model on disk: finding, checking and reading it, one part at a time.

Opening a source reads no weight. Its blocks are built from the safetensors files on request and freed by the caller, so
that memory is bounded by one decoder block, whatever the size of the model.
"""

import abc
import contextlib
import copy
import hashlib
import math
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import huggingface_hub
import torch
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
from jaxtyping import Float, Int
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from dfrot.models.experts import of_module, use_experts_
from dfrot.models.graph import Config, ModelGraph, graph_for, head_dim, kv_heads
from dfrot.system.errors import SetupError, UserError
from dfrot.system.files import RUN_FILE, read_json, translate_io_errors

M = TypeVar("M", bound=nn.Module)

INDEX_FILE = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_COMPUTED = "rotary_emb.inv_freq"  # old Llamas stored RoPE's frequencies; transformers computes them from the config
# The dtypes that dfrot reads, as safetensors names them.
_DTYPES = {
    **{"BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I32": torch.int32, "I64": torch.int64},
    **{"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64},
}


class Packed(abc.ABC):
    """A model in a file of another format, which is unpacked once to a directory that transformers can load."""

    path: Path
    folder: Path  # where it is unpacked, or will be
    is_unpacked: bool

    @property
    @abc.abstractmethod
    def described(self) -> tuple[Config, Mapping[str, torch.Size]]:
        """Its config, and by transformers' names the shapes of the tensors, which are float32 once unpacked."""

    @abc.abstractmethod
    def require_disk(self) -> None:
        """Raise SetupError if the disk does not hold the unpacked model."""

    @abc.abstractmethod
    def unpack(self) -> None:
        """Write the directory, whole or not at all."""


# Called with MODEL. A ring that reads files of another format registers here, so that the core does not know of it.
FORMATS: list[Callable[[str], Packed | None]] = []


def _packed(model: str) -> Packed | None:
    return next((packed for found in FORMATS if (packed := found(model)) is not None), None)


def locate(model: str) -> Path:
    """The directory with the safetensors weights behind MODEL: a directory, a .gguf file, an alias or a hub id.

    Raises:
        UserError: there is no such model, or a GGUF file holds none that is known.
        SetupError: the hub cannot be reached; a GGUF file cannot be unpacked.
    """
    if (packed := _packed(model)) is not None:
        if not packed.is_unpacked:
            open_source(model, unpack=False)  # its errors come before the work
            packed.unpack()
        return packed.folder
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    if path.is_file():
        raise UserError(f"a model file ends in .gguf, got {path}. Give a .gguf file or a directory.")
    if model.count("/") != 1 or model.startswith((".", "/", "~")):  # not the form of a hub id
        raise UserError(
            f"there is no model at '{model}'. MODEL is a directory with safetensors weights, a .gguf file, "
            "a hub id such as 'meta-llama/Llama-2-7b-hf', or smollm2-135m."
        )
    try:
        patterns = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]  # no pickles, no code
        return Path(huggingface_hub.snapshot_download(model, allow_patterns=patterns))
    except GatedRepoError as error:
        raise UserError(f"'{model}' is gated: accept its licence on the hub, then `hf auth login`.") from error
    except RepositoryNotFoundError as error:
        raise UserError(f"the hub has no model '{model}', and there is no such directory.") from error
    except OSError as error:
        raise SetupError(
            f"'{model}' is neither a local directory nor in the local cache, and the hub cannot be reached. "
            "Give a local directory, a .gguf file or smollm2-135m."
        ) from error


class StoredTensor(NamedTuple):
    """A tensor on disk, as the header of its safetensors file describes it."""

    file: Path
    name: str
    shape: torch.Size
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return self.shape.numel() * self.dtype.itemsize

    def read(self) -> Tensor:
        with open_safetensors(self.file) as file:
            return file.get_tensor(self.name)


def stored_tensors(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a directory with one safetensors file or many, by name. No tensor is read.

    Where there are both, transformers reads the one file, whatever the index says.

    Raises:
        UserError: there are no safetensors weights, or a shard is missing, truncated or outside the directory.
    """
    if (path / _SINGLE).is_file():
        return tensors_in(path / _SINGLE)
    if (path / INDEX_FILE).is_file():
        weight_map = read_json(path / INDEX_FILE).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
            raise UserError(f"{path / INDEX_FILE} is not an index of safetensors shards.")
        present = {file.name for file in path.iterdir()}  # plain names, so no shard lies outside the directory
        if absent := set(weight_map.values()) - present:
            raise UserError(f"{INDEX_FILE} names the shard '{min(absent)}', which is not a file in {path}.")
        found: dict[str, StoredTensor] = {}
        for shard in sorted(set(weight_map.values())):
            held = tensors_in(path / shard)
            if lacking := {name for name, where in weight_map.items() if where == shard} - held.keys():
                raise UserError(f"{INDEX_FILE} says that {shard} holds '{min(lacking)}', which it does not.")
            if twice := held.keys() & found.keys():
                first = found[min(twice)].file.name
                raise UserError(f"{path} has two tensors '{min(twice)}', in {first} and in {shard}.")
            found |= held
        return found
    if pickles := [p.name for p in path.glob("*") if p.suffix in (".bin", ".pt", ".pth", ".pkl", ".ckpt")]:
        raise UserError(
            f"{path} has its weights in pickle files ({pickles[0]}), which can run code when they are read and are "
            "refused. Convert them to safetensors on a machine you can lose, or take a revision that has safetensors."
        )
    raise UserError(f"{path} has no safetensors weights ({_SINGLE} or {INDEX_FILE}).")


def tensors_in(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one safetensors file. Raises UserError for a dtype that dfrot does not read."""
    found = {}
    with open_safetensors(path) as file:
        for name in file.keys():  # noqa: SIM118 — safe_open is no mapping
            piece = file.get_slice(name)
            shape, dtype = piece.get_shape(), piece.get_dtype()
            if dtype not in _DTYPES:
                raise UserError(f"the tensor '{name}' in {path} has the dtype {dtype}, which dfrot does not read.")
            if max(shape, default=0) >= 2**63:  # possible if another dimension is 0; torch.Size would overflow
                raise UserError(f"the tensor '{name}' in {path} has the shape {tuple(shape)}.")
            found[name] = StoredTensor(path, name, torch.Size(shape), _DTYPES[dtype])
    return found


def open_safetensors(path: Path) -> Any:
    """`safetensors.safe_open`, raising UserError for a broken file, SetupError for one that cannot be opened."""
    if not path.is_file():
        raise SetupError(f"{path} is not there, or not any more: has it been moved, or a disk been taken away?")
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{path} is not a complete safetensors file ({error}). It may be truncated: fetch it again."
        ) from error
    except RuntimeError as error:  # files are mapped whole, and the system may not promise so much at a time
        raise SetupError(f"{path} cannot be opened: {error}. A model in shards of some gigabytes can.") from error


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
    unpacking: int = 0  # bytes that a GGUF file takes once it is unpacked, which is to come
    # Granite's and Cohere's factors, of what embedding and head put out. In the matrices as they are read here they are
    # in already, and in `config` they are 1.
    embedding_factor: float = 1.0
    head_factor: float = 1.0

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


class ModelSizes:
    """Sizes of a model's tensors in entries, and bytes per entry: from these, methods and roundings estimate memory."""

    def __init__(self, source: Source, working: torch.dtype, stored: torch.dtype, seq_len: int, tokens: int) -> None:
        graph, config = source.graph, source.config
        shapes = {name: tensor.shape for name, tensor in source.empty_block(0).state_dict().items()}
        self.num_blocks = source.num_blocks
        self.hidden = config.hidden_size  # width of the residual stream
        self.vocabulary = config.vocab_size  # rows of the embedding
        self.heads = config.num_attention_heads * head_dim(config)  # channels of all heads' outputs
        self.kv_heads = kv_heads(config) * head_dim(config)  # channels of all keys
        self.experts = graph.experts
        self.block = sum(shape.numel() for shape in shapes.values())  # all tensors of a block
        self.linears = linears = {name: shapes[f"{name}.weight"] for name in graph.linears}  # (out, in)
        self.unbiased = sum(rows for name, (rows, _) in linears.items() if f"{name}.bias" not in shapes)  # outputs
        self.largest = max(shape.numel() for shape in linears.values())  # weight of a block
        # for the layers that are rounded together, their rows and their input's width
        together = graph.rounded_together
        self.stages = [(sum(linears[name][0] for name in stage), linears[stage[0]][1]) for stage in together]
        # bytes of an entry in the source, while a block is folded, and in the checkpoint
        self.source, self.working, self.stored = source.dtype.itemsize, working.itemsize, stored.itemsize
        self.source *= 1 + graph.centred
        self.seq_len = seq_len  # tokens of a calibration sequence
        # one sequence inside a block: the stream, and the widest layer's input with gate and up
        self.chosen = config.num_experts_per_tok if graph.experts else 1  # experts of a token
        self.sequence = seq_len * (4 * self.hidden + 3 * self.chosen * linears[graph.down][1])
        self.tokens = tokens  # of the calibration text, of all processes together


def loaded(module: M, tensors: dict[str, Tensor]) -> M:
    """The module with these tensors as its state, for inference."""
    module.load_state_dict(tensors, assign=True)
    return module.eval().requires_grad_(False)


def load_tokenizer(path: Path) -> Any:
    """The tokenizer of a model directory. Raises UserError if there is none, or it cannot be read."""
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # transformers and tokenizers raise errors of many kinds for broken files
        raise UserError(f"{path} has no tokenizer that transformers can load: {error}") from error


def copy_tokenizer(path: Path, to: Path) -> None:
    """Copy tokenizer and settings; UserError if names in them lead elsewhere, SetupError if `to` cannot be written."""
    tokenizer = load_tokenizer(path)
    with translate_io_errors(to):
        try:
            tokenizer.save_pretrained(to)
        except ValueError as error:
            raise UserError(f"the tokenizer of {path} cannot be kept: {error}") from error
        if (settings := path / "generation_config.json").is_file():
            shutil.copyfile(settings, to / settings.name)


def config_json(path: Path) -> dict[str, Any]:
    """The config.json of a model directory. Raises UserError where there is none, as in an interrupted run."""
    if (adapter := path / "adapter_config.json").is_file():  # with peft, transformers loads it and the model it names
        base = read_json(adapter).get("base_model_name_or_path")
        raise UserError(f"{path} holds an adapter of {base}: merge it first (peft: merge_and_unload, save_pretrained).")
    if (path / "config.json").is_file():
        return read_json(path / "config.json")
    if (path / RUN_FILE).is_file():
        raise UserError(f"{path} holds an interrupted run of `dfrot quantize`. Repeat the command with --resume.")
    if not path.exists():
        raise UserError(f"there is no directory {path}.")
    if path.suffix == ".gguf":
        raise UserError(f"{path} is a GGUF file, which is a model to start from, not a directory.")
    raise UserError(f"{path} holds no complete model: config.json is missing.")


def read_config(path: Path) -> Config:
    """The config of a model directory. Raises UserError if it cannot be read, or needs code, which is never run."""
    record, most = config_json(path), 10_000
    # transformers makes a list or modules of so many items: a small file must not ask for gigabytes
    for name in {"num_hidden_layers", "num_labels"} & record.keys():
        if not isinstance(record[name], int) or record[name] > most:
            raise UserError(f"{path / 'config.json'} has {name} {record[name]!r}; it is an integer, at most {most}.")
    if not isinstance(record.get("quantization_config") or {}, dict):
        raise UserError(f"{path / 'config.json'} has a quantization_config that is no JSON object.")
    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # transformers and huggingface_hub raise errors of many kinds for a broken config
        raise UserError(f"{path / 'config.json'} is not a config that transformers can load: {error}") from error


def use_torch_norms_(model: nn.Module, graph: ModelGraph) -> None:
    """Replace the norms by torch.nn.RMSNorm, which computes float64 inputs in float64.

    transformers' own RMS norms always cast to float32, so that no invariance could be checked below 1e-7. A norm with a
    bias leaves it to the layers that read it, and to the head, whose biases have no values yet: see `Source`.
    """
    modules = dict(model.named_modules())
    blocks: Any = modules[graph.blocks]
    places = [f"{graph.blocks}.{index}." for index in range(len(blocks))]
    readers = {f"{at}{norm}": [at + name for name in names] for at in places for norm, names in graph.norms.items()}
    others = {f"{at}{norm}" for at in places for norm in (*graph.norms_behind, *graph.head_norms)}
    for name in (*readers, *others, graph.final_norm):
        module: Any = modules[name]
        norm = nn.RMSNorm(module.weight.shape, eps=norm_eps(module))
        gain = nn.Parameter(1 + module.weight.detach(), requires_grad=False) if graph.unit_gains else module.weight
        norm.weight = gain
        model.set_submodule(name, norm)
        if getattr(module, "bias", None) is not None:
            for reader in readers.get(name, [graph.head] if graph.head in modules else []):
                add_bias_(modules[reader])


def norm_eps(norm: Any) -> float:
    """ε of a norm."""
    return norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps


def add_bias_(linear: Any) -> None:
    """Give a linear layer a bias, without values, unless it has one."""
    if linear.bias is None:
        empty = torch.empty_like(linear.weight[:, 0])
        linear.bias = nn.Parameter(empty, requires_grad=False)


def open_source(model: str, *, unpack: bool = True) -> Source:
    """Open MODEL, as `locate` finds it, without reading its weights (but those that its config says are tied).

    Args:
        unpack: a GGUF file, if that has not been done; else only describe what it will be, which suffices for a plan.

    Raises:
        UserError: no such model, an unknown architecture, weights that are missing, truncated or pickled.
        SetupError: the hub cannot be reached; a GGUF file cannot be unpacked.
    """
    if not unpack and (packed := _packed(model)) is not None and not packed.is_unpacked:
        packed.require_disk()
        config, shapes = packed.described
        stored = {name: StoredTensor(packed.path, name, shape, torch.float32) for name, shape in shapes.items()}
        nbytes = 4 * sum(shape.numel() for shape in shapes.values())
        return replace(_described(packed.path, config, stored), unpacking=nbytes)
    path = locate(model)
    config = read_config(path)
    graph_for(config)  # an architecture that cannot be read is refused whatever its weights are
    return _described(path, config, stored_tensors(path))


def _described(path: Path, config: Config, stored: dict[str, StoredTensor]) -> Source:
    """A source whose config and tensors fit each other."""
    if quantized := getattr(config, "quantization_config", None):
        made_by = quantized.get("quant_method") if isinstance(quantized, dict) else quantized
        raise UserError(f"{path} is quantized already (quantization_config: {made_by}): give the original model.")
    if (named := getattr(config, "transformers_weights", None)) is not None:
        raise UserError(f"{path} has its weights in {named!r} (transformers_weights), which dfrot does not read.")
    graph = graph_for(config)
    stored = {of_module(config.model_type, name): tensor for name, tensor in stored.items()}
    if getattr(config, "is_causal", True) is not True:
        raise UserError(f"{path} lets tokens attend to later ones (is_causal): dfrot quantizes causal language models.")
    if not isinstance(config.dtype, torch.dtype | None):
        raise UserError(f"{path / 'config.json'} has the dtype {config.dtype!r}, which torch does not know.")
    named = config.architectures or []
    if not isinstance(named, list) or not all(str(name).endswith("ForCausalLM") for name in named):
        raise UserError(f"{path} has the architectures {named}: dfrot quantizes causal language models.")
    for key in ("sliding_window", "layer_types"):  # transformers' masks ignore what the class lacks; its caches do not
        if getattr(config, key, None) is not None and not hasattr(type(config), key):
            raise UserError(f"the config of {path} has a {key}, which {config.model_type} does not know: take it out.")
    if "sliding_attention" in (getattr(config, "layer_types", None) or ()) and config.sliding_window is None:
        raise UserError(f"{path / 'config.json'} has layer_types with sliding_attention, and no sliding_window.")
    _check_extent(path, config, graph, stored)
    one, other = f"{graph.embedding}.weight", f"{graph.head}.weight"
    if config.tie_word_embeddings and one in stored and other in stored:
        # as transformers does: only matrices that are equal are one
        config.tie_word_embeddings = torch.equal(stored[one].read().float(), stored[other].read().float())
    with building(path):
        skeleton = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", trust_remote_code=False)
        use_experts_(skeleton, config)
    _check_blocks(path, skeleton.get_submodule(graph.blocks))
    _check_tensors(path, skeleton, graph, stored)
    use_torch_norms_(skeleton, graph)
    factors = _without_factors_(config)
    return Source(path, config, graph, stored, skeleton.eval(), 0, *factors)


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


@contextlib.contextmanager
def silent_transformers() -> Iterator[None]:
    """No progress bars, and no messages below errors."""
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        transformers_logging.enable_progress_bar()


@contextlib.contextmanager
def building(path: Path) -> Iterator[None]:
    """Build a model on the meta device; UserError where the config in `path` describes none that can be built."""
    try:
        with torch.device("meta"):
            yield
    except UserError:
        raise
    except Exception as error:  # there is no end to the errors that a config can cause
        raise UserError(f"{path / 'config.json'} describes no model that transformers can make: {error!r}") from error


def _check_extent(path: Path, config: Config, graph: ModelGraph, stored: Mapping[str, StoredTensor]) -> None:
    """Raise UserError if the config asks for more than the files can hold; its skeleton could take gigabytes."""
    held = {name.removeprefix(graph.blocks + ".").split(".")[0] for name in stored}
    if (absent := next((i for i in range(config.num_hidden_layers) if str(i) not in held), None)) is not None:
        raise UserError(f"the weights in {path} lack '{graph.blocks}.{absent}.…', which its config needs.")
    most = max((each.shape.numel() for each in stored.values()), default=0)
    for name in ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim"):
        if isinstance(size := getattr(config, name, None), int) and size > most:
            raise UserError(f"{path / 'config.json'} has {name} {size}; no tensor there has so many entries.")


def _check_blocks(path: Path, blocks: Any) -> None:
    """Raise UserError unless all blocks have the same layers."""
    layers = [block.state_dict().keys() for block in blocks]
    for index, names in enumerate(layers):
        if differing := sorted(layers[0] ^ names):
            raise UserError(
                f"the model in {path} has blocks of more than one kind: only one of blocks 0 and {index} has a "
                f"'{differing[0]}'. dfrot takes models whose blocks are alike."
            )


def _check_tensors(path: Path, skeleton: Any, graph: ModelGraph, stored: Mapping[str, StoredTensor]) -> None:
    """Raise UserError unless the files hold the tensors of the config, and no other block's."""
    expected, unread = skeleton.state_dict(), {name for name in stored if name.endswith(_COMPUTED)}
    if skeleton.config.tie_word_embeddings:
        del expected[f"{graph.head}.weight"]
        unread.add(f"{graph.head}.weight")  # if it is there, it equals the embedding
    if missing := sorted(expected.keys() - stored.keys()):
        raise UserError(f"the weights in {path} lack '{missing[0]}' ({len(missing)} missing), which its config needs.")
    check_shapes(path, expected, stored)
    if wrong := next((stored[name] for name in expected if not stored[name].dtype.is_floating_point), None):
        raise UserError(f"'{wrong.name}' in {path} has the dtype {wrong.dtype}; weights are floating-point numbers.")
    passed_over = skeleton._keys_to_ignore_on_load_unexpected or ()
    unread |= {name for name in stored if any(re.search(pattern, name) for pattern in passed_over)}
    if left := sorted(stored.keys() - expected.keys() - unread):
        raise UserError(f"the weights in {path} hold '{left[0]}', for which its config has no place.")


def check_shapes(path: Path, expected: Mapping[str, Tensor], stored: Mapping[str, StoredTensor]) -> None:
    """Raise UserError if a stored tensor does not have the shape of the expected one of its name."""
    for name in (name for name in expected if name in stored):
        if (shape := stored[name].shape) != (wanted := expected[name].shape):
            raise UserError(f"'{name}' in {path} has the shape {tuple(shape)}; its config asks for {tuple(wanted)}.")
