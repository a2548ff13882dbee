"""The sites at which a model is rotated.

| site | paper's name | online or folded | absorbed by |
|---|---|---|---|
| residual stream | R1 | folded | every reader and writer of the stream, embedding, head |
| what reads the stream, where R1 cannot be folded | R1 | online | the readers |
| value → output projection, per head | R2 | folded | v_proj, o_proj |
| queries and keys after RoPE, per head | R3 | online | nothing: scores are unchanged |
| input of down_proj | R4 | online | down_proj |
| across heads before o_proj | QuaRot's only | online | o_proj |
| input of every linear layer | DuQuant's | online; its smoothing folded | that layer; the norm or layer before |
| input of every linear layer | scales and offsets, learned | folded; the offset online | the same |

A method fits a `Transforms`; this module derives the `Fold` of each linear layer of a block.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from dfrot.linalg.rotation import Identity, Kronecker, Rotation, block_diagonal, block_rotation, rotation_from
from dfrot.models.graph import Config, ModelGraph, ffn_width, head_dim, kv_heads, rows_of_heads
from dfrot.transform.fold import Fold

SITES = ("residual", "values", "keys", "ffn", "heads", "readers")
_PARTS = ("smooth", "matrices", "orders")
KEYS, VALUES = "keys", "values"  # where a stage is named, these stand for keys and values


@dataclass(frozen=True, eq=False)
class InputTransform:
    """x ↦ (x / s) B₁ P₁ B₂ … for the layers that read one input: DuQuant's."""

    smooth: Float[Tensor, " in"] | None  # s
    matrices: Float[Tensor, "count block block"]  # each is repeated along the diagonal of one B
    orders: Int[Tensor, "between in"]  # of the count − 1 permutations P between them

    @property
    def rotation(self) -> Rotation:
        return block_rotation(self.matrices, self.orders)


def input_widths(graph: ModelGraph, config: Config) -> dict[str, int]:
    """Input channels of each linear layer of a block."""
    heads = config.num_attention_heads * head_dim(config)
    others = {graph.output: heads} | dict.fromkeys(graph.downs, ffn_width(config))
    return {name: others.get(name, config.hidden_size) for name in graph.linears}


