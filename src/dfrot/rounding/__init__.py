"""Weight quantizers: how the folded weights are rounded to their grid."""

from collections.abc import Callable

from torch import Tensor

from dfrot.quant.affine import QParams
from dfrot.rounding.gptq import gptq_block
from dfrot.rounding.lwc import lwc_block
from dfrot.rounding.rtn import rtn_block
from dfrot.rounding.stream import BlockTask

# From a folded block, the integers (out, in) and scales (out, groups) of its linear layers.
WEIGHTS: dict[str, Callable[[BlockTask], dict[str, tuple[Tensor, QParams]]]] = {
    "rtn": rtn_block,
    "gptq": gptq_block,
    "lwc": lwc_block,
}
