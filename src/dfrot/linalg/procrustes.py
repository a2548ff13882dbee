"""The orthogonal Procrustes problem: which rotation carries A closest to B."""

import torch
from jaxtyping import Float
from torch import Tensor

# float64 where an SVD is cheap; above, float32 and Newton–Schulz steps that restore orthogonality.
_FLOAT64_UP_TO = 2048


def polar_factor(matrix: Float[Tensor, "size size"]) -> Float[Tensor, "size size"]:
    """U Vᵀ of the singular value decomposition U Σ Vᵀ: the orthogonal matrix nearest to `matrix`, in float64.

    Unlike `qr(matrix)[0]`, which flips signs, it leaves an orthogonal matrix as it is.
    """
    size = matrix.shape[0]
    u, _, vh = torch.linalg.svd(matrix.to(torch.float64 if size <= _FLOAT64_UP_TO else torch.float32))
    q = (u @ vh).double()
    for _ in range(1 if size <= _FLOAT64_UP_TO else 2):  # Newton–Schulz: an error ε becomes ε²
        q = 1.5 * q - 0.5 * q @ (q.T @ q)
    return q


def procrustes(
    a: Float[Tensor, "rows size"],
    b: Float[Tensor, "rows size"],
    weights: Float[Tensor, " rows"] | None = None,
) -> Float[Tensor, "size size"]:
    """The orthogonal R that minimises Σᵢ wᵢ ‖aᵢ R − bᵢ‖², in float64.

    R = U Vᵀ with U Σ Vᵀ = svd(Aᵀ diag(w) B) (Schönemann 1966). Weights are those of the squared errors: a token
    that the objective multiplies by γ² has weight γ².
    """
    weighted = a if weights is None else a * weights[:, None]
    return polar_factor(weighted.T @ b)
