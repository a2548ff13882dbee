"""What a model predicts on texts: perplexity as the papers compute it, and the distance to another model's predictions.

Perplexity: the text is tokenized once and cut into non-overlapping blocks; the mean negative log-likelihood over the
seq_len − 1 predictions of every block is exponentiated. It can stay the same while predictions change, some tokens
gaining what others lose; the KL divergence and the agreement of the likeliest tokens show that.

What the massive tokens cost, the papers' QuaRot.FP16(): a checkpoint is measured with the tokens that have massive
activations left unquantized where the residual stream is read (inputs of q, k, v, gate and up). Everything else, the
cache included, stays quantized, as in DFRot's released code. The difference to the checkpoint's perplexity bounds the
gain from treating massive tokens better. The tokens are found in the original model, run beside the checkpoint on the
same text, so the checkpoint's rotation may be unknown.
"""

import contextlib
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers.modeling_outputs import MoeModelOutputWithPast

from dfrot.methods.massive import massive_tokens
from dfrot.models.graph import graph_for
from dfrot.models.norms import norm_eps
from dfrot.models.stream import captured_inputs
from dfrot.models.texts import check_tokens, token_ids
from dfrot.runtime.linear import QuantLinear
from dfrot.system.errors import UserError
from dfrot.system.progress import track

# Positions whose logits are computed at a time: 256 × 128 000 logits in float32 are 131 MB.
_LOGIT_POSITIONS = 256


