"""Zero-shot tasks through lm-eval, on a model that is loaded already.

Tasks, prompts and metrics are lm-eval's own. What is added is how large a batch is where no memory can run out in a way
that could be caught, and which of a task's metrics the papers report: acc_norm where it is defined, else acc.
"""

import contextlib
import io
import logging
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

from dfrot.evaluation.record import AVERAGE, REPORTED
from dfrot.system.errors import SetupError, UserError

_BATCH_TOKENS = 2048  # of a batch on a CPU; more are no faster there, and their logits take gigabytes


class Scores(NamedTuple):
    """Results of some tasks.

    Attributes:
        metrics: "<metric>/<task>" for every metric of every task or group that was asked for; with two or more, also
            `zero_shot_average`, the mean of what `REPORTED` picks for each.
        standard_errors: of those that have one.
        examples: how many each task was measured on.
    """

    metrics: dict[str, float]
    standard_errors: dict[str, float]
    examples: dict[str, int]


def zero_shot(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    task_path: Path | None = None,
    limit: int | None = None,
    batch_size: int | None = None,
) -> Scores:
    """Measure a model of transformers on tasks or groups of lm-eval.

    Args:
        task_path: a folder with further tasks.
        limit: take the first so many examples of each task.
        batch_size: sequences at a time; None chooses.

    Raises:
        UserError: there is no such task.
        SetupError: lm-eval is not installed, or a task's data cannot be had.
    """
    try:
        with _quiet():
            from lm_eval import evaluator
            from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise SetupError("zero-shot tasks need the package lm-eval: pip install 'dfrot[eval]'.") from error
    if limit is not None and limit < 1:
        raise UserError(f"limit is at least 1 example, got {limit}.")
    if task_path is not None and not task_path.is_dir():
        raise UserError(f"there is no folder of tasks '{task_path}'.")
    with _quiet():
        manager = TaskManager(include_path=None if task_path is None else str(task_path))
        if unknown := [task for task in tasks if task not in manager.all_tasks]:
            raise UserError(
                f"lm-eval has no task '{unknown[0]}'. `lm-eval ls tasks` lists them; --task-path adds others."
            )
        wrapped = _wrapped(model, tokenizer, batch_size)
        # it would gather what is installed, which takes seconds, and ask git, which complains outside of a repository
        bare = mock.patch.multiple(evaluator, add_env_info=lambda results: None, get_git_commit_hash=lambda: None)
        try:
            with bare:
                found = evaluator.simple_evaluate(
                    wrapped,
                    tasks=list(tasks),
                    task_manager=manager,
                    limit=limit,
                    log_samples=False,
                    bootstrap_iters=100,
                )
        except (OSError, ConnectionError, ValueError) as error:  # datasets' own errors are some of these
            raise SetupError(f"lm-eval cannot run {', '.join(tasks)}: {error}") from error
    assert found is not None, "only other processes than the first get None"
    return scores(found, tasks)


def scores(found: dict[str, Any], tasks: Sequence[str]) -> Scores:
    """From what lm-eval's `simple_evaluate` returns."""
    metrics: dict[str, float] = {}
    errors: dict[str, float] = {}
    for task in tasks:
        for key, value in found["results"][task].items():
            name, _, kept = key.partition(",")
            if kept != "none" or not isinstance(value, float):
                continue
            if name.endswith("_stderr"):
                errors[f"{name.removesuffix('_stderr')}/{task}"] = value
            else:
                metrics[f"{name}/{task}"] = value
    reported = [
        next((metrics[f"{name}/{task}"] for name in REPORTED if f"{name}/{task}" in metrics), None) for task in tasks
    ]
    if len(tasks) > 1 and None not in reported:
        metrics[AVERAGE] = sum(reported) / len(reported)  # type: ignore[arg-type]
    examples = {task: int(counts["effective"]) for task, counts in found["n-samples"].items()}
    return Scores(metrics, errors, examples)


def _wrapped(model: Any, tokenizer: Any, batch_size: int | None) -> Any:
    from lm_eval.models.huggingface import HFLM

    class Wrapped(HFLM):
        """lm-eval's own model, with batches that fit a CPU."""

        def _detect_batch_size(self, requests: Sequence[Any] | None = None, pos: int = 0) -> int:
            if model.device.type != "cpu":
                return super()._detect_batch_size(requests, pos)
            length = self.max_length
            if requests:
                _, context, continuation = requests[pos]  # the longest that is left
                length = min(length, len(context) + len(continuation))
            return max(1, _BATCH_TOKENS // length)

    return Wrapped(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch_size or "auto")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """lm-eval and datasets speak of much that concerns their developers; their bars are for a terminal."""
    loggers = [logging.getLogger(name) for name in ("lm_eval", "datasets", "transformers")]
    levels = [logger.level for logger in loggers]
    with contextlib.ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        if not sys.stderr.isatty():
            stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
        for logger, level in zip(loggers, levels, strict=True):
            stack.callback(logger.setLevel, level)
            logger.setLevel(logging.ERROR)
        yield
