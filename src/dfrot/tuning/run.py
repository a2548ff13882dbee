"""Tuning a checkpoint whose shards are written: teacher, student, descent, and the shards with what was trained.

How a kill is survived: until the descent is done, shards are as rounding left them, and a file beside them holds its
state, saved every few steps. Then the same file holds the trained tensors themselves, and one shard after the other is
replaced by one that has them. Doing that twice changes nothing.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dfrot.checkpoint.writer import CheckpointWriter, digest, read_fit, write_fit
from dfrot.linalg.rotation import Rotation
from dfrot.models.source import Source
from dfrot.models.texts import load_tokenizer, read_text, token_ids
from dfrot.runtime.config import RuntimeConfig
from dfrot.system.devices import memory_on
from dfrot.system.distributed import SINGLE_PROCESS, ProcessGroup
from dfrot.system.errors import UserError
from dfrot.system.progress import track
from dfrot.training.descent import Descent
from dfrot.training.teacher import (
    Distillation,
    Teacher,
    Windows,
    mapped,
    product_dtype,
    teacher_states,
    windows_at_once,
)
from dfrot.tuning.student import Student
from dfrot.tuning.tuning import Needs, Tuning

Kept = tuple[dict[str, Any], dict[str, Tensor]]  # JSON and tensors, as one file has them
STATE_FILE = "dfrot-tune.safetensors"
TEACHER_FILE = "dfrot-tune-teacher-{}.bin"  # of a process
SAVE_EVERY = 10  # steps


def tuning_windows(source: Source, tuning: Tuning, text: str, seed: int) -> Windows | None:
    """The text that tuning sees, read before the work; None if nothing is tuned.

    Raises:
        UserError, SetupError: as `read_text`; the text is too short.
    """
    if not tuning.enabled:
        return None
    name = tuning.text or text
    ids = token_ids(load_tokenizer(source.path), read_text(name, "train"), source.config.vocab_size)
    return Windows.of(ids, name, tuning.seq_len, tuning.tokens // tuning.seq_len, tuning.steps, seed)


def require_whole(writer: CheckpointWriter, shards: int) -> None:
    """Raise UserError if shards are missing that could only be made again from shards that are replaced already."""
    kept = read_fit(writer.path / STATE_FILE)
    if kept is not None and "notes" in kept[0] and not all(map(writer.has, range(shards))):
        raise UserError(
            f"{writer.path} holds a run that was interrupted while its tuned shards were written, and one of "
            "them is damaged. --overwrite it."
        )


def written_head(source: Source, writer: CheckpointWriter) -> tuple[Tensor, Tensor, Tensor | None]:
    """The gain of the last norm, and the head, which is the embedding where they are tied, with its bias."""
    graph, tail = source.graph, writer.read(source.num_blocks + 1)
    head = tail.get(f"{graph.head}.weight")
    if head is None:
        head = writer.read(0)[f"{graph.embedding}.weight"]
    return tail[f"{graph.final_norm}.weight"], head, tail.get(f"{graph.head}.bias")


@dataclass(frozen=True)
class TuningRun:
    """A checkpoint that is to be tuned, and how.

    Args:
        runtime: the checkpoint's, before tuning.
        residual: R1.
        stored, dtype: of the checkpoint's tensors that are not quantized, and of the computation.
        budget: bytes of memory that may be taken on a CPU; on a GPU it is what is free there.
        processes: that share the windows of a step; each has all of the teacher's states, and the first one writes.
    """

    source: Source
    runtime: RuntimeConfig
    residual: Rotation | None
    writer: CheckpointWriter
    tuning: Tuning
    windows: Windows
    stored: torch.dtype
    dtype: torch.dtype
    device: torch.device
    needs: Needs
    budget: int
    processes: ProcessGroup = SINGLE_PROCESS

    @property
    def biased_runtime(self) -> RuntimeConfig:
        """How the checkpoint computes with the biases that are to be trained."""
        if "biases" not in self.tuning.parts:
            return self.runtime
        return dataclasses.replace(self.runtime, biases=self.source.without_bias)

    def __call__(self) -> tuple[dict[str, Any], RuntimeConfig]:
        """Train, and rewrite the shards of the blocks; returns notes for fit.json, and how the checkpoint computes.

        Raises:
            UserError: the interrupted run that this one resumes had another text of the same name.
            SetupError: the disk does not hold the teacher's states.
        """
        path = self.writer.path / STATE_FILE
        kept = read_fit(path)
        if kept is not None and kept[0]["text"] != self.windows.digest:
            raise UserError(
                f"{self.writer.path} holds an interrupted run whose text for tuning was another, though it had the "
                "same name. Resume with that text, choose another -o directory, or --overwrite it."
            )
        if kept is None or "notes" not in kept[0]:
            found, tensors = self._trained(kept)
            kept = {"text": self.windows.digest, **found}, tensors
            self._write(*kept)
        record, tensors = kept
        for index in track(range(self.source.num_blocks), "writing"):
            prefix = f"{self.source.graph.blocks}.{index}."
            mine = {name: tensor for name, tensor in tensors.items() if name.startswith(prefix)}
            self.writer.replace(index + 1, self.writer.read(index + 1) | mine)
        clips = {site: tuple(ratios) for site, ratios in record["clips"].items()}
        return record["notes"], dataclasses.replace(self.biased_runtime, clips={**self.runtime.clips, **clips})

    def _trained(
        self, kept: tuple[dict[str, Any], dict[str, Tensor]] | None
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Notes and clip ratios, and trained tensors; `kept` is the state of an interrupted run."""
        record = kept[0] if kept is not None else {}
        teacher, made = self._teacher(record.get("teacher"))
        student = self._student()
        objective = Distillation(student, teacher, self.windows, self.processes)
        how = objective.loss, objective.measure, self.tuning.steps, self.processes
        descent = Descent(student.moving, *how)
        if kept is not None:
            descent.restore({name: value for name, value in record.items() if name not in ("text", "teacher")}, kept[1])
            kept[1].clear()
        for done in track(descent.remaining(), "tuning", total=descent.total + 1):
            if done % SAVE_EVERY == 0 and not descent.done:
                state, tensors = descent.state()
                self._write({"text": self.windows.digest, "teacher": made, **state}, tensors)
        tensors = {}
        for index in range(self.source.num_blocks):
            tensors |= student.stored(index)
        return {"notes": descent.notes(), "clips": student.clip_ratios()}, tensors

    def _write(self, record: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        if self.processes.is_main:
            write_fit(self.writer.path / STATE_FILE, record, tensors)

    def _teacher(self, made: str | None) -> tuple[Teacher, str]:
        """The teacher, and the digest of its file, which is kept if it has the one of the interrupted run."""
        source, path = self.source, self.writer.path / TEACHER_FILE.format(self.processes.rank)
        norm, head, bias = written_head(source, self.writer)
        head = head.to(self.device, self.product)
        if made is not None and path.is_file() and digest(path) == made:
            states = mapped(path, (*self.windows.tokens.shape, source.config.hidden_size))
            return Teacher(states, head, bias), made
        path.unlink(missing_ok=True)
        how: Any = {"dtype": self.dtype, "product": self.product, "device": self.device}
        states = teacher_states(
            source, self.windows.tokens, self.residual, norm, path, batch=self.windows.per_step, **how
        )
        return Teacher(states, head, bias), digest(path)

    def _student(self) -> Student:
        source, writer = self.source, self.writer
        graph = source.graph
        blocks = []
        for index in range(source.num_blocks):
            prefix = f"{graph.blocks}.{index}."
            blocks.append({name.removeprefix(prefix): tensor for name, tensor in writer.read(index + 1).items()})
        at_once = windows_at_once(self.device.type, self.tuning.seq_len, self.windows.per_step)
        keep, states = self.needs.affordable(memory_on(self.device, self.budget), at_once, self.product.itemsize)
        return Student(
            source,
            self.biased_runtime,
            writer.read(0),
            blocks,
            writer.read(source.num_blocks + 1)[f"{graph.final_norm}.weight"],
            self.tuning.parts,
            stored=self.stored,
            dtype=self.dtype,
            product=self.product,
            device=self.device,
            keep=keep,
            recompute=not states,
        )

    @property
    def product(self) -> torch.dtype:
        """Dtype of products."""
        return product_dtype(self.dtype, self.device)
