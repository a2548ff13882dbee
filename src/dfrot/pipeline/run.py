"""quantize(): the loop over decoder blocks, the only orchestration.

Fit the transforms; then for each block: load, fold and prove, quantize, write, free. Memory holds one block, whatever
the size of the model, and a small model goes through the same loop.
"""

import functools
import hashlib
import re
import time
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from dfrot.checkpoint.load import DfrotConfig, usable_device
from dfrot.checkpoint.writer import CheckpointWriter, ReuseDir, opened_writer
from dfrot.methods import key_means
from dfrot.methods.method import Fit, FitContext, FitProgress
from dfrot.models.source import Source, open_source
from dfrot.models.stream import require_same_logits
from dfrot.models.texts import calibration_windows, copy_tokenizer, load_tokenizer, read_text
from dfrot.pipeline import cache
from dfrot.pipeline.estimate import VOCABULARY_ROWS, Estimate
from dfrot.pipeline.ranges import TOKENS, largest_inputs
from dfrot.pipeline.recipe import Recipe
from dfrot.quant.affine import grouped
from dfrot.quant.spec import Spec
from dfrot.rounding.rounding import BlockTask
from dfrot.rounding.stream import CalibrationStream, runtime_block
from dfrot.runtime.config import RuntimeConfig
from dfrot.runtime.linear import packed_tensors
from dfrot.system.devices import memory_on
from dfrot.system.distributed import SINGLE_PROCESS, ProcessGroup
from dfrot.system.errors import UserError
from dfrot.system.memory import give_freed_memory_back
from dfrot.system.progress import track
from dfrot.training.teacher import Windows
from dfrot.transform.fold import Fold
from dfrot.transform.invariance import InvarianceCheck, InvarianceError
from dfrot.transform.transforms import Transforms, input_widths
from dfrot.tuning.run import TuningRun, require_whole, tuning_windows
from dfrot.version import __version__


@dataclass(frozen=True)
class QuantizeResult:
    """What a run did."""

    path: Path  # of the checkpoint
    recipe: Recipe
    timings_s: dict[str, float]  # by stage
    invariance: float  # the largest float64 error that folding made, relative; rounding if all is well
    notes: dict[str, Any]  # what method and rounding found out; also in the checkpoint's fit.json

    def summary(self) -> list[str]:
        """What is worth saying of it, in sentences."""
        return [
            *self.recipe.method.summary(self.notes),
            *key_means.summary(self.notes.get("key_means", {})),
            *self.recipe.rounding.summary(self.notes.get("weights_by_block", [])),
            *self.recipe.tuning.summary(self.notes.get("tuning", {}), self.recipe.spec),
            *cache.summary(self.notes.get("cache", {}), self.notes.get("kv_bits", {})),
            *_for_no_speed(self.recipe.spec),
            f"folding changed the model by {self.invariance:.0e} (float64, relative)",
        ]


