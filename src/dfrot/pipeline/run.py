"""quantize(): the loop over decoder blocks, the only orchestration.

Fit the transforms; then for each block: load, check, fold, quantize, write, free. Memory holds one block, whatever the
size of the model, and a small model goes through the same loop.
"""

import contextlib
import functools
import hashlib
import shutil
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from dfrot.checkpoint.load import usable_device
from dfrot.checkpoint.reuse import Shared
from dfrot.checkpoint.writer import CheckpointWriter, opened_writer
from dfrot.methods import METHODS
from dfrot.methods.method import Context
from dfrot.models.source import Source, open_source, stored_tensors
from dfrot.models.texts import calibration_windows, read_text
from dfrot.pipeline.estimate import VOCABULARY_ROWS, Estimate, rotates_residual, storage_dtype, working_dtype
from dfrot.pipeline.recipe import GPTQ, LWC, DFRot, DuQuant, Recipe
from dfrot.rounding import WEIGHTS
from dfrot.rounding.stream import BlockTask, CalibrationStream, runtime_block
from dfrot.runtime.config import RuntimeConfig
from dfrot.runtime.linear import packed_tensors
from dfrot.system.distributed import SINGLE_PROCESS, ProcessGroup
from dfrot.system.errors import SetupError, UserError
from dfrot.system.memory import give_freed_memory_back
from dfrot.system.progress import track
from dfrot.transform.fold import Fold
from dfrot.transform.invariance import InvarianceCheck
from dfrot.transform.transforms import Transforms, block_folds, fold_block_
from dfrot.version import __version__


@dataclass
class Report:
    """What a run did.

    Attributes:
        path: the checkpoint.
        timings_s: seconds per stage.
        invariance: the largest float64 error that folding made, relative; rounding if all is well.
        notes: what the method found out while it fitted; also in the checkpoint's fit.json.
    """

    path: Path
    timings_s: dict[str, float] = field(default_factory=dict)
    invariance: float = 0.0
    notes: dict[str, Any] = field(default_factory=dict)

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.timings_s[name] = self.timings_s.get(name, 0.0) + time.perf_counter() - started


def quantize(
    model: str | Path,
    recipe: Recipe,
    out: str | Path,
    *,
    device: str | torch.device = "cpu",
    resume: bool = False,
    overwrite: bool = False,
    memory: int | None = None,
    share: str | Path | None = None,
    processes: ProcessGroup = SINGLE_PROCESS,
) -> Report:
    """Rotate and quantize a model into a checkpoint directory.

    Args:
        model: a directory with safetensors weights, a .gguf file, a hub id, or `smollm2-135m`.
        recipe: what to do; see `Recipe.parse`.
        out: the checkpoint directory to make.
        device: where to compute.
        resume: continue a run that was interrupted.
        overwrite: replace a checkpoint that is there.
        memory: bytes that may be taken; None takes what the machine has available. If the hidden states of the
            calibration text do not fit, they go into a memory-mapped file in `out`.
        share: a folder in which runs leave what others can take: fitted rotations, and blocks if recipes differ in the
            cache alone.
        processes: that make this checkpoint together, and have joined. Its numbers are those of one process but for the
            order in which sums over tokens are rounded.

    Raises:
        UserError: the request cannot be carried out as it was made; it needs more memory than it may take.
        SetupError: network, disk or an optional package failed, or the disk is too small.
        InvarianceError: folding changed the model, which is a bug; nothing is left that looks finished.
    """
    there = usable_device(device)
    source = open_source(str(model))
    _check_sizes(source, recipe)
    _check_shares(recipe, processes)
    _warn_of_few_tokens(source, recipe)
    expected = Estimate.of(source, recipe, memory, processes)
    expected.require_room(Path(out))
    source.tokenizer()  # a model without one is refused before the work, not after it
    report = Report(Path(out))
    calibration = functools.cache(lambda: calibration_tokens(source, recipe))
    context = Context(source, recipe, calibration, there, report.notes, processes)
    shared = Shared(None if share is None else Path(share))
    num_shards = source.num_blocks + 2
    run = _run(source, recipe)
    with opened_writer(report.path, run, num_shards, resume=resume, overwrite=overwrite, processes=processes) as writer:
        with report.stage("fit"):
            transforms = _fitted(context, writer, shared)
        with report.stage("quantize"):
            online = transforms.online(source.graph, source.config)
            keys = transforms.keys if recipe.spec.keys.enabled else None
            plan = RuntimeConfig(recipe.spec, online, keys, transforms.blocks(source.graph))
            blocks = _depended_on_by_blocks(context)
            if (other := shared.checkpoint(blocks)) is not None:
                writer.adopt(other)
            _quantize_blocks(context, transforms, plan, writer, report, expected)
            if processes.is_main:
                _finish(context, transforms, plan, writer)
            writer.agree()
            shared.keep_checkpoint(blocks, writer.path)
    return report


