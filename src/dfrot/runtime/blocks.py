"""Block rotations whose tensors are part of the checkpoint."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dfrot.linalg.rotation import block_rotation


class BlockRotation(nn.Module):
    """x ↦ x B₁ P₁ B₂ …, each B one block along the diagonal, each P a permutation.

    Buffers: `matrices` float32 (float64 in a float64 model) (count, block, block), `orders` int32 (count − 1, size).
    """

    matrices: Tensor
    orders: Tensor

    def __init__(self, size: int, block: int, count: int, dtype: torch.dtype) -> None:
        super().__init__()
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        self.register_buffer("matrices", torch.empty(count, block, block, dtype=wide))
        self.register_buffer("orders", torch.empty(count - 1, size, dtype=torch.int32))

    def forward(self, x: Float[Tensor, "*batch size"]) -> Float[Tensor, "*batch size"]:
        return block_rotation(self.matrices, self.orders).apply(x)


class RotatedNorm(nn.RMSNorm):
    """A norm that hands its output out rotated, once for all layers that read it."""

    def __init__(self, norm: nn.RMSNorm, rotation: BlockRotation) -> None:
        super().__init__(norm.normalized_shape, eps=norm.eps, device="meta")
        self.weight, self.rotation = norm.weight, rotation

    def forward(self, x: Float[Tensor, "*batch size"]) -> Float[Tensor, "*batch size"]:
        return self.rotation(super().forward(x))
