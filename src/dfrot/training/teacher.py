"""The unquantized model's predictions on the text that tuning sees, and how far a student's are from them.

Kept are its last hidden states, memory-mapped, in bfloat16: a vocabulary's worth of logits would take a hundred times
as much. The head gives the logits again. They are made block by block, so that the unquantized model is never resident,
and in the basis of the checkpoint, behind its last norm: so one head serves teacher and student.
"""

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from dfrot.kernels import training
from dfrot.linalg.rotation import Rotation
from dfrot.models.source import Source
from dfrot.models.stream import BlockRunner
from dfrot.system.distributed import SINGLE_PROCESS, ProcessGroup
from dfrot.system.errors import SetupError, UserError
from dfrot.system.progress import track

HELD_TOKENS = 4096  # at most, and at most a quarter of the text: on these rates and steps are compared
RUN = 64  # tokens in a row that hardly ever stand in two places of a text which do not overlap
LOGITS = 1 << 24  # tokens × vocabulary that stand at a time, on a CPU
STATES_DTYPE = torch.bfloat16  # rounds a hidden state by 2⁻⁹: far below what 4 bits do to it


@dataclass(frozen=True)
class Windows:
    """Windows of text, those for training first, and which of them a step sees."""

    tokens: Int[Tensor, "windows seq_len"]
    held: int  # windows at the end that are not trained on
    per_step: int
    seed: int

    @staticmethod
    def of(
        ids: Int[Tensor, " tokens"],
        name: str,
        seq_len: int,
        per_step: int,
        steps: int,
        seed: int,
        overlapping: bool = False,
    ) -> "Windows":
        """As many windows as so many steps see, drawn from the text, and held-out ones from its end.

        Args:
            overlapping: the text consists of parts that may overlap: windows that have `RUN` tokens in a row with the
                held-out ones in common are left out, unless that leaves fewer than a step has.

        Raises:
            UserError: the text is shorter than two windows.
        """
        whole = ids[: len(ids) // seq_len * seq_len].view(-1, seq_len)
        if len(whole) < 2:
            raise UserError(
                f"the text '{name}' has {len(ids)} tokens; training needs two windows, of {seq_len} tokens."
            )
        held = max(1, min(HELD_TOKENS // seq_len, len(whole) // 4))
        trained = len(whole) - held
        apart: Sequence[int] = range(trained)
        if overlapping:
            seen = _runs(whole[trained:])
            alone = [index for index in range(trained) if seen.isdisjoint(_runs(whole[index : index + 1]))]
            apart = alone if len(alone) >= per_step else apart
        drawn = torch.randperm(len(apart), generator=torch.Generator().manual_seed(seed))[: steps * per_step]
        return Windows(torch.cat([whole[torch.tensor(apart)[drawn]], whole[trained:]]), held, per_step, seed)

    @property
    def held_out(self) -> list[list[int]]:
        """The windows that are not trained on, as many at a time as a step has."""
        count = len(self.tokens)
        starts = range(count - self.held, count, self.per_step)
        return [list(range(start, min(start + self.per_step, count))) for start in starts]

    def step(self, number: int) -> list[int]:
        """The windows of one step. They come in turn; each time through, in another order."""
        trained, chosen = len(self.tokens) - self.held, []
        for place in range(number * self.per_step, (number + 1) * self.per_step):
            turn = torch.Generator().manual_seed(self.seed + place // trained)
            chosen.append(int(torch.randperm(trained, generator=turn)[place % trained]))
        return chosen

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.tokens.numpy().tobytes()).hexdigest()


def _runs(windows: Int[Tensor, "windows seq_len"]) -> set[tuple[int, ...]]:
    """All runs of RUN tokens in them."""
    runs = windows.unfold(1, min(RUN, windows.shape[1]), 1)
    return set(map(tuple, runs.flatten(0, 1).tolist()))


def windows_at_once(device: str, seq_len: int, per_step: int) -> int:
    """Windows of a step whose gradients are made together, before those of the next ones are added: few keep what the
    backward pass reads small, and on a CPU in its caches. Memory has no say: the order of a sum changes its last bits.
    """
    return min(per_step, max(1, (1024 if device == "cpu" else 8192) // seq_len))


class ProductLinear(nn.Module):
    """A linear layer with products of another dtype."""

    def __init__(self, linear: nn.Linear, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight, self.bias, self.dtype = linear.weight.data.to(dtype), linear.bias, dtype

    def forward(self, x: Tensor) -> Tensor:
        y = (x.to(self.dtype) @ self.weight.T).to(x.dtype)
        return y if self.bias is None else y + self.bias


class Teacher:
    """Last hidden states of the unquantized model by window, and the head that turns them into predictions.

    Args:
        states: (windows, seq_len, hidden).
        head: (vocabulary, hidden), in the dtype of its products.
        bias: what is added to the logits.
    """

    def __init__(
        self,
        states: Float[Tensor, "windows seq_len hidden"],
        head: Float[Tensor, "vocabulary hidden"],
        bias: Float[Tensor, " vocabulary"] | None = None,
    ) -> None:
        self.states, self.head = states, head
        self.bias = None if bias is None else bias.to(head.device)

    @torch.no_grad()
    def divergence(
        self, hidden: Float[Tensor, "windows seq_len hidden"], windows: list[int], gradient: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Mean over tokens of KL(teacher ‖ student), in nats, and on demand its gradient in the student's states.

        Args:
            hidden: what the student's head reads, on these windows.
        """
        flat, head = hidden.flatten(0, 1), self.head
        goals = self.states[windows].to(flat.device).flatten(0, 1)
        rows = max(1, (LOGITS if flat.device.type == "cpu" else 16 * LOGITS) // len(head))
        total, slopes = torch.zeros((), dtype=torch.float64, device=flat.device), []
        share = 1 / len(flat) if gradient else None
        for own, goal in zip(flat.split(rows), goals.split(rows), strict=True):
            value, slope = training.divergence(self._logits(own), self._logits(goal), share)
            total += value
            if slope is not None:
                slopes.append((slope.to(head.dtype) @ head).to(hidden.dtype))
        return total / len(flat), torch.cat(slopes).view_as(hidden) if gradient else None

    def _logits(self, states: Tensor) -> Tensor:
        logits = states.to(self.head.dtype) @ self.head.T
        return logits if self.bias is None else logits.to(torch.promote_types(logits.dtype, torch.float32)) + self.bias


class Distillation(NamedTuple):
    """What a student is trained by: its divergence from a teacher on windows of text, which processes share."""

    student: Callable[[Int[Tensor, "windows seq_len"]], Float[Tensor, "windows seq_len hidden"]]
    teacher: Teacher
    windows: Windows
    processes: ProcessGroup = SINGLE_PROCESS

    def loss(self, step: int) -> float:
        """Of a step; adds this process's part of its gradients."""
        windows = self.windows.step(step)
        total, mine = torch.zeros((), dtype=torch.float64), windows[self.processes.shard]
        at_once = windows_at_once(self.teacher.head.device.type, self.windows.tokens.shape[1], len(windows))
        for start in range(0, len(mine), at_once):
            part = mine[start : start + at_once]
            share = len(part) / len(windows)
            hidden = self.student(self.windows.tokens[part])
            value, slope = self.teacher.divergence(hidden.detach(), part, gradient=True)
            assert slope is not None, "it was asked for"
            hidden.backward(slope * share)
            total += value.cpu() * share
        return float(self.processes.all_reduce_sum(total))

    @torch.no_grad()
    def measure(self) -> float:
        """On held-out text."""
        total = torch.zeros((), dtype=torch.float64)
        for windows in self.windows.held_out[self.processes.shard]:
            found, _ = self.teacher.divergence(self.student(self.windows.tokens[windows]), windows)
            total += len(windows) * found.cpu()
        return float(self.processes.all_reduce_sum(total)) / self.windows.held


@torch.no_grad()
def teacher_states(
    source: Source,
    tokens: Int[Tensor, "windows seq_len"],
    residual: Rotation | None,
    norm: Float[Tensor, " hidden"],
    path: Path | None,
    *,
    dtype: torch.dtype,
    product: torch.dtype,
    device: torch.device,
    batch: int,
) -> Tensor:
    """The unquantized model's last hidden states, in a file that is mapped, or in memory.

    Args:
        residual: R1, into whose basis they are rotated.
        norm: gain of the checkpoint's last norm.
        path: of the file, None for memory; beside it lies another, for the states between blocks, while it is made.
        batch: windows at a time.

    Raises:
        SetupError: the disk does not hold the files.
    """
    shape = (*tokens.shape, source.config.hidden_size)
    if path is None:
        states = torch.empty(shape, dtype=dtype)
    else:
        between = path.with_name(path.name + ".tmp")
        states = mapped(between, shape, dtype)
        between.unlink()  # it lives as long as the mapping: a kill leaves nothing
    embeddings = source.embeddings()
    for state, ids in zip(states, tokens, strict=True):
        state.copy_(source.embedded(ids, embeddings))
    del embeddings
    run = BlockRunner(source, states[:1].to(device))
    for index in track(range(source.num_blocks), "teacher"):
        block = source.block(index).to(device, dtype)
        for name in source.graph.linears:
            block.set_submodule(name, ProductLinear(block.get_submodule(name), product))  # type: ignore[arg-type]
        for part in states.split(batch):
            part.copy_(run(block, index, part.to(device)))
    made = torch.empty(shape, dtype=STATES_DTYPE) if path is None else mapped(path, shape, STATES_DTYPE)
    gain = norm.to(device, dtype)
    for part, into in zip(states.split(batch), made.split(batch), strict=True):
        rotated = part.to(device) if residual is None else residual.apply(part.to(device))
        into.copy_(nn.functional.rms_norm(rotated, gain.shape, gain, source.eps))
    return made


def mapped(path: Path, shape: tuple[int, ...], dtype: torch.dtype = STATES_DTYPE) -> Tensor:
    """A tensor in a file, which is made or kept. Raises SetupError if the disk does not hold it."""
    size = torch.Size(shape).numel()
    try:
        with path.open("ab") as file:
            os.posix_fallocate(file.fileno(), 0, size * dtype.itemsize)  # now: a full disk would be a SIGBUS later
    except OSError as error:
        raise SetupError(
            f"{path.parent} does not hold what the unquantized model predicts, {size * dtype.itemsize / 1e9:.1f} GB "
            f"for tuning: {error}. Make room, or take fewer --tune-steps or --tune-tokens."
        ) from error
    return torch.from_file(str(path), shared=True, size=size, dtype=dtype).view(shape)


def product_bytes(entry: int) -> int:
    """Bytes of an entry of a weight that is multiplied on this CPU by a model whose entries have so many."""
    dtype = torch.float64 if entry == torch.float64.itemsize else torch.float32
    return product_dtype(dtype, torch.device("cpu")).itemsize


def product_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Of products: bfloat16 where the device multiplies it faster, unless the model is in float64."""
    if dtype == torch.float64 or (device.type == "cpu" and not torch.cpu._is_avx512_bf16_supported()):
        return dtype
    return torch.bfloat16
