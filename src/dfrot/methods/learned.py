"""Learned transforms: R1, and scale, offset and clip ratio of every quantized input, by the loss of the whole model.

Starts from RangeRot. A scale divides each channel of an input behind its rotation, and its inverse multiplies the
columns of the weights that read it (SmoothQuant, Xiao et al. 2022, arXiv 2211.10438; learned together with rotations:
OSTQuant, Hu et al. 2025, arXiv 2501.13987). An offset is subtracted from it before it is quantized, so that the grid
need not span what every token has in common; the readers' biases make up for it, exactly.

    input of                 rotated by    the scale is absorbed by            the offset is subtracted by
    readers of a norm        R1            the norm's gain, by block and norm  the norm, at run time
    o_proj                   R2            v_proj, for all heads that read     v_proj's bias: attention's weights
                                           one value head alike                sum to 1
    down_proj                – (R4 after)  up_proj                             the layer, behind R4, at run time

No weight is folded, and none gets a gradient, to learn this. A transform T in front of a quantizer Q, which the weights
undo, is x ↦ T⁻¹(Q(T x − o) + o) in the original model, whose weights stay as they are. T moves by the KL divergence of
next-token distributions from the original model's, with gradients straight through Q (training/). Weights are rounded
afterwards; the descent does not see that.
"""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from dfrot.linalg.procrustes import polar_factor
from dfrot.linalg.rotation import Dense, Rotation, block_diagonal
from dfrot.methods.dfrot import DFROT
from dfrot.methods.method import Fit, FitContext, Look
from dfrot.methods.quarot import QUAROT
from dfrot.methods.rangerot import SPINQUANT, RangeRot
from dfrot.models.source import ModelSizes
from dfrot.quant.spec import TensorSpec
from dfrot.system.errors import UserError
from dfrot.system.papers import Paper
from dfrot.system.progress import track
from dfrot.training.descent import Descent
from dfrot.training.teacher import Distillation, ProductLinear, Teacher, Windows, product_dtype, teacher_states
from dfrot.training.trained import ThroughBlocks, Trained, TrainedRotation, less, quantized, rotated, rotated_back
from dfrot.transform.transforms import Transforms, input_widths

OSTQUANT = Paper(
    "ostquant",
    "2501.13987",
    "Hu, Xing and others",
    "OSTQuant: Refining Large Language Model Quantization with Orthogonal and Scaling Transformations",
)
# Learning rates of Adam; measured with steps of 8 × 1024 tokens on smollm2-135m, then probed.
ROTATION_RATE, SCALE_RATE = 3e-4, 3e-3
OFFSET_RATE, CLIP_RATE = 3e-3, 3e-3  # of offsets in units of their input's root mean square
WINDOW = 512  # tokens
KEPT_BYTES = 2 << 30  # of what blocks compute; what would be more is computed again backward


