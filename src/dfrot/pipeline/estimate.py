"""What quantizing a model will take, from its config and the headers of its files: memory and disk.

One of several stages needs the most memory: fitting the rotations, folding the embedding or head, a decoder block,
tuning, or measuring what the cache costs. All count the tensors that are there at the same time; methods and roundings
count their own. malloc may keep as much again of freed memory (system/memory.py), which is not counted; the command
line lets it only where there is room. The hidden states of the calibration text come on top, unless they do not fit:
then they are offloaded to disk.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dfrot.methods import key_means
from dfrot.methods.method import FitContext
from dfrot.models.sizes import ModelSizes
from dfrot.models.source import Source
from dfrot.pipeline import cache
from dfrot.pipeline.recipe import Recipe
from dfrot.quant.packing import packed_width
from dfrot.system.distributed import SINGLE_PROCESS, ProcessGroup
from dfrot.system.errors import SetupError, UserError
from dfrot.system.memory import available_memory
from dfrot.transform.transforms import Transforms
from dfrot.tuning.tuning import NOTHING, Needs

# Folding the embedding or head in float64 takes this many rows at a time, so that no float64 copy of it exists.
VOCABULARY_ROWS = 8192

# Measured on x86-64 with smollm2-135m, and on one block of LLaMA-2-7B's shape.
_PROCESS = 460_000_000  # bytes of Python, torch, transformers and a tokenizer
_SLACK = 1.1  # resident memory over the tensors that are counted here
_FOLD64 = 24  # bytes by entry while one weight is folded in float64: it, what it becomes, and what lies between


@dataclass(frozen=True)
class Estimate:
    """What a run is expected to take. All sizes are in bytes."""

    blocks: int  # decoder blocks
    block_weights: int  # entries of the linear layers of one block
    block_bytes: int  # of one block, as the source stores it
    resident: int  # peak memory of one process without the states
    states: int  # hidden states of the calibration text, of one process
    checkpoint: int  # written to disk
    budget: int  # memory that may be taken by one process
    processes: int = 1  # that share the machine
    warning: str | None = None  # the rounding's, about so much calibration text
    check: int = 0  # peak memory of comparing the source with transformers first; 0: that is left out
    tuning: Needs = NOTHING
    pending: int = 0  # of the source, still to come into a cache. A block takes more memory later than that does
    comes: str = ""  # how

    @staticmethod
    def of(
        source: Source,
        recipe: Recipe,
        memory: int | None = None,
        processes: ProcessGroup = SINGLE_PROCESS,
        check_source: str = "auto",
    ) -> "Estimate":
        """The estimate for a model; no weight is read.

        Args:
            memory: the budget in bytes; None takes what the machine has available.
            processes: that work together; those on this machine share the budget.
            check_source: as `quantize` takes it.

        Raises:
            UserError: the model has no place for the method's rotations.
        """
        dtypes, wanted = recipe.dtypes(source.dtype), recipe.calibration
        if source.graph.traced and check_source == "auto":  # nothing else has proved that it is read rightly
            check_source = "always"
        sizes = ModelSizes(source, dtypes.working, dtypes.stored, wanted.seq_len, wanted.tokens)
        sequences = -(-(wanted.tokens // wanted.seq_len) // processes.count)  # of one process
        on = FitContext(source, recipe.spec.activations, _no_text, torch.device("cpu"), recipe.seed)
        outline = recipe.method.outline(on)
        # the embedding or the head, while it is folded
        vocabulary = sizes.vocabulary * sizes.hidden * (sizes.source + sizes.stored)
        vocabulary += _FOLD64 * min(sizes.vocabulary, VOCABULARY_ROWS) * sizes.hidden
        budget = (available_memory() if memory is None else memory) // processes.local
        tuning = recipe.tuning.needs(sizes, recipe.spec)
        stages = [
            recipe.method.peak_bytes(sizes, budget),
            vocabulary,
            _block_bytes(sizes, recipe),
            tuning.memory(budget),
        ]
        if recipe.method.mean_keys:
            stages.append(key_means.peak_bytes(sizes))
        if recipe.spec.keys.enabled and recipe.reads_text:
            stages.append(cache.peak_bytes(sizes, recipe.kv_bits_by_block is not None))
        state = sizes.working * sizes.hidden + recipe.rounding.state_bytes(sizes)
        # the whole model in float32, and its files, which are mapped
        every = (*source.stored.values(), *source.rest)
        check = int(_SLACK * (_PROCESS + sum(4 * each.shape.numel() + each.nbytes for each in every)))
        return Estimate(
            blocks=source.num_blocks,
            block_weights=sum(rows * columns for rows, columns in sizes.linears.values()),
            block_bytes=sizes.block * sizes.source,
            resident=int(_SLACK * (_PROCESS + max(stages))),
            states=sequences * wanted.seq_len * state if recipe.fits_weights else 0,
            checkpoint=_checkpoint_bytes(sizes, source, recipe, outline),
            budget=budget,
            processes=processes.local,
            warning=recipe.rounding.warning(sizes) if recipe.fits_weights else None,
            check=check if check_source == "always" or (check_source == "auto" and check <= budget) else 0,
            tuning=tuning,
            pending=source.pending,
            comes=source.comes,
        )

    @property
    def offloads(self) -> bool:
        """Whether the states go into a file beside the checkpoint."""
        return self.states > 0 and self.resident + self.states > self.budget

    @property
    def memory(self) -> int:
        """Expected peak, but for `check`."""
        return self.resident + (0 if self.offloads else self.states)

    @property
    def tight(self) -> bool:
        """Whether there is no room for freed memory to be kept."""
        return 2 * self.memory > self.budget

    @property
    def disk(self) -> int:
        """Expected in the checkpoint's directory while the run is under way."""
        states = self.states * self.processes if self.offloads else 0
        return self.checkpoint + max(states, self.tuning.disk * self.processes + self.tuning.state)

    def require_room(self, out: Path) -> None:
        """Raise before the work an error that would otherwise come in the middle of it.

        Raises:
            UserError: the budget is too small even with all states offloaded.
            SetupError: the disk of `out` does not hold the checkpoint and the offloaded states.
        """
        if self.memory > self.budget:
            raise UserError(
                f"this needs {_gb(self.memory)} of memory that is not offloaded; the budget is {_gb(self.budget)}. "
                "Give a larger --memory if there is more, or --weights rtn, which needs the least."
            )
        if self.check > self.budget:
            raise UserError(
                f"--check-source always needs {_gb(self.check)} of memory; the budget is {_gb(self.budget)}. "
                "Give a larger --memory if there is more, or --check-source auto or never."
            )
        free = free_disk(out)
        if self.disk > free:
            offloaded = f" and {_gb(self.disk - self.checkpoint)} until it is done" * (self.disk > self.checkpoint)
            fewer = ", fewer --calib-tokens or --tune-steps, a larger --memory" * (self.disk > self.checkpoint)
            raise SetupError(
                f"{out} needs {_gb(self.checkpoint)} for the checkpoint{offloaded}; its disk has {_gb(free)}. "
                f"Make room, or choose an -o directory on another disk{fewer}."
            )

    def __str__(self) -> str:
        where = "on disk" if self.offloads else "in memory"
        kept = "" if self.tight else ", as much again of freed memory kept"
        states = f", {_gb(self.states)} of calibration states {where}" if self.states else ""
        each = f", for each of {self.processes} processes" if self.processes > 1 else ""
        if self.check:
            kept += f", {_gb(self.check)} while the source is checked"
        offloaded = f", and {_gb(self.disk - self.checkpoint)} until it is done" * (self.disk > self.checkpoint)
        cached = f"\nexpected in the cache {_gb(self.pending)}, {self.comes} and kept" if self.pending else ""
        return (
            f"{self.blocks} blocks of {self.block_weights / 1e6:.1f} million weights, {_gb(self.block_bytes)} each\n"
            f"expected peak memory {_gb(max(self.memory, self.check))} of {_gb(self.budget)}{states}{kept}{each}\n"
            f"expected on disk {_gb(self.checkpoint)}{offloaded}{cached}"
        )


