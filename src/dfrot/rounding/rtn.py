"""Round to nearest, with a searched clip ratio."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from dfrot.kernels.rounding import clip_errors, supported
from dfrot.models.sizes import ModelSizes
from dfrot.quant.affine import SCALE_DTYPE, QParams, choose_qparams, quantize
from dfrot.quant.clip import search_clip
from dfrot.quant.spec import TensorSpec
from dfrot.rounding.rounding import BlockTask, Rounded, Rounding


@dataclass(frozen=True)
class RTN(Rounding):
    """Round every linear layer to nearest; needs no data."""

    name = "rtn"
    needs_data = False

    def round(self, task: BlockTask) -> Rounded:
        layers: dict[str, tuple[Tensor, QParams]] = {}
        for stage in task.graph.rounded_together:  # layers that engines fuse have one factor of their scales
            weights: dict[str, Any] = {name: task.module.get_submodule(name).weight for name in stage}
            spec = task.spec.holding(torch.stack([weight.abs().max() for weight in weights.values()]).max())
            layers |= {name: rtn(weight, spec) for name, weight in weights.items()}
        return Rounded(layers, {})

    def peak_bytes(self, sizes: ModelSizes) -> int:
        codes = 2 * sizes.block  # a byte each, and packed
        return sizes.block * sizes.working + codes + 3 * sizes.working * sizes.largest


def rtn(weight: Float[Tensor, "out in"], spec: TensorSpec) -> tuple[Tensor, QParams]:
    """Integers (out, in) and scales (out, groups) of a weight; ValueError as for `weight_qparams`."""
    qparams = weight_qparams(weight, spec)
    return quantize(weight, spec.grid, spec.weight_granularity, qparams), qparams


def weight_qparams(weight: Float[Tensor, "out in"], spec: TensorSpec) -> QParams:
    """Scales (and zero points) of shape (out, groups), in a dtype that they are stored in, by search unless given.

    Raises ValueError if the group size does not divide `in`.
    """
    if spec.largest is None:
        spec = spec.holding(weight.abs().max())
    if spec.clip_ratio is None:
        errors = clip_errors if supported(weight, spec.grid) else None
        return search_clip(weight, spec.grid, spec.weight_granularity, SCALE_DTYPE, errors)
    return choose_qparams(weight, spec.grid, spec.weight_granularity, spec.clip_ratio, SCALE_DTYPE)
