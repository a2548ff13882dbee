"""One rotated, quantized checkpoint for the engines that people run."""

from pathlib import Path

from dfrot.errors import UserError
from dfrot.export.checkpoint import Checkpoint
from dfrot.export.huggingface import to_huggingface
from dfrot.export.vllm import to_vllm

ENGINES = ("huggingface", "vllm")


def export(checkpoint: str | Path, to: str, out: str | Path, *, device: str = "cpu") -> list[str]:
    """Write a checkpoint for another engine.

    Args:
        checkpoint: a directory that `dfrot.quantize` wrote.
        to: huggingface or vllm.
        out: what to make; it must not be there, or be empty.
        device: where vLLM is to run: cpu or cuda.

    Returns:
        Sentences: what is otherwise there than in dfrot's runtime.

    Raises:
        UserError: the engine would run it wrongly; something is in the way.
        EnvironmentFault: it cannot be written.
    """
    if to not in ENGINES:
        raise UserError(f"there is no export to '{to}'. Engines: {', '.join(ENGINES)}.")
    opened, out = Checkpoint.open(Path(checkpoint)), Path(out).expanduser()
    return to_vllm(opened, out, device) if to == "vllm" else to_huggingface(opened, out)
