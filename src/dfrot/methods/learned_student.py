"""The original model with what is quantized sent through transforms that may be trained, for `learned`.

A transform T in front of a quantizer, which the weights undo, is x ↦ T⁻¹(Q(T x − o) + o) in the original model.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from dfrot.linalg.procrustes import polar_factor
from dfrot.linalg.rotation import Dense, Rotation, block_diagonal
from dfrot.models.graph import head_dim, kv_heads
from dfrot.models.source import Source
from dfrot.quant.affine import SCALE_DTYPE
from dfrot.quant.spec import Spec, TensorSpec
from dfrot.runtime.key_bias import KeyBias
from dfrot.training.teacher import ProductLinear
from dfrot.training.trained import (
    ThroughBlocks,
    Trained,
    TrainedRotation,
    clip_ratio,
    less,
    quantized,
    rotated,
    rotated_back,
)
from dfrot.transform.transforms import KEYS, VALUES, Transforms, input_widths

# Learning rates of Adam; of × 0.3, 1 and 3, 1 was best in steps of 4096 tokens on smollm2-135m. Offsets move in units
# of their input's root mean square.
ROTATION_RATE, HEAD_ROTATION_RATE, SCALE_RATE, OFFSET_RATE, CLIP_RATE = 1e-3, 3e-3, 1e-2, 1e-2, 1e-2
_ATTENTION = "dfrot-learned"


class Through(nn.Module):
    """x ↦ T⁻¹(Q(T x − o) + o), T x = x A / s · B.

    Args:
        before, behind: A and B; None is the identity.
        scale: (groups, channels), of which s is made.
        copies: how often each group stands in s, one after the other.
        planes: the first so many channels of a group stand there twice, as both coordinates of RoPE's planes.
        spec: Q, unless its clip ratio is trained, too.
        scale_dtype: of Q's scales, if narrower.

    Attributes:
        offset: o, in groups and copies like s; None for none.
        clip: the trained clip ratio.
    """

    def __init__(
        self,
        before: TrainedRotation | Rotation | None,
        scale: Trained,
        behind: Rotation | None,
        spec: TensorSpec,
        *,
        copies: int = 1,
        planes: int = 0,
        scale_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.before, self.scale, self.behind, self.spec = before, scale, behind, spec
        self.copies, self.planes, self.scale_dtype = copies, planes, scale_dtype
        self.offset: Trained | None = None
        self.clip: Trained | None = None

    def forward(self, x: Float[Tensor, "*batch size"]) -> Float[Tensor, "*batch size"]:
        x, offset = self.transformed(x), self.shift()
        y = quantized(less(x, offset), self.spec, self.scale_dtype, clip_ratio(self.clip))
        return self.back(y if offset is None else y + offset)

    def transformed(self, x: Float[Tensor, "*batch size"]) -> Float[Tensor, "*batch size"]:
        """T x."""
        return rotated(rotated(x, self.before) / self.divisor(), self.behind)

    def back(self, y: Float[Tensor, "*batch size"]) -> Float[Tensor, "*batch size"]:
        """T⁻¹ y."""
        return rotated_back(rotated_back(y, self.behind) * self.divisor(), self.before)

    def divisor(self) -> Float[Tensor, " size"]:
        """s of every channel."""
        return self._by_channel(self.scale())

    def shift(self) -> Float[Tensor, " size"] | None:
        """o of every channel."""
        return None if self.offset is None else self._by_channel(self.offset())

    def free_clip_(self) -> None:
        """Let the clip ratio move."""
        start = self.scale.start.new_tensor([self.spec.fixed_clip])
        self.clip = Trained(start, start.dtype, None, CLIP_RATE, most=1.0)

    def free_offset_(self, x: Float[Tensor, "windows seq_len size"]) -> None:
        """Let the offset move, from the mean of inputs like x but for first tokens, which are massive."""
        y = self.transformed(x[:, 1:])
        mean = y.flatten(0, -2).mean(0).view(-1, self.copies, self.scale.start.shape[1]).mean(1)
        self.offset = Trained(mean, y.dtype, float(y.square().mean().sqrt()), OFFSET_RATE)

    def _by_channel(self, vector: Float[Tensor, "groups channels"]) -> Float[Tensor, " size"]:
        whole = torch.cat([vector[:, : self.planes], vector], 1) if self.planes else vector
        return whole[:, None].expand(-1, self.copies, -1).flatten()


class ThroughNorm(nn.Module):
    """A norm whose output, before its gain, goes through."""

    def __init__(self, norm: nn.RMSNorm, through: Through) -> None:
        super().__init__()
        self.gain, self.eps, self.through = norm.weight, norm.eps, through

    def forward(self, x: Float[Tensor, "*batch size"]) -> Float[Tensor, "*batch size"]:
        return self.through(nn.functional.rms_norm(x, self.gain.shape, eps=self.eps)) * self.gain

    def constant(self) -> Float[Tensor, " size"]:
        """What the offset is of the norm's output."""
        offset = self.through.shift()
        return torch.zeros_like(self.gain) if offset is None else self.through.back(offset) * self.gain


