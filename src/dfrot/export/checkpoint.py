"""A dfrot checkpoint as exporters read it, one layer at a time, and directories as they write them.

Grids and rotations come from the runtime's record, as in inference; the recipe is good for names and descriptions only.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from jaxtyping import Float, Int
from torch import Tensor

from dfrot.checkpoint.load import read_checkpoint
from dfrot.models.configs import read_config
from dfrot.models.files import INDEX_FILE, StoredTensor, in_file, stored_tensors
from dfrot.models.graph import Config, ModelGraph, graph_for
from dfrot.models.texts import copy_tokenizer
from dfrot.quant.affine import QParams, dequantize
from dfrot.quant.packing import unpack
from dfrot.runtime.config import RuntimeConfig
from dfrot.system.errors import UserError
from dfrot.system.files import LOCK_FILE, exclusive_lock, write_json, write_tensors
from dfrot.system.progress import track
from dfrot.transform.transforms import input_widths


class Layer(NamedTuple):
    """A linear layer of a decoder block."""

    weight: Float[Tensor, "out in"]  # dequantized to float32, or as stored if it is not quantized
    bias: Float[Tensor, " out"] | None
    # centred on 0 if symmetric, and scales; None if the weight is not quantized
    integers: tuple[Int[Tensor, "out in"], Float[Tensor, "out groups"]] | None
    block: int  # its index


Weight = Callable[[str, Layer], dict[str, Tensor]]
_ROUNDED = (
    "weights are integers times a scale here, which 16 bits do not hold: each is rounded once more, by up to 0.4 %. A "
    "checkpoint that was quantized with --dtype float32 is exported exactly."
)
# model_type → an entry of its config that gives linear layers a bias, and which of a block's: how a tuned checkpoint's
# biases go to engines that build the model from the config
_BIAS_SWITCHES: dict[str, dict[str, tuple[str, ...]]] = {
    "llama": {
        "attention_bias": ("q_proj", "k_proj", "v_proj", "o_proj"),
        "mlp_bias": ("gate_proj", "up_proj", "down_proj"),
    },
    "qwen3": {"attention_bias": ("q_proj", "k_proj", "v_proj", "o_proj")},
}


@dataclass(frozen=True)
class Checkpoint:
    """A directory that `dfrot quantize` wrote. Tensors are read when asked for, so that memory holds one layer."""

    path: Path
    config: Config
    recipe: dict[str, Any]
    runtime: RuntimeConfig
    graph: ModelGraph
    stored: dict[str, StoredTensor]

    @staticmethod
    def open(path: Path) -> "Checkpoint":
        """Raises UserError if the directory is not a complete dfrot checkpoint."""
        path = path.expanduser()
        if (found := read_checkpoint(path)) is None:
            raise UserError(f"{path} is a model, but not a dfrot checkpoint. Make one: dfrot quantize {path} -o CKPT.")
        config = read_config(path)
        config.__dict__.pop("fusion_config", None)  # which says that dfrot is needed
        return Checkpoint(path, config, found.recipe, found.runtime, graph_for(config), stored_tensors(path))

    def require_table(self, engine: str) -> None:
        """Raise UserError for an architecture that was traced: what `engine` makes of it has not been looked at."""
        if self.graph.traced:
            raise UserError(
                f"exports for {engine} are made for architectures with a table (`dfrot models`), and "
                f"{self.config.model_type} has none. transformers loads the checkpoint itself, after `import dfrot`."
            )

    def refuse_offsets(self) -> None:
        """Raise UserError if an offset is subtracted while the model runs, as no other engine does."""
        if offsets := ", ".join(self.runtime.offsets):
            raise UserError(
                f"{self.path} subtracts an offset at {offsets} while the model runs; no other engine does. Quantize "
                "with --fold-only, which leaves out offsets and online rotations."
            )

    def ask_for_biases(self) -> None:
        """Let the config ask for the biases that tuning made; raises UserError where it cannot."""
        left = {name.rpartition(".")[2] for name in self.runtime.biases}
        for switch, layers in _BIAS_SWITCHES.get(self.config.model_type, {}).items():
            if left >= set(layers):
                setattr(self.config, switch, True)
                left -= set(layers)
        if left:
            raise UserError(
                f"{self.path} was tuned and has a bias in {min(left)}, for which {self.config.model_type} has no place "
                "in other engines. Quantize with --tune gains,scales."
            )

    def refuse_rotations(self, engine: str, *, alike: bool = True) -> None:
        """Raise UserError if an input is rotated while the model runs, as no engine can from block to block (DuQuant),
        and `engine` cannot at all if that is to be refused where it is `alike` in all blocks, too."""
        if self.runtime.rotation_blocks:
            raise UserError(
                f"{self.path} was made by {self.recipe.get('method')}, which rotates every layer's input while the "
                f"model runs; {engine} cannot. Quantize with --method rangerot --fold-only."
            )
        if alike and (online := ", ".join(self.runtime.online)):
            raise UserError(
                f"{self.path} rotates at {online} while the model runs; {engine} cannot. "
                "Quantize with --fold-only, which leaves out online rotations."
            )

    def lost(self, engine: str, *kinds: str) -> Iterator[str]:
        """A sentence for each of these kinds of tensors that is quantized here; `engine` does not quantize them."""
        for kind in kinds:
            if (grid := getattr(self.runtime.spec, kind)).enabled:
                yield f"{kind} are in {grid.in_words} here, and not quantized by {engine}, so its quality differs."

    def tensor(self, name: str) -> Tensor:
        return self.stored[name].read()

    def layer(self, index: int, linear: str) -> Layer:
        """Linear layer `linear` of block `index`."""
        name, spec = f"{self.graph.blocks}.{index}.{linear}", self.runtime.spec.weights
        bias = self.tensor(f"{name}.bias") if f"{name}.bias" in self.stored else None
        if not spec.enabled:
            return Layer(self.tensor(f"{name}.weight"), bias, None, index)
        width = input_widths(self.graph, self.config)[linear]
        codes = spec.grid.decode(unpack(self.tensor(f"{name}.qweight"), spec.bits, width))
        scales = self.tensor(f"{name}.scales").float()
        zeros = None if spec.symmetric else self.tensor(f"{name}.zeros").float()
        return Layer(dequantize(codes, spec.weight_granularity, QParams(scales, zeros)), bias, (codes, scales), index)

    @property
    def shards(self) -> list[int | None]:
        """What `tensors` takes, in order."""
        return [None, *range(self.config.num_hidden_layers)]

    def tensors(self, index: int | None, weight: Weight) -> Iterator[tuple[str, Tensor]]:
        """Names and contents of the tensors of block `index`, or of embedding, last norm and untied head.

        Args:
            weight: name and contents of a linear layer → its tensors but for the bias. All others are as stored, and
                norms as transformers has them.
        """
        if index is None:
            ends = (f"{name}.weight" for name in (self.graph.embedding, self.graph.final_norm, self.graph.head))
            yield from ((name, self._less_one(name)) for name in ends if name in self.stored)
            return
        prefix = f"{self.graph.blocks}.{index}."
        linears = tuple(f"{prefix}{linear}." for linear in self.graph.linears)
        others = (name for name in sorted(self.stored) if name.startswith(prefix) and not name.startswith(linears))
        yield from ((name, self._less_one(name)) for name in others)
        for linear in self.graph.linears:
            layer = self.layer(index, linear)
            for part, tensor in weight(linear, layer).items():
                yield f"{prefix}{linear}.{part}", tensor
            if layer.bias is not None:
                yield f"{prefix}{linear}.bias", layer.bias

    def _less_one(self, name: str) -> Tensor:
        """A tensor, no linear layer's; smaller by 1 if it is of a norm to whose weight transformers adds 1."""
        tensor = self.tensor(name)
        return (tensor.double() - 1).to(tensor.dtype) if self.graph.adds_one(name) else tensor


