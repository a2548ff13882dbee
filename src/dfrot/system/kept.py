"""What is derived from tensors and kept for as long as they stay the same.

A loaded model may be cast, moved, written to or given other parameters between two forward passes. So a kept value
remembers the state of every tensor that it was made from, and is made anew when that state is another one.
"""

from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

T = TypeVar("T")
_PLAIN = (Tensor, nn.Parameter, nn.Buffer)


def state(tensors: Sequence[Tensor | None]) -> list[Any]:
    """Differs once one of the tensors is another, lies elsewhere, or was written to in a way that torch counts.

    An address tells apart only as long as a tensor that shares its memory is kept, or it may have been given to others.
    """
    return [None if t is None else (id(t), t.data_ptr(), t._version, t.dtype, t.shape) for t in tensors]


def lasting(tensor: Tensor | None) -> bool:
    """Whether the state of a tensor can be told: not while it is traced, differentiated or an inference tensor."""
    if tensor is None:
        return True
    differentiated = tensor.requires_grad and torch.is_grad_enabled()
    return type(tensor) in _PLAIN and not (tensor.is_meta or tensor.is_inference() or differentiated)


class Kept(Generic[T]):
    """A value made from tensors. Copies of it, by `copy` or pickle, are empty."""

    def __init__(self) -> None:
        self.value: T | None = None
        self._made_from: tuple[list[Any], tuple[Any, ...]] | None = None
        self._memory: list[Tensor | None] = []  # of the tensors

    def get(self, make: Callable[[], T], tensors: Sequence[Tensor | None], *settings: Any) -> T:
        """The value for these tensors and settings; made, and not kept, where the tensors' state cannot be told."""
        if torch.compiler.is_compiling() or not all(map(lasting, tensors)):
            return make()
        made_from = state(tensors), settings
        if self.value is None or self._made_from != made_from:
            self.value = None  # before another one is made
            with torch.inference_mode(False), torch.no_grad():
                self.value, self._memory = make(), [t if t is None else t.detach() for t in tensors]
            self._made_from = made_from
        return self.value

    def __reduce__(self) -> tuple[type["Kept[T]"], tuple[()]]:
        return type(self), ()
