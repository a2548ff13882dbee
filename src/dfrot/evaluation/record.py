"""The result record: numbers and everything they depend on, as one line of JSON (docs/reference/records.md).

Records are kept in files, and logged to experiment trackers through accelerate.
"""

import importlib.metadata
import json
import os
import platform
import reprlib
import resource
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers.utils.generic import flatten_dict

from dfrot.checkpoint.load import read_checkpoint
from dfrot.kernels.library import backend
from dfrot.models.graph import head_dim, kv_heads
from dfrot.models.multimodal import LanguageModel, read_language_model
from dfrot.models.texts import NAMED
from dfrot.quant.packing import packed_width
from dfrot.quant.spec import UNQUANTIZED, TensorSpec
from dfrot.system.errors import SetupError, UserError
from dfrot.system.files import parse_json, translate_io_errors
from dfrot.version import __version__

SCHEMA = 1
RESULTS_FILE = "results.jsonl"
MASSIVE_UNQUANTIZED = "ppl_massive_unquantized"  # of a text: perplexity with massive tokens left unquantized
AVERAGE = "zero_shot_average"  # of what `REPORTED` picks for each task
REPORTED = ("acc_norm", "acc")  # the first that a task has is what papers report
_QPARAM_BYTES = 3  # of one head of one token in a quantized cache: a bfloat16 scale and a byte of zero point


def peak_rss_bytes() -> int:
    """The most memory that this process has had resident."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


@dataclass
class Record:
    """One evaluated model."""

    model: str  # how the user called it
    recipe: dict[str, Any] | None  # as JSON; None for a model that is not quantized
    metrics: dict[str, float]  # "ppl/<text>", "<metric>/<task>" and the like
    size: dict[str, int | float]  # bytes; see `model_size`
    timings_s: dict[str, float]  # seconds per stage
    conditions: dict[str, Any]  # text, tokens, seq_len, seed, device, dtype, threads and versions
    schema: int = SCHEMA
    peak_rss_bytes: int = field(default_factory=peak_rss_bytes)

    @staticmethod
    def from_json(record: Any) -> "Record":
        """Raises UserError if it is no record, or has another schema."""
        if not isinstance(record, dict) or record.get("schema") != SCHEMA:
            given = record.get("schema") if isinstance(record, dict) else record
            raise UserError(f"a result record has schema {SCHEMA}, got {given!r}.")
        record = {"peak_rss_bytes": 0, **record}
        for name, (holds, rule) in _FORM.items():
            if not holds(record.get(name)):
                raise UserError(f"the {name} of a result record {rule}, got {reprlib.repr(record.get(name))}.")
        try:
            return Record(**record)
        except TypeError as error:
            raise UserError(f"this is not a result record: {error}") from error


def text_label(name: str) -> str:
    """The name of a text in results: its own, or that of its file."""
    return name if name in NAMED else Path(name).name


def is_number(value: Any) -> bool:
    """Whether this is a number that a float can hold, infinite or not."""
    return isinstance(value, float) or (type(value) is int and abs(value) < 2**1023)


# By field, a check of what readers rely on and its wording: anyone may have written the file.
_FORM: dict[str, tuple[Callable[[Any], bool], str]] = {
    "model": (lambda value: isinstance(value, str), "is a text"),
    "recipe": (lambda value: isinstance(value, dict | None), "is an object or null"),
    **dict.fromkeys(
        ("metrics", "size", "timings_s"),
        (lambda value: isinstance(value, dict) and all(map(is_number, value.values())), "are an object of numbers"),
    ),
    "conditions": (lambda value: isinstance(value, dict), "are an object"),
    "peak_rss_bytes": (is_number, "is a number"),
}


def reported(metrics: Iterable[str]) -> list[str]:
    """Of the metrics of each task, the one that papers report; all metrics that are not of tasks."""
    found = list(metrics)
    tasks = {metric.partition("/")[2] for metric in found if metric.startswith(("acc/", "acc_norm/"))}
    kept = {next(f"{name}/{task}" for name in REPORTED if f"{name}/{task}" in found) for task in tasks}
    return [metric for metric in found if metric.partition("/")[2] not in tasks or metric in kept]


def append_records(path: Path, records: list[Record]) -> None:
    """Append records to a `.jsonl` file, one line each, durably. Raises SetupError if it cannot be written."""
    with translate_io_errors(path.parent), path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(vars(record)) + "\n" for record in records)
        file.flush()
        os.fsync(file.fileno())


def read_records(path: Path, *, repair: bool = False) -> list[Record]:
    """The records of a `.jsonl` file; none if it is not there. A last line without its newline is left out: the process
    that wrote it was killed.

    Args:
        repair: also cut that line off the file, so that others can be appended.

    Raises:
        UserError: another line is no record.
    """
    if not path.is_file():
        return []
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if repair and len(whole) < len(content):
        with path.open("rb+") as file:
            file.truncate(len(whole))
    records = []
    for number, line in enumerate(whole.splitlines(), start=1):
        try:
            records.append(Record.from_json(parse_json(line)))
        except ValueError as error:  # a UserError is a ValueError
            raise UserError(
                f"{path}, line {number}: not a result record: {error} Remove that line, or run `dfrot compare` again."
            ) from error
    return records


def tracker_class(tracker: str) -> Any:
    """The class of accelerate's for a tracker, such as wandb.

    Raises:
        UserError: accelerate knows no such tracker.
        SetupError: accelerate or the tracker's package is not installed.
    """
    try:
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
    except ImportError as error:
        raise SetupError("logging to a tracker needs the package accelerate: pip install accelerate.") from error
    if tracker not in LOGGER_TYPE_TO_CLASS:
        raise UserError(f"there is no tracker '{tracker}'. Trackers: {', '.join(sorted(LOGGER_TYPE_TO_CLASS))}.")
    if tracker not in map(str, get_available_trackers()):
        raise SetupError(f"the package of the tracker '{tracker}' is not installed: pip install {tracker}.")
    return LOGGER_TYPE_TO_CLASS[tracker]


def log_records(records: Iterable[Record], tracker: str) -> None:
    """Log records to a tracker that accelerate knows (wandb, trackio, mlflow, tensorboard, …), one step each.

    Raises what `tracker_class` raises; SetupError if the tracker refuses.
    """
    kind = tracker_class(tracker)
    from accelerate import PartialState

    PartialState()  # accelerate's trackers ask it which process they are in
    try:
        logger = kind("dfrot", logging_dir=".") if kind.requires_logging_directory else kind("dfrot")
        logger.start()
        for step, record in enumerate(records):
            if step == 0:
                logger.store_init_configuration(_flat({"model": record.model, **record.conditions}))
            logger.log(record.metrics | _flat({"recipe": record.recipe}), step=step)
        logger.finish()
    except Exception as error:  # every tracker raises its own kinds
        raise SetupError(f"{tracker} refused the results: {error}") from error


def _flat(record: dict[str, Any]) -> dict[str, Any]:
    """One level without blanks, the only form that some trackers take."""
    return {name: value for name, value in flatten_dict(record, delimiter="/").items() if value not in (None, {})}


def conditions(model: Any, **measured: Any) -> dict[str, Any]:
    """The conditions of a measurement, beside those that were `measured`.

    Args:
        model: a loaded model, or a tensor, with the device and dtype of the computation.
    """
    spread = getattr(model, "hf_device_map", None)
    return {
        **measured,
        "device": ", ".join(sorted(set(map(str, spread.values())))) if spread else str(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "backend": backend(),
        "machine": f"{platform.system()} {platform.machine()}",
        "dfrot": __version__,
        "commit": _commit(),
        "torch": torch.__version__,
        "transformers": importlib.metadata.version("transformers"),
    }


def _commit() -> str | None:
    """The commit of the source tree that dfrot runs from, if it runs from one."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short=12", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):  # no git, no repository
        return None


