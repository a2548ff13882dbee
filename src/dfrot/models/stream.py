"""Running decoder blocks one at a time, and capturing their layers' inputs."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers.masking_utils import create_sliding_window_causal_mask

from dfrot.models.source import Source


class BlockRunner:
    """Runs single decoder blocks on hidden states of one length and dtype, as the whole model would.

    Hidden states are (batch, tokens, hidden), all sequences unpadded and starting at position 0.
    """

    def __init__(self, source: Source, like: Float[Tensor, "batch tokens hidden"]) -> None:
        self._config = source.config
        positions = torch.arange(like.shape[1], device=like.device)[None]
        rotary = type(source.skeleton.get_submodule(source.graph.rotary))(config=source.config).to(like.device)
        self._arguments = {"position_ids": positions, "position_embeddings": rotary(like, position_ids=positions)}
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
        slides = types is None or types[index] == "sliding_attention"
        mask = self._sliding_mask if slides else None  # None: SDPA's own causal mask
        return block(hidden, attention_mask=mask, past_key_values=cache, **self._arguments)

    def until(
        self, layer: nn.Module, block: nn.Module, index: int, hidden: Float[Tensor, "batch tokens hidden"]
    ) -> Float[Tensor, "batch tokens channels"]:
        """The input of one layer of the block; nothing after it is computed."""

        def stop(_: nn.Module, args: tuple[Tensor]) -> None:
            raise _Reached(args[0])

        with layer.register_forward_pre_hook(stop):
            try:
                self(block, index, hidden)
            except _Reached as reached:
                return reached.args[0]
        raise AssertionError(f"block {index} does not run {layer}")


class _Reached(Exception):
    """Carries a layer's input out of a forward pass."""


@contextlib.contextmanager
def captured_inputs(modules: dict[str, nn.Module]) -> Iterator[dict[str, list[Tensor]]]:
    """Collect the inputs of the named modules while the context is open."""
    seen: dict[str, list[Tensor]] = {name: [] for name in modules}
    with contextlib.ExitStack() as hooks:
        for name, module in modules.items():
            keep = seen[name].append
            hooks.enter_context(module.register_forward_pre_hook(lambda _, args, keep=keep: keep(args[0].detach())))
        yield seen
