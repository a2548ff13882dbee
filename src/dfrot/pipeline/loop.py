"""From a model and its transforms to the shards of a checkpoint: shard 0 the embedding, then a block each, at last the
final norm and the head. Then what is trained or measured with all shards there.

A block is loaded, folded and proved, quantized, written, freed.
"""

from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from dfrot.checkpoint.load import DfrotConfig
from dfrot.checkpoint.writer import CheckpointWriter
from dfrot.methods.method import FitContext
from dfrot.models.texts import copy_tokenizer
from dfrot.pipeline import cache
from dfrot.pipeline.estimate import VOCABULARY_ROWS, Estimate
from dfrot.pipeline.ranges import TOKENS, largest_inputs
from dfrot.pipeline.recipe import Recipe
from dfrot.rounding.rounding import BlockTask
from dfrot.rounding.stream import CalibrationStream, runtime_block
from dfrot.runtime.config import RuntimeConfig
from dfrot.runtime.linear import packed_tensors
from dfrot.system.errors import UserError
from dfrot.system.memory import give_freed_memory_back
from dfrot.system.progress import track
from dfrot.training.teacher import Windows
from dfrot.transform.fold import Fold
from dfrot.transform.invariance import InvarianceCheck
from dfrot.transform.transforms import Transforms
from dfrot.tuning.run import TuningRun


