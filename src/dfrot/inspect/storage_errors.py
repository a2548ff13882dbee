"""Quantization errors of stored weights, keys and values, by rotation."""

import dataclasses
from collections.abc import Mapping

from jaxtyping import Float
from torch import Tensor, nn

from dfrot.inspect.norm_stats import ratio
from dfrot.inspect.schema import LayerErrors
from dfrot.linalg.rotation import Rotation
from dfrot.methods.quarot import hadamard
from dfrot.models.source import Source
from dfrot.quant.affine import dequantize
from dfrot.quant.spec import TensorSpec
from dfrot.rounding.rtn import rtn
from dfrot.runtime.kv import KVQuantizer
from dfrot.transform.transforms import Transforms


def weight_errors(
    block: nn.Module, index: int, source: Source, transforms: Mapping[str, Transforms], spec: TensorSpec
) -> list[LayerErrors]:
    """‖W − Q(W)‖ / ‖W‖ of every linear layer of a block, folded and rounded to nearest without clipping by search."""
    spec = spec if spec.clip_ratio is not None else dataclasses.replace(spec, clip_ratio=1.0)
    errors: dict[str, dict[str, float]] = {name: {} for name in source.graph.linears}
    for method, fit in transforms.items():
        for name, fold in fit.folds(index, source.graph, source.config, block).items():
            weight = fold.weight(block.get_submodule(name).weight.data).float()  # type: ignore[arg-type]
            codes, qparams = rtn(weight, spec)
            left = weight - dequantize(codes, spec.weight_granularity, qparams)
            errors[name][method] = float(left.norm() / weight.norm())
    return [{"block": index, "layer": name, "error": by_method} for name, by_method in errors.items() if by_method]


def kv_errors(x: Float[Tensor, "batch heads tokens head_dim"], spec: TensorSpec) -> dict[str, float]:
    """‖x − Q(x)‖ / ‖x‖ of keys or values in the cache, plain and rotated; mean over heads and tokens."""
    size = x.shape[-1]

    def error(rotation: Rotation | None) -> float:
        quantizer = KVQuantizer(spec, spec, rotation, size)
        rotated = quantizer.rotate(x)
        return float(ratio(rotated - quantizer.unpack(quantizer.pack_keys(x), x.dtype), rotated).mean())

    return {"plain": error(None), "rotated": error(hadamard("one head", size))}
