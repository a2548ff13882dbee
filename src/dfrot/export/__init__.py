"""One rotated, quantized checkpoint for the engines that people run."""

from collections.abc import Callable
from pathlib import Path

from dfrot.export.checkpoint import Checkpoint
from dfrot.export.gguf_file import to_gguf
from dfrot.export.plain import to_huggingface
from dfrot.export.vllm import to_vllm
from dfrot.system.errors import UserError

EXPORTERS: dict[str, Callable[..., list[str]]] = {"huggingface": to_huggingface, "vllm": to_vllm, "gguf": to_gguf}
# Word of `export` → the engine that it is for, and the command line's option.
_TAKEN_BY = {
    "device": ("vllm", "--device"),
    "plugin": ("vllm", "--plugin"),
    "tensor_parallel": ("vllm", "--tensor-parallel"),
    "kind": ("gguf", "--type"),
}


def export(
    checkpoint: str | Path,
    to: str,
    out: str | Path,
    *,
    device: str | None = None,
    plugin: bool | None = None,
    tensor_parallel: int | None = None,
    kind: str | None = None,
) -> list[str]:
    """Write a checkpoint for another engine.

    Args:
        checkpoint: a directory that `dfrot.quantize` wrote.
        to: huggingface, vllm or gguf.
        out: what to make, a directory or for gguf a file; it must not be there, or be empty.
        device: vllm: where it is to run, cpu (default) or cuda.
        plugin: vllm: whether dfrot's plugin is to be there (default: no).
        tensor_parallel: vllm: GPUs that every layer is split among (default 1).
        kind: gguf: type of the weights, f16, bf16, f32, q8_0 or q4_0 (default: that which keeps them, else f16).

    Returns:
        Sentences: what is otherwise there than in dfrot's runtime.

    Raises:
        UserError: the engine would run it wrongly; something is in the way.
        SetupError: it cannot be written.
    """
    if to not in EXPORTERS:
        raise UserError(f"there is no export to '{to}'. Engines: {', '.join(EXPORTERS)}.")
    given = {"device": device, "plugin": plugin, "tensor_parallel": tensor_parallel, "kind": kind}
    words = {name: value for name, value in given.items() if value is not None}
    for name in words:
        engine, option = _TAKEN_BY[name]
        if engine != to:
            raise UserError(f"{option} is for {engine}, and means nothing to {to}. Leave it out.")
    return EXPORTERS[to](Checkpoint.open(Path(checkpoint)), Path(out).expanduser(), **words)
