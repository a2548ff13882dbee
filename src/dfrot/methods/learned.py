"""Learned transforms: R1 and R2, scales, offsets and clip ratios of all that is quantized, by the whole model's loss.

Starts from RangeRot. A scale divides each channel of an input behind its rotation, and its inverse multiplies the
columns of the weights that read it (SmoothQuant, Xiao et al. 2022, arXiv 2211.10438; learned together with rotations:
OSTQuant, Hu et al. 2025, arXiv 2501.13987). An offset is subtracted from it before it is quantized, so that the grid
need not span what every token has in common; the readers' biases make up for it, exactly.

    input of                 rotated by    the scale is absorbed by            the offset is subtracted by
    readers of a norm        R1            the norm's gain, by block and norm  the norm, at run time
    o_proj                   R2            v_proj, for all heads that read     v_proj's bias: attention's weights
                                           one value head alike                sum to 1
    down_proj                – (R4 after)  up_proj                             the layer, behind R4, at run time
    keys                     – (R3 after)  q_proj and k_proj, the two          –
                                           channels of a plane of RoPE alike
    values                   R2            as of o_proj                        as of o_proj

No weight is folded, and none gets a gradient, to learn this. A transform T in front of a quantizer Q, which the weights
undo, is x ↦ T⁻¹(Q(T x − o) + o) in the original model, whose weights stay as they are. T moves by the KL divergence of
next-token distributions from the original model's, with gradients straight through Q (training/). Weights are rounded
afterwards; the descent does not see that.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from dfrot.methods.dfrot import DFROT
from dfrot.methods.learned_student import Student
from dfrot.methods.method import Fit, FitContext, Look
from dfrot.methods.quarot import QUAROT
from dfrot.methods.rangerot import SPINQUANT, RangeRot
from dfrot.models.sizes import ModelSizes
from dfrot.quant.spec import UNQUANTIZED, Spec
from dfrot.system.errors import UserError
from dfrot.system.papers import Paper
from dfrot.system.progress import track
from dfrot.training.descent import Descent
from dfrot.training.teacher import (
    Distillation,
    Teacher,
    Windows,
    product_bytes,
    product_dtype,
    teacher_states,
    windows_at_once,
)
from dfrot.transform.transforms import Transforms, input_widths

OSTQUANT = Paper(
    "ostquant",
    "2501.13987",
    "Hu, Xing and others",
    "OSTQuant: Refining Large Language Model Quantization with Orthogonal and Scaling Transformations",
)
WINDOW = 512  # tokens
SAVE_EVERY = 10  # steps
_MOVING = "moving."  # before the names of the descent's tensors in what is kept


@dataclass(frozen=True)
class Learned(RangeRot):
    """R1 and R2, scales, offsets and clip ratios of inputs, keys and values, learned end to end from RangeRot's
    rotations; R3 and R4 as QuaRot. `fold_only` leaves out offsets and clip ratios, too."""

    learn_steps: int = 100
    """Steps of Adam, beside those that choose the learning rate."""
    learn_tokens: int = 1024
    """Tokens of one step; the calibration text is gone through again and again."""

    name = "learned"
    papers: ClassVar[tuple[Paper, ...]] = (QUAROT, DFROT, SPINQUANT, OSTQUANT)
    look = Look("#117733", "star", "solid")
    reads_all_text = True
    reads_grids = ("activations", "keys", "values")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.block is not None:
            raise UserError("learned moves R1 as a whole and has no blocks. Take --method rangerot, or no --block.")
        if self.learn_steps < 1 or self.learn_tokens < 2:
            raise UserError(
                f"learning takes a step of two tokens at least, got {self.learn_steps} steps of {self.learn_tokens}."
            )

    def outline(self, on: FitContext) -> Transforms:
        outline, graph = super().outline(on), on.source.graph
        if graph.experts:
            raise UserError(f"{graph.name} has experts, for whose inputs nothing is learned. Use --method rangerot.")
        if not self._shifts(on):
            return outline
        widths = input_widths(graph, on.source.config)
        offsets = {stage[0]: torch.zeros(widths[stage[0]]) for stage in graph.stages}
        return dataclasses.replace(outline, offsets=(offsets,) * on.source.num_blocks)

    def fit(self, on: FitContext) -> Fit:
        sequences = on.calibration()
        length = self._window(sequences.shape[1])
        text = sequences[:, : sequences.shape[1] // length * length].flatten()  # no window reaches across a seam
        words = "calibration", length, self.learn_tokens // length, self.learn_steps, on.seed
        windows = Windows.of(text, *words, overlapping=True)  # the sequences are drawn from anywhere
        kept = on.progress.load()
        if kept is not None and kept[0]["text"] == windows.digest:
            start, notes = Transforms.from_description(kept[0]["start"], kept[1]), kept[0]["notes"]
        else:
            (start, notes), kept = super().fit(on), None
        source, device = on.source, on.device
        dtype = torch.float64 if source.dtype == torch.float64 else torch.float32
        product = product_dtype(dtype, device)
        how: Any = {"dtype": dtype, "product": product, "device": device, "batch": windows.per_step}
        norm, head = source.final_norm().weight, source.head().to(device, product)
        states = teacher_states(source, windows.tokens, None, norm, None, **how)
        teacher = Teacher(states, head, source.head_bias())
        activations = on.activations if on.keys.enabled else self.quantizer(on.activations)
        spec, widths = Spec(UNQUANTIZED, activations, on.keys, on.values), input_widths(source.graph, source.config)
        heads, ffn = widths[source.graph.output], widths[source.graph.down]
        at_once = windows_at_once(device.type, length, windows.per_step)
        block, _ = _kept_bytes(heads, source.config.hidden_size, ffn, at_once * length)
        keep = _affordable(source.num_blocks * block, on.budget)
        student = Student(source, start, spec, dtype, product, device, not keep)
        if self._shifts(on):
            student.free_offsets_and_clips_(windows.tokens[windows.step(0)])
        objective = Distillation(student, teacher, windows, on.processes)
        descent = Descent(student.trained, objective.loss, objective.measure, self.learn_steps, on.processes)
        started: dict[str, Tensor] = {}
        record = {"text": windows.digest, "start": start.describe(started), "notes": notes}
        if kept is not None:
            names = [name for name in kept[1] if name.startswith(_MOVING)]
            descent.restore(kept[0]["descent"], {name.removeprefix(_MOVING): kept[1][name] for name in names})
        for done in track(descent.remaining(), "learning", descent.total + 1):
            if done % SAVE_EVERY == 0 and not descent.done:
                state, moving = descent.state()
                renamed = {_MOVING + name: tensor for name, tensor in moving.items()}
                on.progress.save({**record, "descent": state}, started | renamed)
        return Fit(student.transforms(), notes | {"learned": descent.notes()})

    def _shifts(self, on: FitContext) -> bool:
        """Whether there are offsets and clip ratios of inputs."""
        return not self.fold_only and on.activations.enabled and on.activations.integer

    def _window(self, seq_len: int) -> int:
        """Tokens of a window in sequences of so many."""
        return min(WINDOW, self.learn_tokens, seq_len)

    def peak_bytes(self, sizes: ModelSizes, budget: int) -> int:
        product = product_bytes(sizes.working)
        model = product * sizes.num_blocks * sizes.block + sizes.vocabulary * sizes.hidden * (sizes.source + product)
        length = self._window(sizes.seq_len)
        at_once = windows_at_once("cpu", length, self.learn_tokens // length)
        block, streams = _kept_bytes(sizes.heads, sizes.hidden, sizes.stages[-1][1], at_once * length)
        blocks = sizes.num_blocks * block if _affordable(sizes.num_blocks * block, budget) else block
        text = (4 + 2) * sizes.tokens * sizes.hidden
        return max(super().peak_bytes(sizes, budget), model + text + 2 * blocks + sizes.num_blocks * streams)

    def summary(self, notes: Mapping[str, Any]) -> list[str]:
        held = notes["learned"]["held_kl"]
        learned = f"from {held['0']:.4f} to {min(held.values()):.4f} nats a token"
        return [*super().summary(notes), f"learning lowered the KL divergence on held-out text {learned}"]


def _kept_bytes(heads: int, hidden: int, ffn: int, tokens: int) -> tuple[int, int]:
    """What the backward pass of a block reads, in bytes, and its input alone."""
    return 4 * tokens * (10 * hidden + 12 * heads + 8 * ffn), 4 * tokens * hidden


def _affordable(blocks: int, budget: int) -> bool:
    """Whether what the backward pass reads of all blocks is kept; if not, it is computed again."""
    return blocks <= budget // 4
