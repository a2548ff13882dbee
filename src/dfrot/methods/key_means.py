"""What all keys have in common, which stays out of the quantized cache.

RoPE is linear: RoPE(k, p) = RoPE(k − m, p) + RoPE(m, p) for any m. With the mean key for m, what is quantized has a
smaller range, and the last term is added where keys are read, as a bias of the model is (runtime/key_bias.py). It is
exact, and costs time: attention to n tokens takes n further products a head.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import DynamicCache

from dfrot.linalg.rotation import Rotation
from dfrot.methods.method import FitContext
from dfrot.models.sizes import ModelSizes
from dfrot.models.stream import BlockRunner
from dfrot.runtime.key_bias import KeyBias
from dfrot.system.errors import UserError
from dfrot.system.progress import track

TOKENS = 16384  # whose mean is taken, but one sequence at least


class KeyMeans(NamedTuple):
    """A vector of each block that is taken from its keys before RoPE; notes for people."""

    vectors: tuple[Float[Tensor, " channels"], ...]
    notes: dict[str, Any]


def read_of(calibration: Int[Tensor, "sequences seq_len"]) -> Int[Tensor, "some seq_len"]:
    """The calibration text that is read."""
    return calibration[: max(1, TOKENS // calibration.shape[1])]


@torch.no_grad()
def key_means(on: FitContext, rotation: Rotation | None) -> KeyMeans:
    """The mean keys of the first `TOKENS` of the calibration text; of blocks where they do not help, what stayed out
    before.

    That is the model's own bias, or nothing. It helps where the squared error of rotated, quantized keys gets smaller,
    on the first sequence.

    Args:
        rotation: R3.

    Raises:
        UserError: a norm follows the layer of keys, q, k and v are one layer, or RoPE is of another kind.
    """
    source, graph = on.source, on.source.graph
    bias_at = KeyBias.of(source.empty_block(0), graph, source.rotary, on.keys, any_bias=True)
    if bias_at is None or graph.key is None:
        raise UserError(
            f"--mean-keys takes the mean from what a layer of keys puts out and RoPE then turns; in {graph.name} a "
            "norm follows it, it makes queries and values too, or RoPE is of another kind. Leave it out."
        )
    tokens = read_of(on.calibration())
    hidden = source.embedded(tokens).float().to(on.device)
    run, vectors, errors = BlockRunner(source, hidden[:1]), [], []
    positions = torch.arange(hidden.shape[1], device=on.device)[None]
    for index in track(range(source.num_blocks), "mean keys"):
        block, cache = source.block(index).float().to(on.device), DynamicCache()
        layer: Any = block.get_submodule(graph.key)
        means: list[Tensor] = []  # of each sequence, (channels,)
        layer.register_forward_hook(lambda _, args, y, means=means: means.append(y.flatten(0, -2).double().mean(0)))
        parts = [run(block, index, part, None if place else cache) for place, part in enumerate(hidden.split(1))]
        hidden, keys = torch.cat(parts), cast(Any, cache.layers[index].keys)
        before = torch.zeros_like(means[0]) if layer.bias is None else layer.bias
        choices = [before.float(), torch.stack(means).mean(0).float()]
        found = []
        for vector in choices:
            rest = keys - bias_at.at(vector, positions, keys.dtype).keys(None).float()
            rest = rest if rotation is None else rotation.apply(rest)
            found.append(float((rest - on.keys.fake_quantize(rest)).norm() / keys.norm()))
        vectors.append(choices[found[1] < found[0]].cpu())
        errors.append(found)
    return KeyMeans(tuple(vectors), {"error": errors, "tokens": tokens.numel()})


def peak_bytes(sizes: ModelSizes) -> int:
    """Memory that `key_means` takes: a block and the text's hidden states, in float32, before and behind it."""
    text = max(sizes.seq_len, min(TOKENS, sizes.tokens)) * sizes.hidden
    return 4 * 2 * text + sizes.block * (sizes.source + 4) + 4 * sizes.sequence


def summary(notes: Mapping[str, Any]) -> list[str]:
    """What was found out, in sentences."""
    if not notes:
        return []
    helped = sum(after < before for before, after in notes["error"])
    blocks = len(notes["error"])
    before, after = (sum(map(pick, notes["error"])) / blocks for pick in (lambda pair: pair[0], min))
    return [
        f"the mean key stays out of the cache in {helped} of {blocks} blocks: keys are off by {after:.1%} in place of "
        f"{before:.1%}"
    ]