@dataclass(frozen=True, eq=False)
class Transforms:
    """One rotation per site; None leaves the site alone.

    Norm gains are folded exactly when `residual` is set.
    """

    residual: Rotation | None = None  # R1, of size hidden_size
    values: Rotation | None = None  # R2, of size head_dim, the same for every head
    keys: Rotation | None = None  # R3, of size head_dim, applied at run time if keys are quantized; to queries too
    ffn: Rotation | None = None  # R4, of size intermediate_size, applied at run time
    heads: Rotation | None = None  # over the head index, of size num_attention_heads, applied at run time
    readers: Rotation | None = None  # of what reads the residual stream, instead of R1, applied at run time
    # One mapping per block, from the first layer of a stage to the transform of the stage's input.
    inputs: tuple[Mapping[str, InputTransform], ...] = ()
    # Likewise to s, which divides that input once it is rotated by R1 or R2, and before R4; folded. Not with `inputs`.
    # Keys may be divided too, the planes of RoPE as a whole, and queries are multiplied then.
    scales: tuple[Mapping[str, Float[Tensor, " in"]], ...] = ()
    # Likewise to the offset o that is subtracted behind all of these: of o_proj's input by v_proj's bias, since the
    # weights of attention sum to 1, of the others at run time. Biases of the readers make up for it.
    offsets: tuple[Mapping[str, Float[Tensor, " in"]], ...] = ()
    # Likewise to the clip ratio of that input, or of keys or values, where they have their own.
    clips: tuple[Mapping[str, float], ...] = ()

    def describe(self, tensors: dict[str, Tensor]) -> dict[str, Any]:
        """JSON that `from_description` turns back into this; tensors are put into `tensors`."""
        rotations: dict[str, Rotation | None] = {site: getattr(self, site) for site in SITES}
        described = {site: rotation and rotation.describe(tensors, site) for site, rotation in rotations.items()}
        for index, stages in enumerate(self.inputs):
            for stage, transform in stages.items():
                for part in _PARTS:
                    if (tensor := getattr(transform, part)) is not None:
                        tensors[f"{index}.{stage}.{part}"] = tensor
        for kind, blocks in (("scale", self.scales), ("offset", self.offsets)):
            for index, vectors in enumerate(blocks):
                tensors |= {f"{index}.{stage}.{kind}": vector for stage, vector in vectors.items()}
        sites = {"inputs": self.inputs, "scales": self.scales, "offsets": self.offsets}
        listed = {name: [list(stages) for stages in blocks] for name, blocks in sites.items()}
        return described | listed | {"clips": [dict(clips) for clips in self.clips]}

    @staticmethod
    def from_description(description: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> "Transforms":
        """The inverse of `describe`."""
        sites = {site: description.get(site) for site in SITES}
        inputs = tuple(
            {
                stage: InputTransform(**{part: tensors.get(f"{index}.{stage}.{part}") for part in _PARTS})  # type: ignore[arg-type]
                for stage in stages
            }
            for index, stages in enumerate(description["inputs"])
        )
        vectors: dict[str, Any] = {
            f"{kind}s": tuple(
                {stage: tensors[f"{index}.{stage}.{kind}"] for stage in stages}
                for index, stages in enumerate(description.get(f"{kind}s", ()))
            )
            for kind in ("scale", "offset")
        }
        rotations: dict[str, Any] = {site: at and rotation_from(at, tensors) for site, at in sites.items()}
        return Transforms(**rotations, inputs=inputs, **vectors, clips=tuple(description.get("clips", ())))

    def rotation_blocks(self, graph: ModelGraph) -> dict[str, tuple[int, int]]:
        """Norm or layer at which the runtime applies a rotation of `inputs` → block size and count."""
        stages = self.inputs[0] if self.inputs else {}
        return {
            site: (transform.matrices.shape[-1], len(transform.matrices))
            for stage, transform in stages.items()
            for site in graph.sites(stage)
        }

    def offset_sites(self, graph: ModelGraph) -> dict[str, str]:
        """Norm or layer at which the runtime subtracts an offset → first layer of the stage that reads it."""
        stages = self.offsets[0] if self.offsets else ()
        return {site: stage for stage in stages if stage != graph.output for site in graph.sites(stage)}

    def clip_sites(self, graph: ModelGraph) -> dict[str, tuple[float, ...]]:
        """Norm or layer, keys or values → clip ratio by block, where they have their own."""
        stages = self.clips[0] if self.clips else {}
        return {graph.norm_before(stage) or stage: tuple(block[stage] for block in self.clips) for stage in stages}

    def online_tensors(self, index: int, graph: ModelGraph, dtype: torch.dtype) -> dict[str, Tensor]:
        """Tensors of one block's input rotations and offsets in the checkpoint, named after the runtime's modules."""
        tensors = {
            f"{site}.offset": self.offsets[index][stage].to(dtype) for site, stage in self.offset_sites(graph).items()
        }
        for stage, transform in (self.inputs[index] if self.inputs else {}).items():
            for site in graph.sites(stage):  # copies: a file shares no tensor
                tensors[f"{site}.rotation.matrices"] = transform.matrices.to(dtype, copy=True)
                tensors[f"{site}.rotation.orders"] = transform.orders.to(torch.int32, copy=True)
        return tensors

    def online(self, graph: ModelGraph, config: Config) -> dict[str, Rotation]:
        """Norm or linear layer → the rotation that the runtime applies to its output or input."""
        found: dict[str, Rotation] = {}
        if self.readers is not None:
            found |= {site: self.readers for stage in graph.readers for site in graph.sites(stage[0])}
        if self.ffn is not None:
            found |= dict.fromkeys(graph.downs, self.ffn)
        if self.heads is not None:
            found[graph.output] = Kronecker(self.heads, Identity(head_dim(config)))
        return found

    def head_fold(self, gain: Float[Tensor, " hidden"]) -> Fold:
        """The head's fold; `gain` belongs to the norm before it."""
        return Fold(gain=None if self.residual is None else gain, input_rotation=self.residual)

    @property
    def unties_head(self) -> bool:
        """Whether a tied head parts from the embedding: it absorbs the last norm's gain."""
        return self.residual is not None

    def folds(self, index: int, graph: ModelGraph, config: Config, block: nn.Module) -> dict[str, Fold]:
        """The fold of every linear layer of block `index`, with the gains of its norms."""
        online = self.online(graph, config)
        smooth: dict[str, Tensor | None] = {KEYS: self.scales[index].get(KEYS)} if self.scales else {}
        stages = graph.stages
        if graph.router is not None:
            stages = (*stages[:2], (*stages[2], graph.router), *stages[3:])
        for stage in stages if self.inputs else ():
            transform = self.inputs[index][stage[0]]
            online |= dict.fromkeys(stage, transform.rotation)
            smooth |= dict.fromkeys(stage, transform.smooth)
        for stage in stages if self.scales else ():
            smooth |= dict.fromkeys(stage, self.scales[index].get(stage[0]))
        offsets = self.offsets[index] if self.offsets else {}

        def of_values(of_heads: Tensor | None) -> Tensor | None:  # the same for all heads that read one value head
            shape = kv_heads(config), -1, head_dim(config)
            return None if of_heads is None else of_heads.view(shape)[:, 0].flatten()

        def outputs(name: str, part: Tensor | None, rows: Tensor | slice | None, others: float) -> Tensor | None:
            """A vector for all outputs of a layer, `part` at its rows."""
            if part is None:
                return None
            weight: Any = block.get_submodule(name).weight
            full = part.new_full((len(weight),), others)
            full[slice(None) if rows is None else rows] = part
            return full

        value_rows = None
        if graph.key is None:
            query_rows, key_rows, value_rows = rows_of_heads(graph, config)
        last = slice(-ffn_width(config), None)
        pairs = zip(graph.ups, graph.downs, strict=bool(graph.ups))
        output_divisor = {up: outputs(up, smooth.get(down), last, 1.0) for up, down in pairs}
        divisor = outputs(graph.value, of_values(smooth.get(graph.output)), value_rows, 1.0)
        output_divisor[graph.value] = divisor
        if (of_keys := smooth.get(KEYS)) is not None:
            shape = kv_heads(config), 1, head_dim(config)
            copies = config.num_attention_heads // kv_heads(config)
            of_queries = (1 / of_keys).view(shape).expand(-1, copies, -1).flatten()
            if graph.key is not None:
                output_divisor |= {graph.stages[0][0]: of_queries, graph.key: of_keys}
            else:
                of_all = outputs(graph.value, of_keys, key_rows, 1.0) if divisor is None else divisor
                of_all[query_rows], of_all[key_rows] = of_queries, of_keys  # type: ignore[index]
                output_divisor[graph.value] = of_all
        shift = outputs(graph.value, of_values(offsets.get(graph.output)), value_rows, 0.0)
        offset_of = {name: offsets.get(stage[0]) for stage in stages for name in stage}
        folds = {}
        for name in graph.folded:
            norm = graph.norm_before(name)
            reads, writes = (self.residual if norm else None), (self.residual if name in graph.writers else None)
            if name == graph.output and self.values is not None:
                reads = block_diagonal(self.values, config.num_attention_heads)
            if name == graph.value and self.values is not None:
                writes = block_diagonal(self.values, kv_heads(config))
            folds[name] = Fold(
                gain=block.get_submodule(norm).weight if norm and self.residual is not None else None,  # type: ignore[arg-type]
                input_rotation=reads,
                smooth=smooth.get(name),
                online=online.get(norm or name, online.get(name)),
                output_rotation=writes,
                output_rows=value_rows if name == graph.value else None,
                output_divisor=output_divisor.get(name),
                offset=offset_of[name],
                offset_online=name != graph.output,
                output_offset=shift if name == graph.value else None,
            )
        return folds


def fold_block_(block: nn.Module, folds: Mapping[str, Fold], graph: ModelGraph, dtype: torch.dtype) -> None:
    """Fold everything into a block's weights and norms: computed in float64, cast once to `dtype`."""
    for name, fold in folds.items():
        linear: Any = block.get_submodule(name)
        weight = fold.weight(linear.weight.data)
        bias = fold.bias(linear.bias, weight)
        linear.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
        linear.bias = None if bias is None else nn.Parameter(bias.to(dtype), requires_grad=False)
    for name, readers in graph.norms.items():
        norm = block.get_submodule(name)
        norm.weight = nn.Parameter(folds[readers[0]].norm_gain(norm.weight), requires_grad=False)  # type: ignore[arg-type]
    block.to(dtype)