def _depended_on_by_fit(context: Context) -> dict[str, Any]:
    """What the transforms of a method depend on: neither the weight quantizer nor the cache."""
    recipe = context.recipe
    read = {DFRot: getattr(recipe.method, "samples", 0), DuQuant: 1}.get(type(recipe.method), 0)  # sequences
    text = context.calibration()[:read].numpy().tobytes() if read else b""
    return {
        **_run(context.source, recipe),
        "recipe": {name: recipe.to_json()[name] for name in ("method", "options", "seed")},
        "activations": recipe.to_json()["grids"]["activations"],
        "learns_clipping": isinstance(recipe.method, DuQuant) and isinstance(recipe.weights, LWC),
        "text": hashlib.sha256(text).hexdigest(),
        "device": context.device.type,
    }


def _depended_on_by_blocks(context: Context) -> dict[str, Any]:
    """What the blocks of a checkpoint depend on: all of the recipe but the cache."""
    recipe = context.recipe.to_json()
    del recipe["spec"]
    recipe["grids"] = {kind: recipe["grids"][kind] for kind in ("weights", "activations")}
    return {**_run(context.source, context.recipe), "recipe": recipe, "device": context.device.type}


def _run(source: Source, recipe: Recipe) -> dict[str, Any]:
    return {"model": source.fingerprint(), "recipe": recipe.to_json(), "dfrot": __version__}


def _fitted(context: Context, writer: CheckpointWriter, shared: Shared) -> Transforms:
    """The method's transforms: fitted and kept, or those that the interrupted run, or another one, kept.

    Fitting again would not do: another number of threads rounds differently, and refinement amplifies that.
    """
    text = None
    if context.recipe.fits_weights:  # a resumed run reads the text again: it has to be the same
        text = hashlib.sha256(context.calibration().numpy().tobytes()).hexdigest()
    if (kept := writer.load_fit()) is not None:
        record, tensors = kept
        if record.get("text") != text:
            raise UserError(
                f"{writer.path} holds an interrupted run whose calibration text was another, though it had the same "
                "name. Resume with that text, choose another -o directory, or --overwrite it."
            )
        transforms = Transforms.from_description(record["transforms"], tensors)
        if not transforms.fit(context.source.graph, context.source.config):
            raise UserError(f"{writer.path} keeps the rotations of another model. Begin again with --overwrite.")
        context.notes.update(record["notes"])
        return transforms
    depends_on = _depended_on_by_fit(context)
    if (kept := shared.fit(depends_on)) is None:
        transforms = METHODS[context.recipe.method_name](context)
        tensors = {}
        kept = {"transforms": transforms.describe(tensors), "notes": dict(context.notes)}, tensors
        shared.keep_fit(depends_on, *kept)
    record, tensors = kept
    context.notes.update(record["notes"])
    writer.save_fit({**record, "text": text}, tensors)
    record, tensors = writer.load_fit() or kept  # another process's, if that is the first
    return Transforms.from_description(record["transforms"], tensors)


