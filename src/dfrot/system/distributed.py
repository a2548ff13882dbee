"""Several processes that quantize one model together, as torchrun starts them.

All go through the same steps. They share the calibration text, each taking its part of the sequences, and the rounding,
each taking its part of the rows; sums over tokens are summed over the processes. The first one writes. They have to see
one file system, and to be of one kind: the same versions, the same type of device.
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

# That one is dead is noticed by torchrun; here it is only waited for those that have more to do.
_LONGEST_WAIT = timedelta(hours=12)


@dataclass(frozen=True)
class ProcessGroup:
    """This process among those that work together; by itself unless `joined` made it.

    Attributes:
        rank: which one this is.
        count: how many there are.
        local: how many of them are on this machine.
        local_rank: which one of those this is.
    """

    rank: int = 0
    count: int = 1
    local: int = 1
    local_rank: int = 0

    @staticmethod
    def of(environment: Mapping[str, str] = os.environ) -> "ProcessGroup":
        """Those that torchrun says it has started; nothing is joined yet."""
        names = ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_RANK")
        if not all(environment.get(name, "").isdigit() for name in names):
            return ProcessGroup()
        return ProcessGroup(*(int(environment[name]) for name in names))

    @property
    def is_main(self) -> bool:
        """Whether this is the one that writes and talks."""
        return self.rank == 0

    @property
    def shard(self) -> slice:
        """Which sequences, or rows, are this process's."""
        return slice(self.rank, None, self.count)

    def device(self, name: str) -> str:
        """The device of this process: cuda is one of its own for each."""
        return f"cuda:{self.local_rank}" if name == "cuda" and self.count > 1 else name

    @contextlib.contextmanager
    def joined(self, device: str) -> Iterator[None]:
        """While open, the processes can talk to each other: by nccl on GPUs, else by gloo.

        Raises:
            SetupError: they cannot be reached.
        """
        if self.count == 1:
            yield
            return
        on_gpu = torch.device(device).type == "cuda"
        if on_gpu:
            torch.cuda.set_device(device)
        try:
            dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout=_LONGEST_WAIT)
        except (RuntimeError, ValueError) as error:
            raise SetupError(f"the {self.count} processes that torchrun started do not meet: {error}") from error
        try:
            yield
        finally:
            dist.destroy_process_group()

    def all_reduce_sum(self, tensor: Tensor) -> Tensor:
        """Add up what all processes have, in place."""
        if self.count > 1:
            with _others_lost():
                dist.all_reduce(tensor)
        return tensor

    def all_gather(self, part: Shaped[Tensor, "part *shape"], rows: int) -> Shaped[Tensor, "rows *shape"]:
        """All rows, of which every process has its `part`."""
        if self.count == 1:
            return part
        whole = part.new_zeros((rows, *part.shape[1:]))
        whole[self.shard] = part
        return self.all_reduce_sum(whole)

    def broadcast_object(self, record: Any) -> Any:
        """The JSON that the first process has; all come here before any goes on.

        It travels as JSON, since torch's own exchange of objects unpickles what it is sent.
        """
        if self.count == 1:
            return record
        text = torch.tensor(list(json.dumps(record).encode()), dtype=torch.uint8)
        length = torch.tensor([len(text)])
        with _others_lost():
            dist.broadcast(length, 0)
            text = text if self.is_main else torch.empty(int(length), dtype=torch.uint8)
            dist.broadcast(text, 0)
            dist.all_reduce(length)  # the sender has waited for nobody
        return json.loads(bytes(text.tolist()))


@contextlib.contextmanager
def _others_lost() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise SetupError(
            f"another process of this run has ended before its work was done, and has said why ({error})."
        ) from error


SINGLE_PROCESS = ProcessGroup()
