"""The operators on NVIDIA GPUs, in Triton, which torch brings along there.

They are tested in Triton's interpreter and compiled for several GPUs, but no GPU has run them yet. Until one has, they
are used only where DFROT_KERNELS=triton asks for them; otherwise the reference computes on GPUs.
"""

import functools
import importlib
import os
from typing import Any

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@torch.compiler.assume_constant_result
@functools.cache
def available() -> bool:
    """Whether they are asked for, and Triton is there. It takes a second to import, and most machines have none."""
    if os.environ.get("DFROT_KERNELS") != "triton":
        return False
    try:
        import triton  # noqa: F401
    except ImportError:
        return False
    return True


def computable(x: Tensor) -> bool:
    """Whether there are kernels for such a tensor: on a GPU, with nothing to differentiate."""
    known = x.is_cuda and x.dtype in DTYPES and available()
    return known and not (x.requires_grad and torch.is_grad_enabled())


def register(operator: Any, module: str, name: str) -> None:
    """Have a function of a module of this package compute an operator on GPUs, each call on its tensors' own GPU."""

    def compute(first: Any, *arguments: Any) -> Any:
        function = getattr(importlib.import_module(f"{__name__}.{module}"), name)
        with torch.cuda.device(first.device if isinstance(first, Tensor) else first[0].device):
            return function(first, *arguments)

    operator.register_kernel("cuda")(compute)
