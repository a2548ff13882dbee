"""The inputs that blocks of the quantized-so-far model really meet, carried from block to block.

Weights are fitted to the inputs that they will meet: those that the rotated model produces whose earlier blocks are
quantized already. Memory holds the hidden states of the calibration text, or a memory-mapped file does.
"""

import contextlib
import mmap
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from dfrot.models.source import Source, loaded
from dfrot.models.stream import BlockRunner
from dfrot.runtime.config import RuntimeConfig
from dfrot.runtime.install import install_block_
from dfrot.runtime.linear import QuantLinear
from dfrot.system.distributed import ProcessGroup
from dfrot.system.errors import SetupError
from dfrot.system.files import SCRATCH

_ROWS = 4096  # tokens that go through an expert at a time
TOGETHER = {"cpu": 1, "cuda": 8192}  # tokens that go through a block at a time, but one sequence at least


class Hessian(NamedTuple):
    """Of the inputs X of a layer: Xᵀ X, with a teacher, whose inputs are X₀, also X₀ᵀ X, and how many of the tokens did
    not choose the expert that the layer is of."""

    inputs: Float[Tensor, "in in"]
    cross: Float[Tensor, "in in"] | None
    filled: int


class _Heads:
    """What the heads of the block at hand put out, (sequences, seq_len, channels), so that they are computed once."""

    states: Tensor | None = None
    whole = False  # whether those of all sequences are there


