"""Rotations in blocks, for grids with a scale for each group."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import scipy.linalg
import torch
from safetensors.torch import load_file

import dfrot
from dfrot.checkpoint.load import read_checkpoint
from dfrot.linalg.hadamard import hadamard_matrix
from dfrot.linalg.rotation import Dense, Hadamard, Identity, Kronecker, Rotation, random_hadamard
from dfrot.methods.dfrot import DFRot
from dfrot.methods.massive import Sample
from dfrot.methods.rangerot import RangeRot
from dfrot.methods.refinement import Refined, squared_errors
from dfrot.quant.spec import Spec, TensorSpec
from dfrot.system.distributed import SINGLE_PROCESS
from dfrot.system.errors import UserError
from dfrot.transform.transforms import Transforms
from tests.contract.test_contract import logits, original_logits

Tiny = Callable[[str], Path]
SIZE, BLOCK = 64, 16
FLOATS = {word: Spec.parse(word).activations for word in ("nvfp4", "mxfp4")}
METHODS: dict[str, type[Refined]] = {"rangerot": RangeRot, "dfrot": DFRot}


def in_block(matrix: torch.Tensor, size: int) -> torch.Tensor:
    number = torch.arange(len(matrix)) // size
    return number[:, None] == number


def sample() -> Sample:
    """Tokens that share a few directions, as those of a language model do."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(300, 4, generator=generator) @ torch.randn(4, SIZE, generator=generator)
    x += 0.5 * torch.randn(300, SIZE, generator=generator)
    x /= x.square().mean(-1, keepdim=True).sqrt()
    return Sample(x, torch.zeros(300, dtype=torch.bool), torch.ones(300))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("quantizer", FLOATS.values(), ids=FLOATS)
