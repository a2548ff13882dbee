import torch

from dfrot.linalg.rotation import random_hadamard, random_orthogonal
from dfrot.transform.fold import Fold


def test_what_a_layer_absorbs_moves_to_the_device_of_its_weight() -> None:
    generator = torch.Generator().manual_seed(0)
    fold = Fold(gain=torch.ones(8), reads=random_hadamard(8, generator), writes=random_orthogonal(4, generator))
    folded = fold.weight(torch.empty(4, 8, device="meta"))
    assert (folded.device.type, folded.dtype) == ("meta", torch.float64)