def token_windows(
    tokenizer: Any, text: str, name: str, rows: int, seq_len: int, max_tokens: int | None = None
) -> Int[Tensor, "blocks seq_len"]:
    """The whole text tokenized once and cut into non-overlapping blocks; the tail is dropped.

    Args:
        name: of the text, for messages.
        rows: of the model's embedding.
        max_tokens: take the first ⌊max_tokens / seq_len⌋ blocks.

    Raises:
        UserError: the text, or max_tokens, is shorter than one block; it has a token without a row.
    """
    if seq_len < 2:
        raise UserError(f"a block has at least two tokens, so that one can be predicted; got seq_len {seq_len}.")
    if max_tokens is not None and max_tokens < seq_len:
        raise UserError(f"one block is {seq_len} tokens long, but only {max_tokens} tokens are asked for.")
    ids = token_ids(tokenizer, text, rows)
    if len(ids) < seq_len:
        raise UserError(f"the text '{name}' has {len(ids)} tokens, fewer than one block of {seq_len}.")
    ids = ids[:max_tokens]
    return ids[: len(ids) // seq_len * seq_len].view(-1, seq_len)


def perplexity(
    model: Any,
    blocks: Int[Tensor, "blocks seq_len"],
    description: str = "perplexity",
    during: Callable[[Tensor], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
) -> float:
    """exp of the mean negative log-likelihood of blocks of tokens; every block starts from an empty context.

    Args:
        model: a causal language model of transformers.
        blocks: token ids; `token_windows` makes them.
        during: a context of the block, open while the model runs on it.

    Raises:
        UserError: blocks of fewer than two tokens, a token that the embedding has no row for, NaN logits.
    """
    if blocks.shape[1] < 2:
        raise UserError(f"a block needs two tokens, the second to be predicted; got blocks of {blocks.shape[1]}.")
    total = 0.0
    for block in track(blocks, description):
        with during(block):
            total += negative_log_likelihood(model, block)
    return perplexity_of(total / (blocks.shape[0] * (blocks.shape[1] - 1)))


@contextlib.contextmanager
def checked(model: Any) -> Iterator[None]:
    """While open, a causal language model raises UserError for tokens that its embedding has no row for, positions
    beyond those that it has learned, and logits that are NaN: search takes those for a likeliest token."""

    def check_ids(embedding: nn.Embedding, args: tuple[Tensor]) -> None:
        check_tokens(args[0], embedding.num_embeddings)

    def check_logits(head: nn.Module, args: Any, logits: Tensor) -> None:
        if not (logits < math.inf).all():  # where NaN is not, either
            raise UserError("the model's logits are NaN or infinite here: its weights or its recipe are broken.")

    with contextlib.ExitStack() as hooks:
        hooks.callback(model.get_input_embeddings().register_forward_pre_hook(check_ids).remove)
        hooks.callback(model.get_output_embeddings().register_forward_hook(check_logits).remove)
        try:
            yield
        except IndexError as error:  # of tokens these would be, had they not been checked
            if not str(error).startswith("index out of range in self"):
                raise
            length = getattr(model.config, "max_position_embeddings", "fewer")
            raise UserError(
                f"the model has learned {length} positions, and here are more tokens: choose a smaller --seq-len, a "
                "shorter prompt or fewer --max-new-tokens."
            ) from error


def perplexity_of(mean: float) -> float:
    """exp of a mean negative log-likelihood in nats."""
    return math.exp(mean) if mean < 700 else math.inf  # math.exp raises from 710 on


@torch.no_grad()
def negative_log_likelihood(model: Any, tokens: Int[Tensor, " seq_len"]) -> float:
    """Sum over the seq_len − 1 predictions of one sequence, in nats."""
    return sum(
        float(nn.functional.cross_entropy(logits, targets, reduction="sum"))
        for logits, targets in _logits_by_piece(model, tokens)
    )


@torch.no_grad()
def divergence(
    model: Any, original: Any, blocks: Int[Tensor, "blocks seq_len"], description: str = "divergence"
) -> dict[str, Tensor]:
    """Compare two causal language models of transformers that have one vocabulary, prediction by prediction.

    Returns:
        Tensors (blocks, seq_len − 1): `nll` and `original_nll`, the negative log-likelihood of the token that came by
        either model, and `kl`, KL(original ‖ model), in nats; `agrees`, whether both have the same likeliest token.
    """
    # made now: small results of each piece, kept among its large tensors, would leave malloc a heap of holes
    wide = torch.promote_types(model.dtype, torch.float32)
    found = {name: torch.empty(len(blocks), blocks.shape[1] - 1, dtype=wide) for name in ("nll", "original_nll", "kl")}
    found["agrees"] = torch.empty(found["kl"].shape, dtype=torch.bool)
    for number, block in enumerate(track(blocks, description)):
        pieces = zip(_logits_by_piece(model, block), _logits_by_piece(original, block), strict=True)
        for place, ((logits, targets), (others, _)) in enumerate(pieces):
            here = number, slice(place * _LOGIT_POSITIONS, (place + 1) * _LOGIT_POSITIONS)
            own, wanted = logits.log_softmax(-1), others.to(logits.device).log_softmax(-1)
            found["nll"][here] = -own.gather(-1, targets[:, None])[:, 0]
            found["original_nll"][here] = -wanted.gather(-1, targets[:, None])[:, 0]
            found["kl"][here] = nn.functional.kl_div(own, wanted, reduction="none", log_target=True).sum(-1)
            found["agrees"][here] = own.argmax(-1) == wanted.argmax(-1)
    return found


def _logits_by_piece(
    model: Any, tokens: Int[Tensor, " seq_len"]
) -> Iterator[tuple[Float[Tensor, "positions vocabulary"], Int[Tensor, " positions"]]]:
    """Logits of the seq_len − 1 predictions of one sequence, in float32 or float64, and the tokens that came."""
    tokens = tokens.to(model.device)
    with checked(model):
        hidden = model.base_model(tokens[None], use_cache=False).last_hidden_state[0, :-1]  # (seq_len − 1, hidden)
        for states, targets in zip(hidden.split(_LOGIT_POSITIONS), tokens[1:].split(_LOGIT_POSITIONS), strict=True):
            logits = _logits_of(model, states)
            yield logits if logits.dtype == torch.float64 else logits.float(), targets


def _logits_of(model: Any, states: Float[Tensor, "positions hidden"]) -> Float[Tensor, "positions vocabulary"]:
    """What the model makes of last hidden states, by the head and what follows it, such as a factor or soft cap."""
    # with a place for what routers say, which heads of mixtures of experts hand on
    decoder, made = model.base_model, MoeModelOutputWithPast(last_hidden_state=states[None])
    own = decoder.__dict__.get("forward")  # accelerate's, if it spreads the model
    decoder.forward = lambda *_, **__: made
    try:
        return model(torch.zeros(1, len(states), dtype=torch.long, device=model.device), use_cache=False).logits[0]
    finally:
        del decoder.forward
        if own is not None:
            decoder.forward = own


@torch.no_grad()
def massive_positions(original: Any, tokens: Int[Tensor, " seq_len"]) -> dict[str, Bool[Tensor, " seq_len"]]:
    """Reader of a norm (its full name) → which positions of a sequence have massive activations there."""
    graph, config = graph_for(original.config), original.config
    if graph.experts:
        raise UserError(f"{graph.name} has experts, which see some of the tokens: none are left unquantized there.")
    readers = {
        f"{graph.blocks}.{index}.{norm}": [f"{graph.blocks}.{index}.{name}" for name in names]
        for index in range(config.num_hidden_layers)
        for norm, names in graph.norms.items()
    }
    with captured_inputs({norm: original.get_submodule(norm) for norm in readers}) as seen:
        original.base_model(tokens[None].to(original.device), use_cache=False)
    masks: dict[str, Tensor] = {}
    for norm, inputs in seen.items():
        x = inputs[0][0].float()  # (tokens, hidden)
        x = x - x.mean(-1, keepdim=True) if graph.centred else x
        # without the norm's gain, which is folded into its readers before anything is rotated
        massive = massive_tokens(nn.functional.rms_norm(x, x.shape[-1:], eps=norm_eps(original.get_submodule(norm))))
        masks |= dict.fromkeys(readers[norm], massive)
    return masks


@contextlib.contextmanager
def massive_unquantized(checkpoint: Any, original: Any, tokens: Int[Tensor, " seq_len"]) -> Iterator[None]:
    """While open, a checkpoint does not quantize the activations of the massive tokens of a sequence.

    Args:
        checkpoint: a model that `dfrot.load` has loaded from a checkpoint; in any other nothing changes.
        original: the model that it was made from, loaded by `dfrot.load`.
    """
    with contextlib.ExitStack() as stack:
        for name, mask in massive_positions(original, tokens).items():
            layer = checkpoint.get_submodule(name)
            if isinstance(layer, QuantLinear) and mask.any():
                stack.callback(layer.register_forward_hook(partial(_passing_by, mask)).remove)
        yield


def _passing_by(mask: Bool[Tensor, " tokens"], layer: QuantLinear, args: tuple[Tensor], output: Tensor) -> Tensor:
    """A forward hook: the layer's outputs (1, tokens, out), of masked tokens from inputs that are not quantized."""
    massive = mask.to(output.device)
    x = layer.transformed(args[0][:, massive])
    output[:, massive] = nn.functional.linear(x, layer.dense_weight(x.dtype), layer.added)
    return output
