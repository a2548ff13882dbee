"""What a rounding is: how the integers of a folded block are chosen, as a frozen dataclass that owns all of it.

Its fields are its options. `round` gets a block and, unless it needs no data, the inputs that the block will really
meet; it returns integers and scales, with notes for people. What else differs by rounding is one of the attributes.
"""

import abc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from torch import Tensor, nn

from dfrot.models.graph import ModelGraph
from dfrot.models.sizes import ModelSizes
from dfrot.quant.affine import QParams
from dfrot.quant.spec import TensorSpec
from dfrot.rounding.stream import CalibrationStream
from dfrot.system.options import Options
from dfrot.system.papers import Paper


@dataclass
class BlockTask:
    """A folded block whose linear layers are to be rounded."""

    index: int
    module: nn.Module  # with the runtime's modules and weights that are not quantized yet
    graph: ModelGraph
    spec: TensorSpec  # the grid of the weights
    stream: CalibrationStream | None  # the inputs, unless the rounding needs no data
    seed: int


class Rounded(NamedTuple):
    """Integers (out, in) and scales (out, groups) of the linear layers of a block, and notes, as JSON."""

    layers: dict[str, tuple[Tensor, QParams]]
    notes: dict[str, Any]


@dataclass(frozen=True)
class Rounding(Options, abc.ABC):
    """The base of all roundings."""

    name: ClassVar[str]  # on the command line
    papers: ClassVar[tuple[Paper, ...]] = ()  # that a model card cites
    needs_data: ClassVar[bool] = True  # whether weights are fitted to the inputs that they will meet
    quantizes_activations: ClassVar[bool] = False  # whether blocks rounded before have their activations quantized
    learns_clipping: ClassVar[bool] = False  # whether clip ratios of weights are learned; DuQuant smooths less then
    shares_sequences: ClassVar[bool] = False  # whether processes can each take a part of the calibration text

    @property
    def needs_teacher(self) -> bool:
        """Whether what the original model computes is needed, too."""
        return False

    @abc.abstractmethod
    def round(self, task: BlockTask) -> Rounded:
        """Choose the integers of all linear layers of a block."""

    @abc.abstractmethod
    def peak_bytes(self, sizes: ModelSizes) -> int:
        """Memory of a block while it is rounded: its weights, the integers, and what lies between."""

    def state_bytes(self, sizes: ModelSizes) -> int:
        """Memory of a calibration token beside its hidden state, from block to block."""
        return 0

    def warning(self, sizes: ModelSizes) -> str | None:
        """What is risky about so much calibration text, if anything; said before the work."""
        return None

    def summary(self, notes: Sequence[Mapping[str, Any]]) -> list[str]:
        """What the notes of all blocks say, in sentences."""
        return []
