"""The known architectures, each a table: which layers read and write the residual stream, and where the heads are.

Names are those of the Hugging Face modules. The rest of the package knows nothing else about an architecture: adding
one takes a row in `GRAPHS` and a row in tests/tiny_models.py. What has none is traced (models/tracing.py).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

Config = Any  # transformers' PreTrainedConfig: its fields differ from model to model


@dataclass(frozen=True)
class ModelGraph:
    """Where the rotations act in one architecture. Names above `embedding` are relative to their block."""

    name: str  # of the family, for messages
    norms: Mapping[str, tuple[str, ...]]  # each norm before linear layers of a block, with those that read its output
    unnormed: tuple[tuple[str, ...], ...] = ()  # the layers that read the stream itself, if no norm stands before them
    norms_behind: tuple[str, ...] = ()  # norms between the writers and the stream
    writers: tuple[str, ...] = ("self_attn.o_proj", "mlp.down_proj")  # linear layers that write the residual stream
    attention: str = "self_attn"
    key: str | None = "self_attn.k_proj"  # computes the keys and nothing else; None: q, k and v are fused
    value: str = "self_attn.v_proj"  # its last rows (all unless q, k and v are fused) compute the values
    output: str = "self_attn.o_proj"  # reads the heads' outputs
    # Its last rows (all unless gate and up are fused) are multiplied by the gate; None: there is no gate.
    up: str | None = "mlp.up_proj"
    down: str = "mlp.down_proj"  # reads the feed-forward activations
    router: str | None = None  # reads what the experts read, and chooses among them; it is not quantized
    experts: int = 0  # `up` and `down` are then the first one's
    head_norms: tuple[str, ...] = ()  # norms of queries and keys (QK-norm); no rotation touches them
    unit_gains: bool = False  # norms multiply by 1 + their weight, as Gemma's
    # Norms subtract the mean (LayerNorm). As a source is read, what they read has none, and their biases are those of
    # the layers that read them: see `Source`.
    centred: bool = False
    by_heads: bool = False  # the rows of a fused q, k and v: each key's queries, it, its value, and then the next key's
    embedding: str = "model.embed_tokens"
    positions: str = ""  # the embedding of positions, if they are learned
    decoder: str = "model"
    blocks: str = "model.layers"
    rotary: str = "model.rotary_emb"  # "": there is no RoPE
    final_norm: str = "model.norm"
    head: str = "lm_head"
    traced: bool = False  # found out by models/tracing.py, not known from tests
    rope_in_halves: bool = True  # RoPE turns channel j with channel j + half, in every block

    @property
    def linears(self) -> tuple[str, ...]:
        """The linear layers of a block in execution order."""
        return tuple(name for stage in self.stages for name in stage)

    @property
    def stages(self) -> tuple[tuple[str, ...], ...]:
        """The linear layers in execution order, grouped by their input.

        Where attention and the feed-forward network read one norm, their readers are one group.
        """
        first, *second = self.readers
        return (first, (self.output,), *second, *((down,) for down in self.downs))

    @property
    def rounded_together(self) -> tuple[tuple[str, ...], ...]:
        """The stages, each expert's apart from those of the others, which see other tokens."""
        found: list[tuple[str, ...]] = []
        for stage in self.stages:
            by_expert: dict[int | None, list[str]] = {}
            for name in stage:
                by_expert.setdefault(self.expert(name), []).append(name)
            found += map(tuple, by_expert.values())
        return tuple(found)

    def expert(self, linear: str) -> int | None:
        """The expert that a layer belongs to, if it is one's."""
        if not (self.experts and linear.startswith(self._before_experts)):
            return None
        return int(linear.removeprefix(self._before_experts).partition(".")[0])

    @property
    def _before_experts(self) -> str:
        """How the names of all experts' layers begin."""
        return self.down.rpartition(".")[0].rpartition(".")[0] + "."

    @property
    def mixture(self) -> str:
        """The module that has router and experts."""
        assert self.router is not None, "it has experts"
        return self.router.rpartition(".")[0]

    @property
    def downs(self) -> tuple[str, ...]:
        """`down`, or those of all experts."""
        return self._of_experts(self.down)

    @property
    def ups(self) -> tuple[str, ...]:
        """`up`, or those of all experts; none without a gate."""
        return () if self.up is None else self._of_experts(self.up)

    def _of_experts(self, first: str) -> tuple[str, ...]:
        if not self.experts:
            return (first,)
        start = self._before_experts
        inner = first.removeprefix(start).partition(".")[2]
        return tuple(f"{start}{number}.{inner}" for number in range(self.experts))

    @property
    def folded(self) -> tuple[str, ...]:
        """All layers whose weights take folds up: the router's, too."""
        return self.linears if self.router is None else (*self.linears, self.router)

    @property
    def readers(self) -> tuple[tuple[str, ...], ...]:
        """The linear layers that read the residual stream: attention's, then those of the feed-forward network, or both
        at once."""
        return (*self.norms.values(), *self.unnormed)

    @property
    def rotates_stream(self) -> bool:
        """Whether R1 can be folded. The gain of a norm behind a writer stands in the stream's own basis."""
        return not self.norms_behind

    def adds_one(self, tensor: str) -> bool:
        """Whether it is the weight of a norm that multiplies by 1 plus it."""
        module = tensor.removesuffix(".weight")
        of_block = module.removeprefix(f"{self.blocks}.").partition(".")[2]
        norms = (*self.norms, *self.norms_behind, *self.head_norms)
        return self.unit_gains and (module == self.final_norm or of_block in norms)

    def norm_before(self, linear: str) -> str | None:
        """The norm whose output `linear` reads, if it reads one."""
        if linear == self.router:
            linear = self.readers[1][0]
        return next((norm for norm, readers in self.norms.items() if linear in readers), None)

    def absorbs_scale(self, linear: str) -> bool:
        """Whether the norm or the layer before it can divide what `linear` reads, channel by channel."""
        return (
            self.norm_before(linear) is not None
            or linear == self.output
            or (linear in self.downs and self.up is not None)
        )

    def sites(self, linear: str) -> tuple[str, ...]:
        """Where the runtime transforms the input of `linear`: the norm before it, or each layer that reads it."""
        norm = self.norm_before(linear)
        return next(stage for stage in self.stages if linear in stage) if norm is None else (norm,)