def model_size(path: Path, model: LanguageModel | None = None) -> dict[str, int | float]:
    """Bytes of a model directory, as `model` describes it if its weights are still to come.

    Returns:
        weight_bytes: all tensors on disk.
        decoder_bits_per_weight: bits on disk per weight of the decoder's linear layers, scales included.
        unquantized_bytes: the model that it was made from, at 16 bits.
        kv_bytes_per_token: keys and values of one token in all layers.
        unquantized_kv_bytes_per_token: the same at 16 bits.
    """
    checkpoint, model = read_checkpoint(path), model or read_language_model(path)
    config = model.config
    spec, blocks = checkpoint.runtime.spec if checkpoint else None, range(config.num_hidden_layers)
    cached = [checkpoint.runtime.heads(block).keys if checkpoint else UNQUANTIZED for block in blocks]
    total = entries = decoder_bytes = decoder_weights = 0
    for name, tensor in model.stored.items():
        total += tensor.nbytes
        entries += tensor.shape.numel()
        if ".layers." in name and len(tensor.shape) == 2:  # a weight, or the codes, scales and zero points of one
            decoder_bytes += tensor.nbytes
            if name.endswith(".qweight"):
                assert spec is not None, "only quantized checkpoints have packed weights"
                decoder_weights += tensor.shape.numel() * 8 // spec.weights.bits
            elif name.endswith(".weight"):
                decoder_weights += tensor.shape.numel()
    return {
        "weight_bytes": total,
        "decoder_bits_per_weight": 8 * decoder_bytes / decoder_weights,
        "unquantized_bytes": checkpoint.unquantized_bytes if checkpoint else 2 * entries,
        "kv_bytes_per_token": kv_bytes_per_token(config, cached),
        "unquantized_kv_bytes_per_token": kv_bytes_per_token(config, [UNQUANTIZED for _ in blocks]),
    }


def kv_bytes_per_token(config: Any, grids: Iterable[TensorSpec]) -> int:
    """Bytes that keys and values of one token take in the cache, without its position, from the grid of each block."""
    size = head_dim(config)
    heads = (packed_width(size, grid.bits) + _QPARAM_BYTES if grid.enabled else 2 * size for grid in grids)
    return 2 * kv_heads(config) * sum(heads)
