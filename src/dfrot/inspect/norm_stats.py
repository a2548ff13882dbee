"""Statistics of norm outputs, which readers of the residual stream see: massive tokens, channels, kurtosis, error.

These are the pictures of the DFRot paper: ordinary tokens are equally easy under every random rotation, and the few
massive ones decide. Norm outputs x̂ are without gain, which is folded into the readers, and have RMS 1.
"""

from jaxtyping import Float
from torch import Tensor

from dfrot.inspect.schema import NormChannels
from dfrot.quant.spec import TensorSpec
from dfrot.transform.transforms import Transforms

LARGEST = 8  # outlier channels that are listed of every norm
_TINY = 1e-30  # keeps the statistics of a token of zeros finite


def as_quantized(
    x: Float[Tensor, "tokens hidden"], transforms: Transforms, index: int, reader: str, gain: Float[Tensor, " hidden"]
) -> Float[Tensor, "tokens hidden"]:
    """The norm output x̂ in the form in which a method quantizes it.

    That is x̂ R; for DuQuant, which leaves the gain where it is and smooths, (x̂ g / s) R. Without rotation it is x̂, the
    same tokens as with one, as in the papers' figures, although the method `none` leaves the gain where it is, too.

    Args:
        index: of the block.
        reader: the first of the layers that read the norm.
        gain: g, of the norm.
    """
    if transforms.inputs:
        transform = transforms.inputs[index][reader]
        x = x * gain
        return transform.rotation.apply(x if transform.smooth is None else x / transform.smooth)
    return x if transforms.residual is None else transforms.residual.apply(x)


def channel_stats(x: Float[Tensor, "tokens hidden"]) -> NormChannels:
    """The outlier channels of a norm's outputs x̂."""
    peaks = x.abs().amax(0)  # (hidden,)
    values, channels = peaks.topk(min(LARGEST, len(peaks)))
    largest = zip(channels.tolist(), values.tolist(), strict=True)
    return {
        "median": float(peaks.median()),
        "largest": [{"channel": channel, "value": value} for channel, value in largest],
    }


def relative_error(x: Float[Tensor, "*tokens channels"], quantizer: TensorSpec) -> Float[Tensor, "*tokens"]:
    """‖x − Q(x)‖ / ‖x‖ of every token."""
    return ratio(x - quantizer.fake_quantize(x), x)


def ratio(error: Float[Tensor, "*tokens channels"], x: Float[Tensor, "*tokens channels"]) -> Float[Tensor, "*tokens"]:
    """‖error‖ / ‖x‖ of every token."""
    return error.norm(dim=-1) / x.norm(dim=-1).clamp(min=_TINY)


def excess_kurtosis(x: Float[Tensor, "*tokens channels"]) -> Float[Tensor, "*tokens"]:
    """How heavy the tails of every token's entries are: 0 for Gaussian ones, large where few channels stick out."""
    squared = (x - x.mean(-1, keepdim=True)).square()
    return squared.square().mean(-1) / squared.mean(-1).square().clamp(min=_TINY) - 3
