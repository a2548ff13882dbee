"""What a method may look at while it fits its transforms."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from dfrot.models.source import Source
from dfrot.pipeline.recipe import Recipe
from dfrot.system.distributed import SINGLE_PROCESS, ProcessGroup


@dataclass(frozen=True)
class Context:
    """A model, a recipe, and calibration text for the methods that ask for it.

    Attributes:
        calibration: returns token ids of shape (sequences, seq_len). Calling it may read files or the network, so
            methods that need no data never do.
        device: where to compute.
        processes: that fit together; all come to the same sums.
        notes: what the method found out, as JSON; it stays with the checkpoint.
    """

    source: Source
    recipe: Recipe
    calibration: Callable[[], Int[Tensor, "sequences seq_len"]]
    device: torch.device
    notes: dict[str, Any] = field(default_factory=dict)
    processes: ProcessGroup = SINGLE_PROCESS

    def generator(self) -> torch.Generator:
        """A fresh generator with the recipe's seed; always on the CPU, so that every device draws the same."""
        return torch.Generator().manual_seed(self.recipe.seed)