class Loop:
    """A checkpoint under way: `run` writes its shards, `finish` the config that makes them one."""

    def __init__(
        self, on: FitContext, recipe: Recipe, transforms: Transforms, writer: CheckpointWriter, estimate: Estimate
    ) -> None:
        self.on, self.recipe, self.transforms, self.writer, self.estimate = on, recipe, transforms, writer, estimate
        self.source, self.dtypes = on.source, recipe.dtypes(on.source.dtype)
        graph, config = self.source.graph, self.source.config
        keys = transforms.keys if recipe.spec.keys.enabled else None
        blocks = transforms.rotation_blocks(graph)
        made = self.source.without_bias if transforms.offsets else ()
        of_inputs = tuple(transforms.offset_sites(graph)), transforms.clip_sites(graph)
        online = transforms.online(graph, config)
        means = bool(transforms.key_means)
        self.runtime = RuntimeConfig(recipe.spec, online, keys, blocks, made, *of_inputs, key_means=means)
        self.tied = self.source.tied and not transforms.unties_head

    def run(self) -> float:
        """Write all shards that are not there; returns the largest float64 error that folding made."""
        source, residual = self.source, self.transforms.residual
        embeddings = source.embeddings()
        check = InvarianceCheck(source, embeddings, self.recipe.seed, self.on.device)
        if not self.writer.has(0):
            fold = Fold(input_rotation=residual)
            folded = {name: self._fold_rows(matrix, fold) for name, matrix in embeddings.items()}
            self.writer.write(0, folded)
            del folded
        del embeddings  # a gigabyte for some models
        written = self.writer.read(0)
        check.embedding(written, residual)
        stream = self._stream(written)
        del written
        errors = []
        for index in track(range(source.num_blocks), "quantizing"):
            errors.append(self._block(index, check, stream))
            if self.estimate.tight:
                give_freed_memory_back()
        del stream  # the head may need the room
        return max(*errors, self._head(check))

    def _stream(self, embeddings: dict[str, Tensor]) -> CalibrationStream | None:
        """The inputs of the blocks that are still to be rounded; None if they need no data."""
        missing = not all(map(self.writer.has, range(1, self.source.num_blocks + 1)))
        if not (missing and self.recipe.fits_weights):
            return None
        on, spill = self.on, self.writer.path if self.estimate.offloads else None
        text, working, rounding = on.calibration(), self.dtypes.working, self.recipe.rounding
        how = rounding.needs_teacher, rounding.quantizes_activations, on.processes
        fits = on.device.type == "cuda" and self.estimate.states <= on.budget // 2  # of what is free there
        home = on.device if fits else torch.device("cpu")
        return CalibrationStream(self.source, self.runtime, embeddings, text, working, on.device, home, spill, *how)

    def _block(self, index: int, check: InvarianceCheck, stream: CalibrationStream | None) -> float:
        """Prove, quantize and write one block; returns the float64 error. Nothing of the block outlives the call."""
        source, working, error = self.source, self.dtypes.working, 0.0
        block = source.block(index).to(self.on.device)
        prefix = f"{source.graph.blocks}.{index}."
        done = self.writer.has(index + 1)
        if done and (stream is None or stream.teacher_states is None):
            check.advance(index, block)
        else:
            error, state = check.block(index, block, self.transforms, working)
            del block
            rotations = self.transforms.online_tensors(index, source.graph, working)
            if stream is not None:
                stream.meet(index, state | rotations)
        if not done:
            tensors, notes = self.quantize_block(index, state, rotations, stream)
            self.writer.write(index + 1, {prefix + name: tensor for name, tensor in tensors.items()}, notes)
        if stream is not None:
            # From the disk, though a rounding has the block in memory: what the next block meets is then what lies
            # there, and a resumed run equals one that was never interrupted.
            kept = self.writer.read(index + 1)
            stream.advance(index, {name.removeprefix(prefix): tensor for name, tensor in kept.items()})
        return error

    def quantize_block(
        self, index: int, folded: dict[str, Tensor], rotations: dict[str, Tensor], stream: CalibrationStream | None
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The tensors that a checkpoint keeps of a folded block, under the names of the runtime's modules, and notes.

        The weights of quantized layers are taken out of `folded`.
        """
        graph, spec, stored = self.source.graph, self.recipe.spec.weights, self.dtypes.stored
        linears = {f"{name}.weight": folded.pop(f"{name}.weight") for name in graph.linears if spec.enabled}
        # what is not quantized is already as it will be stored
        tensors = {name: _narrowed(tensor, stored, name) for name, tensor in folded.items()} | rotations
        if not spec.enabled:
            return tensors, {}
        wide = linears[f"{graph.down}.weight"]
        unquantized = self.runtime.without("weights", "activations")
        module = runtime_block(self.source, index, tensors | linears, unquantized).to(wide.dtype).to(wide.device)
        del linears, wide
        layers, notes = self.recipe.rounding.round(BlockTask(index, module, graph, spec, stream, self.recipe.seed))
        for name, (codes, qparams) in layers.items():
            tensors |= {f"{name}.{key}": tensor for key, tensor in packed_tensors(codes, qparams, spec).items()}
        return tensors, notes

    def _head(self, check: InvarianceCheck) -> float:
        """Prove and write the last norm and, unless it stays the embedding, the head; returns the float64 error."""
        graph, last = self.source.graph, self.source.num_blocks + 1
        norm, head = self.source.final_norm(), self.source.head()
        error = check.head(norm, head, self.transforms)
        if not self.writer.has(last):
            fold = self.transforms.head_fold(norm.weight)
            tensors = {f"{graph.final_norm}.weight": fold.norm_gain(norm.weight).to(self.dtypes.stored)}
            if not self.tied:
                tensors[f"{graph.head}.weight"] = self._fold_rows(head, fold)
            if (bias := self.source.head_bias()) is not None:
                tensors[f"{graph.head}.bias"] = _narrowed(bias, self.dtypes.stored, "the head's bias")
            self.writer.write(last, tensors)
            del tensors
        del head  # before it is read back
        written = self.writer.read(last) | (self.writer.read(0) if self.tied else {})
        name = graph.embedding if self.tied else graph.head
        ends = written[f"{graph.final_norm}.weight"], written[f"{name}.weight"], written.get(f"{graph.head}.bias")
        check.written_head(*ends)
        return error

    def _fold_rows(self, matrix: Tensor, fold: Fold) -> Tensor:
        """A folded embedding or head, (vocabulary, hidden), made in pieces."""
        folded = torch.empty(matrix.shape, dtype=self.dtypes.stored)
        for rows, into in zip(matrix.split(VOCABULARY_ROWS), folded.split(VOCABULARY_ROWS), strict=True):
            into.copy_(_narrowed(fold.weight(rows.to(self.on.device)), self.dtypes.stored, "the embedding or head"))
        return folded

    def tune(self, windows: Windows) -> dict[str, Any]:
        """Train what the recipe names, and rewrite the blocks; returns notes."""
        how: Any = (*self.dtypes[:2], self.on.device, self.estimate.tuning, self.estimate.budget, self.on.processes)
        model = self.source, self.runtime, self.transforms.residual, self.writer
        run = TuningRun(*model, self.recipe.tuning, windows, *how)
        notes, self.runtime = run()
        return notes

    def measure_ranges(self) -> None:
        """Fix the factors of the activations' scales."""
        sequences = max(1, TOKENS // self.recipe.calibration.seq_len)
        how = self.on.calibration()[:sequences], self.dtypes.working, self.on.device
        self.runtime = replace(self.runtime, largest=largest_inputs(self.source, self.runtime, self.writer, *how))

    def choose_kv_bits(self, average: float) -> dict[str, Any]:
        """Give keys and values of some blocks more bits; a resumed run takes what was chosen. Returns notes."""
        record, tensors = self.writer.load_fit() or ({}, {})
        if "kv_bits" not in record:
            if self.on.processes.is_main:
                record["kv_bits"] = cache.bits_by_block(self._written, self._few_tokens, average)
            self.writer.save_fit(record, tensors)
            record, _ = self.writer.load_fit() or (record, tensors)
        self.runtime = self.runtime.with_kv_bits(record["kv_bits"]["bits"])
        return record["kv_bits"]

    def cache_cost(self) -> dict[str, Any]:
        """What quantized keys and values cost on the first calibration sequence; returns notes."""
        tokens = self._few_tokens
        return cache.cache_cost(self._written, tokens).notes(tokens.shape[1])

    @property
    def _few_tokens(self) -> Int[Tensor, "1 tokens"]:
        return self.on.calibration()[:1, : cache.TOKENS]

    @property
    def _written(self) -> cache.Written:
        model = self.source, self.runtime, self.transforms.residual, self.writer
        return cache.Written(*model, self.dtypes.working, self.on.device)

    def finish(self, notes: dict[str, Any]) -> None:
        """Write the tokenizer, the notes and, last of all, the config, which makes the directory a checkpoint."""
        source, writer = self.source, self.writer
        unquantized = 2 * sum(tensor.shape.numel() for tensor in source.stored.values())
        config = source.config.to_dict() | {
            "architectures": [type(source.skeleton).__name__],
            "tie_word_embeddings": self.tied,
            "dtype": str(self.dtypes.computing).removeprefix("torch."),
            **DfrotConfig.describe(self.runtime, self.recipe.to_json(), unquantized),
        }
        copy_tokenizer(source.path, writer.path)
        writer.finish(config, notes)


def _narrowed(tensor: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    narrow = tensor.to(dtype)
    if not torch.isfinite(narrow).all():
        raise UserError(f"{name} does not fit into {dtype}: choose --dtype bfloat16.")
    return narrow
