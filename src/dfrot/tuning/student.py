"""The quantized model with what is continuous in it free to move, and its integers, if they are asked for.

The integers stay packed. A linear layer unpacks them forward, and again backward, so that at most one weight stands as
floats; where there is room they stay unpacked. The scale of a whole row is applied outside of the product,

    y = s_w Σ x̂ (w − v) + b

so bfloat16, which has the integers exactly, rounds inputs by 2⁻⁹ and the sums, far less than 4 bits do. Such a scale
needs no gradient of the weight; scales of groups do, a group at a time, and so do integers that may move.

Values are rounded to the dtype in which the checkpoint keeps them: what is measured while tuning is what lies there
afterwards.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from dfrot.kernels import training
from dfrot.linalg.rotation import Rotation
from dfrot.models.source import Source, loaded
from dfrot.quant.affine import SCALE_DTYPE
from dfrot.quant.packing import pack
from dfrot.quant.spec import UNQUANTIZED, Spec, TensorSpec
from dfrot.runtime.config import RuntimeConfig
from dfrot.runtime.install import install_block_
from dfrot.runtime.key_bias import KeyBias
from dfrot.runtime.linear import QuantLinear
from dfrot.runtime.norms import BlockRotation, Float64SiLU, TransformedNorm
from dfrot.training.trained import ThroughBlocks, Trained, TrainedIntegers, clip_ratio, less, quantized, rotated
from dfrot.transform.transforms import KEYS, VALUES

_ATTENTION = "dfrot-student"


class PackedProduct(torch.autograd.Function):
    """x Ŵᵀ + b with Ŵ made of a layer's integers and scales (out, groups); no weight outlives forward or backward.

    Args:
        x: (…, in).
        scales: (out, groups), to which gradients flow too.
        bias: (out,) or None, likewise.
        moved: (out, in) or None: how far the integers have moved, likewise.
        layer: whose integers these are.
        dtype: of the product.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        scales: Tensor,
        bias: Tensor | None,
        moved: Tensor | None,
        layer: "StudentLinear",
        dtype: torch.dtype,
    ) -> Tensor:
        ctx.layer, ctx.dtype = layer, dtype
        if scales.shape[1] == 1:
            sums = x.to(dtype) @ layer.integers(dtype).T
            ctx.save_for_backward(scales, sums if scales.requires_grad else None, None if moved is None else x)
            return training.scaled(sums, scales[:, 0], bias, x.dtype)
        ctx.save_for_backward(scales, None, None if moved is None and not scales.requires_grad else x)
        y = (x.to(dtype) @ _scaled(layer.integers(dtype), scales).T).to(x.dtype)
        return y if bias is None else y + bias

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        scales, sums, x = ctx.saved_tensors
        of_x, of_scales, of_moved, integers = None, None, None, ctx.layer.integers(ctx.dtype)
        of_bias = upstream.flatten(0, -2).sum(0) if ctx.needs_input_grad[2] else None
        if scales.shape[1] == 1:
            if ctx.needs_input_grad[1]:
                of_scales = (upstream * sums).flatten(0, -2).sum(0)[:, None]
            if ctx.needs_input_grad[0] or ctx.needs_input_grad[3]:
                narrow = training.scaled(upstream, scales[:, 0], None, ctx.dtype)  # in units of the integers
                of_x = (narrow @ integers).to(upstream.dtype) if ctx.needs_input_grad[0] else None
                of_moved = _of_weight(narrow, x, torch.float32) if ctx.needs_input_grad[3] else None
            return of_x, of_scales, of_bias, of_moved, None, None
        narrow = upstream.to(ctx.dtype)
        if ctx.needs_input_grad[0]:
            of_x = (narrow @ _scaled(integers, scales)).to(upstream.dtype)
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[3]:
            of_weight = _of_weight(narrow, x, scales.dtype)
            if ctx.needs_input_grad[1]:
                of_scales = (of_weight * integers).unflatten(1, (scales.shape[1], -1)).sum(-1)
            if ctx.needs_input_grad[3]:
                of_moved = _scaled(of_weight, scales).float()
        return of_x, of_scales, of_bias, of_moved, None, None


def _of_weight(upstream: Tensor, x: Tensor, dtype: torch.dtype) -> Float[Tensor, "out in"]:
    """Σ over tokens of upstream ⊗ x."""
    return (upstream.flatten(0, -2).T @ x.flatten(0, -2).to(upstream.dtype)).to(dtype)


