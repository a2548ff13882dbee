"""One rotated, quantized checkpoint for the engines that people run."""

from collections.abc import Callable
from pathlib import Path

from dfrot.export.checkpoint import Checkpoint
from dfrot.export.huggingface import to_huggingface

EXPORTERS: dict[str, Callable[[Checkpoint, Path], list[str]]] = {"huggingface": to_huggingface}


def export(checkpoint: str | Path, to: str, out: str | Path) -> list[str]:
    """Write a checkpoint for another engine.

    Args:
        checkpoint: a directory that `dfrot.quantize` wrote.
        to: huggingface.
        out: what to make; it must not be there, or be empty.

    Returns:
        Sentences: what is otherwise there than in dfrot's runtime.

    Raises:
        UserError: the engine would run it wrongly; something is in the way.
        EnvironmentFault: it cannot be written.
    """
    return EXPORTERS[to](Checkpoint.open(Path(checkpoint)), Path(out).expanduser())
