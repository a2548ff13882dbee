"""Running decoder blocks one at a time, capturing their layers' inputs, and proof that a source is read rightly."""

import contextlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers.masking_utils import create_sliding_window_causal_mask

from dfrot.models.configs import silent_transformers
from dfrot.models.multimodal import read_language_model, whole_from_pretrained
from dfrot.models.source import Source
from dfrot.system.errors import UserError

PROBE_TOKENS = 32
# Rounding to 2⁻²³ through some hundred blocks and sums of thousands; another RoPE, mask or weight makes 10⁻² and more.
FLOAT32_BOUND = 1e-3


def cache_name(module: nn.Module) -> str:
    """What a decoder or one of its blocks calls the cache that it is given; `cache` from transformers 5.24 on."""
    takes = inspect.signature(module.forward).parameters
    return next((name for name in ("layer_past", "cache") if name in takes), "past_key_values")


class BlockRunner:
    """Runs single decoder blocks on hidden states of one length and dtype, as the whole model would.

    Hidden states are (batch, tokens, hidden), all sequences unpadded and starting at position 0.
    """

    def __init__(self, source: Source, like: Float[Tensor, "batch tokens hidden"]) -> None:
        self._config = source.config
        self._positions = positions = torch.arange(like.shape[1], device=like.device)[None]
        self._embeddings: dict[str | None, Any] = {None: None}
        if source.graph.rotary:
            rotary = type(source.rotary)(config=source.config).to(like.device)
            self._embeddings = position_embeddings(rotary, like, positions)
        self._cache_name = cache_name(source.empty_block(0))
        window = getattr(source.config, "sliding_window", None)
        self._sliding_mask = None
        if window is not None and window < like.shape[1]:  # else the window changes nothing
            self._sliding_mask = create_sliding_window_causal_mask(
                source.skeleton.config, like, attention_mask=None, past_key_values=None, position_ids=positions
            )

    def __call__(
        self, block: Callable[..., Any], index: int, hidden: Float[Tensor, "batch tokens hidden"], cache: Any = None
    ) -> Float[Tensor, "batch tokens hidden"]:
        """The block's output; an empty transformers `cache` is filled with its keys and values."""
        types = getattr(self._config, "layer_types", None)
        kind = None if types is None else types[index]
        slides = kind in (None, "sliding_attention")
        mask = self._sliding_mask if slides else None  # None: SDPA's own causal mask
        embeddings = self._embeddings.get(kind, self._embeddings.get(None))
        how = {"position_ids": self._positions, "position_embeddings": embeddings, self._cache_name: cache}
        return block(hidden, attention_mask=mask, **how)

    def until(
        self, layer: nn.Module, block: nn.Module, index: int, hidden: Float[Tensor, "batch tokens hidden"]
    ) -> Float[Tensor, "batch tokens channels"]:
        """The input of one layer of the block; nothing after it is computed."""

        def stop(_: nn.Module, args: tuple[Tensor]) -> None:
            raise _Reached(_in_batch(args[0]))

        with layer.register_forward_pre_hook(stop):
            try:
                self(block, index, hidden)
            except _Reached as reached:
                return reached.args[0]
        raise AssertionError(f"block {index} does not run {layer}")


def position_embeddings(rotary: Any, like: Tensor, positions: Int[Tensor, "1 tokens"]) -> dict[str | None, Any]:
    """RoPE's cosines and sines by the type of a layer, as in Gemma 3; those of None are for all types."""
    takes = "layer_type" in inspect.signature(rotary.forward).parameters
    types = set(rotary.config.layer_types) if takes else {None}
    return {kind: rotary(like, positions, *([kind] if takes else [])) for kind in types}


def _in_batch(x: Float[Tensor, "*batch channels"]) -> Float[Tensor, "batch tokens channels"]:
    """What a layer reads; OPT hands its feed-forward network tokens without a batch."""
    return x if x.ndim > 2 else x[None]


class _Reached(Exception):
    """Carries a layer's input out of a forward pass."""


@contextlib.contextmanager
def captured_inputs(modules: dict[str, nn.Module]) -> Iterator[dict[str, list[Tensor]]]:
    """Collect the inputs of the named modules while the context is open."""
    seen: dict[str, list[Tensor]] = {name: [] for name in modules}
    with contextlib.ExitStack() as hooks:
        for name, module in modules.items():
            keep = seen[name].append
            hook = module.register_forward_pre_hook(lambda _, args, keep=keep: keep(_in_batch(args[0].detach())))
            hooks.enter_context(hook)
        yield seen


@torch.no_grad()
def logits_by_blocks(source: Source, tokens: Int[Tensor, "batch tokens"]) -> Float[Tensor, "batch tokens vocabulary"]:
    """Logits in float32 through the blocks of a source, read one after the other.

    Raises:
        UserError: a weight holds NaN or infinities, or the blocks cannot be run as the config says.
    """
    hidden = source.embedded(tokens).float()
    try:
        run = BlockRunner(source, hidden)
        for index in range(source.num_blocks):
            hidden = run(source.block(index).float(), index, hidden)
    except (TypeError, ValueError, RuntimeError, AttributeError, IndexError, KeyError) as error:
        raise UserError(f"{source.path / 'config.json'} describes no model that can be run: {error!r}") from error
    bias = source.head_bias()
    head, added = source.head().float(), None if bias is None else bias.float()
    return nn.functional.linear(source.final_norm().float()(hidden), head, added)


@torch.no_grad()
def require_same_logits(source: Source) -> None:
    """Raise UserError unless transformers computes the same from the source's directory, the whole model in float32."""
    vocabulary, generator = source.config.vocab_size, torch.Generator().manual_seed(0)
    tokens = torch.randint(vocabulary, (1, PROBE_TOKENS), generator=generator)
    ours = logits_by_blocks(source, tokens)
    try:
        with silent_transformers():
            model = whole_from_pretrained(source.path, read_language_model(source.path), dtype=torch.float32)
            expected = model.eval()(input_ids=tokens, use_cache=False).logits
    except Exception as error:  # transformers raises errors of many kinds for files that do not fit together
        raise UserError(f"{source.path} cannot be loaded by transformers: {error}") from error
    off, size = float((ours - expected).norm()), float(expected.norm())
    if not off <= FLOAT32_BOUND * size:
        raise UserError(
            f"{source.path} computes something else here than in transformers: logits of {PROBE_TOKENS} tokens are off "
            f"by {off:.1e} of {size:.1e}, where rounding explains {FLOAT32_BOUND * size:.1e}. Its config asks for "
            "something that dfrot does not know: please report it. --check-source never goes on regardless."
        )
