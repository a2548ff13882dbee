import dataclasses

import torch

from dfrot.linalg.rotation import block_diagonal, random_hadamard, random_orthogonal
from dfrot.transform.fold import Fold


def test_what_a_layer_absorbs_moves_to_the_device_of_its_weight() -> None:
    generator = torch.Generator().manual_seed(0)
    fold = Fold(
        gain=torch.ones(8),
        input_rotation=random_hadamard(8, generator),
        output_rotation=random_orthogonal(4, generator),
    )
    folded = fold.weight(torch.empty(4, 8, device="meta"))
    assert (folded.device.type, folded.dtype) == ("meta", torch.float64)


def test_a_folded_layer_computes_the_same_from_rotated_and_smoothed_inputs() -> None:
    """((x̂ Q) / s) R − o goes in, (y P) divided by t, less o', comes out, y = x̂ diag(g) Wᵀ + b."""
    generator = torch.Generator().manual_seed(0)
    weight, bias, x = (torch.randn(*shape, generator=generator).double() for shape in ((6, 8), (6,), (5, 8)))
    gain, smooth, output_divisor = (torch.rand(size, generator=generator) + 0.5 for size in (8, 8, 6))
    offset, output_offset = (torch.randn(size, generator=generator).double() for size in (8, 6))
    q, p = random_orthogonal(8, generator), random_orthogonal(4, generator)
    rows = torch.tensor([1, 2, 4, 5])
    online = block_diagonal(random_hadamard(4, generator), 2)
    fold = Fold(gain, q, smooth, online, p, output_rows=rows, output_divisor=output_divisor)
    fold = dataclasses.replace(fold, offset=offset, output_offset=output_offset)
    arriving, folded = fold.arriving(q.apply(x) / smooth.double()), fold.weight(weight)
    torch.testing.assert_close(arriving, online.apply(q.apply(x) / smooth.double()) - offset)
    folded_bias = fold.bias(bias, folded)
    assert folded_bias is not None
    got = arriving @ folded.T + folded_bias
    expected = (x * gain.double()) @ weight.T + bias
    expected[:, rows] = p.apply(expected[:, rows])
    expected = expected / output_divisor.double() - output_offset
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-13)
