"""QuaRot: outlier-free 4-bit inference in rotated LLMs (Ashkboos et al. 2024, arXiv 2404.00456).

Rotate the residual stream by a random rotation Q and the outliers, which sit in few channels, are spread over all of
them. §4: a randomized Hadamard matrix does it best ("Stage 1a", R1), a Hadamard matrix per head makes the values
easy ("Stage 1c", R2), one on the fly before down_proj the feed-forward activations ("Stage 1b", R4), one after RoPE
the keys ("Stage 1d", R3).

Divergences. The released code mixes the heads by an online Hadamard matrix before o_proj; DFRot leaves that out, and
so do we unless `head_mixing` is set. It takes hidden_size / num_attention_heads for head_dim; we ask the config.
"""

from dfrot.linalg.hadamard import require_hadamard_size
from dfrot.linalg.rotation import Hadamard, Rotation, random_hadamard, random_orthogonal
from dfrot.methods.method import Context
from dfrot.models.graph import head_dim
from dfrot.pipeline.recipe import QuaRot
from dfrot.system.errors import UserError
from dfrot.transform.transforms import Transforms


def quarot(context: Context) -> Transforms:
    """R1 random, R2, R3 and R4 Hadamard.

    Raises:
        UserError: no Hadamard matrix has the size that a site of this model needs.
    """
    options = context.recipe.method
    assert isinstance(options, QuaRot), "fitted with the options of another method"
    return around(
        random_rotation(context, options.rotation), context, online=options.online, head_mixing=options.head_mixing
    )


def random_rotation(context: Context, kind: str) -> Rotation:
    """R1 before any refinement: RH ("hadamard") or RO ("orthogonal") of the model's width.

    Raises:
        UserError: no Hadamard matrix has the model's width.
    """
    width = context.source.config.hidden_size
    if kind == "orthogonal":
        return random_orthogonal(width, context.generator())
    try:
        require_hadamard_size(width)
    except ValueError as error:
        raise UserError(f"the residual stream has {width} channels: {error} Use --rotation orthogonal.") from error
    return random_hadamard(width, context.generator())


def around(residual: Rotation, context: Context, *, online: bool, head_mixing: bool = False) -> Transforms:
    """QuaRot's other rotations around a given R1; without `online` those that are folded."""
    config = context.source.config
    return Transforms(
        residual=residual,
        values=hadamard("one head", head_dim(config)),
        keys=hadamard("one head", head_dim(config)) if online else None,
        ffn=hadamard("the input of down_proj", config.intermediate_size) if online else None,
        heads=hadamard("head mixing", config.num_attention_heads) if head_mixing else None,
    )


def hadamard(site: str, size: int) -> Hadamard:
    """The plain Hadamard matrix of a site.

    Raises:
        UserError: none of that size is known.
    """
    try:
        return Hadamard(size)
    except ValueError as error:
        raise UserError(f"{site} has size {size}: {error}") from error
