"""Which recipe suits a model: trials are quantized, measured and recorded.

A trial is a recipe (or none: the unquantized model) and a measurement. Finished trials are lines of results.jsonl,
which this process alone writes, as they finish; a comparison that was killed continues, even in the middle of a trial.
Trials that share their rotations form a group and follow one another, so that they can reuse each other's work
(checkpoint/writer.py); groups run side by side in separate processes, here or on a Ray cluster.
"""

import contextlib
import hashlib
import json
import logging
import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from dfrot.compare.published import published
from dfrot.evaluation.record import RESULTS_FILE, Record, append_records, read_records
from dfrot.evaluation.run import Measurement, evaluate
from dfrot.models.source import open_source
from dfrot.pipeline.recipe import Recipe
from dfrot.pipeline.run import quantize
from dfrot.system.errors import SetupError, UserError
from dfrot.system.files import exclusive_lock
from dfrot.system.memory import available_memory, keep_freed_memory
from dfrot.system.progress import console
from dfrot.version import __version__


@dataclass(frozen=True)
class Trial:
    """One recipe, to be measured."""

    model: str  # how the user called it
    fingerprint: str  # of its files
    recipe: Recipe | None  # None for the unquantized model
    measurement: Measurement
    device: str
    threads: int  # that torch computes with; they decide how sums are rounded
    memory: int | None = None  # bytes that quantizing may take; no measured number depends on them

    @property
    def key(self) -> str:
        """16 hexadecimal digits that differ between trials that differ, or are of different versions of dfrot."""
        parts = {**asdict(self), "recipe": self.recipe and self.recipe.to_json(), "dfrot": __version__}
        del parts["memory"]
        if not self.measurement.massive_unquantized:  # came later: trials without it keep their keys
            del parts["measurement"]["massive_unquantized"]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def checkpoint_key(self) -> str:
        """16 hexadecimal digits that differ where the trial's checkpoint may."""
        parts = [self.recipe and self.recipe.digest, self.device, self.threads, __version__]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]

    @property
    def group(self) -> str:
        """Equal for trials that have their rotations in common."""
        recipe = {} if self.recipe is None else self.recipe.to_json()
        alike = [recipe.get(name) for name in ("method", "options", "seed")]
        return json.dumps([alike, recipe.get("grids", {}).get("activations")], sort_keys=True)


OnTrial = Callable[[Trial, Record | Exception | None], None]


