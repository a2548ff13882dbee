"""dfrot: run large language models in 4 bits (weights, activations and KV cache) and keep their quality."""

from dfrot.version import __version__

# isort: split
import dfrot.fused
import dfrot.gguf  # noqa: F401 — makes GGUF files known
from dfrot.checkpoint.load import load
from dfrot.evaluation.perplexity import perplexity
from dfrot.pipeline.recipe import Recipe
from dfrot.pipeline.run import QuantizeResult, quantize
from dfrot.quant.spec import Spec
from dfrot.system.errors import SetupError, UserError

__all__ = [
    "QuantizeResult",
    "Recipe",
    "SetupError",
    "Spec",
    "UserError",
    "__version__",
    "load",
    "perplexity",
    "quantize",
]
