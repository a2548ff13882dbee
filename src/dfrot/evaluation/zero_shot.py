"""Zero-shot tasks through lm-eval, on a model that is loaded already.

Tasks, prompts and metrics are lm-eval's own. dfrot adds two things: a batch size that fits a CPU, where running out of
memory cannot be caught, and the choice of the metric that papers report, acc_norm where a task defines it, else acc.
"""

import contextlib
import io
import logging
import random
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import transformers

from dfrot.evaluation.perplexity import checked
from dfrot.evaluation.record import AVERAGE, REPORTED
from dfrot.system.errors import SetupError, UserError

_BATCH_TOKENS = 2048  # of a batch on a CPU; more are no faster there, and their logits take gigabytes


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence what lm-eval and datasets tell their developers; their bars are for a terminal."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings(action="ignore"))
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        if not sys.stderr.isatty():
            stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
        for logger in map(logging.getLogger, ("lm_eval", "datasets", "transformers")):
            stack.callback(logger.setLevel, logger.level)
            logger.setLevel(logging.ERROR)
        yield


@_quiet()
def find_tasks(tasks: Sequence[str], task_path: str | None = None) -> Any:
    """lm-eval's `TaskManager`, which knows all of these tasks, groups or tags.

    Args:
        task_path: a folder with further tasks.

    Raises:
        UserError: there is no such task or folder.
        SetupError: lm-eval is not installed.
    """
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise SetupError("zero-shot tasks need the package lm-eval: pip install 'dfrot[eval]'.") from error
    if task_path is not None and not Path(task_path).is_dir():
        raise UserError(f"there is no folder of tasks '{task_path}'.")
    manager = TaskManager(include_path=task_path)
    if unknown := [task for task in tasks if task not in manager.all_tasks]:
        raise UserError(f"lm-eval has no task '{unknown[0]}'. `lm-eval ls tasks` lists them; --task-path adds others.")
    return manager


def zero_shot(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[str],
    manager: Any,
    limit: int | None = None,
    batch_size: int | None = None,
) -> tuple[dict[str, float], dict[str, Any]]:
    """Measure a model of transformers on tasks, groups or tags of lm-eval.

    Args:
        manager: of `find_tasks`.
        limit: take the first so many examples of each task.
        batch_size: sequences at a time; None chooses.

    Returns:
        Metrics, as `scores` names them, and their conditions: `standard_errors` of those that have one, and `examples`,
        how many each task was measured on.

    Raises:
        UserError: the model takes no token of a task or computes NaN, as `checked` says.
        SetupError: a task's data, or a package that it needs, cannot be had.
    """
    with _quiet():
        found, leaves = _evaluated(model, tokenizer, tasks, manager, limit, batch_size)
    return scores(found, leaves)


def _evaluated(
    model: Any, tokenizer: Any, tasks: Sequence[str], manager: Any, limit: int | None, batch_size: int | None
) -> tuple[Any, dict[str, list[str]]]:
    """What lm-eval's `evaluate` returns, and the tasks that make up each of those asked for."""
    from lm_eval import evaluator
    from lm_eval.models.huggingface import HFLM

    class FittingCPU(HFLM):
        """lm-eval's own model, with batches that fit a CPU."""

        def _detect_batch_size(self, requests: Sequence[Any] | None = None, pos: int = 0) -> int:
            if model.device.type != "cpu":
                return super()._detect_batch_size(requests, pos)
            length = self.max_length
            if requests:
                _, context, continuation = requests[pos]  # the longest that is left
                length = min(length, len(context) + len(continuation))
            return max(1, _BATCH_TOKENS // length)

    wrapped = FittingCPU(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch_size or "auto")
    try:
        loaded, leaves = _loaded(manager, tasks)
        with checked(model):
            found = evaluator.evaluate(wrapped, loaded, limit=limit, log_samples=False, bootstrap_iters=100)
    except UserError:
        raise
    except (OSError, ValueError, ImportError) as error:  # datasets' own errors are some of these
        raise SetupError(f"lm-eval cannot run {', '.join(tasks)}: {error}") from error
    assert found is not None, "only other processes than the first get None"
    return found, leaves


def _loaded(manager: Any, tasks: Sequence[str]) -> tuple[Any, dict[str, list[str]]]:
    """The tasks for `evaluate`, prepared as `simple_evaluate` prepares them: its seeds, no examples in the prompt
    unless a task says so. `simple_evaluate` itself also lists all that is installed, which takes seconds, and asks git
    for a commit, which complains outside of a repository. And which tasks each of those asked for consists of."""
    from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED

    transformers.set_seed(DEFAULT_OTHER_SEED)
    random.seed(DEFAULT_RANDOM_SEED)  # some tasks shuffle their choices while they load
    loaded: dict[str, Any] = {"tasks": {}, "groups": {}, "group_map": {}}
    leaves = {}
    for asked in tasks:
        part = manager.load([asked])
        leaves[asked] = list(part["tasks"])
        for kind, whole in loaded.items():
            whole |= part[kind]
    for task in loaded["tasks"].values():
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)
    return loaded, leaves


def scores(found: dict[str, Any], leaves: Mapping[str, Sequence[str]]) -> tuple[dict[str, float], dict[str, Any]]:
    """What `zero_shot` returns, from the results of lm-eval's `evaluate`.

    A metric is called "<metric>/<task>", or "<metric>@<filter>/<task>" where a task reads answers in more than one way
    and this is not the plain one. Groups without a metric of their own, and tags, stand for their tasks.
    `zero_shot_average` is the mean of the metrics that `REPORTED` picks, of two or more tasks that all have one.

    Args:
        leaves: the tasks that make up each task, group or tag that was asked for.
    """
    metrics: dict[str, float] = {}
    errors: dict[str, float] = {}
    tasks: list[str] = []
    for asked, inside in leaves.items():
        tasks += [asked] if _numbers(found, asked) else inside
    tasks = list(dict.fromkeys(tasks))
    for task in tasks:
        numbers = _numbers(found, task)
        if not numbers:
            warnings.warn(f"lm-eval's task '{task}' has no metric that is a number.", stacklevel=2)
        filters = {kept for _, kept in numbers}
        for (name, kept), value in numbers.items():
            way = "" if kept == "none" or len(filters) == 1 else f"@{kept}"
            into = errors if name.endswith("_stderr") else metrics
            into[f"{name.removesuffix('_stderr')}{way}/{task}"] = value
    names = [[f"{name}/{task}" for name in REPORTED if f"{name}/{task}" in metrics] for task in tasks]
    if len(tasks) > 1 and all(names):
        metrics[AVERAGE] = sum(metrics[first] for first, *_ in names) / len(names)
    examples = {task: int(counts["effective"]) for task, counts in found["n-samples"].items()}
    return metrics, {"standard_errors": errors, "examples": examples}


def _numbers(found: Mapping[str, Any], task: str) -> dict[tuple[str, str], float]:
    """By metric and filter, which is "none" where answers are taken as they are."""
    results = {key: value for key, value in found["results"].get(task, {}).items() if "," in key}
    return {tuple(key.split(",", 1)): value for key, value in results.items() if isinstance(value, int | float)}
