"""Writing an exported model so that an unfinished one never looks finished."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from dfrot.checkpoint.writer import INDEX_FILE
from dfrot.export.checkpoint import Checkpoint, Layer
from dfrot.system.errors import SetupError, UserError
from dfrot.system.files import write_json, write_tensors
from dfrot.system.lock import LOCK_FILE, exclusive_lock
from dfrot.system.progress import track


def write_directory(
    checkpoint: Checkpoint, out: Path, weight: Callable[[str, Layer], dict[str, Tensor]], config: dict[str, Any]
) -> None:
    """Write a directory in the layout of transformers: safetensors shards, an index, the tokenizer, config.json last.

    Args:
        weight: what is kept of the linear layer of a name beside its bias; everything else is kept as it is.

    Raises:
        UserError: something is in the way.
        SetupError: it cannot be written.
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
        try:
            checkpoint.tokenizer().save_pretrained(out)
            if (settings := checkpoint.path / "generation_config.json").is_file():
                shutil.copyfile(settings, out / settings.name)
        except OSError as error:
            raise SetupError(f"cannot write the tokenizer to {out}: {error}") from error
        write_json(out / "config.json", config)


def _shards(checkpoint: Checkpoint, weight: Callable[[str, Layer], dict[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
    """The ends, and then every block."""
    yield checkpoint.ends()
    for index in range(checkpoint.config.num_hidden_layers):
        tensors = checkpoint.others(index)
        for linear in checkpoint.graph.linears:
            layer = checkpoint.layer(index, linear)
            kept = weight(linear, layer) | ({} if layer.bias is None else {"bias": layer.bias})
            tensors |= {f"{linear}.{name}": tensor for name, tensor in kept.items()}
        yield {f"{checkpoint.graph.blocks}.{index}.{name}": tensor for name, tensor in tensors.items()}


@contextmanager
def _emptied_unless_finished(out: Path) -> Iterator[None]:
    """Raise UserError if something is in a directory; what is there after an error or Ctrl-C is removed."""
    if found := _contents(out):
        raise UserError(f"{out} is not empty ({found[0].name}); nothing there is touched. Choose another -o directory.")
    try:
        yield
    except BaseException:
        for file in _contents(out):
            file.unlink()
        raise


def _contents(out: Path) -> list[Path]:
    return sorted(file for file in out.iterdir() if file.name != LOCK_FILE)
