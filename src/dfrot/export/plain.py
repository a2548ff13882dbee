"""Plain Hugging Face weights, for those who go on with a tool of their own: any transformers loads them without dfrot.

Rotations that are folded stay; integers become what they stand for. What happens while the model runs is not there:
activations and the cache are not quantized, and a checkpoint that rotates online is refused.
"""

from pathlib import Path

from dfrot.export.checkpoint import Checkpoint
from dfrot.export.directory import write_directory


def to_huggingface(checkpoint: Checkpoint, out: Path) -> list[str]:
    """Write the model that a checkpoint stands for, in the dtype that it computes in.

    Returns:
        What is otherwise than in dfrot's runtime.

    Raises:
        UserError: the checkpoint rotates online; something is in the way.
        SetupError: it cannot be written.
    """
    checkpoint.require_folded("transformers")
    config = {name: value for name, value in checkpoint.record.items() if name != "quantization_config"}
    write_directory(checkpoint, out, lambda _, layer: {"weight": layer.weight.to(checkpoint.dtype)}, config)
    return checkpoint.lost("transformers", ("activations", "keys"))