class _Heads(nn.Module):
    """Keys and values of an attention module go through.

    Args:
        key_bias: how the bias that stays out of the keys is turned.
        bias: makes it: the layer's own, and what an offset of its input becomes.
    """

    def __init__(
        self, keys: Through, values: Through, key_bias: KeyBias | None, bias: Callable[[], Float[Tensor, " channels"]]
    ) -> None:
        super().__init__()
        self.keys, self.values, self.key_bias, self.bias = keys, values, key_bias, bias

    def forward(self, key: Tensor, value: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Heads (batch, kv_heads, tokens, head_dim), keys after RoPE."""
        if self.key_bias is None:
            key = self._through(self.keys, key)
        else:
            apart = self.key_bias.at(self.bias(), positions, key.dtype).keys(None).to(key.dtype)
            key = self._through(self.keys, key - apart) + apart
        return key, self._through(self.values, value)

    @staticmethod
    def _through(through: Through, x: Tensor) -> Tensor:
        y = x.transpose(1, 2)
        return through(y.flatten(2)).view_as(y).transpose(1, 2)


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **arguments: Any
) -> tuple[Tensor, None]:
    heads: _Heads = module.learned_heads  # type: ignore[assignment]
    return sdpa_attention_forward(module, query, *heads(key, value, arguments["position_ids"]), mask, **arguments)


AttentionInterface.register(_ATTENTION, _attention)


class Student:
    """The original model with its inputs, keys and values quantized behind transforms that may be trained.

    Args:
        start: transforms to start from, without scales.
        spec: the grids.
        dtype, product: of the computation, and of the products of linear layers and trained rotations in it.
        recompute: whether what blocks compute is computed again backward.
    """

    def __init__(
        self,
        source: Source,
        start: Transforms,
        spec: Spec,
        dtype: torch.dtype,
        product: torch.dtype,
        device: torch.device,
        recompute: bool,
    ) -> None:
        assert start.residual is not None, "RangeRot rotates the stream"
        assert start.values is not None, "and values"
        self.source, self.start, self.spec, self.dtype, self.device = source, start, spec, dtype, device
        self.embeddings = {name: matrix.to(device) for name, matrix in source.embeddings().items()}
        self.norm = source.final_norm().to(device, dtype)
        self.rotation = TrainedRotation(start.residual.as_matrix().to(device, dtype), ROTATION_RATE, product)
        self.value_rotation = TrainedRotation(start.values.as_matrix().to(device, dtype), HEAD_ROTATION_RATE, product)
        # by block: first layer of a stage, KEYS or VALUES → what goes through there
        self.inputs: list[dict[str, Through]] = []
        self.blocks = [self._block(index, product) for index in range(source.num_blocks)]
        self.through_blocks = ThroughBlocks(source, recompute)

    @property
    def trained(self) -> list[Trained | TrainedRotation]:
        throughs = [through for block in self.inputs for through in block.values()]
        parts = [part for each in throughs for part in (each.scale, each.offset, each.clip) if part is not None]
        distinct = {id(part): part for part in parts if part.parameter is not None}  # values and o_proj share some
        return [self.rotation, self.value_rotation, *distinct.values()]

    def __call__(self, tokens: Int[Tensor, "windows seq_len"]) -> Float[Tensor, "windows seq_len hidden"]:
        """What the head reads."""
        self.rotation.refresh()
        self.value_rotation.refresh()
        hidden = self.source.embedded(tokens, self.embeddings).to(self.dtype)
        return self.norm(self.through_blocks(hidden, self.blocks))

    @torch.no_grad()
    def free_offsets_and_clips_(self, tokens: Int[Tensor, "windows seq_len"]) -> None:
        """Let them move, offsets from what the model has on these tokens."""
        hooks = [
            through.register_forward_pre_hook(lambda each, inputs: each.free_offset_(*inputs))
            for block in self.inputs
            for name, through in block.items()
            if name not in (KEYS, VALUES)
        ]
        self(tokens)
        for hook in hooks:
            hook.remove()
        for block in self.inputs:
            for through in block.values():
                through.free_clip_()
            if VALUES in block:
                block[VALUES].offset = block[self.source.graph.output].offset

    @torch.no_grad()
    def transforms(self) -> Transforms:
        """What was learned, in float64."""
        self.rotation.refresh()
        self.value_rotation.refresh()
        residual, values = (
            Dense(polar_factor(each.matrix.double()).cpu()) for each in (self.rotation, self.value_rotation)
        )

        def by_block(value: Callable[[Through], Any], *without: str) -> tuple[dict[str, Any], ...]:
            return tuple({n: value(each) for n, each in block.items() if n not in without} for block in self.inputs)

        found: dict[str, Any] = {"scales": by_block(lambda each: each.divisor().double().cpu(), VALUES)}
        if self.inputs[0][self.source.graph.output].offset is not None:
            found["offsets"] = by_block(lambda each: each.shift().double().cpu(), KEYS, VALUES)  # type: ignore[union-attr]
            found["clips"] = by_block(lambda each: float(clip_ratio(each.clip)))  # type: ignore[arg-type]
        return Transforms(residual, values, self.start.keys, self.start.ffn, self.start.heads, **found)

    def _block(self, index: int, product: torch.dtype) -> nn.Module:
        graph, config, start, spec = self.source.graph, self.source.config, self.start, self.spec
        block = self.source.block(index).to(self.device, self.dtype)
        throughs: dict[str, Through] = {}
        self.inputs.append(throughs)

        def scales(*shape: int, rate: float | None = SCALE_RATE) -> Trained:
            return Trained(torch.ones(shape, dtype=self.dtype, device=self.device), self.dtype, None, rate)

        widths = input_widths(graph, config)
        for name in graph.linears:
            block.set_submodule(name, ProductLinear(block.get_submodule(name), product))  # type: ignore[arg-type]
        for name, readers in graph.norms.items():
            throughs[readers[0]] = Through(self.rotation, scales(1, widths[readers[0]]), None, spec.activations)
            norm: Any = block.get_submodule(name)
            block.set_submodule(name, ThroughNorm(norm, throughs[readers[0]]))
        heads = kv_heads(config)
        copies = config.num_attention_heads // heads
        size, of_heads = head_dim(config), scales(heads, head_dim(config))
        throughs[graph.output] = Through(self.value_rotation, of_heads, None, spec.activations, copies=copies)
        of_down = scales(1, widths[graph.down], rate=SCALE_RATE if graph.absorbs_scale(graph.down) else None)
        throughs[graph.down] = Through(None, of_down, start.ffn, spec.activations)
        for name in (graph.output, graph.down):
            block.set_submodule(name, nn.Sequential(throughs[name], block.get_submodule(name)))
        if spec.keys.enabled:
            planes = self.source.rotary.inv_freq.numel() if graph.rotary else size // 2
            # where a norm over the head follows the projection, or RoPE has other planes, nothing folds into it
            stay = graph.head_norms or not graph.rope_in_halves
            of_keys = scales(heads, size - planes, rate=None if stay else SCALE_RATE)
            behind = start.keys and block_diagonal(start.keys, heads)
            keys, values = (dataclasses.replace(grid, group=size) for grid in (spec.keys, spec.values))
            throughs[KEYS] = Through(None, of_keys, behind, keys, planes=planes, scale_dtype=SCALE_DTYPE)
            throughs[VALUES] = Through(self.value_rotation, of_heads, None, values, scale_dtype=SCALE_DTYPE)
            key_bias = KeyBias.of(block, graph, self.source.rotary, spec.keys)
            attention: Any = block.get_submodule(graph.attention)
            before: Any = block.get_submodule(next(iter(graph.norms)))

            def bias() -> Tensor:
                return block.get_submodule(str(graph.key))(before.constant())

            attention.config._attn_implementation = _ATTENTION
            attention.learned_heads = _Heads(throughs[KEYS], throughs[VALUES], key_bias, bias)
        return block
