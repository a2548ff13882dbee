"""Which recipe for my model: every cell of a grid of recipes quantized, measured and recorded.

A cell is a recipe (or none: the model as it is) and what is measured. Finished cells are lines of results.jsonl, which
this process alone writes, as they finish; a comparison that was killed goes on where it was, in the middle of a cell
too. Cells with the same rotations follow one another in a chain, and share what they can (checkpoint/shared.py);
chains run side by side in processes of their own, here or on a Ray cluster.
"""

import contextlib
import hashlib
import json
import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dfrot.compare.published import published
from dfrot.evaluation.record import RESULTS_FILE, Record, append_records, read_records
from dfrot.evaluation.run import Measurement, evaluate
from dfrot.models.source import open_source
from dfrot.models.texts import text_label
from dfrot.pipeline.recipe import Recipe
from dfrot.pipeline.run import quantize
from dfrot.system.errors import SetupError, UserError
from dfrot.system.lock import exclusive_lock
from dfrot.system.memory import available_memory, keep_freed_memory
from dfrot.system.progress import silence
from dfrot.version import __version__


@dataclass(frozen=True)
class Cell:
    """One recipe, to be measured.

    Attributes:
        model: how the user called it.
        fingerprint: of its files.
        recipe: None for the model as it is.
        threads: that torch computes with; they decide how sums are rounded.
        memory: bytes that quantizing may take; they decide nothing that is measured.
    """

    model: str
    fingerprint: str
    recipe: Recipe | None
    measurement: Measurement
    device: str
    threads: int
    memory: int | None = None

    @property
    def key(self) -> str:
        """16 hexadecimal digits that differ between cells that differ, or are of different versions of dfrot."""
        recipe = None if self.recipe is None else self.recipe.to_json()
        parts = {**asdict(self), "recipe": recipe, "dfrot": __version__}
        del parts["memory"]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def chain(self) -> str:
        """Cells that have it in common have their rotations in common."""
        recipe = None if self.recipe is None else self.recipe.to_json()
        alike = None if recipe is None else [recipe[name] for name in ("method", "options", "seed")]
        return json.dumps([alike, recipe and recipe["grids"]["activations"]], sort_keys=True)


