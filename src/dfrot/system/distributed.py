"""Several processes that quantize one model together, as torchrun starts them.

All run the same steps. They share the calibration text by sequences and the rounding by rows; sums over tokens are
reduced over the processes. The first one writes. They must see one file system and be alike: the same versions, the
same type of device.
"""

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Shaped
from torch import Tensor

from dfrot.system.errors import SetupError


@dataclass(frozen=True)
class ProcessGroup:
    """This process among those that work together; the defaults are those of a single process."""

    rank: int = 0
    count: int = 1
    local: int = 1  # how many are on this machine
    local_rank: int = 0  # among those on this machine

    @staticmethod
    def of(environment: Mapping[str, str] = os.environ) -> "ProcessGroup":
        """The group that torchrun's environment variables describe; the processes are not connected yet."""
        names = ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_RANK")
        if not all(environment.get(name, "").isdigit() for name in names):
            return ProcessGroup()
        return ProcessGroup(*(int(environment[name]) for name in names))

    @property
    def is_main(self) -> bool:
        """Whether this process writes and prints."""
        return self.rank == 0

    @property
    def shard(self) -> slice:
        """This process's sequences or rows."""
        return slice(self.rank, None, self.count)

    def device(self, name: str) -> str:
        """The device of this process: each has its own GPU."""
        return f"cuda:{self.local_rank}" if name == "cuda" and self.count > 1 else name

    @contextlib.contextmanager
    def joined(self, device: str) -> Iterator[None]:
        """Connect the processes while the context is open, by nccl on GPUs, else by gloo; SetupError if they cannot."""
        if self.count == 1:
            yield
            return
        on_gpu = torch.device(device).type == "cuda"
        if on_gpu:
            torch.cuda.set_device(device)
        try:
            # torchrun notices dead processes; a timeout here would only end runs in which one has more to do
            dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout=timedelta(hours=12))
        except (RuntimeError, ValueError) as error:
            raise SetupError(f"the {self.count} processes that torchrun started do not meet: {error}") from error
        try:
            yield
        finally:
            dist.destroy_process_group()

    def all_reduce_sum(self, tensor: Tensor) -> Tensor:
        """Sum a tensor over all processes, in place."""
        if self.count > 1:
            with _translate_lost_processes():
                dist.all_reduce(tensor)
        return tensor

    def all_gather(self, part: Shaped[Tensor, "part *shape"], rows: int) -> Shaped[Tensor, "rows *shape"]:
        """All rows, of which every process has its `shard`."""
        if self.count == 1:
            return part
        whole = part.new_zeros((rows, *part.shape[1:]))
        whole[self.shard] = part
        return self.all_reduce_sum(whole)

    def broadcast_object(self, record: Any) -> Any:
        """The first process's JSON value; a barrier. Sent as JSON, since torch's exchange of objects unpickles."""
        if self.count == 1:
            return record
        text = torch.tensor(list(json.dumps(record).encode()), dtype=torch.uint8)
        length = torch.tensor([len(text)])
        with _translate_lost_processes():
            dist.broadcast(length, 0)
            text = text if self.is_main else torch.empty(int(length), dtype=torch.uint8)
            dist.broadcast(text, 0)
            dist.all_reduce(length)  # a broadcast does not make its sender wait for the others
        return json.loads(bytes(text.tolist()))


@contextlib.contextmanager
def _translate_lost_processes() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise SetupError(f"another process of this run ended early; its own message says why ({error}).") from error


SINGLE_PROCESS = ProcessGroup()