def quantize(
    model: str | Path,
    recipe: Recipe,
    out: str | Path,
    *,
    device: str | torch.device = "cpu",
    resume: bool = False,
    overwrite: bool = False,
    memory: int | None = None,
    reuse_dir: str | Path | None = None,
    check_source: str = "auto",
    processes: ProcessGroup = SINGLE_PROCESS,
) -> QuantizeResult:
    """Rotate and quantize a model into a checkpoint directory.

    Args:
        model: a directory with safetensors weights, a .gguf file, a hub id, or `smollm2-135m`.
        recipe: how; see `Recipe.parse`.
        out: the checkpoint directory to make.
        device: where to compute.
        resume: continue a run that was interrupted.
        overwrite: replace a checkpoint that is there.
        memory: bytes that may be taken; None takes what the machine has available. If the hidden states of the
            calibration text do not fit, they go into a memory-mapped file in `out`.
        reuse_dir: a folder in which runs leave what others can take: fitted rotations, and blocks if recipes differ in
            the cache alone.
        check_source: whether logits of a few tokens are compared with those of transformers on the same source before
            the work: "never", "always", or "auto", where the whole model in float32 fits into the memory; for an
            architecture that was traced "auto" is "always".
        processes: that make this checkpoint together, and have joined. Its numbers are those of one process but for the
            order in which sums over tokens are rounded.

    Raises:
        UserError: the request cannot be carried out; it needs more memory than it may take.
        SetupError: network, disk or an optional package failed, or the disk is too small.
        InvarianceError: folding changed the model, which is a bug; nothing is left that looks finished.
    """
    there, path = usable_device(device), Path(out)
    if check_source not in ("never", "auto", "always"):
        raise UserError(f"check_source is never, auto or always, got {check_source!r}.")
    source = open_source(str(model), unpack=False)
    _check(source, recipe, processes)
    estimate = Estimate.of(source, recipe, memory, processes, check_source)
    estimate.require_room(path)
    if estimate.warning:
        warnings.warn(estimate.warning, stacklevel=2)
    if source.unpacking:
        source = open_source(str(model))
    load_tokenizer(source.path)  # a model without one is refused before the work, not after it
    if estimate.check:
        require_same_logits(source)
        give_freed_memory_back()

    reuse = ReuseDir(None if reuse_dir is None else Path(reuse_dir))
    calibration = functools.cache(lambda: calibration_tokens(source, recipe))
    spec, budget = recipe.spec, memory_on(there, estimate.budget)
    how: Any = there, recipe.seed, processes, spec.keys, spec.values, budget
    on = FitContext(source, spec.activations, calibration, *how)
    run, num_shards = _identity(source, recipe), source.num_blocks + 2
    with opened_writer(path, run, num_shards, resume=resume, overwrite=overwrite, processes=processes) as writer:
        if recipe.fits_weights:
            calibration()
        windows = tuning_windows(source, recipe.tuning, recipe.calibration.text, recipe.seed)
        began = time.perf_counter()
        transforms, notes = _fitted(on, recipe, writer, reuse)
        fitted = time.perf_counter()
        blocks = _depended_on_by_blocks(on, recipe)
        if (other := reuse.checkpoint(blocks)) is not None:
            writer.reuse(other)
        require_whole(writer, num_shards)
        loop = _Loop(on, recipe, transforms, writer, estimate)
        try:
            invariance = loop.run()
        except InvarianceError as error:
            if not source.graph.traced:
                raise
            raise UserError(
                f"the architecture '{source.config.model_type}' has no table, and the one that was traced is wrong: "
                f"{error} `dfrot models {model}` shows it."
            ) from error
        if by_block := writer.shard_notes():
            notes["weights_by_block"] = by_block
        rounded = time.perf_counter()
        timings = {"fit": fitted - began, "quantize": rounded - fitted}
        if recipe.kv_bits_by_block is not None:
            notes["kv_bits"] = loop.choose_kv_bits(recipe.kv_bits_by_block)
        if windows is not None:
            notes["tuning"] = loop.tune(windows)
            timings["tune"] = time.perf_counter() - rounded
        if processes.is_main:
            if recipe.spec.activations.format == "nvfp4":
                loop.measure_ranges()
            if recipe.spec.keys.enabled and recipe.reads_text:
                notes["cache"] = loop.cache_cost()
                cache.warn_if_dear(notes["cache"], recipe.spec)
            loop.finish(notes)
        writer.sync()
        if not recipe.tuning.enabled:
            reuse.keep_checkpoint(blocks, writer.path)
    return QuantizeResult(path, recipe, timings, invariance, notes)


def _for_no_speed(spec: Spec) -> list[str]:
    """What is to be said where fewer bits than 8 lose quality and save no time; `dfrot info` measures it."""
    if not (spec.weights.integer and spec.activations.integer):
        return ["4-bit floats compute in torch here; dfrot export --to vllm is for GPUs that multiply them"]
    if not (spec.weights.enabled and spec.activations.bits < 8):
        return []
    more = re.sub(r"a\d+", "a8", str(spec), count=1)
    return [
        f"activations of {spec.activations.bits} bits compute as bytes, no faster than those of 8: {more} loses less"
    ]


def _identity(source: Source, recipe: Recipe) -> dict[str, Any]:
    """What tells a run from others."""
    return {"model": source.fingerprint(), "recipe": recipe.to_json(), "dfrot": __version__}


def _depended_on_by_fit(on: FitContext, recipe: Recipe) -> dict[str, Any]:
    """What the transforms of a method depend on: neither the rounding nor the cache."""
    record, method = recipe.to_json(), recipe.method
    read = recipe.calibration.tokens if method.reads_all_text else method.sequences_read
    read = max(read, len(key_means.read_of(on.calibration())) if method.mean_keys else 0)
    text = on.calibration()[:read].numpy().tobytes() if read else b""
    return {
        **_identity(on.source, recipe),
        "recipe": {name: record[name] for name in ("method", "options", "seed")},
        "grids": {kind: record["grids"][kind] for kind in (*method.reads_grids, *["keys"] * method.mean_keys)},
        "text": hashlib.sha256(text).hexdigest(),
        "device": on.device.type,
    }