def _quantize_blocks(
    context: Context,
    transforms: Transforms,
    plan: RuntimeConfig,
    writer: CheckpointWriter,
    report: Report,
    expected: Estimate,
) -> None:
    source, recipe = context.source, context.recipe
    stored = storage_dtype(source, recipe)
    working = working_dtype(source, recipe)
    embedding = source.embedding()
    check = InvarianceCheck(source, embedding, recipe.seed)
    if not writer.has(0):
        folded = _fold_rows(embedding, Fold(input_rotation=transforms.residual), stored, context.device)
        writer.write(0, {f"{source.graph.embedding}.weight": folded})
        del folded
    del embedding  # a gigabyte for some models
    stream = None
    if recipe.fits_weights and not all(map(writer.has, range(1, source.num_blocks + 1))):
        (rows,) = writer.read(0).values()
        stream = CalibrationStream(
            source,
            plan,
            rows,
            context.calibration(),
            working,
            context.device,
            writer.path if expected.offloads else None,
            isinstance(recipe.weights, LWC),
            context.processes,
        )
        del rows

    def through(index: int) -> None:  # a function: nothing of a block outlives it
        block = source.block(index)
        prefix = f"{source.graph.blocks}.{index}."
        done = writer.has(index + 1)
        if done and (stream is None or stream.teacher_states is None):
            check.advance(index, block)
        else:
            folds = block_folds(transforms, index, source.graph, source.config, block)
            error = check.block(index, block, folds, transforms.residual)
            report.invariance = max(report.invariance, error)
            block.to(context.device)
            fold_block_(block, folds, source.graph, working)
            state = block.state_dict()
            del block  # the layers' weights go as soon as they are rounded
            rotations = transforms.online_tensors(index, source.graph, working)
            if stream is not None:
                stream.advance_teacher(index, state | rotations)
        if not done:
            tensors, notes = quantize_block(index, state, rotations, source, recipe, plan, stream, stored)
            writer.write(index + 1, {prefix + name: tensor for name, tensor in tensors.items()}, notes)
        if stream is not None:
            kept = writer.read(index + 1)
            stream.advance(index, {name.removeprefix(prefix): tensor for name, tensor in kept.items()})

    for index in track(range(source.num_blocks), "quantizing"):
        through(index)
        if expected.tight:
            give_freed_memory_back()
    stream = None  # the head may need the room
    norm, head = source.final_norm(), source.head()
    fuses = transforms.residual is not None
    fold = Fold(gain=norm.weight if fuses else None, input_rotation=transforms.residual)
    report.invariance = max(report.invariance, check.head(norm, head, fold, transforms.residual))
    if writer.has(source.num_blocks + 1):
        return
    last = {f"{source.graph.final_norm}.weight": fold.norm_gain(norm.weight).to(stored)}
    if not _stays_tied(source, recipe):
        last[f"{source.graph.head}.weight"] = _fold_rows(head, fold, stored, context.device)
    writer.write(source.num_blocks + 1, last)


