"""Weight quantizers: how the folded weights are rounded to their grid."""

from collections.abc import Callable

from torch import Tensor

from dfrot.quant.affine import QParams
from dfrot.recipe import TensorSpec
from dfrot.weights.rtn import rtn

WEIGHTS: dict[str, Callable[[Tensor, TensorSpec], tuple[Tensor, QParams]]] = {"rtn": rtn}