def write_directory(checkpoint: Checkpoint, out: Path, weight: Weight, config: dict[str, Any]) -> None:
    """Write all `tensors` in shards, an index, the tokenizer and, last, config.json: without it there is no model.

    Raises:
        UserError: `out` is not empty.
        SetupError: `out` cannot be written.
    """
    count, kind = len(checkpoint.shards), checkpoint.config.model_type
    weight_map: dict[str, str] = {}
    total = 0
    with exclusive_lock(out):
        if found := sorted(file.name for file in out.iterdir() if file.name != LOCK_FILE):
            raise UserError(f"{out} is not empty ({found[0]}); nothing there is touched. Choose another -o directory.")
        try:
            for number, index in enumerate(track(checkpoint.shards, "exporting", count), start=1):
                tensors = {in_file(kind, name): tensor for name, tensor in checkpoint.tensors(index, weight)}
                file = out / f"model-{number:05}-of-{count:05}.safetensors"
                write_tensors(file, tensors, {"format": "pt"})
                weight_map |= dict.fromkeys(tensors, file.name)
                total += sum(tensor.nbytes for tensor in tensors.values())
            write_json(out / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": weight_map})
            copy_tokenizer(checkpoint.path, out)
            write_json(out / "config.json", config)
        except BaseException:  # Ctrl-C too
            for file in out.iterdir():
                if file.name != LOCK_FILE:
                    file.unlink()
            raise


def to_huggingface(checkpoint: Checkpoint, out: Path) -> list[str]:
    """Write plain weights in the checkpoint's dtype, for tools that know nothing of dfrot: folded rotations stay in
    them, integers become floats. Returns and errors are those of `export`."""
    if checkpoint.graph.centred:
        raise UserError(
            f"the norms of {checkpoint.config.model_type} subtract the mean over channels, and those of a rotated "
            "model do not: plain weights would mean something else. Load the checkpoint itself, after `import dfrot`."
        )
    checkpoint.refuse_rotations("transformers")
    config = {name: value for name, value in checkpoint.config.to_dict().items() if name != "quantization_config"}
    write_directory(checkpoint, out, lambda _, layer: {"weight": layer.weight.to(checkpoint.config.dtype)}, config)
    rounds = checkpoint.runtime.spec.weights.enabled and checkpoint.config.dtype.itemsize < 4
    return [*checkpoint.lost("transformers", "activations", "keys"), *[_ROUNDED] * rounds]