# Called when a cell begins (None) or is done: with its record, or with what went wrong.
Listener = Callable[[Cell, Record | Exception | None], None]


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
    listener: Listener = lambda cell, outcome: None,
) -> list[Record]:
    """Quantize and measure a model by every recipe.

    Args:
        recipes: None stands for the model as it is.
        out: a folder for results.jsonl, the checkpoints and what they share; a comparison that was begun there goes on.
        jobs: cells at a time, each in a process of its own.
        threads: of each; None divides the cores among the jobs.
        ray: address of a Ray cluster ("auto" for the one of this machine) whose nodes all see `out` and the model; in
            place of `jobs`, it takes as many cells at a time as it has room for.
        memory: bytes that may be taken; None takes what the machine has available. The jobs divide it; on a cluster
            each cell has it to itself.
        listener: told of every cell, finished ones first.

    Returns:
        The records, in the order of the recipes; those of cells that failed are missing.

    Raises:
        UserError: there is no such model, or another process works in `out`.
        SetupError: `out` cannot be written; ray is not installed, or its cluster cannot be reached.
    """
    if jobs < 1 or (threads is not None and threads < 1):
        raise UserError(f"jobs and threads are at least 1, got {jobs} and {threads}.")
    threads = threads or max(1, (os.cpu_count() or 1) // jobs)
    fingerprint = open_source(model).fingerprint()
    if ray is None:
        memory = (available_memory() if memory is None else memory) // jobs
    cells = [Cell(model, fingerprint, recipe, measurement, device, threads, memory) for recipe in recipes]
    out = out.expanduser().resolve()
    with exclusive_lock(out):
        done = {record.conditions.get("cell"): record for record in read_records(out / RESULTS_FILE, repair=True)}
        chains: dict[str, list[Cell]] = {}
        for cell in cells:
            if cell.key in done:
                listener(cell, done[cell.key])
            else:
                chains.setdefault(cell.chain, []).append(cell)
        with _on_ray(ray, threads) if ray is not None else _in_processes(jobs) as pool:
            for cell, outcome in _outcomes(pool, list(chains.values()), out, listener):
                if isinstance(outcome, Record):
                    append_records(out / RESULTS_FILE, [outcome])
                    done[cell.key] = outcome
                listener(cell, outcome)
    return [done[cell.key] for cell in cells if cell.key in done]


def measure(cell: Cell, out: Path) -> Record:
    """Quantize and evaluate; runs in a process of its own."""
    import torch

    torch.set_num_threads(cell.threads)
    timings: dict[str, float] = {}
    path = cell.model
    checkpoint: Path | None = None
    if cell.recipe is not None:
        name = f"{Path(cell.model).name}-{cell.fingerprint[:6]}-{cell.recipe.digest}"
        checkpoint = Path("checkpoints") / name  # as it is called within `out`
        folder = out / checkpoint
        path = str(folder)
        if not (folder / "config.json").is_file():
            report = quantize(
                cell.model,
                cell.recipe,
                folder,
                device=cell.device,
                resume=folder.is_dir(),
                memory=cell.memory,
                share=out / "shared",
            )
            timings = report.timings_s
    record = evaluate(path, cell.measurement, device=cell.device)
    record.model = cell.model
    record.timings_s |= timings
    record.conditions["cell"] = cell.key
    record.conditions["checkpoint"] = checkpoint and str(checkpoint)
    if beside := published(cell.model, cell.recipe, _as_published(cell.measurement)):
        record.conditions["published"] = beside
    return record


def _as_published(measurement: Measurement) -> str | None:
    """The text that is WikiText-2's whole test part in blocks of 2048 tokens, as the papers take it."""
    if measurement.seq_len != 2048 or measurement.max_tokens is not None:
        return None
    texts = (text for text in measurement.texts if text == "wikitext2" or text_label(text) == "wiki.test.raw")
    return next(texts, None)


class _Pool:
    """Something that measures cells: `submit` begins one, `wait` gives those that are done."""

    room: float

    def submit(self, cell: Cell, out: Path) -> Any:
        raise NotImplementedError

    def wait(self, begun: list[Any]) -> list[Any]:
        raise NotImplementedError

    def result(self, begun: Any) -> Record:
        """Raises what went wrong."""
        raise NotImplementedError


def _outcomes(
    pool: _Pool, chains: list[list[Cell]], out: Path, listener: Listener
) -> Iterator[tuple[Cell, Record | Exception]]:
    """Every cell as it is done; the next of its chain begins then."""
    begun: dict[Any, list[Cell]] = {}
    while chains or begun:
        while chains and len(begun) < pool.room:
            chain = chains.pop(0)
            listener(chain[0], None)
            begun[pool.submit(chain[0], out)] = chain
        for handle in pool.wait(list(begun)):
            cell, *rest = begun.pop(handle)
            if rest:
                chains.insert(0, rest)
            try:
                yield cell, pool.result(handle)
            except (UserError, SetupError) as error:
                yield cell, error


class _Processes(_Pool):
    def __init__(self, executor: futures.Executor, jobs: int) -> None:
        self._executor, self.room = executor, jobs

    def submit(self, cell: Cell, out: Path) -> Any:
        return self._executor.submit(measure, cell, out)

    def wait(self, begun: list[Any]) -> list[Any]:
        return list(futures.wait(begun, return_when=futures.FIRST_COMPLETED).done)

    def result(self, begun: Any) -> Record:
        try:
            return begun.result()
        except futures.process.BrokenProcessPool as error:
            raise SetupError(
                "a process that measured a cell was killed, perhaps for want of memory. The same command goes on; "
                "with fewer --jobs it needs less."
            ) from error


@contextlib.contextmanager
def _in_processes(jobs: int) -> Iterator[_Pool]:
    """A process for every cell: what one keeps in memory does not count for the next."""
    spawn = multiprocessing.get_context("spawn")
    with futures.ProcessPoolExecutor(jobs, spawn, _begin_worker, max_tasks_per_child=1) as executor:
        try:
            yield _Processes(executor, jobs)
        except BaseException:
            for process in list((executor._processes or {}).values()):  # or leaving would wait for them
                process.kill()
            executor.shutdown(wait=False, cancel_futures=True)
            raise


def _begin_worker() -> None:
    """Be quiet, leave Ctrl-C to the parent, and do not outlive it."""
    silence()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    keep_freed_memory()
    parent = multiprocessing.parent_process()
    assert parent is not None, "a worker has a parent"
    threading.Thread(target=_end_with, args=[parent], daemon=True).start()


def _end_with(parent: Any) -> None:
    parent.join()
    os._exit(1)


class _Ray(_Pool):
    room = float("inf")  # Ray itself lets tasks wait

    def __init__(self, ray: Any, threads: int) -> None:
        self._ray = ray
        # a process for every cell, as above
        self._measure = ray.remote(num_cpus=threads, max_calls=1, max_retries=0)(_measure_on_ray)

    def submit(self, cell: Cell, out: Path) -> Any:
        return self._measure.remote(cell, out)

    def wait(self, begun: list[Any]) -> list[Any]:
        return self._ray.wait(begun, num_returns=1)[0]

    def result(self, begun: Any) -> Record:
        try:
            return self._ray.get(begun)
        except self._ray.exceptions.RayTaskError as error:
            raise error.cause if isinstance(error.cause, (UserError, SetupError)) else error from None
        except self._ray.exceptions.RayError as error:
            raise SetupError(f"Ray lost a cell: {error}") from error


def _measure_on_ray(cell: Cell, out: Path) -> Record:
    silence()
    return measure(cell, out)


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
        yield _Ray(ray, threads)
    finally:
        ray.shutdown()
