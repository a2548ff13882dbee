"""Models that are still to come into a directory: out of a file of another format, or from the Hub."""

import abc
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

from dfrot.models.multimodal import LanguageModel


class Pending(abc.ABC):
    """A model that comes into a directory that transformers can load, once, and can be described before.

    Attributes:
        comes: how, as a participle.
        path: what messages call it by.
        folder: the directory.
    """

    comes: ClassVar[str]
    path: Path
    folder: Path

    @property
    @abc.abstractmethod
    def is_there(self) -> bool:
        """Whether nothing is left to do."""

    @property
    @abc.abstractmethod
    def described(self) -> LanguageModel:
        """What will lie in the directory."""

    @property
    @abc.abstractmethod
    def to_come(self) -> int:
        """Bytes that are missing there."""

    @abc.abstractmethod
    def require_disk(self) -> None:
        """Raise SetupError if the disk does not hold it."""

    @abc.abstractmethod
    def fetch(self) -> None:
        """Bring it there, whole or not at all."""


# Called with MODEL. A ring that reads files of another format registers here, so that the core does not know of it.
FORMATS: list[Callable[[str], Pending | None]] = []
