"""One rotated, quantized checkpoint for the engines that people run."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from dfrot.errors import UserError
from dfrot.export.checkpoint import Checkpoint
from dfrot.export.gguf import to_gguf
from dfrot.export.huggingface import to_huggingface
from dfrot.export.vllm import to_vllm

EXPORTERS: dict[str, Callable[..., list[str]]] = {"huggingface": to_huggingface, "vllm": to_vllm, "gguf": to_gguf}
# Word of `export` → the engine that it is for, and the command line's option.
_TAKEN_BY = {
    "device": ("vllm", "--device"),
    "plugin": ("vllm", "--plugin"),
    "tensor_parallel": ("vllm", "--tensor-parallel"),
    "kind": ("gguf", "--type"),
}


def export(checkpoint: str | Path, to: str, out: str | Path, **words: Any) -> list[str]:
    """Write a checkpoint for another engine.

    Args:
        checkpoint: a directory that `dfrot.quantize` wrote.
        to: huggingface, vllm or gguf.
        out: what to make, a directory or for gguf a file; it must not be there, or be empty.
        words: vllm: device, where it is to run, cpu (default) or cuda; plugin, whether dfrot's plugin is to be there;
            tensor_parallel, GPUs that share every layer. gguf: kind, type of the weights, f16, bf16, f32, q8_0 or q4_0
            (default: that which keeps them, else f16). None stands for the default.

    Returns:
        Sentences: what is otherwise there than in dfrot's runtime.

    Raises:
        UserError: the engine would run it wrongly; something is in the way.
        EnvironmentFault: it cannot be written.
    """
    if to not in EXPORTERS:
        raise UserError(f"there is no export to '{to}'. Engines: {', '.join(EXPORTERS)}.")
    words = {name: value for name, value in words.items() if value is not None}
    for name in words:
        engine, option = _TAKEN_BY[name]
        if engine != to:
            raise UserError(f"{option} is for {engine}, and means nothing to {to}. Leave it out.")
    return EXPORTERS[to](Checkpoint.open(Path(checkpoint)), Path(out).expanduser(), **words)
