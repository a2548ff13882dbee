"""The operators on NVIDIA GPUs, in Triton, which torch brings along there. `backend()` says whether they are used."""

import functools
import importlib
import os
from typing import Any

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_OLDEST = 8, 0  # capability: from there on bfloat16 and products of int8 are in hardware


def computable(x: Tensor) -> bool:
    """Whether there are kernels for such a tensor: on a GPU, with nothing to differentiate."""
    known = x.is_cuda and x.dtype in DTYPES and _usable(x.get_device())
    return known and not (x.requires_grad and torch.is_grad_enabled())


def backend(device: torch.device) -> str:
    """What computes on a GPU, for people."""
    why = _why_not(torch.cuda.current_device() if device.index is None else device.index)
    return "Triton kernels" if why is None else f"torch reference: {why}"


@torch.compiler.assume_constant_result
def _usable(device: int) -> bool:
    """Which torch.compile need not look into."""
    return _why_not(device) is None


@functools.cache
def _why_not(device: int) -> str | None:
    """What keeps the kernels from being used. Triton is looked for last: that takes a second."""
    if os.environ.get("DFROT_KERNELS") == "reference":
        return "DFROT_KERNELS=reference is set"
    if torch.version.hip is not None:
        return "there are no kernels for AMD GPUs"
    if torch.cuda.get_device_capability(device) < _OLDEST:
        return "the GPU's capability is below {}.{}".format(*_OLDEST)
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return f"Triton cannot be imported ({error})"
    return None


def register(operator: Any, module: str, name: str) -> None:
    """Have a function of a module of this package compute an operator on GPUs, each call on its tensors' own GPU."""

    def compute(first: Any, *arguments: Any) -> Any:
        function = getattr(importlib.import_module(f"{__name__}.{module}"), name)
        with torch.cuda.device(first.device if isinstance(first, Tensor) else first[0].device):
            return function(first, *arguments)

    operator.register_kernel("cuda")(compute)
