"""Statistics of norm outputs, which readers of the residual stream see, and quantization errors of what is stored.

These are the pictures of the DFRot paper: ordinary tokens are equally easy under every random rotation, and the few
massive ones decide. Norm outputs x̂ are without gain, which is folded into the readers, and have RMS 1.
"""

import dataclasses
from collections.abc import Mapping

from jaxtyping import Float
from torch import Tensor, nn

from dfrot.inspect.inspection import LayerErrors, NormChannels
from dfrot.methods.quarot import hadamard
from dfrot.models.source import Source
from dfrot.quant.affine import dequantize
from dfrot.quant.spec import TensorSpec
from dfrot.rounding.rtn import rtn
from dfrot.runtime.kv import KVQuantizer
from dfrot.transform.transforms import Transforms

LARGEST = 8  # outlier channels that are listed of every norm
_TINY = 1e-30  # keeps the statistics of a token of zeros finite


def as_quantized(
    x: Float[Tensor, "tokens hidden"], transforms: Transforms, index: int, reader: str, gain: Float[Tensor, " hidden"]
) -> Float[Tensor, "tokens hidden"]:
    """The output x̂ of a norm of block `index`, which the layer `reader` reads, in the form in which it is quantized.

    That is x̂ R; for DuQuant, which leaves the gain where it is and smooths, (x̂ g / s) R. Without rotation it is x̂, the
    same tokens as with one, as in the papers' figures, although the method `none` leaves the gain where it is, too.
    """
    if transforms.inputs:
        transform = transforms.inputs[index][reader]
        x = x * gain
        return transform.rotation.apply(x if transform.smooth is None else x / transform.smooth)
    return x if transforms.residual is None else transforms.residual.apply(x)


def outliers(x: Float[Tensor, "tokens hidden"]) -> NormChannels:
    """The outlier channels of a norm's outputs x̂."""
    peaks = x.abs().amax(0)  # (hidden,)
    largest = zip(*(part.tolist() for part in peaks.topk(min(LARGEST, len(peaks)))), strict=True)
    return {
        "median": float(peaks.median()),
        "largest": [{"channel": channel, "value": value} for value, channel in largest],
    }


def excess_kurtosis(x: Float[Tensor, "*tokens channels"]) -> Float[Tensor, "*tokens"]:
    """How heavy the tails of every token's entries are: 0 for Gaussian ones, large where few channels stick out."""
    squared = (x - x.mean(-1, keepdim=True)).square()
    return squared.square().mean(-1) / squared.mean(-1).square().clamp(min=_TINY) - 3


def relative_error(
    x: Float[Tensor, "*tokens channels"], q: Float[Tensor, "*tokens channels"]
) -> Float[Tensor, "*tokens"]:
    """‖x − Q(x)‖ / ‖x‖ of every token."""
    return (x - q).norm(dim=-1) / x.norm(dim=-1).clamp(min=_TINY)


def weight_errors(
    block: nn.Module, index: int, source: Source, fitted: Mapping[str, Transforms], spec: TensorSpec
) -> list[LayerErrors]:
    """‖W − Q(W)‖ / ‖W‖ of every linear layer of a block, folded and rounded to nearest without clipping by search."""
    spec = spec if spec.clip_ratio is not None else dataclasses.replace(spec, clip_ratio=1.0)
    errors: dict[str, dict[str, float]] = {name: {} for name in source.graph.linears}
    for method, transforms in fitted.items():
        if transforms.inputs:  # DuQuant's rotations run online: nothing is folded into weights
            continue
        for name, fold in transforms.folds(index, source.graph, source.config, block).items():
            weight = fold.weight(block.get_submodule(name).weight.data).float()  # type: ignore[arg-type]
            codes, qparams = rtn(weight, spec)
            left = weight - dequantize(codes, spec.weight_granularity, qparams)
            errors[name][method] = float(left.norm() / weight.norm())
    return [{"block": index, "layer": name, "error": by_method} for name, by_method in errors.items() if by_method]


def kv_errors(x: Float[Tensor, "batch heads tokens head_dim"], spec: TensorSpec) -> dict[str, float]:
    """‖x − Q(x)‖ / ‖x‖ of keys or values in the cache, plain and rotated; mean over heads and tokens."""
    size, errors = x.shape[-1], {}
    for how, rotation in {"plain": None, "rotated": hadamard("one head", size)}.items():
        quantizer = KVQuantizer(spec, spec, rotation, size)
        rotated = quantizer.rotate(x)
        unpacked = quantizer.unpack(quantizer.pack_keys(x), x.dtype)
        errors[how] = float(relative_error(rotated, unpacked).mean())
    return errors
