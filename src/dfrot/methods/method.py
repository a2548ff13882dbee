"""The base class of methods. A method is a frozen dataclass that holds everything specific to one paper.

Its fields are its options. `fit` looks at a model and returns the rotations, with notes for people. Code outside the
paper's file never asks which method it has. `Transforms` decides what follows from the rotations (tied embeddings,
online rotations, tensors of the checkpoint); the attributes below hold what follows from the paper.
"""

import abc
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from dfrot.models.sizes import ModelSizes
from dfrot.models.source import Source
from dfrot.quant.spec import UNQUANTIZED, TensorSpec
from dfrot.system.distributed import SINGLE_PROCESS, ProcessGroup
from dfrot.system.options import Options
from dfrot.system.papers import Paper
from dfrot.transform.transforms import Transforms


class FitProgress(NamedTuple):
    """Where a fit that takes long keeps what an interrupted one goes on from, JSON and tensors; nowhere unless told."""

    load: Callable[[], tuple[dict[str, Any], dict[str, Tensor]] | None] = lambda: None
    save: Callable[[dict[str, Any], dict[str, Tensor]], None] = lambda record, tensors: None


NOWHERE = FitProgress()


@dataclass(frozen=True)
class FitContext:
    """Everything that a method may look at."""

    source: Source
    activations: TensorSpec  # the grid of activations; those of keys and values are below
    # Token ids. It may read files or the network, so methods that need no data never call it.
    calibration: Callable[[], Int[Tensor, "sequences seq_len"]]
    device: torch.device
    seed: int = 0
    processes: ProcessGroup = SINGLE_PROCESS  # that fit together; all get the same sums
    keys: TensorSpec = UNQUANTIZED
    values: TensorSpec = UNQUANTIZED
    budget: int = 0  # bytes of memory that fitting may take if that makes it faster
    progress: FitProgress = NOWHERE

    def generator(self) -> torch.Generator:
        """A fresh generator with the run's seed; always on the CPU, so that every device draws the same."""
        return torch.Generator().manual_seed(self.seed)


class Fit(NamedTuple):
    """The rotations that a method fitted, and its notes, as JSON for the checkpoint's fit.json."""

    transforms: Transforms
    notes: dict[str, Any]


class Look(NamedTuple):
    """A method's style in figures; colour, symbol and dash each identify it."""

    colour: str
    symbol: str
    dash: str


@dataclass(frozen=True)
class Method(Options, abc.ABC):
    """The base of all methods."""

    mean_keys: bool = False
    """Keep the mean key of the calibration text out of the quantized cache, where that helps."""

    name: ClassVar[str]  # on the command line
    papers: ClassVar[tuple[Paper, ...]] = ()  # that a model card cites
    look: ClassVar[Look | None] = None  # None takes an unused one
    preset: ClassVar[str] = "paper"  # the paper's symmetry and clip ratios
    reads_all_text: ClassVar[bool] = False  # whether `fit` reads all of the calibration text
    reads_grids: ClassVar[tuple[str, ...]] = ("activations",)  # on which grids `fit` depends
    # The names under which papers compare it, with the options of each; if empty, its own name.
    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = {}

    @abc.abstractmethod
    def fit(self, on: FitContext) -> Fit:
        """Fit the rotations; UserError if they do not fit the model."""

    def outline(self, on: FitContext) -> Transforms:
        """Rotations of the same sites and sizes as `fit` returns, with any entries; the estimate needs them up front.

        Override it if fitting reads text or takes time.
        """
        return self.fit(on).transforms

    @property
    def sequences_read(self) -> int:
        """The number of calibration sequences that `fit` reads, counted from the first."""
        return 0

    def resolved(self, learned_clipping: bool) -> "Method":
        """The method with every default filled in; `learned_clipping` tells whether the rounding learns clip ratios."""
        return self

    def peak_bytes(self, sizes: ModelSizes, budget: int) -> int:
        """The peak memory of `fit`, if so much may be taken."""
        return 0

    def summary(self, notes: Mapping[str, Any]) -> list[str]:
        """The notes in sentences."""
        return []


@dataclass(frozen=True)
class NoRotation(Method):
    """Quantize the model unrotated: the baseline of all methods."""

    name = "none"
    look = Look("#D55E00", "circle", "solid")

    def fit(self, on: FitContext) -> Fit:
        return Fit(Transforms(), {})
