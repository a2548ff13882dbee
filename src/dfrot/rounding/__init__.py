"""How the folded weights are rounded to their grid."""

from dfrot.rounding.gptq import GPTQ
from dfrot.rounding.lwc import LWC
from dfrot.rounding.rounding import Rounding
from dfrot.rounding.rtn import RTN

ROUNDINGS: dict[str, type[Rounding]] = {"rtn": RTN, "gptq": GPTQ, "lwc": LWC}