@pytest.mark.parametrize("block", [BLOCK, None])
def test_refining_lowers_the_error_of_the_float_grid_itself_and_stays_in_its_blocks(
    method: str, quantizer: TensorSpec, block: int | None
) -> None:
    few, generator = sample(), torch.Generator().manual_seed(2)
    size = block or SIZE
    parts = [random_hadamard(size, generator).as_matrix() for _ in range(SIZE // size)]
    start = Dense(torch.block_diag(*parts))
    refined, steps = METHODS[method](steps=40, block=block).refine(start, few, quantizer, 1.0, SINGLE_PROCESS)
    before, after = (squared_errors(few.tokens, each, quantizer).mean() for each in (start, refined))
    assert after < before
    # the error that is reported is that of the quantizer by hand
    v = few.tokens @ start.matrix.float()
    expected = (v - quantizer.fake_quantize(v)).square().sum(-1).mean()
    assert steps[0]["ordinary"] == pytest.approx(float(expected), rel=1e-6)
    eye = torch.eye(SIZE, dtype=torch.float64)
    torch.testing.assert_close(refined.matrix @ refined.matrix.T, eye, rtol=0, atol=1e-9)
    assert (refined.matrix * ~in_block(refined.matrix, size)).abs().max() < 1e-12


def test_one_alternation_in_blocks_solves_procrustes_in_every_block() -> None:
    few, quantizer = sample(), FLOATS["nvfp4"]
    start = torch.block_diag(*[Hadamard(BLOCK).as_matrix()] * (SIZE // BLOCK))
    x = few.tokens.double()
    steps = DFRot(block=BLOCK).walk(x, torch.ones(300).double(), start, quantizer, SINGLE_PROCESS)
    next(steps)
    quantized = quantizer.fake_quantize(x @ start)
    expected = torch.zeros(SIZE, SIZE, dtype=torch.float64)
    for begin in range(0, SIZE, BLOCK):
        at = slice(begin, begin + BLOCK)
        block, _ = scipy.linalg.orthogonal_procrustes(x[:, at].numpy(), quantized[:, at].numpy())
        expected[at, at] = torch.from_numpy(block)
    torch.testing.assert_close(next(steps)[0], expected, rtol=0, atol=1e-9)


def test_descent_on_the_ranges_of_groups_is_the_gradient_that_autograd_finds() -> None:
    """The first step of RangeRot goes along −Σ r_τ² of all groups of integers."""
    few, quantizer = sample(), TensorSpec(4, symmetric=True, group=BLOCK)
    x, R = few.tokens.double(), torch.eye(SIZE, dtype=torch.float64, requires_grad=True)
    v = (x @ R).unflatten(-1, (-1, BLOCK))
    tau = 0.8
    r = 2 * tau * torch.logsumexp(torch.cat([v, -v], -1) / tau, -1)
    r.square().sum().backward()
    check_first_step(x, R, quantizer)


@pytest.mark.parametrize("quantizer", FLOATS.values(), ids=FLOATS)
def test_descent_on_floats_follows_the_error_of_their_quantizer(quantizer: TensorSpec) -> None:
    x, R = sample().tokens.double(), torch.eye(SIZE, dtype=torch.float64, requires_grad=True)
    (x @ R - quantizer.fake_quantize(x)).square().sum().backward()
    check_first_step(x, R, quantizer)


def check_first_step(x: torch.Tensor, R: torch.Tensor, quantizer: TensorSpec) -> None:
    """It goes along minus the gradient of R, which is the identity, in the Lie algebra."""
    assert R.grad is not None
    expected = R.grad - R.grad.T
    steps = RangeRot(steps=10).walk(x, torch.ones(len(x)).double(), R.detach(), quantizer, SINGLE_PROCESS)
    next(steps)
    moved = torch.from_numpy(scipy.linalg.logm(next(steps)[0].numpy()).real)
    torch.testing.assert_close(moved / moved.norm(), -expected / expected.norm(), rtol=0, atol=1e-9)


@pytest.mark.parametrize("method", ["quarot", "rangerot"])
@pytest.mark.parametrize("fold_only", [False, True])
def test_every_rotation_of_the_stream_of_values_and_of_the_ffn_has_blocks(
    tiny: Tiny, tmp_path: Path, text_file: Path, method: str, fold_only: bool
) -> None:
    """Logits stay what they were, and R1 and R2 in the weights are what those blocks make of the original's."""
    words: dict[str, Any] = {"steps": 2, "calib_tokens": 64} if method == "rangerot" else {}
    words |= {"spec": "w16a16kv16", "tune": "none", "calib": str(text_file)}
    recipe = dfrot.Recipe.parse(method, "rtn", block=BLOCK, fold_only=fold_only, **words)
    path = dfrot.quantize(tiny("qwen3"), recipe, tmp_path / "out").path
    expected = original_logits(tiny("qwen3"))
    assert (logits(path).double() - expected).norm() / expected.norm() < 1e-4  # float32, as in test_contract.py
    found = read_checkpoint(path)
    assert found is not None
    online = found.runtime.online
    assert ("mlp.down_proj" in online) != fold_only
    for rotation in online.values():
        plain = torch.kron(torch.eye(96 // BLOCK), hadamard_matrix(BLOCK).float()) / BLOCK**0.5
        assert torch.equal(rotation.as_matrix().float(), plain)
    rotated, original = (load_file(next(iter(sorted(each.glob("*.safetensors"))))) for each in (path, tiny("qwen3")))
    embedding = "model.embed_tokens.weight"
    # E R = E', so R = E⁺ E'
    R = torch.linalg.lstsq(original[embedding].double(), rotated[embedding].double()).solution
    assert (R * ~in_block(R, BLOCK)).abs().max() < 1e-5
    assert (R - torch.block_diag(*[R[:BLOCK, :BLOCK]] * 4)).abs().max() > 0.1  # each block is drawn on its own


def test_values_are_rotated_as_a_whole_where_a_block_is_no_smaller_than_a_head(tiny: Tiny, tmp_path: Path) -> None:
    from dfrot.methods.method import FitContext
    from dfrot.methods.quarot import QuaRot
    from dfrot.models.source import open_source
    from dfrot.quant.spec import UNQUANTIZED

    def rotations(block: int) -> Transforms:
        on = FitContext(open_source(str(tiny("qwen3"))), UNQUANTIZED, torch.empty, torch.device("cpu"))
        return QuaRot(block=block).fit(on).transforms

    def same(found: Rotation | None, expected: Rotation) -> bool:
        return found is not None and torch.equal(found.as_matrix(), expected.as_matrix())

    assert same(rotations(32).values, Hadamard(32))
    assert same(rotations(16).values, Kronecker(Identity(2), Hadamard(16)))
    assert same(rotations(16).keys, Hadamard(32))  # their grid has no groups


@pytest.mark.parametrize(
    ("method", "block", "message"),
    [
        ("quarot", 24, r"the residual stream has 64 channels, which blocks of 24 do not divide.*\[16, 32\]"),
        ("quarot", 1, "two channels at least, got 1"),
        ("rangerot", 0, "two channels at least, got 0"),
        ("learned", 16, "learned moves R1 as a whole.*--method rangerot"),
    ],
)
def test_blocks_that_do_not_fit_are_refused(
    tiny: Tiny, tmp_path: Path, text_file: Path, method: str, block: int, message: str
) -> None:
    def quantize() -> None:
        recipe = dfrot.Recipe.parse(method, "rtn", block=block, calib=str(text_file), calib_tokens=64, tune="none")
        dfrot.quantize(tiny("qwen3"), recipe, tmp_path / "out")

    with pytest.raises(UserError, match=message):
        quantize()
