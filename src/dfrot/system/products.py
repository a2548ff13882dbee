"""Products in float32 on processors for which MKL has no fast code.

torch multiplies float32 by MKL, which takes a slower path on processors that are not Intel's. oneDNN, which torch has
too, does not: it is 2.2 times as fast on an AMD EPYC of 2024 (Zen 5). Which one computes depends on the processor's
maker and not on a measurement, so that a run that is resumed rounds its sums as it did before.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

P = ParamSpec("P")
T = TypeVar("T")
FEW = 16  # rows, below which reading the weight is what takes the time
_ROWS = 1024  # of a product that is added to something, so that little of it stands beside that
_SMALL = 1 << 20  # multiplications, below which a product is not worth the way to oneDNN
_MATMUL = (torch.matmul, Tensor.matmul, Tensor.__matmul__)


class OneDNNProducts(TorchFunctionMode):
    """Within it `linear`, `@` and `addmm_` multiply by oneDNN what is float32, on the CPU and has no gradient."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not kwargs:
            if func is nn.functional.linear and _suits(*args):
                return _product(*args)
            if func in _MATMUL and _worth(*args):
                return _product(args[0], args[1].T)
            if func is Tensor.addmm_ and _plain(args[0]) and _worth(*args[1:]):
                for rows, of_them in zip(args[0].split(_ROWS), args[1].split(_ROWS), strict=True):
                    rows.add_(_product(of_them, args[2].T))
                return args[0]
        return func(*args, **(kwargs or {}))


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def _worth(x: Any, y: Any) -> bool:
    """Whether x y is a product for oneDNN."""
    matrices = isinstance(x, Tensor) and isinstance(y, Tensor) and x.dim() > 1 and y.dim() == 2
    return matrices and x.numel() * y.shape[1] >= _SMALL and _suits(x, y.T)


def _suits(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:
    if torch.autograd.forward_ad._current_level >= 0:  # derivatives forwards
        return False
    if not all(map(_plain, (x, weight) if bias is None else (x, weight, bias))) or weight.dim() != 2:
        return False
    if bias is not None and not (bias.shape == weight.shape[:1] and bias.is_contiguous()):  # oneDNN takes it for one
        return False
    return x.numel() >= FEW * max(1, x.shape[-1])


def _plain(tensor: Tensor) -> bool:
    """Whether it holds float32 numbers and nothing is to be differentiated."""
    known = type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided and tensor.device.type == "cpu"
    graded = tensor.requires_grad and torch.is_grad_enabled()
    return (
        known
        and tensor.dtype == torch.float32
        and not graded
        and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)
    )


@functools.cache
def onednn_is_faster(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether this processor is one that MKL neglects."""
    both = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
    return both and cpuinfo.is_file() and "AuthenticAMD" in cpuinfo.read_text()


def with_fast_products(function: Callable[P, T]) -> Callable[P, T]:
    """A function whose products in float32 are computed by the faster library."""

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> T:
        if not onednn_is_faster():
            return function(*args, **kwargs)
        with OneDNNProducts():
            return function(*args, **kwargs)

    return wrapped
