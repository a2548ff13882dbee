"""Round to nearest, with a searched clip ratio."""

from jaxtyping import Float
from torch import Tensor

from dfrot.quant.affine import SCALE_DTYPE, QParams, choose_qparams, quantize
from dfrot.quant.clip import search_clip
from dfrot.quant.spec import TensorSpec
from dfrot.rounding.stream import BlockTask


def rtn_block(task: BlockTask) -> dict[str, tuple[Tensor, QParams]]:
    """Round every linear layer of a block."""
    names = task.source.graph.linears
    return {name: rtn(task.module.get_submodule(name).weight, task.recipe.spec.weights) for name in names}  # type: ignore[arg-type]


def rtn(weight: Float[Tensor, "out in"], spec: TensorSpec) -> tuple[Tensor, QParams]:
    """Integers (out, in) and scales (out, groups) of a weight.

    Raises:
        ValueError: the group size does not divide `in`.
    """
    qparams = weight_qparams(weight, spec)
    return quantize(weight, spec.grid, spec.weight_granularity, qparams), qparams


def weight_qparams(weight: Float[Tensor, "out in"], spec: TensorSpec) -> QParams:
    """The grid of a weight: scales (and zero points) of shape (out, groups), in a dtype that they are stored in.

    Raises:
        ValueError: the group size does not divide `in`.
    """
    if spec.clip is None:
        return search_clip(weight, spec.grid, spec.weight_granularity, SCALE_DTYPE)
    return choose_qparams(weight, spec.grid, spec.weight_granularity, spec.clip, SCALE_DTYPE)
