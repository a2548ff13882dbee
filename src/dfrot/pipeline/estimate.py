"""What quantizing a model will take, from its config and the headers of its files: memory, disk, roughly how long.

Three stages may need the most memory: fitting the rotations, folding the embedding or head, and a decoder block. All
count the tensors that are there at the same time. malloc may keep as much again of what was freed (memory.py), which is
not counted; the command line lets it only where there is room. The hidden states of the calibration text come on top,
unless they do not fit: then they are offloaded.
"""

import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from dfrot.methods.dfrot import GAMMAS, ORDINARY_TOKENS
from dfrot.methods.duquant import block_size
from dfrot.models.graph import head_dim
from dfrot.models.source import Source
from dfrot.pipeline.recipe import GPTQ, LWC, DFRot, DuQuant, QuaRot, Recipe
from dfrot.quant.packing import packed_width
from dfrot.rounding.gptq import FLOAT64_UP_TO, PIECE_ENTRIES
from dfrot.system.distributed import SINGLE_PROCESS, ProcessGroup
from dfrot.system.errors import SetupError, UserError
from dfrot.system.memory import available_memory

# Folding the embedding or head in float64 takes this many rows at a time, so that no float64 copy of it exists.
VOCABULARY_ROWS = 8192

# Measured on x86-64 with smollm2-135m. Times are of one core and meant to be right within a factor of three.
_PROCESS = 460_000_000  # bytes of Python, torch, transformers and a tokenizer
_SLACK = 1.1  # of what was resident, over the tensors counted here; also on one block of LLaMA-2-7B's shape
_FOLD64 = 24  # bytes by entry while one weight is folded in float64: it, what it becomes, what lies between
_SECONDS_BY_WEIGHT = 3.6e-7  # folding and checking twice, searching for clip ratios, packing
_SECONDS_BY_CHANNEL = 1.9e-3  # DuQuant's search, by channel that a linear layer reads
_SECONDS_BY_STEP = 1.5e-8  # rounding one weight in one step of LWC, forwards and backwards
_EFFICIENCY = 0.5  # of all products, against one large product by itself


@dataclass(frozen=True)
class Estimate:
    """What a run is expected to take. All sizes are in bytes.

    Attributes:
        blocks: how many decoder blocks.
        block_weights: entries of the linear layers of one.
        block_bytes: of one, as the source stores it.
        resident: peak memory without the states.
        states: hidden states of the calibration text.
        checkpoint: what is written.
        budget: memory that may be taken.
        seconds: roughly, with the threads that torch has now.
        processes: how many on this machine share the budget. Memory and states are those of each.
    """

    blocks: int
    block_weights: int
    block_bytes: int
    resident: int
    states: int
    checkpoint: int
    budget: int
    seconds: float
    processes: int = 1

    @staticmethod
    def of(
        source: Source, recipe: Recipe, memory: int | None = None, processes: ProcessGroup = SINGLE_PROCESS
    ) -> "Estimate":
        """The plan for a model; no weight is read.

        Args:
            memory: the budget in bytes; None takes what the machine has available.
            processes: that work together; those on this machine share the budget.
        """
        shapes = _Shapes(source, recipe, processes)
        return Estimate(
            blocks=source.num_blocks,
            block_weights=sum(rows * columns for rows, columns in shapes.linears.values()),
            block_bytes=shapes.block * source.dtype.itemsize,
            resident=int(_SLACK * (_PROCESS + shapes.largest_stage())),
            states=shapes.states_bytes(),
            checkpoint=shapes.checkpoint_bytes(),
            budget=(available_memory() if memory is None else memory) // processes.local,
            seconds=shapes.seconds(),
            processes=processes.local,
        )

    @property
    def offloads(self) -> bool:
        """Whether the states go into a file beside the checkpoint."""
        return self.states > 0 and self.resident + self.states > self.budget

    @property
    def memory(self) -> int:
        """Expected peak."""
        return self.resident + (0 if self.offloads else self.states)

    @property
    def tight(self) -> bool:
        """Whether there is no room for freed memory to be kept."""
        return 2 * self.memory > self.budget

    @property
    def disk(self) -> int:
        """Expected in the checkpoint's directory while the run is under way."""
        return self.checkpoint + (self.states * self.processes if self.offloads else 0)

    def require_room(self, out: Path) -> None:
        """Raise before the work what would come in the middle of it.

        Raises:
            UserError: the budget does not hold what cannot be offloaded.
            SetupError: the disk of `out` does not hold the checkpoint and what is offloaded.
        """
        if self.memory > self.budget:
            raise UserError(
                f"memory has to hold what cannot be offloaded, {_gb(self.memory)} as far as can be told; the budget is "
                f"{_gb(self.budget)}. Give a larger --memory if there is more, or --weights rtn, which needs the least."
            )
        free = free_disk(out)
        if self.disk > free:
            offloaded = f" and {_gb(self.states)} of offloaded states" if self.offloads else ""
            fewer = ", fewer --calib-tokens, a larger --memory" if self.offloads else ""
            raise SetupError(
                f"{out} needs {_gb(self.checkpoint)} for the checkpoint{offloaded}; its disk has {_gb(free)}. "
                f"Make room, or choose an -o directory on another disk{fewer}."
            )

    def __str__(self) -> str:
        where = "on disk" if self.offloads else "in memory"
        kept = "" if self.tight else ", as much again of freed memory kept"
        states = f", {_gb(self.states)} of calibration states {where}" if self.states else ""
        each = f", for each of {self.processes} processes" if self.processes > 1 else ""
        return (
            f"{self.blocks} blocks of {self.block_weights / 1e6:.1f} million weights, {_gb(self.block_bytes)} each\n"
            f"expected peak memory {_gb(self.memory)} of {_gb(self.budget)}{states}{kept}{each}\n"
            f"expected on disk {_gb(self.checkpoint)}{f', and {_gb(self.states)} until it is done' * self.offloads}\n"
            f"roughly {_duration(self.seconds)} with {torch.get_num_threads()} threads"
        )