class CalibrationStream:
    """Hidden states of the calibration text before one block after the other.

    Args:
        runtime, embeddings: the checkpoint's.
        home: where the states lie.
        offload: a directory for a memory-mapped file that holds them instead.
        with_teacher: also carry what the original model computes, the teacher.
        quantizes_activations: whether blocks of the checkpoint that it goes through quantize theirs. GPTQ's do not, as
            in the papers, and those of LWC, which learns with them, do.
        processes: of these each carries a part of the sequences.
    """

    def __init__(
        self,
        source: Source,
        runtime: RuntimeConfig,
        embeddings: Mapping[str, Tensor],
        token_ids: Int[Tensor, "sequences seq_len"],
        dtype: torch.dtype,
        device: torch.device,
        home: torch.device,
        offload: Path | None,
        with_teacher: bool,
        quantizes_activations: bool,
        processes: ProcessGroup,
    ) -> None:
        self.source, self.runtime, self.device, self.processes = source, runtime, device, processes
        token_ids = token_ids[processes.shard]
        shape = (*token_ids.shape, source.config.hidden_size)
        self._passed = runtime if quantizes_activations else runtime.without("activations")
        self._home, self._offload = home, offload
        self._mapped: list[mmap.mmap] = []  # the offloaded states
        self.hidden_states = self._allocated(shape, dtype)
        for state, ids in zip(self.hidden_states, token_ids, strict=True):
            state.copy_(source.embedded(ids, embeddings))
        together = max(1, TOGETHER[device.type] // shape[1])
        self._parts = [slice(start, start + together) for start in range(0, len(token_ids), together)]
        self.teacher_states = self._allocated(shape, dtype).copy_(self.hidden_states) if with_teacher else None
        self._teacher: tuple[int, nn.Module] | None = None  # the block at hand, until its states have gone through
        self._heads, self._its_heads = _Heads(), _Heads()  # and the teacher's
        self._read: Tensor | None = None  # what the experts of the block at hand read, and the teacher's
        self._taught: Tensor | None = None
        self._chosen: Tensor | None = None  # which of them tokens choose, (tokens, chosen); None: not known yet
        self.run = BlockRunner(source, self.hidden_states[:1].to(device))

    def __len__(self) -> int:
        return len(self.hidden_states)

    def __getitem__(self, part: slice) -> Float[Tensor, "sequences seq_len hidden"]:
        """The inputs that some sequences make for the block at hand."""
        return self.hidden_states[part].to(self.device)

    def block(self, index: int, tensors: dict[str, Tensor], runtime: RuntimeConfig) -> nn.Module:
        """Block `index` as `runtime` computes it."""
        return runtime_block(self.source, index, tensors, runtime).to(self.hidden_states.dtype).to(self.device)

    def hessian(self, index: int, block: nn.Module, linear: str) -> Hessian:
        """Xᵀ X over all inputs of one linear layer of the block at hand, those of other processes too.

        An expert's layer has inputs of the tokens that choose it, the block at hand choosing, and, if they are fewer
        than channels of the stream, of so many others as are missing, evenly drawn.

        Layers are asked for in the order in which they run, with final weights before them. The outputs of the heads
        are kept once the layer that reads them was asked for, so that attention is computed only once.
        """
        if self.source.graph.expert(linear) is not None:
            return self._experts_hessian(index, block, linear)
        total: Tensor | None = None
        cross: Tensor | None = None
        for part in self._parts:
            x = _read(block.get_submodule(linear), self._reaching(linear, block, index, part))
            total = x.T @ x if total is None else total.addmm_(x.T, x)
            if self._teacher is not None:
                teacher = self._teacher[1]
                x0 = _read(teacher.get_submodule(linear), self._reaching(linear, teacher, index, part))
                cross = x0.T @ x if cross is None else cross.addmm_(x0.T, x)
        if linear == self.source.graph.output:
            self._heads.whole, self._its_heads.whole = True, self._teacher is not None
        self._leave_to_disk()
        assert total is not None, "calibration has at least one sequence"
        return self._of_all_processes(total, cross, 0)

    def _reaching(
        self, name: str, block: nn.Module, index: int, part: slice
    ) -> Float[Tensor, "sequences seq_len channels"]:
        """What one module of the block at hand, or of its teacher, reads of some sequences."""
        taught = self._teacher is not None and block is self._teacher[1]
        heads, states = (self._its_heads, self.teacher_states) if taught else (self._heads, self.hidden_states)
        assert states is not None, "a teacher has states"
        with self._attention_kept(block, heads, part):
            x = self.run.until(block.get_submodule(name), block, index, states[part].to(self.device))
        if name == self.source.graph.output:
            if heads.states is None:
                heads.states = self._allocated((*states.shape[:2], x.shape[-1]), x.dtype)
            heads.states[part] = x
        return x

    def _of_all_processes(self, total: Tensor, cross: Tensor | None, filled: int) -> Hessian:
        reduce = self.processes.all_reduce_sum
        return Hessian(reduce(total), None if cross is None else reduce(cross), filled)

    def _experts_hessian(self, index: int, block: nn.Module, linear: str) -> Hessian:
        if self._chosen is None:
            self._chosen = self._route(index, block)
        assert self._read is not None, "routing keeps what the experts read"
        read, number = self._read.flatten(0, -2), self.source.graph.expert(linear)
        mine = self._chosen.eq(-1 if number is None else number).any(-1)
        own, others = torch.nonzero(mine).flatten(), torch.nonzero(~mine).flatten()
        least = min(len(read), -(-read.shape[1] // self.processes.count))
        missing = max(0, least - len(own))
        rows = torch.cat([own, others[torch.arange(missing) * len(others) // max(1, missing)]])
        total: Tensor | None = None
        cross: Tensor | None = None
        for piece in rows.split(_ROWS):
            x = self._read_by_expert(block, linear, read[piece])
            total = x.T @ x if total is None else total.addmm_(x.T, x)
            if self._teacher is not None and self._taught is not None:
                x0 = self._read_by_expert(self._teacher[1], linear, self._taught.flatten(0, -2)[piece])
                cross = x0.T @ x if cross is None else cross.addmm_(x0.T, x)
        self._leave_to_disk()
        assert total is not None, "calibration has at least one token"
        return self._of_all_processes(total, cross, missing)

    def _read_by_expert(
        self, block: nn.Module, linear: str, x: Float[Tensor, "tokens hidden"]
    ) -> Float[Tensor, "tokens in"]:
        """What the weight of an expert's layer is multiplied by, for what experts read."""
        expert: Any = block.get_submodule(linear.rpartition(".")[0])
        x = x.to(self.device)
        return _read(block.get_submodule(linear), expert.inner(x) if linear in self.source.graph.downs else x)

    def _route(self, index: int, block: nn.Module) -> Int[Tensor, "tokens chosen"]:
        """Which experts of the block at hand tokens choose; what these and the teacher's read is kept."""
        name, shape, dtype = self.source.graph.mixture, self.hidden_states.shape, self.hidden_states.dtype
        if self._read is None:
            self._read = self._allocated(shape, dtype)
            self._taught = None if self.teacher_states is None else self._allocated(shape, dtype)
        mixture: Any = block.get_submodule(name)
        chosen = []
        for part in self._parts:
            self._read[part] = x = self._reaching(name, block, index, part)
            chosen.append(mixture.shares(x)[1].flatten(0, -2).to(self._read.device))
            if self._teacher is not None and self._taught is not None:
                self._taught[part] = self._reaching(name, self._teacher[1], index, part)
        return torch.cat(chosen)

    def advance(self, index: int, tensors: dict[str, Tensor]) -> None:
        """Go through block `index` of the checkpoint."""
        if self._teacher is not None:
            self.advance_teacher()
        block = self.block(index, tensors, self._passed)
        for part in self._parts:
            with self._attention_kept(block, self._heads, part):
                self.hidden_states[part] = self.run(block, index, self[part])
        self._heads.whole, self._chosen = False, None
        self._leave_to_disk()

    def meet(self, index: int, tensors: dict[str, Tensor]) -> None:
        """Take block `index` with weights that are not quantized, if there is a teacher to go through it."""
        if self.teacher_states is not None:
            self._teacher = index, self.block(index, tensors, self.runtime.without("weights", "activations"))

    def advance_teacher(self) -> Float[Tensor, "sequences seq_len hidden"]:
        """Let the teacher go through the block at hand; its outputs are the targets."""
        assert self._teacher is not None, "meet comes first"
        assert self.teacher_states is not None, "a rounding that needs a teacher has one"
        (index, block), self._teacher = self._teacher, None
        for part in self._parts:
            with self._attention_kept(block, self._its_heads, part):
                self.teacher_states[part] = self.run(block, index, self.teacher_states[part].to(self.device))
        self._its_heads.whole = False
        self._leave_to_disk()
        return self.teacher_states

    def _allocated(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        if self._offload is None:
            return torch.empty(shape, dtype=dtype, device=self._home)
        size = torch.Size(shape).numel() * dtype.itemsize
        try:
            # the file has no name, and lives as long as the tensor: nothing is left behind by a kill
            with tempfile.TemporaryFile(dir=self._offload, prefix=SCRATCH) as file:
                # reserves the space: a full disk is an error now, not a SIGBUS later
                os.posix_fallocate(file.fileno(), 0, size)
                mapped = mmap.mmap(file.fileno(), size)
        except OSError as error:
            raise SetupError(
                f"the calibration text's hidden states, {size / 1e9:.1f} GB, cannot be put into {self._offload}: "
                f"{error}. Make room, or take fewer --calib-tokens."
            ) from error
        self._mapped.append(mapped)
        return torch.frombuffer(mapped, dtype=dtype).view(shape)

    def _leave_to_disk(self) -> None:
        """Drop the offloaded states from memory; they are read again where they are needed."""
        for mapped in self._mapped:
            mapped.madvise(mmap.MADV_DONTNEED)

    @contextlib.contextmanager
    def _attention_kept(self, block: nn.Module, heads: _Heads, part: slice) -> Iterator[None]:
        """While open, the block takes the kept outputs of its heads, if they are there, and computes neither them nor a
        norm that only they read."""
        if heads.states is None or not heads.whole:
            yield
            return
        graph = self.source.graph
        attention, output = block.get_submodule(graph.attention), block.get_submodule(graph.output)
        kept, inside = heads.states[part].to(self.device), graph.attention + "."
        unread = [norm for norm, readers in graph.norms.items() if all(name.startswith(inside) for name in readers)]
        replaced: dict[nn.Module, Any] = {attention: lambda *_, **__: (output(kept), None)}
        replaced |= {block.get_submodule(norm): lambda x: x for norm in unread}
        for module, forward in replaced.items():
            module.forward = forward
        try:
            yield
        finally:
            for module in replaced:
                del module.forward


def _read(layer: nn.Module, x: Tensor) -> Float[Tensor, "tokens in"]:
    """What the weight of a layer is multiplied by, for such an input."""
    return (layer.quantize_input(x) if isinstance(layer, QuantLinear) else x).flatten(0, -2)


def runtime_block(source: Source, index: int, tensors: dict[str, Tensor], runtime: RuntimeConfig) -> nn.Module:
    """Block `index` with the runtime's modules.

    Products of inputs that are not quantized are torch's, as while the block is rounded, when its weights are floats:
    kernels sum in another order, and a resumed run would differ from one that was never interrupted.
    """
    block = source.empty_block(index)
    install_block_(block, index, source.graph, runtime)
    for module in block.modules():
        if isinstance(module, QuantLinear):
            module.by_reference = not module.activations.enabled
    return loaded(block, tensors)