def rows_of_heads(graph: ModelGraph, config: Config) -> tuple[Int[Tensor, " rows"], ...]:
    """The rows of a fused q, k and v that make queries, those that make keys and those that make values."""
    heads, size = kv_heads(config), head_dim(config)
    copies = config.num_attention_heads // heads
    if graph.by_heads:
        rows = torch.arange(heads * (copies + 2) * size).view(heads, copies + 2, size)
        return tuple(part.flatten() for part in rows.split([copies, 1, 1], 1))
    return torch.arange(heads * (copies + 2) * size).split([heads * n * size for n in (copies, 1, 1)])


_SEPARATE = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
}
_FUSED = {"input_layernorm": ("self_attn.qkv_proj",), "post_attention_layernorm": ("mlp.gate_up_proj",)}

# Keyed by `model_type` of config.json.
GRAPHS: dict[str, ModelGraph] = {
    "llama": ModelGraph("Llama 1, 2, 3.x; Vicuna; SmolLM2", _SEPARATE),
    "mistral": ModelGraph("Mistral", _SEPARATE),
    "qwen2": ModelGraph("Qwen2, Qwen2.5", _SEPARATE),
    "qwen3": ModelGraph("Qwen3", _SEPARATE, head_norms=("self_attn.q_norm", "self_attn.k_norm")),
    "phi3": ModelGraph("Phi-3, Phi-4-mini", _FUSED, key=None, value="self_attn.qkv_proj", up="mlp.gate_up_proj"),
}


def graph_for(config: Config) -> ModelGraph:
    """The table of a config's architecture, or else what tracing proposes. Raises UserError if that is nothing."""
    if (graph := GRAPHS.get(config.model_type)) is not None:
        return graph
    from dfrot.models.tracing import traced_graph  # which needs transformers, and names from here

    return traced_graph(config)


def ffn_width(config: Config) -> int:
    """Channels that down_proj reads, of one expert if there are some."""
    found = (getattr(config, name, None) for name in ("moe_intermediate_size", "intermediate_size", "ffn_dim"))
    return next(width for width in found if width)


def kv_heads(config: Config) -> int:
    """Heads of keys and values: as many as of queries where a config knows no other number."""
    return getattr(config, "num_key_value_heads", None) or config.num_attention_heads


def head_dim(config: Config) -> int:
    """Channels of one head; in Qwen3 not hidden_size / num_attention_heads."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