def free_disk(out: Path) -> int:
    """Bytes that may be written to a directory, made or not: what is free, and what is there and will be replaced."""
    there = [file.stat().st_size for file in out.iterdir() if file.is_file()] if out.is_dir() else []
    existing = next(folder for folder in (out.absolute(), *out.absolute().parents) if folder.is_dir())
    return shutil.disk_usage(existing).free + sum(there)


class _Shapes:
    """Sizes of a model's tensors, and what follows from them under a recipe."""

    def __init__(self, source: Source, recipe: Recipe, processes: ProcessGroup) -> None:
        self.source, self.recipe, self.processes = source, recipe, processes
        block = source.empty_block(0)
        self.tensors = {name: tensor.shape for name, tensor in block.state_dict().items()}
        self.linears = {name: self.tensors[f"{name}.weight"] for name in source.graph.linears}  # (out, in)
        self.stages = [  # rows of all layers that read one input, and its width
            (sum(self.linears[name][0] for name in stage), self.linears[stage[0]][1]) for stage in source.graph.stages
        ]
        self.block = sum(shape.numel() for shape in self.tensors.values())
        self.largest = max(shape.numel() for shape in self.linears.values())
        self.hidden, self.vocabulary = source.config.hidden_size, source.config.vocab_size
        self.stored = storage_dtype(source, recipe)
        self.work = working_dtype(source, recipe).itemsize
        self.seq_len = recipe.calibration.seq_len
        # of one process
        self.tokens = -(-(recipe.calibration.tokens // self.seq_len) // processes.count) * self.seq_len
        # of one sequence on its way through a block: the stream, and what the widest layer reads with gate and up
        self.sequence = self.seq_len * (4 * self.hidden + 3 * self.linears[source.graph.down][1])

    def largest_stage(self) -> int:
        return max(self.fit_bytes(), self.vocabulary_bytes(), self.block_bytes())

    def fit_bytes(self) -> int:
        method = self.recipe.method
        if not isinstance(method, DFRot | DuQuant):
            return 0
        samples = method.samples if isinstance(method, DFRot) else 1
        block = self.block * (self.source.dtype.itemsize + 4) + 4 * self.sequence
        outputs = 4 * samples * self.seq_len * sum(width for _, width in self.stages)
        if isinstance(method, DuQuant):  # rows are searched in float64 beside the layers that read them
            return block + outputs + 8 * self.seq_len * max(width for _, width in self.stages)
        rows = samples * self.seq_len * 2 * self.source.num_blocks
        rows = rows if method.objective == "paper" else min(rows, ORDINARY_TOKENS)
        refining = 3 * 4 * rows * self.hidden + 8 * 8 * self.hidden**2  # rows, twice while joined; matrices
        return max(block + outputs + 4 * rows * self.hidden, refining)

    def vocabulary_bytes(self) -> int:
        held = self.vocabulary * self.hidden * (self.source.dtype.itemsize + self.stored.itemsize)
        return held + _FOLD64 * min(self.vocabulary, VOCABULARY_ROWS) * self.hidden

    def block_bytes(self) -> int:
        folding = self.block * (self.source.dtype.itemsize + self.work) + _FOLD64 * self.largest
        if not self.recipe.spec.weights.enabled:
            return folding + self.block * self.stored.itemsize
        codes = 2 * self.block  # a byte by weight, and packed
        if isinstance(self.recipe.weights, GPTQ):
            held = self.block * self.work + codes + self.work * self.sequence  # folded, or rounded
            return max(folding, held + max(self._gptq_bytes(*stage) for stage in self.stages))
        if isinstance(self.recipe.weights, LWC):  # folded; rounded with gradients; a sequence's states for them
            return max(folding, self.block * (self.work + 3 * self.work + 1) + codes + 3 * self.work * self.sequence)
        return max(folding, self.block * self.work + codes + 3 * self.work * self.largest)

    def _gptq_bytes(self, rows: int, width: int) -> int:
        """The Hessian and its factorisation, or rounding with its factor: weights, sums, errors and codes."""
        wide = 8 if width <= FLOAT64_UP_TO else self.work
        factorising = width**2 * (self.work + max(2 * self.work + wide, 2 * wide))
        piece = min(rows * width, PIECE_ENTRIES)
        return self.work * rows * width + max(factorising, self.work * (2 * width**2 + rows * width + 5 * piece))

    def states_bytes(self) -> int:
        if not self.recipe.fits_weights:
            return 0
        heads = self.source.config.num_attention_heads * head_dim(self.source.config)
        beside = heads if isinstance(self.recipe.weights, GPTQ) else self.hidden  # or the original model's states
        return self.tokens * (self.hidden + beside) * self.work

    def checkpoint_bytes(self) -> int:
        """All tensors of the checkpoint, exactly."""
        spec, size = self.recipe.spec.weights, self.stored.itemsize
        block = sum(shape.numel() for shape in self.tensors.values()) * size
        for rows, width in self.linears.values() if spec.enabled else ():
            groups = 1 if spec.group is None else width // spec.group
            packed = packed_width(width, spec.bits) + groups * (2 if spec.symmetric else 3)  # scale and zero point
            block += rows * (packed - width * size)
        if isinstance(method := self.recipe.method, DuQuant):
            for _, width in self.stages:
                block += (method.permutations + 1) * block_size(width, method.block) ** 2 * self.work
                block += method.permutations * width * 4
        matrices = 1 if self.source.tied and not rotates_residual(self.recipe) else 2
        return block * self.source.num_blocks + (matrices * self.vocabulary + 1) * self.hidden * size

    def seconds(self) -> float:
        """Products at the speed that this machine has now, all else as it was measured."""
        recipe, threads = self.recipe, torch.get_num_threads()
        weights = sum(shape.numel() for shape in self.linears.values())
        products, rest = 0.0, weights * _SECONDS_BY_WEIGHT
        if isinstance(recipe.method, DFRot) or getattr(recipe.method, "rotation", "") == "orthogonal":
            products += 12 * weights * self.hidden  # thrice by a dense matrix, in float64 as fast as two in float32
        if isinstance(recipe.method, DuQuant):
            rest += sum(width for _, width in self.stages) * _SECONDS_BY_CHANNEL
        if recipe.fits_weights and isinstance(recipe.weights, GPTQ):
            products += 5 * self.tokens * weights  # half the block again and again, then all of it
            for rows, width in self.stages:
                products += 2 * self.tokens * width**2 + width**3 + 5 * rows * width**2 / self.processes.count
        elif recipe.fits_weights and isinstance(recipe.weights, LWC):
            steps = recipe.weights.epochs * self.tokens // self.seq_len
            products += (6 * recipe.weights.epochs + 4) * self.tokens * weights
            rest += steps * weights * _SECONDS_BY_STEP
        products, rest = products * self.source.num_blocks, rest * self.source.num_blocks / threads
        if isinstance(recipe.method, DFRot):
            gammas = len(GAMMAS) if recipe.method.gamma in (None, "auto") and recipe.method.objective != "paper" else 1
            tokens = ORDINARY_TOKENS / self.processes.count
            products += gammas * recipe.method.steps * 6 * tokens * self.hidden**2
        return products / (_EFFICIENCY * _products_per_second()) + rest


def _products_per_second(size: int = 512) -> float:
    """Floating point operations per second of a product of two square matrices: the best of five."""
    a, seconds = torch.ones(size, size), []
    for _ in range(5):
        began = time.perf_counter()
        a @ a
        seconds.append(time.perf_counter() - began)
    return 2 * size**3 / min(seconds)


def rotates_residual(recipe: Recipe) -> bool:
    """Whether the residual stream is rotated, so that a head absorbs the last norm's gain and is not the embedding."""
    return isinstance(recipe.method, QuaRot | DFRot) or getattr(recipe.method, "base", "none") == "quarot"


def storage_dtype(source: Source, recipe: Recipe) -> torch.dtype:
    """What unquantized tensors are stored in.

    Unless the recipe names a dtype: the source's own, but no more than 16 bits beside quantized weights.
    """
    if recipe.dtype != "auto":
        return getattr(torch, recipe.dtype)
    narrow = recipe.spec.weights.enabled and source.dtype.itemsize > 2
    return torch.float16 if narrow else source.dtype


def working_dtype(source: Source, recipe: Recipe) -> torch.dtype:
    """What a folded block is computed in."""
    return torch.float64 if storage_dtype(source, recipe) == torch.float64 else torch.float32


def _gb(size: int) -> str:
    return f"{size / 1e9:.2f} GB"


def _duration(seconds: float) -> str:
    for unit, length in (("hours", 3600), ("minutes", 60)):
        if seconds > 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{max(seconds, 1):.0f} seconds"
