"""The known architectures, one table each."""

from dfrot.models.graph import Config, ModelGraph
from dfrot.system.errors import UserError

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
    "phi3": ModelGraph("Phi-3, Phi-4-mini", _FUSED, value="self_attn.qkv_proj", up="mlp.gate_up_proj"),
}


def graph_for(config: Config) -> ModelGraph:
    """The table of a config's architecture. Raises UserError for an unknown one."""
    if (graph := GRAPHS.get(config.model_type)) is None:
        known = ", ".join(f"{model_type} ({graph.name})" for model_type, graph in GRAPHS.items())
        raise UserError(
            f"the architecture '{config.model_type}' is not known. Known: {known}. "
            "To add one, write its table in dfrot/models/families.py and a row in tests/tiny_models.py "
            "(CONTRIBUTING.md, 'A new architecture')."
        )
    return graph