@dataclass(frozen=True)
class Learned(RangeRot):
    """R1 and scales, offsets and clip ratios of all quantized inputs, learned end to end from RangeRot's rotation;
    everything else as QuaRot. `fold_only` leaves out offsets and clip ratios, too."""

    learn_steps: int = 100
    """Steps of Adam, beside those that choose the learning rate."""
    learn_tokens: int = 1024
    """Tokens of one step; the calibration text is gone through again and again."""

    name = "learned"
    papers: ClassVar[tuple[Paper, ...]] = (QUAROT, DFROT, SPINQUANT, OSTQUANT)
    look = Look("#117733", "star", "solid")
    reads_all_text = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.learn_steps < 1 or self.learn_tokens < 2:
            raise UserError(
                f"learning takes a step of two tokens at least, got {self.learn_steps} steps of {self.learn_tokens}."
            )

    def outline(self, on: FitContext) -> Transforms:
        outline, graph = super().outline(on), on.source.graph
        if not self._shifts(on):
            return outline
        widths = input_widths(graph, on.source.config)
        offsets = {stage[0]: torch.zeros(widths[stage[0]]) for stage in graph.stages}
        return dataclasses.replace(outline, offsets=(offsets,) * on.source.num_blocks)

    def fit(self, on: FitContext) -> Fit:
        text, length = on.calibration().flatten(), min(WINDOW, self.learn_tokens)
        windows = Windows.of(text, "calibration", length, self.learn_tokens // length, self.learn_steps, on.seed)
        start, notes = super().fit(on)
        source, device = on.source, on.device
        dtype = torch.float64 if source.dtype == torch.float64 else torch.float32
        product = product_dtype(dtype, device)
        how: Any = {"dtype": dtype, "product": product, "device": device, "batch": windows.per_step}
        norm, head = source.final_norm().weight, source.head().to(device, product)
        teacher = Teacher(teacher_states(source, windows.tokens, None, norm, None, **how), head)
        student = Student(source, start, self.quantizer(on.activations), dtype, product, device, self.learn_tokens)
        if self._shifts(on):
            student.free_offsets_and_clips_(windows.tokens[windows.step(0)])
        objective = Distillation(student, teacher, windows, on.processes)
        descent = Descent(student.trained, objective.loss, objective.measure, self.learn_steps, on.processes)
        for _ in track(descent.remaining(), "learning", descent.total + 1):
            pass
        return Fit(student.transforms(), notes | {"learned": descent.notes()})

    def _shifts(self, on: FitContext) -> bool:
        """Whether there are offsets and clip ratios of inputs."""
        return not self.fold_only and on.activations.enabled

    def peak_bytes(self, sizes: ModelSizes) -> int:
        model = 2 * sizes.num_blocks * sizes.block + sizes.vocabulary * sizes.hidden * (sizes.source + 2)
        block, streams = _kept_bytes(sizes.hidden, sizes.heads, sizes.stages[-1][1], self.learn_tokens)
        blocks = sizes.num_blocks * block if sizes.num_blocks * block <= KEPT_BYTES else block
        text = (4 + 2) * sizes.tokens * sizes.hidden
        return max(super().peak_bytes(sizes), model + text + 2 * blocks + sizes.num_blocks * streams)

    def summary(self, notes: Mapping[str, Any]) -> list[str]:
        held = notes["learned"]["held_kl"]
        learned = f"from {held['0']:.4f} to {min(held.values()):.4f} nats a token"
        return [*super().summary(notes), f"learning lowered the KL divergence on held-out text {learned}"]


def _kept_bytes(hidden: int, heads: int, ffn: int, tokens: int) -> tuple[int, int]:
    """What the backward pass of a block reads, in bytes, and its input alone."""
    return 4 * tokens * (10 * hidden + 8 * heads + 8 * ffn), 4 * tokens * hidden


class Through(nn.Module):
    """x ↦ T⁻¹(Q(T x − o) + o), T x = x A / s · B.

    Args:
        before, behind: A and B; None is the identity.
        scale: s, for (copies, channels) inputs the same by copy.
        spec: Q, unless its clip ratio is trained, too.

    Attributes:
        offset: o, by copy like s; None for none.
        clip: the trained clip ratio.
    """

    def __init__(
        self,
        before: TrainedRotation | Rotation | None,
        scale: Trained,
        copies: int,
        behind: Rotation | None,
        spec: TensorSpec,
    ) -> None:
        super().__init__()
        self.before, self.scale, self.copies, self.behind, self.spec = before, scale, copies, behind, spec
        self.offset: Trained | None = None
        self.clip: Trained | None = None

    def forward(self, x: Float[Tensor, "*batch size"]) -> Float[Tensor, "*batch size"]:
        x, offset = self.transformed(x), self.shift()
        y = quantized(less(x, offset), self.spec, clip=self.clip_ratio())
        y = y if offset is None else y + offset
        return rotated_back(rotated_back(y, self.behind) * self.divisor(), self.before)

    def transformed(self, x: Float[Tensor, "*batch size"]) -> Float[Tensor, "*batch size"]:
        """T x."""
        return rotated(rotated(x, self.before) / self.divisor(), self.behind)

    def divisor(self) -> Float[Tensor, " size"]:
        """s of every channel."""
        return self._by_copy(self.scale())

    def shift(self) -> Float[Tensor, " size"] | None:
        """o of every channel."""
        return None if self.offset is None else self._by_copy(self.offset())

    def clip_ratio(self) -> Float[Tensor, "1"] | None:
        return None if self.clip is None else self.clip().clamp(max=1)

    def free_offset_and_clip_(self, x: Float[Tensor, "windows seq_len size"]) -> None:
        """Let offset and clip ratio move, the offset from the mean of inputs like x but for first tokens, which are
        massive."""
        y = self.transformed(x[:, 1:])
        mean = y.flatten(0, -2).mean(0).view(-1, self.copies, self.scale.start.shape[1]).mean(1)
        self.offset = Trained(mean, y.dtype, float(y.square().mean().sqrt()), OFFSET_RATE)
        self.clip = Trained(y.new_tensor([self.spec.fixed_clip]), y.dtype, None, CLIP_RATE)

    def _by_copy(self, vector: Float[Tensor, "groups channels"]) -> Float[Tensor, " size"]:
        return vector[:, None].expand(-1, self.copies, -1).flatten()


class ThroughNorm(nn.Module):
    """A norm whose output, before its gain, goes through."""

    def __init__(self, norm: nn.RMSNorm, through: Through) -> None:
        super().__init__()
        self.gain, self.eps, self.through = norm.weight, norm.eps, through

    def forward(self, x: Float[Tensor, "*batch size"]) -> Float[Tensor, "*batch size"]:
        return self.through(nn.functional.rms_norm(x, self.gain.shape, eps=self.eps)) * self.gain


class Student:
    """The original model with its inputs quantized behind transforms that may be trained.

    Args:
        start: transforms to start from, without scales.
        spec: the grid of inputs.
        dtype, product: of the computation, and of the products of linear layers in it.
        tokens: of a step.
    """

    def __init__(
        self,
        source: Any,
        start: Transforms,
        spec: TensorSpec,
        dtype: torch.dtype,
        product: torch.dtype,
        device: torch.device,
        tokens: int,
    ) -> None:
        assert start.residual is not None, "RangeRot rotates the stream"
        self.source, self.start, self.spec, self.dtype, self.device = source, start, spec, dtype, device
        self.embedding = source.embedding().to(device)
        self.norm = source.final_norm().to(device, dtype)
        self.rotation = TrainedRotation(start.residual.as_matrix().to(device, dtype), ROTATION_RATE)
        self.inputs: list[dict[str, Through]] = []  # by block: first layer of a stage → what its input goes through
        self.blocks = [self._block(index, product) for index in range(source.num_blocks)]
        config = source.config
        heads = self.inputs[0][source.graph.output].divisor().numel()
        kept, _ = _kept_bytes(config.hidden_size, heads, config.intermediate_size, tokens)
        self.through_blocks = ThroughBlocks(source, recompute=source.num_blocks * kept > KEPT_BYTES)

    @property
    def trained(self) -> list[Trained | TrainedRotation]:
        throughs = [through for block in self.inputs for through in block.values()]
        parts = [part for each in throughs for part in (each.scale, each.offset, each.clip) if part is not None]
        return [self.rotation, *parts]

    def __call__(self, tokens: Int[Tensor, "windows seq_len"]) -> Float[Tensor, "windows seq_len hidden"]:
        """What the head reads."""
        self.rotation.refresh()
        hidden = self.embedding[tokens.to(self.device)].to(self.dtype)
        return self.norm(self.through_blocks(hidden, self.blocks))

    @torch.no_grad()
    def free_offsets_and_clips_(self, tokens: Int[Tensor, "windows seq_len"]) -> None:
        """Let them move, from what the unquantized model has on these tokens."""
        throughs = [through for block in self.inputs for through in block.values()]
        for through in throughs:
            through.register_forward_pre_hook(lambda each, inputs: each.free_offset_and_clip_(*inputs))
        self(tokens)
        for through in throughs:
            through._forward_pre_hooks.clear()

    @torch.no_grad()
    def transforms(self) -> Transforms:
        """What was learned, in float64."""
        self.rotation.refresh()
        residual = Dense(polar_factor(self.rotation.matrix.double()).cpu())

        def by_block(value: Callable[[Through], Any]) -> tuple[dict[str, Any], ...]:
            return tuple({name: value(each) for name, each in block.items()} for block in self.inputs)

        found: dict[str, Any] = {"scales": by_block(lambda each: each.divisor().double().cpu())}
        if self.inputs[0][self.source.graph.output].offset is not None:
            found["offsets"] = by_block(lambda each: each.shift().double().cpu())  # type: ignore[union-attr]
            found["clips"] = by_block(lambda each: float(each.clip_ratio()))  # type: ignore[arg-type]
        return dataclasses.replace(self.start, residual=residual, **found)

    def _block(self, index: int, product: torch.dtype) -> nn.Module:
        graph, config, start = self.source.graph, self.source.config, self.start
        block = self.source.block(index).to(self.device, self.dtype)
        throughs: dict[str, Through] = {}

        def through(
            stage: str, groups: int, copies: int, before: TrainedRotation | Rotation | None, behind: Rotation | None
        ) -> Through:
            size = widths[stage] // (groups * copies)
            scale = Trained(torch.ones(groups, size, device=self.device), self.dtype, None, SCALE_RATE)
            throughs[stage] = Through(before, scale, copies, behind, self.spec)
            return throughs[stage]

        widths = {name: block.get_submodule(name).in_features for name in graph.linears}
        for name in graph.linears:
            block.set_submodule(name, ProductLinear(block.get_submodule(name), product))
        for name, readers in graph.norms.items():
            norm = block.get_submodule(name)
            block.set_submodule(name, ThroughNorm(norm, through(readers[0], 1, 1, self.rotation, None)))
        values = start.values and block_diagonal(start.values, config.num_attention_heads)
        copies = config.num_attention_heads // config.num_key_value_heads
        sites = {graph.output: (config.num_key_value_heads, copies, values, None), graph.down: (1, 1, None, start.ffn)}
        for name, site in sites.items():
            block.set_submodule(name, nn.Sequential(through(name, *site), block.get_submodule(name)))
        self.inputs.append(throughs)
        return block
