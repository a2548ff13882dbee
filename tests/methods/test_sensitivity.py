import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import dfrot
from dfrot.linalg.rotation import random_hadamard
from dfrot.methods.method import FitContext
from dfrot.methods.sensitivity import kl_divergences
from dfrot.models.source import open_source
from dfrot.quant.spec import UNQUANTIZED, TensorSpec
from tests.reference import kl_of_quantized_norm_outputs

Tiny = Callable[[str], Path]
WHOLE = range(2)  # all blocks of a tiny model
TOKENS = torch.randint(1, 96, (2, 24), generator=torch.Generator().manual_seed(7))


def context(path: Path) -> FitContext:
    return FitContext(open_source(str(path)), UNQUANTIZED, lambda: TOKENS, torch.device("cpu"))


@pytest.mark.parametrize("architecture", ["llama", "phi3"])
def test_the_divergence_is_that_of_the_quantized_checkpoint(tiny: Tiny, tmp_path: Path, architecture: str) -> None:
    """Against the artifact with everything but the readers of the norms left unquantized."""
    recipe = dfrot.Recipe.parse("quarot", spec="w16a4kv16")
    there = context(tiny(architecture))
    model, _ = dfrot.load(dfrot.quantize(tiny(architecture), recipe, tmp_path / "out").path)
    for name in ("o_proj", "down_proj"):
        for block in model.model.layers:
            (block.self_attn if name == "o_proj" else block.mlp).get_submodule(name).activations = UNQUANTIZED
    original, _ = dfrot.load(tiny(architecture))
    with torch.no_grad():
        p, q = (m(TOKENS, use_cache=False).logits[:, 6:].double().log_softmax(-1) for m in (original, model))
    expected = (p.exp() * (p - q)).sum(-1).mean().item()
    rotation = random_hadamard(there.source.config.hidden_size, there.generator())
    (found,) = kl_divergences(there, [(rotation, WHOLE)], recipe.spec.activations, TOKENS, first=6)
    assert found == pytest.approx(expected, rel=0.05)  # float32 rounding now and then picks the next code


def test_positions_before_the_first_do_not_count(tiny: Tiny) -> None:
    there = context(tiny("qwen2"))
    rotation = random_hadamard(48, there.generator())
    kl = kl_of_quantized_norm_outputs(tiny("qwen2"), TOKENS, rotation.as_matrix(), 0.9)
    for first in (0, 6, 18, 23):
        (found,) = kl_divergences(there, [(rotation, WHOLE)], TensorSpec(4, False, 0.9), TOKENS, first)
        assert found == pytest.approx(kl[:, first:].mean().item(), rel=1e-3)
    parts = [kl[:, first:].mean().item() for first in (0, 6, 18, 23)]
    assert min(abs(a - b) / b for a, b in itertools.combinations(parts, 2)) > 0.01  # so that 1e-3 tells them apart


def test_the_divergence_falls_with_every_bit(tiny: Tiny) -> None:
    there = context(tiny("llama"))
    candidates = [(random_hadamard(48, there.generator()), WHOLE)]
    kl = [kl_divergences(there, candidates, TensorSpec(bits, False, 0.9), TOKENS)[0] for bits in (8, 4, 2)]
    assert 0 < kl[0] < kl[1] < kl[2]