def _depended_on_by_blocks(on: FitContext, recipe: Recipe) -> dict[str, Any]:
    """What the blocks of a checkpoint depend on, before they are tuned: all of the recipe but the cache."""
    record = recipe.to_json()
    record = {name: value for name, value in record.items() if name not in ("spec", "tune", "kv_bits_by_block")}
    kinds = ("weights", "activations", *["keys"] * recipe.method.mean_keys)
    record["grids"] = {kind: record["grids"][kind] for kind in kinds}
    return {**_identity(on.source, recipe), "recipe": record, "device": on.device.type}


def _fitted(on: FitContext, recipe: Recipe, writer: CheckpointWriter, reuse: ReuseDir) -> Fit:
    """The method's transforms: fitted and kept, or those that the interrupted run, or another one, kept.

    Fitting again would not do: another number of threads rounds differently, and refinement amplifies that.
    """
    text = None
    if recipe.fits_weights:  # a resumed run reads the text again: it has to be the same
        text = hashlib.sha256(on.calibration().numpy().tobytes()).hexdigest()
    if (kept := writer.load_fit()) is None:
        depends_on = _depended_on_by_fit(on, recipe)
        if (kept := reuse.fit(depends_on)) is None:
            progress = FitProgress(writer.load_progress, writer.save_progress)
            (transforms, notes), fitted = recipe.method.fit(replace(on, progress=progress)), dict[str, Tensor]()
            if recipe.method.mean_keys:
                means = key_means.key_means(on, transforms.keys)
                transforms = replace(transforms, key_means=means.vectors)
                notes = notes | {"key_means": means.notes}
            kept = {"transforms": transforms.describe(fitted), "notes": notes}, fitted
            reuse.keep_fit(depends_on, *kept)
        record, tensors = kept
        writer.save_fit({**record, "text": text}, tensors)
        kept = writer.load_fit() or kept  # another process's, if that is the main one
    elif kept[0].get("text") != text:
        raise UserError(
            f"{writer.path} holds an interrupted run whose calibration text was another, though it had the same "
            "name. Resume with that text, choose another -o directory, or --overwrite it."
        )
    record, tensors = kept
    return Fit(Transforms.from_description(record["transforms"], tensors), record["notes"])


class _Loop:
    """From a model and its transforms to the shards of a checkpoint: shard 0 the embedding, then a block each, at last
    the final norm and the head."""

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
        self.runtime = replace(self.runtime, kv_bits=tuple(record["kv_bits"]["bits"]))
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


def calibration_tokens(source: Source, recipe: Recipe) -> Int[Tensor, "sequences seq_len"]:
    """The calibration text that a recipe asks for, in tokens of the model.

    Raises:
        UserError: there is no such text, it is too short, or it has a token for which the embedding has no row.
        SetupError: it has to come from the hub, which cannot be reached.
    """
    wanted = recipe.calibration
    text, generator = read_text(wanted.text, "train"), torch.Generator().manual_seed(recipe.seed)
    tokenizer, rows = load_tokenizer(source.path), source.config.vocab_size
    return calibration_windows(tokenizer, text, wanted.text, rows, wanted.seq_len, wanted.tokens, generator)


def _check(source: Source, recipe: Recipe, processes: ProcessGroup) -> None:
    """Refuse a group size that does not fit the model, and processes that would have no work."""
    wanted, grids = recipe.calibration, (recipe.spec.weights, recipe.spec.activations)
    for name, width in input_widths(source.graph, source.config).items():
        try:
            for grid in grids:
                grouped(torch.empty(width), grid.weight_granularity)
        except ValueError as error:
            raise UserError(f"{name} cannot be quantized: {error}") from error
    if processes.count > 1 and recipe.fits_weights:
        if not recipe.rounding.shares_sequences:
            alone = f"{recipe.rounding.name} learns from one sequence after the other"
            raise UserError(f"{alone}; several processes share gptq, or rtn.")
        if (sequences := wanted.tokens // wanted.seq_len) < processes.count:
            raise UserError(
                f"{processes.count} processes share the calibration text by sequences, and there are {sequences}. "
                f"Give --calib-tokens {processes.count * wanted.seq_len} or more, or a smaller --calib-seq-len."
            )
