"""An architecture as a table: which layers read the residual stream, which write it, and where the heads are.

Names are those of the Hugging Face modules, relative to their block. The rest of the package knows nothing else about
an architecture: adding one takes a `ModelGraph` in families.py and a row in tests/tiny_models.py.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Config = Any  # transformers' PreTrainedConfig: its fields differ from model to model


@dataclass(frozen=True)
class ModelGraph:
    """Where the rotations act in one architecture.

    Attributes:
        name: of the family, for messages.
        norms: each norm of a block, with the linear layers that read its output.
        writers: the linear layers of a block that write the residual stream.
        attention: the attention module of a block.
        value: the linear layer whose last rows (all unless q, k and v are fused) compute the values.
        output: the linear layer that reads the heads' outputs.
        up: the linear layer whose last rows (all unless gate and up are fused) are multiplied by the gate.
        down: the linear layer that reads the feed-forward activations.
        head_norms: norms over head_dim (QK-norm); no rotation touches them.
    """

    name: str
    norms: Mapping[str, tuple[str, ...]]
    writers: tuple[str, ...] = ("self_attn.o_proj", "mlp.down_proj")
    attention: str = "self_attn"
    value: str = "self_attn.v_proj"
    output: str = "self_attn.o_proj"
    up: str = "mlp.up_proj"
    down: str = "mlp.down_proj"
    head_norms: tuple[str, ...] = ()
    embedding: str = "model.embed_tokens"
    decoder: str = "model"
    blocks: str = "model.layers"
    rotary: str = "model.rotary_emb"
    final_norm: str = "model.norm"
    head: str = "lm_head"

    @property
    def linears(self) -> tuple[str, ...]:
        """The linear layers of a block in execution order."""
        return tuple(name for stage in self.stages for name in stage)

    @property
    def stages(self) -> tuple[tuple[str, ...], ...]:
        """The linear layers in execution order, grouped by their input."""
        attention_readers, ffn_readers = self.norms.values()
        return (attention_readers, (self.output,), ffn_readers, (self.down,))

    def norm_before(self, linear: str) -> str | None:
        """The norm whose output `linear` reads, if it reads one."""
        return next((norm for norm, readers in self.norms.items() if linear in readers), None)


def head_dim(config: Config) -> int:
    """Channels of one head; in Qwen3 not hidden_size / num_attention_heads."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def value_width(config: Config) -> int:
    """Output rows of the value projection."""
    return config.num_key_value_heads * head_dim(config)
