"""One rotated, quantized checkpoint for the engines that people run."""

from collections.abc import Callable
from pathlib import Path

from dfrot.errors import UserError
from dfrot.export.checkpoint import Checkpoint
from dfrot.export.gguf import to_gguf
from dfrot.export.huggingface import to_huggingface

EXPORTERS: dict[str, Callable[..., list[str]]] = {"huggingface": to_huggingface, "gguf": to_gguf}


def export(checkpoint: str | Path, to: str, out: str | Path, kind: str | None = None) -> list[str]:
    """Write a checkpoint for another engine.

    Args:
        checkpoint: a directory that `dfrot.quantize` wrote.
        to: huggingface, gguf.
        out: what to make, a directory or for gguf a file; it must not be there, or be empty.
        kind: gguf: type of the weights, f16, bf16, f32, q8_0 or q4_0 (default: that which keeps them, else f16).

    Returns:
        Sentences: what is otherwise there than in dfrot's runtime.

    Raises:
        UserError: the engine would run it wrongly; something is in the way.
        EnvironmentFault: it cannot be written.
    """
    if kind is not None and to != "gguf":
        raise UserError(f"--type is the type of weights in a GGUF file, and --to {to} has none. Leave it out.")
    words = {} if kind is None else {"kind": kind}
    return EXPORTERS[to](Checkpoint.open(Path(checkpoint)), Path(out).expanduser(), **words)
