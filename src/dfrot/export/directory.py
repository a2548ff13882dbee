"""Model directories in transformers' layout: plain weights, and the writer that vllm.py shares.

Plain weights are for tools that know nothing of dfrot: folded rotations stay in them, integers become floats. What
happens while the model runs (online rotations, quantized activations, the quantized cache) cannot be written.
"""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from dfrot.export.checkpoint import Checkpoint, Layer
from dfrot.models.source import INDEX_FILE, load_tokenizer
from dfrot.system.errors import UserError
from dfrot.system.files import LOCK_FILE, exclusive_lock, translate_io_errors, write_json, write_tensors
from dfrot.system.progress import track

Weight = Callable[[str, Layer], dict[str, Tensor]]


def to_huggingface(checkpoint: Checkpoint, out: Path) -> list[str]:
    """Write the dequantized model in the checkpoint's dtype. Returns and errors are those of `export`."""
    checkpoint.require_folded("transformers")
    config = {name: value for name, value in checkpoint.config.to_dict().items() if name != "quantization_config"}
    write_directory(checkpoint, out, lambda _, layer: {"weight": layer.weight.to(checkpoint.config.dtype)}, config)
    return list(checkpoint.lost("transformers", "activations", "keys"))


def write_directory(checkpoint: Checkpoint, out: Path, weight: Weight, config: dict[str, Any]) -> None:
    """Write safetensors shards, their index, the tokenizer and, last, config.json: without it there is no model.

    Args:
        weight: name and contents of a linear layer → its tensors but for the bias. All other tensors are copied.

    Raises:
        UserError: `out` is not empty.
        SetupError: `out` cannot be written.
    """
    count = checkpoint.config.num_hidden_layers + 1
    weight_map: dict[str, str] = {}
    total = 0
    with exclusive_lock(out), _emptied_unless_finished(out):
        for number, tensors in enumerate(track(_shards(checkpoint, weight), "exporting", count), start=1):
            file = out / f"model-{number:05}-of-{count:05}.safetensors"
            write_tensors(file, tensors, {"format": "pt"})
            weight_map |= dict.fromkeys(tensors, file.name)
            total += sum(tensor.nbytes for tensor in tensors.values())
        write_json(out / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": weight_map})
        with translate_io_errors(out):
            load_tokenizer(checkpoint.path).save_pretrained(out)
            if (settings := checkpoint.path / "generation_config.json").is_file():
                shutil.copyfile(settings, out / settings.name)
        write_json(out / "config.json", config)


def _shards(checkpoint: Checkpoint, weight: Weight) -> Iterator[dict[str, Tensor]]:
    """Embedding, last norm and head; then block by block."""
    yield checkpoint.ends()
    for index in range(checkpoint.config.num_hidden_layers):
        tensors = checkpoint.others(index)
        for linear in checkpoint.graph.linears:
            layer = checkpoint.layer(index, linear)
            parts = weight(linear, layer) | ({} if layer.bias is None else {"bias": layer.bias})
            tensors |= {f"{linear}.{name}": tensor for name, tensor in parts.items()}
        yield {f"{checkpoint.graph.blocks}.{index}.{name}": tensor for name, tensor in tensors.items()}


@contextmanager
def _emptied_unless_finished(out: Path) -> Iterator[None]:
    """Raise UserError unless a directory is empty; empty it again after an error or Ctrl-C."""
    if found := sorted(file.name for file in out.iterdir() if file.name != LOCK_FILE):
        raise UserError(f"{out} is not empty ({found[0]}); nothing there is touched. Choose another -o directory.")
    try:
        yield
    except BaseException:
        for file in out.iterdir():
            if file.name != LOCK_FILE:
                file.unlink()
        raise