def _no_text() -> Tensor:
    raise AssertionError("an outline reads no text: a method that does has an outline beside its fit")


def free_disk(out: Path) -> int:
    """Bytes that may be written to a directory, made or not: what is free, and what is there and will be replaced."""
    there = [file.stat().st_size for file in out.iterdir() if file.is_file()] if out.is_dir() else []
    existing = next(folder for folder in (out.absolute(), *out.absolute().parents) if folder.is_dir())
    return shutil.disk_usage(existing).free + sum(there)


def _block_bytes(sizes: ModelSizes, recipe: Recipe) -> int:
    """Folding a block, and then rounding it or casting it to be stored."""
    folding = sizes.block * (sizes.source + sizes.working) + _FOLD64 * sizes.largest
    if not recipe.spec.weights.enabled:
        return folding + sizes.block * sizes.stored
    return max(folding, recipe.rounding.peak_bytes(sizes))


def _checkpoint_bytes(sizes: ModelSizes, source: Source, recipe: Recipe, outline: Transforms) -> int:
    """All tensors of the checkpoint, exactly."""
    spec, working = recipe.spec.weights, recipe.dtypes(source.dtype).working
    block = sizes.block * sizes.stored
    for rows, width in sizes.linears.values() if spec.enabled else ():
        groups = 1 if spec.group is None else width // spec.group
        packed = packed_width(width, spec.bits) + groups * (2 if spec.symmetric else 3)  # scale and zero point
        block += rows * (packed - width * sizes.stored)
    if outline.offsets or "biases" in recipe.tuning.parts:
        block += sizes.unbiased * sizes.stored
    block += sum(tensor.nbytes for tensor in outline.online_tensors(0, source.graph, working).values())
    graph, rows = source.graph, (1 if source.tied and not outline.unties_head else 2) * sizes.vocabulary + 1
    if graph.positions:
        rows += len(source.skeleton.get_submodule(graph.positions).weight)  # type: ignore[arg-type]
    if recipe.method.mean_keys:
        block += sizes.kv_heads * max(working.itemsize, 4)
    biased = {f"{graph.head}.bias", f"{graph.final_norm}.bias"} & source.stored.keys()
    head_bias = sizes.vocabulary if biased else 0
    return block * sizes.num_blocks + (rows * sizes.hidden + head_bias) * sizes.stored


def _gb(size: int) -> str:
    return f"{size / 1e9:.2f} GB"
