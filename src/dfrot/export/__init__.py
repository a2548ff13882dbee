"""One rotated, quantized checkpoint for the engines that people run."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from dfrot.export.checkpoint import Checkpoint, to_huggingface
from dfrot.export.gguf_file import to_gguf
from dfrot.export.vllm import to_vllm
from dfrot.system.errors import UserError

EXPORTERS: dict[str, Callable[..., list[str]]] = {"huggingface": to_huggingface, "vllm": to_vllm, "gguf": to_gguf}
_ONLY_FOR = {"device": "vllm", "plugin": "vllm", "tensor_parallel": "vllm", "kind": "gguf"}  # option → engine


def export(checkpoint: str | Path, to: str, out: str | Path, **options: Any) -> list[str]:
    """Write a checkpoint for another engine.

    Args:
        checkpoint: a directory that `dfrot.quantize` wrote.
        to: huggingface, vllm or gguf.
        out: a directory that does not exist or is empty; for gguf a file that does not exist.
        options: of `to_vllm` (device, plugin, tensor_parallel) or `to_gguf` (kind); None means not given.

    Returns:
        Sentences on how the engine will differ from dfrot's runtime.

    Raises:
        UserError: the engine would compute something else; an option is for another engine; `out` is in the way.
        SetupError: `out` cannot be written.
    """
    if to not in EXPORTERS:
        raise UserError(f"there is no export to '{to}'. Engines: {', '.join(EXPORTERS)}.")
    given = {name: value for name, value in options.items() if value is not None}
    for name in given:
        if (engine := _ONLY_FOR.get(name, to)) != to:
            option = "type" if name == "kind" else name.replace("_", "-")
            raise UserError(f"--{option} is for {engine}, and means nothing to {to}. Leave it out.")
    opened = Checkpoint.open(Path(checkpoint))
    opened.refuse_offsets()
    opened.ask_for_biases()
    return EXPORTERS[to](opened, Path(out).expanduser(), **given)
