"""dfrot: run large language models in 4 bits (weights, activations and KV cache) and keep their quality."""

from dfrot.version import __version__

# isort: split
from dfrot.checkpoint.load import load
from dfrot.errors import EnvironmentFault, UserError
from dfrot.evaluation.perplexity import perplexity
from dfrot.pipeline import Report, quantize
from dfrot.recipe import Recipe
from dfrot.spec import Spec

__all__ = [
    "EnvironmentFault",
    "Recipe",
    "Report",
    "Spec",
    "UserError",
    "__version__",
    "load",
    "perplexity",
    "quantize",
]