def compare(
    model: str,
    recipes: Sequence[Recipe | None],
    measurement: Measurement,
    out: Path,
    *,
    device: str = "cpu",
    jobs: int = 1,
    threads: int | None = None,
    ray: str | None = None,
    memory: int | None = None,
    on_trial: OnTrial = lambda trial, outcome: None,
) -> list[Record]:
    """Quantize and measure a model by every recipe.

    Args:
        recipes: None stands for the unquantized model.
        out: a folder for results.jsonl, the checkpoints and what they share; a comparison that was begun there goes on.
        jobs: trials at a time, each in a separate process.
        threads: of each; None divides the cores among the jobs.
        ray: address of a Ray cluster ("auto" for the one of this machine) whose nodes all see `out` and the model; in
            place of `jobs`, it takes as many trials at a time as it has room for.
        memory: bytes that may be taken; None takes what the machine has available. The jobs divide it; on a cluster
            each trial has it to itself.
        on_trial: called when a trial begins (None) or is done: with its record, or with the error. Finished ones first.

    Returns:
        The records, in the order of the recipes; those of trials that failed are missing.

    Raises:
        UserError: there is no such model, text or task, or another process works in `out`.
        SetupError: `out` cannot be written; a process that measured was killed; ray is not installed, or its cluster
            cannot be reached.
    """
    if jobs < 1 or (threads is not None and threads < 1):
        raise UserError(f"jobs and threads are at least 1, got {jobs} and {threads}.")
    threads = threads or max(1, (os.cpu_count() or 1) // jobs)
    fingerprint = open_source(model).fingerprint()
    if ray is None:
        memory = (available_memory() if memory is None else memory) // jobs
    trials = [Trial(model, fingerprint, recipe, measurement, device, threads, memory) for recipe in recipes]
    out = out.expanduser().resolve()
    with exclusive_lock(out):
        records = read_records(out / RESULTS_FILE, repair=True)  # in older ones a trial was called a cell
        done = {record.conditions.get("trial", record.conditions.get("cell")): record for record in records}
        groups: dict[str, list[Trial]] = {}
        for trial in trials:
            if trial.key in done:
                on_trial(trial, done[trial.key])
            else:
                groups.setdefault(trial.group, []).append(trial)
        if groups:
            measurement.prepared()  # its errors come before the work
        with _on_ray(ray, threads) if ray is not None else _in_processes(jobs) as pool:
            for trial, outcome in _outcomes(pool, list(groups.values()), out, on_trial):
                if isinstance(outcome, Record):
                    append_records(out / RESULTS_FILE, [outcome])
                    done[trial.key] = outcome
                on_trial(trial, outcome)
    return [done[trial.key] for trial in trials if trial.key in done]


def measure(trial: Trial, out: Path) -> Record | Exception:
    """Quantize and evaluate in a process that exists for this. An error of this trial alone is returned."""
    console.quiet = True  # the parent reports progress
    torch.set_num_threads(trial.threads)
    timings: dict[str, float] = {}
    checkpoint: Path | None = None  # relative to `out`, which may be moved
    try:
        if trial.recipe is not None:
            name = f"{Path(trial.model).name}-{trial.fingerprint[:6]}"
            checkpoint = Path("checkpoints") / f"{name}-{trial.checkpoint_key}"
            folder = out / checkpoint
            if not (folder / "config.json").is_file():  # written last: without it the checkpoint is unfinished
                how: Any = {"device": trial.device, "memory": trial.memory, "reuse_dir": out / "shared"}
                if any((out / "checkpoints").glob(f"{name}-*/config.json")):
                    how["check_source"] = "never"  # a finished checkpoint says that it was done
                timings = quantize(trial.model, trial.recipe, folder, resume=folder.is_dir(), **how).timings_s
        measured = trial.model if checkpoint is None else str(out / checkpoint)
        record = evaluate(measured, trial.measurement, device=trial.device)
    except (UserError, SetupError) as error:
        return error
    except (MemoryError, torch.OutOfMemoryError) as error:
        return SetupError(f"there is not enough memory for this trial: {error}")
    except Exception as error:  # the other trials go on; not every error survives the way to the parent
        (out / f"error-{trial.key}.txt").write_text(traceback.format_exc())
        return SetupError(f"{type(error).__name__}: {error}, in dfrot or what it uses; see error-{trial.key}.txt.")
    record.model = trial.model
    record.timings_s |= timings
    record.conditions |= {"trial": trial.key, "checkpoint": checkpoint and str(checkpoint)}
    if beside := published(trial.model, trial.recipe, trial.measurement):
        record.conditions["published"] = beside
    return record


class _Pool(NamedTuple):
    """Processes that call `measure`."""

    submit: Callable[[Trial, Path], "futures.Future[Record | Exception]"]
    room: float  # trials at a time
    lost: tuple[type[Exception], ...] = ()  # errors of the pool that leave it able to take other trials


def _outcomes(
    pool: _Pool, groups: list[list[Trial]], out: Path, on_trial: OnTrial
) -> Iterator[tuple[Trial, Record | Exception]]:
    """Every trial when it is done; the next of its group then begins."""
    begun: dict[futures.Future[Any], list[Trial]] = {}
    while groups or begun:
        while groups and len(begun) < pool.room:
            group = groups.pop(0)
            on_trial(group[0], None)
            begun[pool.submit(group[0], out)] = group
        for future in futures.wait(begun, return_when=futures.FIRST_COMPLETED).done:
            trial, *rest = begun.pop(future)
            if rest:
                groups.insert(0, rest)
            try:
                yield trial, future.result()
            except pool.lost as error:
                yield trial, SetupError(f"the cluster lost a trial: {error}")


@contextlib.contextmanager
def _in_processes(jobs: int) -> Iterator[_Pool]:
    """A process for every trial: memory that one keeps does not count for the next."""
    spawn = multiprocessing.get_context("spawn")
    with futures.ProcessPoolExecutor(jobs, spawn, _begin_worker, max_tasks_per_child=1) as executor:
        try:
            yield _Pool(lambda trial, out: executor.submit(measure, trial, out), jobs)
        except BaseException as error:
            for process in list((executor._processes or {}).values()):  # or leaving would wait for them
                process.kill()
            executor.shutdown(wait=False, cancel_futures=True)
            if isinstance(error, futures.process.BrokenProcessPool):
                raise SetupError(
                    "a process that measured a trial was killed, perhaps for want of memory. The same command goes "
                    "on; with fewer --jobs it needs less."
                ) from error
            raise


def _begin_worker() -> None:
    """Leave Ctrl-C to the parent, and do not outlive it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    keep_freed_memory()
    parent = multiprocessing.parent_process()
    assert parent is not None, "a worker has a parent"

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@contextlib.contextmanager
def _on_ray(address: str, threads: int) -> Iterator[_Pool]:
    try:
        import ray
    except ImportError as error:
        raise SetupError("a Ray cluster needs the package ray: pip install 'dfrot[ray]'.") from error
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise SetupError(f"there is no Ray cluster at '{address}': {error}") from error
    try:
        # max_calls: a process for every trial, as above; room without end: Ray itself lets tasks wait
        task = ray.remote(num_cpus=threads, max_calls=1, max_retries=0)(measure)
        yield _Pool(lambda trial, out: task.remote(trial, out).future(), float("inf"), (ray.exceptions.RayError,))
    finally:
        ray.shutdown()