def _scaled(integers: Float[Tensor, "out in"], scales: Float[Tensor, "out groups"]) -> Float[Tensor, "out in"]:
    return (integers.unflatten(1, (scales.shape[1], -1)) * scales.to(integers.dtype)[..., None]).flatten(1)


class StudentNorm(nn.Module):
    """An RMS norm whose gain may be trained; what it puts out is rotated, taken less an offset and quantized once, for
    all its readers."""

    def __init__(
        self,
        gain: Trained,
        eps: float,
        rotation: Rotation | None,
        offset: Tensor | None,
        spec: TensorSpec,
        clip: Trained | None,
    ) -> None:
        super().__init__()
        self.gain, self.eps, self.rotation, self.offset, self.spec = gain, eps, rotation, offset, spec
        self.clip = clip

    def forward(self, x: Float[Tensor, "*batch size"]) -> Float[Tensor, "*batch size"]:
        gain = self.gain()
        y = nn.functional.rms_norm(x, gain.shape, gain, self.eps)
        return quantized(less(rotated(y, self.rotation), self.offset), self.spec, clip=clip_ratio(self.clip))


class StudentLinear(nn.Module):
    """A `QuantLinear` whose scales and bias may be trained.

    Args:
        spec, clip: the grid of its input, unless that arrives quantized, and its clip ratio, if that may be trained.
        codes: its integers, if they may move.
        product: dtype of its products.
        keep: whether its integers stay unpacked.
    """

    def __init__(
        self,
        layer: QuantLinear,
        scales: Trained | None,
        bias: Trained | None,
        spec: TensorSpec,
        product: torch.dtype,
        keep: bool,
        clip: Trained | None = None,
        codes: TrainedIntegers | None = None,
    ) -> None:
        super().__init__()
        self.layer, self.scales, self.bias, self.codes = layer, scales, bias, codes
        self.spec, self.clip, self.product, self.keep = spec, clip, product, keep
        rotation = layer.rotation
        self.rotation = rotation if rotation is None or isinstance(rotation, Rotation) else rotation.as_rotation

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        x = quantized(less(rotated(x, self.rotation), self.layer.offset), self.spec, clip=clip_ratio(self.clip))
        leaves_out, apart = self.layer.leaves_out, self.layer.apart
        bias = None if self.bias is None or (leaves_out and apart is None) else self.bias()
        if self.scales is None:
            y = (x.to(self.product) @ self.layer.dense_weight(x.dtype).to(self.product).T).to(x.dtype)
            y = y if bias is None else y + bias
        else:
            moved = None if self.codes is None else self.codes.parameter
            y = PackedProduct.apply(x, self.scales(), bias, moved, self, self.product)
        return y - apart.to(y) if leaves_out and apart is not None else y

    def left_out(self) -> Any:
        """Of keys, what attention adds."""
        return self.layer.apart if self.bias is None or self.layer.apart is not None else self.bias()

    def integers(self, dtype: torch.dtype) -> Float[Tensor, "out in"]:
        """w − v."""
        if self.codes is not None:
            return self.layer.centred(self.codes()).to(dtype)
        return self.layer.integer_weight(dtype, self.keep)

    def packed(self) -> UInt8[Tensor, "out bytes"]:
        """The integers that have moved, as the checkpoint has them."""
        assert self.codes is not None
        grid, bits = self.layer.weights.grid, self.layer.weights.bits
        return pack(grid.encode(self.codes().to(torch.int32)), bits).cpu()


class _Heads(nn.Module):
    """How an attention module treats its heads: R3 on queries and keys, the grids, the bias that stays out of keys."""

    def __init__(
        self,
        spec: Spec,
        rotation: Rotation | None,
        key_bias: KeyBias | None,
        bias: Callable[[], Tensor] | None,
        clips: tuple[Trained | None, Trained | None],
    ) -> None:
        super().__init__()
        self.spec, self.rotation, self.key_bias, self.bias = spec, rotation, key_bias, bias
        self.key_clip, self.value_clip = clips


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **arguments: Any
) -> tuple[Tensor, None]:
    """What `runtime.kv.quantized_attention` computes without a cache, and nothing of it packed."""
    heads: _Heads = module.student_heads  # type: ignore[assignment]
    spec = heads.spec
    query = quantized(rotated(query, heads.rotation), spec.queries)
    key = quantized(rotated(key, heads.rotation), spec.keys, SCALE_DTYPE, clip_ratio(heads.key_clip))
    value = quantized(value, spec.values, SCALE_DTYPE, clip_ratio(heads.value_clip))
    if heads.key_bias is not None and heads.bias is not None:
        apart = heads.key_bias.at(heads.bias(), arguments["position_ids"], key.dtype)
        key = (key + apart.keys(heads.rotation)).to(key.dtype)
    return sdpa_attention_forward(module, query, key, value, mask, **arguments)


