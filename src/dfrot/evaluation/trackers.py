"""Result records to an experiment tracker, through the trackers of accelerate."""

from collections.abc import Iterable, Mapping
from typing import Any

from dfrot.evaluation.record import Record
from dfrot.system.errors import SetupError, UserError

PROJECT = "dfrot"


def log_records(records: Iterable[Record], tracker: str) -> None:
    """Log records to a tracker that accelerate knows, one step each.

    Args:
        tracker: wandb, trackio, mlflow, tensorboard, ….

    Raises:
        UserError: accelerate knows no such tracker.
        SetupError: accelerate or the tracker's package is not installed, or the tracker refuses.
    """
    try:
        from accelerate import PartialState
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
    except ImportError as error:
        raise SetupError("logging to a tracker needs the package accelerate: pip install accelerate.") from error
    if tracker not in LOGGER_TYPE_TO_CLASS:
        raise UserError(f"there is no tracker '{tracker}'. Trackers: {', '.join(sorted(LOGGER_TYPE_TO_CLASS))}.")
    if tracker not in map(str, get_available_trackers()):
        raise SetupError(f"the package of the tracker '{tracker}' is not installed: pip install {tracker}.")
    PartialState()  # accelerate's trackers ask it which process they are in
    kind = LOGGER_TYPE_TO_CLASS[tracker]
    try:
        logger = kind(PROJECT, logging_dir=".") if kind.requires_logging_directory else kind(PROJECT)
        logger.start()
        for step, record in enumerate(records):
            if step == 0:
                logger.store_init_configuration(_flat({"model": record.model, **record.conditions}))
            logger.log(record.metrics | _flat(record.recipe or {}, "recipe/"), step=step)
        logger.finish()
    except Exception as error:  # every tracker raises its own kinds
        raise SetupError(f"{tracker} refused the results: {error}") from error


def _flat(record: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """One level, the only form that some trackers take."""
    flat: dict[str, Any] = {}
    for name, value in record.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{name}/")
        elif value is not None:
            flat[prefix + name] = value
    return flat
