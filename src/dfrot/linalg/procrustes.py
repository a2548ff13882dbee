"""The orthogonal Procrustes problem: which rotation R carries the rows of A closest to those of B.

Σᵢ wᵢ ‖aᵢ R − bᵢ‖² is least at R = U Vᵀ, the polar factor of Aᵀ diag(w) B = U Σ Vᵀ (Schönemann 1966). Weights are those
of the squared errors: a token whose error counts γ times has weight γ². The product is summed where A and B are made,
piece by piece.
"""

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