AttentionInterface.register(_ATTENTION, _attention)

# Learning rates of p, of Adam's steps; measured with 100 steps of 8 × 1024 tokens on smollm2-135m, then probed. That of
# roundings is for the factor 0.3: at 1 a probe of a dozen steps carries every integer over half a step.
RATES = {"biases": 2e-3, "clips": 3e-3, "gains": 2e-3, "roundings": 8e-2, "scales": 1e-3}


class Student:
    """The decoder of a checkpoint: token ids to last hidden states, differentiable in what is trained.

    Args:
        runtime: the checkpoint's, with the biases that are to be made.
        embeddings: as `Source.embeddings` has them.
        blocks: the tensors of each block, by the names within it, as the checkpoint has them.
        norm: gain of the final norm.
        parts: what is trained.
        stored: dtype of new biases in the checkpoint.
        dtype, product: of the computation, and of the products of linear layers in it.
        keep: whether integers stay unpacked, a number of `product` each.
        recompute: whether the blocks' inner states are computed again backward instead of kept.
    """

    def __init__(
        self,
        source: Source,
        runtime: RuntimeConfig,
        embeddings: Mapping[str, Tensor],
        blocks: Sequence[Mapping[str, Tensor]],
        norm: Float[Tensor, " hidden"],
        parts: Sequence[str],
        *,
        stored: torch.dtype,
        dtype: torch.dtype,
        product: torch.dtype,
        device: torch.device,
        keep: bool,
        recompute: bool,
    ) -> None:
        self.source, self.runtime, self.parts = source, runtime, parts
        self.stored_dtype, self.dtype, self.product, self.device = stored, dtype, product, device
        self.keep = keep
        self.embeddings = {name: matrix.to(device) for name, matrix in embeddings.items()}
        self.norm = norm.to(device, dtype)
        self.trained: dict[str, Trained] = {}  # by name in the model, in order
        self.clips: dict[str, list[Trained]] = {}  # likewise, by site of `RuntimeConfig.clips`, then block
        self.rounded: dict[str, StudentLinear] = {}  # whose integers move, by name in the model
        self.blocks = [self._block(index, tensors) for index, tensors in enumerate(blocks)]
        self.through_blocks = ThroughBlocks(source, recompute)

    def __call__(self, tokens: Int[Tensor, "windows seq_len"]) -> Float[Tensor, "windows seq_len hidden"]:
        """What the head reads."""
        hidden = self.source.embedded(tokens, self.embeddings).to(self.dtype)
        hidden = self.through_blocks(hidden, self.blocks)
        return nn.functional.rms_norm(hidden, self.norm.shape, self.norm, self.source.eps)

    @property
    def moving(self) -> list[Trained | TrainedIntegers]:
        """All that is trained."""
        clips = (clip for clips in self.clips.values() for clip in clips)
        return [*self.trained.values(), *clips, *(layer.codes for layer in self.rounded.values() if layer.codes)]

    @torch.no_grad()
    def clip_ratios(self) -> dict[str, list[float]]:
        """The trained ones, by site and block."""
        return {site: [float(clip()) for clip in clips] for site, clips in self.clips.items()}

    def stored(self, index: int) -> dict[str, Tensor]:
        """The trained tensors of a block, by their names in the model, as the checkpoint is to keep them."""
        prefix = f"{self.source.graph.blocks}.{index}."
        chosen = {name: trained for name, trained in self.trained.items() if name.startswith(prefix)}
        codes = {f"{name}.qweight": layer.packed() for name, layer in self.rounded.items() if name.startswith(prefix)}
        with torch.no_grad():
            return codes | {name: trained().to(trained.stored).cpu() for name, trained in chosen.items()}

    def _block(self, index: int, tensors: Mapping[str, Tensor]) -> nn.Module:
        graph, spec = self.source.graph, self.runtime.heads(index)
        prefix = f"{graph.blocks}.{index}."
        block = self.source.empty_block(index)
        key_bias = KeyBias.of(block, graph, self.source.rotary, spec.keys, any_bias=self.runtime.key_means)
        runtime = self.runtime
        if "biases" in self.parts:  # also those of layers of which nothing is quantized
            runtime = dataclasses.replace(runtime, biases=graph.linears)
        install_block_(block, index, graph, runtime, key_bias)
        missing = {name: tensor for name, tensor in block.state_dict().items() if name not in tensors}
        assert all(name.endswith(".bias") for name in missing), "the checkpoint has everything but new biases"
        made = {name: torch.zeros(tensor.shape, dtype=self.stored_dtype) for name, tensor in missing.items()}
        kept = {name: tensor.to(self.device) for name, tensor in {**tensors, **made}.items()}
        loaded(block, dict(kept)).to(self.dtype)

        def trained(name: str, part: str | None, unit: float | None = None) -> Trained:
            rate = RATES[part] if part is not None and part in self.parts else None
            found = Trained(kept[name], self.dtype, unit, rate)
            if rate is not None:
                self.trained[prefix + name] = found
            return found

        def clip(site: str, grid: TensorSpec) -> Trained | None:
            if "clips" not in self.parts or not (grid.enabled and grid.integer):
                return None
            found = self.clips.setdefault(site, [])
            if len(found) <= index:  # experts share one
                start = torch.tensor([grid.fixed_clip], dtype=self.dtype, device=self.device)
                found.append(Trained(start, self.dtype, None, RATES["clips"], most=1.0))
            return found[index]

        # a router reads what is not quantized, so the experts beside it quantize it themselves
        apart = None if graph.router is None else graph.norm_before(graph.router)
        readers = {name for norm, names in graph.norms.items() if norm != apart for name in names}
        for name, module in list(block.named_modules()):
            if isinstance(module, nn.RMSNorm):
                blocks, offset = None, None
                if isinstance(module, TransformedNorm):
                    blocks, offset = module.rotation, module.offset
                rotation = blocks.as_rotation if isinstance(blocks, BlockRotation) else blocks
                quantizes = name in graph.norms and name != apart
                grid = self.runtime.activations(name, index) if quantizes else UNQUANTIZED
                moves = name in graph.norms or name in graph.norms_behind
                gain = trained(f"{name}.weight", "gains" if moves else None)
                of_grid = module.eps or 0.0, rotation, offset, grid, clip(name, grid)
                block.set_submodule(name, StudentNorm(gain, *of_grid))
            elif isinstance(module, Float64SiLU):
                block.set_submodule(name, nn.SiLU())
            elif name in graph.linears:
                site = graph.norm_before(name) or name
                grid = UNQUANTIZED if name in readers else self.runtime.activations(site, index)
                linear = self._linear(module, name, grid, trained, clip(site, grid))
                block.set_submodule(name, linear)
                if isinstance(linear, StudentLinear) and linear.codes is not None:
                    self.rounded[prefix + name] = linear
        attention = block.get_submodule(graph.attention)
        attention.config._attn_implementation = _ATTENTION  # type: ignore[union-attr]
        bias: Any = None if key_bias is None else block.get_submodule(str(graph.key)).left_out
        clips = clip(KEYS, spec.keys), clip(VALUES, spec.values)
        rotation = self.runtime.keys if spec.keys.enabled else None
        attention.student_heads = _Heads(spec, rotation, key_bias, bias, clips)
        return block

    def _linear(
        self,
        module: nn.Module,
        name: str,
        grid: TensorSpec,
        trained: Callable[..., Trained],
        clip: Trained | None,
    ) -> nn.Module:
        if not isinstance(module, QuantLinear):  # nothing of it is quantized, rotated or trained
            return module
        if module.weight is None:
            integers, scales = module.integer_weight(self.dtype, keep=False), module.scales
            sizes = integers.square().unflatten(1, (scales.shape[1], -1)).sum(-1) * scales.square()
        else:
            sizes = module.weight.square()
        # a bias moves in units of what the layer puts out for an input of size 1
        unit = float(sizes.sum(1).mean().sqrt())
        scale = None if module.weight is not None else trained(f"{name}.scales", "scales")
        bias = None if module.bias is None else trained(f"{name}.bias", "biases", unit)
        codes = None
        if "roundings" in self.parts and module.weight is None:
            ends = module.weights.grid
            codes = TrainedIntegers(module.codes().to(torch.int16), ends.lowest, ends.highest, RATES["roundings"])
        return StudentLinear(module, scale, bias, grid, self.product, self.keep, clip, codes)
