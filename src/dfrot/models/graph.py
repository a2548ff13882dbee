"""An architecture as a table: who reads the residual stream, who writes it, where the heads are.

Names are those of the Hugging Face modules; those of a block are relative to it. This is all that the rest of the
package knows about an architecture: adding one is a `ModelGraph` in families.py and a row in tests/tiny_models.py.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Config = Any  # transformers' PreTrainedConfig: its fields differ from model to model


@dataclass(frozen=True)
class ModelGraph:
    """Where the rotations act in one architecture.

    Attributes:
        name: how people call the family.
        norms: each norm of a block, with the linear layers that read its output.
        writers: the linear layers of a block that write the residual stream.
        attention: the attention module of a block.
        value: the linear layer whose last rows (all of them unless q, k and v are fused) make the values.
        output: the linear layer that reads the heads' outputs.
        up: the linear layer whose last rows (all of them unless gate and up are fused) are multiplied with the gate's.
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
        """The linear layers of a block in the order in which they run."""
        return tuple(name for stage in self.stages for name in stage)

    @property
    def stages(self) -> tuple[tuple[str, ...], ...]:
        """The same, those together that read the same input."""
        attention_readers, ffn_readers = self.norms.values()
        return (attention_readers, (self.output,), ffn_readers, (self.down,))

    def norm_before(self, linear: str) -> str | None:
        """The norm whose output `linear` reads, if it reads one."""
        return next((norm for norm, readers in self.norms.items() if linear in readers), None)


def head_dim(config: Config) -> int:
    """Channels of one head. From the config: in Qwen3 it is not hidden_size / num_attention_heads."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def value_width(config: Config) -> int:
    """Output rows of the value projection."""
    return config.num_key_value_heads * head_dim(config)
