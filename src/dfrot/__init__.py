"""dfrot: run large language models in 4 bits (weights, activations and KV cache) and keep their quality."""

from dfrot.version import __version__

# isort: split
from dfrot.checkpoint.load import load
from dfrot.evaluation.perplexity import perplexity
from dfrot.pipeline.recipe import Recipe
from dfrot.pipeline.run import Report, quantize
from dfrot.quant.spec import Spec
from dfrot.system.errors import SetupError, UserError

__all__ = [
    "Recipe",
    "Report",
    "SetupError",
    "Spec",
    "UserError",
    "__version__",
    "load",
    "perplexity",
    "quantize",
]