def quantize_block(
    index: int,
    folded: dict[str, Tensor],
    rotations: dict[str, Tensor],
    source: Source,
    recipe: Recipe,
    plan: RuntimeConfig,
    stream: CalibrationStream | None,
    stored: torch.dtype,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors that a checkpoint keeps of a folded block, under the names of the runtime's modules, and notes.

    The weights of quantized layers are taken out of `folded`.
    """
    spec = recipe.spec.weights
    linears = {f"{name}.weight": folded.pop(f"{name}.weight") for name in source.graph.linears if spec.enabled}
    # what is not quantized is already as it will be stored
    tensors = {name: _narrowed(tensor, stored, name) for name, tensor in folded.items() if name not in linears}
    tensors |= rotations
    if not spec.enabled:
        return tensors, {}
    wide = linears[f"{source.graph.down}.weight"]
    module = runtime_block(source, index, tensors | linears, plan.without("weights", "activations")).to(wide.dtype)
    task = BlockTask(index, module.to(wide.device), source, recipe, stream)
    del linears, wide
    for name, (codes, qparams) in WEIGHTS[recipe.weights_name](task).items():
        tensors |= {f"{name}.{key}": tensor for key, tensor in packed_tensors(codes, qparams, spec).items()}
    return tensors, task.notes


def _fold_rows(matrix: Tensor, fold: Fold, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A folded embedding or head, (vocabulary, hidden)."""
    folded = torch.empty(matrix.shape, dtype=dtype)
    for rows, into in zip(matrix.split(VOCABULARY_ROWS), folded.split(VOCABULARY_ROWS), strict=True):
        into.copy_(_narrowed(fold.weight(rows.to(device)), dtype, "the embedding or head"))
    return folded


def _narrowed(tensor: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    narrow = tensor.to(dtype)
    if not torch.isfinite(narrow).all():
        raise UserError(f"{name} does not fit into {dtype}: choose --dtype bfloat16.")
    return narrow


def _finish(context: Context, transforms: Transforms, plan: RuntimeConfig, writer: CheckpointWriter) -> None:
    source, recipe = context.source, context.recipe
    config = source.config.to_dict()
    config["architectures"] = [type(source.skeleton).__name__]
    config["tie_word_embeddings"] = _stays_tied(source, recipe)
    config["dtype"] = str(compute_dtype(source, recipe)).removeprefix("torch.")
    unquantized = 2 * sum(shape.numel() for _, shape, _ in stored_tensors(set(source.files.values())))
    config["quantization_config"] = {**plan.to_json(recipe), "unquantized_bytes": unquantized}
    try:
        source.tokenizer().save_pretrained(writer.path)
        if (settings := source.path / "generation_config.json").is_file():
            shutil.copyfile(settings, writer.path / settings.name)
    except ValueError as error:  # of transformers: names in its files that lead out of the directory
        raise UserError(f"the tokenizer of {source.path} cannot be kept: {error}") from error
    except Exception as error:  # tokenizers reports a full disk as a plain Exception
        raise SetupError(
            f"cannot write the tokenizer to {writer.path}: {error}. Make room or allow writing. "
            "The same command with --resume instead of --overwrite continues."
        ) from error
    if by_block := writer.shard_notes():
        context.notes["weights_by_block"] = by_block
    writer.finish(config, context.notes)


def _stays_tied(source: Source, recipe: Recipe) -> bool:
    """A head that absorbs the last norm's gain can no longer be the embedding."""
    return source.tied and not rotates_residual(recipe)


def compute_dtype(source: Source, recipe: Recipe) -> torch.dtype:
    """What the checkpoint computes in unless its loader says otherwise: the source's own dtype."""
    return source.dtype if recipe.dtype == "auto" else getattr(torch, recipe.dtype)


def calibration_tokens(source: Source, recipe: Recipe) -> Int[Tensor, "sequences seq_len"]:
    """The calibration text that a recipe asks for, in tokens of the model.

    Raises:
        UserError: there is no such text, or it is too short.
        SetupError: it has to come from the hub, which cannot be reached.
    """
    wanted = recipe.calibration
    return calibration_windows(
        source.tokenizer(),
        read_text(wanted.text, "train"),
        wanted.text,
        wanted.seq_len,
        wanted.tokens,
        torch.Generator().manual_seed(recipe.seed),
    )


def _widths(source: Source) -> dict[str, int]:
    """in_features of the linear layers of a block."""
    block = source.skeleton.get_submodule(f"{source.graph.blocks}.0")
    return {name: block.get_submodule(name).in_features for name in source.graph.linears}  # type: ignore[misc]


def _warn_of_few_tokens(source: Source, recipe: Recipe) -> None:
    """A Hessian of fewer tokens than channels is singular: the weights would be fitted to the calibration text."""
    wanted = recipe.calibration
    tokens = wanted.tokens // wanted.seq_len * wanted.seq_len
    name, width = max(_widths(source).items(), key=lambda item: item[1])
    if recipe.fits_weights and isinstance(recipe.weights, GPTQ) and tokens < width:
        warnings.warn(
            f"{tokens} calibration tokens are few for GPTQ: {name} has {width} inputs. Give --calib-tokens {8 * width} "
            "or more.",
            stacklevel=3,
        )


def _check_shares(recipe: Recipe, processes: ProcessGroup) -> None:
    """Refuse several processes where there is not something for each."""
    if processes.count == 1 or not recipe.fits_weights:
        return
    if isinstance(recipe.weights, LWC):
        raise UserError("lwc learns from one sequence after the other; several processes can share gptq, or rtn.")
    wanted = recipe.calibration
    if (sequences := wanted.tokens // wanted.seq_len) < processes.count:
        raise UserError(
            f"{processes.count} processes share the calibration text by sequences, and there are {sequences}. "
            f"Give --calib-tokens {processes.count * wanted.seq_len} or more, or a smaller --calib-seq-len."
        )


def _check_sizes(source: Source, recipe: Recipe) -> None:
    """Refuse a group size that does not fit before any work is done."""
    group = recipe.spec.weights.group
    if group is None or not recipe.spec.weights.enabled:
        return
    for name, width in _widths(source).items():
        if width % group:
            fitting = [g for g in (16, 32, 64, 128, 256) if width % g == 0]
            raise UserError(
                f"group_size must divide in_features: {name} has in_features={width}, group_size={group}. "
                f"Try {' or '.join(f'g{g}' for g in fitting) or 'no group (one scale per channel)'}."
            )
