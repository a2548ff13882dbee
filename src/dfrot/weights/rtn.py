"""Round to nearest, with a searched clip ratio."""

from jaxtyping import Float
from torch import Tensor

from dfrot.quant.affine import SCALE_DTYPE, QParams, choose_qparams, quantize
from dfrot.quant.clip import search_clip
from dfrot.recipe import TensorSpec


def rtn(weight: Float[Tensor, "out in"], spec: TensorSpec) -> tuple[Tensor, QParams]:
    """Integers (out, in) and scales (out, groups) of a weight.

    Raises:
        ValueError: the group size does not divide `in`.
    """
    granularity = spec.weight_granularity
    if spec.clip is None:
        qparams = search_clip(weight, spec.grid, granularity, SCALE_DTYPE)
    else:
        qparams = choose_qparams(weight, spec.grid, granularity, spec.clip, SCALE_DTYPE)
    return quantize(weight, spec.grid, granularity, qparams), qparams
