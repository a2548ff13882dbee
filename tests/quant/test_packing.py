import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dfrot.quant.packing import pack, packed_width, unpack


@given(st.integers(2, 8), st.integers(1, 40), st.integers(0, 2**31))
def test_packing_is_numpys_and_comes_back(bits: int, width: int, seed: int) -> None:
    codes = torch.randint(2**bits, (3, width), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)
    digits = codes.numpy()[..., None] >> np.arange(bits) & 1
    expected = np.packbits(digits.reshape(3, -1).astype(np.uint8), axis=-1, bitorder="little")
    packed = pack(codes, bits)
    assert packed.shape == (3, packed_width(width, bits))
    assert np.array_equal(packed.numpy(), expected)
    assert torch.equal(unpack(packed, bits, width), codes)


def test_the_low_nibble_comes_first() -> None:
    assert pack(torch.tensor([1, 2, 15], dtype=torch.uint8), 4).tolist() == [0x21, 0x0F]


def test_a_code_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="codes of 3 bits are below 8, got 8"):
        pack(torch.tensor([8], dtype=torch.uint8), 3)
