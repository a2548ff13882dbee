"""quantize(): what is checked before the work, and its stages, the only orchestration.

Fit the transforms; go through the blocks (loop.py); tune; measure; finish. Memory holds one block, whatever the size of
the model, and a small model goes through the same stages.
"""

import functools
import hashlib
import json
import re
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from dfrot.checkpoint.load import usable_device
from dfrot.checkpoint.writer import CheckpointWriter, ReuseDir, opened_writer
from dfrot.methods import key_means
from dfrot.methods.method import Fit, FitContext, FitProgress
from dfrot.models.source import Source, open_source
from dfrot.models.stream import require_same_logits
from dfrot.models.texts import calibration_windows, load_tokenizer, read_text
from dfrot.pipeline import cache
from dfrot.pipeline.estimate import Estimate
from dfrot.pipeline.loop import Loop
from dfrot.pipeline.recipe import Recipe
from dfrot.quant.affine import grouped
from dfrot.quant.spec import Spec
from dfrot.system.devices import memory_on
from dfrot.system.distributed import SINGLE_PROCESS, ProcessGroup
from dfrot.system.errors import UserError
from dfrot.system.memory import give_freed_memory_back
from dfrot.system.products import with_fast_products
from dfrot.transform.invariance import InvarianceError
from dfrot.transform.transforms import Transforms, input_widths
from dfrot.tuning.run import require_whole, tuning_windows
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
        whole = self.notes.get("part_of")
        return [
            *([f"the language model of {whole}, without the rest: it reads text alone"] if whole else []),
            *self.recipe.method.summary(self.notes),
            *key_means.summary(self.notes.get("key_means", {})),
            *self.recipe.rounding.summary(self.notes.get("weights_by_block", [])),
            *self.recipe.tuning.summary(self.notes.get("tuning", {}), self.recipe.spec),
            *cache.summary(self.notes.get("cache", {}), self.notes.get("kv_bits", {})),
            *_for_no_speed(self.recipe.spec),
            f"folding changed the model by {self.invariance:.0e} (float64, relative)",
        ]


@with_fast_products
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
    source = open_source(str(model), fetch=False)
    require_fitting(source, recipe, processes)
    estimate = Estimate.of(source, recipe, memory, processes, check_source)
    estimate.require_room(path)
    if estimate.warning:
        warnings.warn(estimate.warning, stacklevel=2)
    if not source.path.is_dir():  # a GGUF file, which the tokenizer comes out of, too
        source = open_source(str(model))
    load_tokenizer(source.path)  # a model without one is refused before the work, not after it
    if source.pending:
        source = open_source(str(model))
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
        notes |= {"part_of": source.part_of} if source.part_of else {}
        fitted = time.perf_counter()
        blocks = _depended_on_by_blocks(on, recipe, transforms)
        if (other := reuse.checkpoint(blocks)) is not None:
            writer.reuse(other)
        require_whole(writer, num_shards)
        loop = Loop(on, recipe, transforms, writer, estimate)
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
        **_computed_by(on),
    }


def _depended_on_by_blocks(on: FitContext, recipe: Recipe, transforms: Transforms) -> dict[str, Any]:
    """What the blocks of a checkpoint depend on, before they are tuned: all of the recipe but the cache, on which the
    transforms may depend."""
    record, fitted = recipe.to_json(), dict[str, Tensor]()
    record = {name: value for name, value in record.items() if name not in ("spec", "tune", "kv_bits_by_block")}
    record["grids"] = {kind: record["grids"][kind] for kind in ("weights", "activations")}
    read = hashlib.sha256(json.dumps(transforms.describe(fitted), sort_keys=True).encode())
    for name in sorted(fitted):
        read.update(fitted[name].cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return {**_identity(on.source, recipe), "recipe": record, **_computed_by(on), "fit": read.hexdigest()}


def _computed_by(on: FitContext) -> dict[str, Any]:
    """What decides how sums are rounded."""
    return {"device": on.device.type, "threads": torch.get_num_threads()}


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


def require_fitting(source: Source, recipe: Recipe, processes: ProcessGroup = SINGLE_PROCESS) -> None:
    """Raise UserError for a group size or an average of bits that does not fit the model, and for processes that would
    have no work."""
    if recipe.kv_bits_by_block is not None:
        cache.blocks_with_more(source.num_blocks, recipe.spec.keys.bits, recipe.kv_bits_by_block)
    wanted = recipe.calibration
    require_groups(recipe.spec, input_widths(source.graph, source.config))
    if processes.count > 1 and recipe.fits_weights:
        if not recipe.rounding.shares_sequences:
            alone = f"{recipe.rounding.name} learns from one sequence after the other"
            raise UserError(f"{alone}; several processes share gptq, or rtn.")
        if (sequences := wanted.tokens // wanted.seq_len) < processes.count:
            raise UserError(
                f"{processes.count} processes share the calibration text by sequences, and there are {sequences}. "
                f"Give --calib-tokens {processes.count * wanted.seq_len} or more, or a smaller --calib-seq-len."
            )


def require_groups(spec: Spec, widths: Mapping[str, int]) -> None:
    """Raise UserError for a group size that does not divide an input of a linear layer."""
    for name, width in widths.items():
        try:
            for grid in (spec.weights, spec.activations):
                grouped(torch.empty(width), grid.weight_granularity)
        except ValueError as error:
            raise UserError(f"{name} cannot be quantized: {error}") from error
