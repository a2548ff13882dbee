"""Writing a checkpoint so that an unfinished one never looks finished.

A checkpoint is a directory of safetensors shards, one per decoder block plus one before and one after, an index, a
tokenizer and a config.json. Each file is written under a temporary name, synced and renamed; config.json comes last.
Until then the directory holds the manifest, `dfrot-run.json` (which run the shards belong to, and the digest and notes
of each finished one), and the fitted rotations, `dfrot-run.safetensors`, so that the run can be resumed.
"""

import contextlib
import hashlib
import os
import re
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from dfrot.checkpoint.reuse import read_fit, write_fit
from dfrot.models.source import INDEX_FILE, tensors_in
from dfrot.system.distributed import SINGLE_PROCESS, ProcessGroup
from dfrot.system.errors import UserError
from dfrot.system.files import RUN_FILE, SCRATCH, atomically, read_json, translate_io_errors, write_json, write_tensors
from dfrot.system.lock import LOCK_FILE, exclusive_lock

FIT_FILE = "dfrot-run.safetensors"
NOTES_FILE = "fit.json"


@contextlib.contextmanager
def opened_writer(
    path: Path,
    run: dict[str, Any],
    num_shards: int,
    *,
    resume: bool = False,
    overwrite: bool = False,
    processes: ProcessGroup = SINGLE_PROCESS,
) -> Iterator["CheckpointWriter"]:
    """A `CheckpointWriter` whose run has its directory to itself.

    Args:
        path: the checkpoint directory.
        run: JSON that identifies the run; resuming compares it.
        num_shards: of the whole checkpoint.
        resume: keep the intact shards of an interrupted run with the same identity.
        overwrite: replace an existing checkpoint or interrupted run.
        processes: of this run. The first one writes; the others know what it has written.

    Raises:
        UserError: the directory is not ours, a finished checkpoint, an interrupted or different run, or in use.
        SetupError: the directory cannot be made.
    """
    path = path.resolve()
    if resume and overwrite:
        raise UserError("--resume keeps the files in the directory and --overwrite deletes them: give one of them.")
    writer = CheckpointWriter(path, run, num_shards, processes)
    if not processes.is_main:
        writer.sync()
        yield writer
        return
    if not is_blank(path) and not is_ours(path):
        raise UserError(
            f"{path} exists and is not a dfrot checkpoint; nothing there is touched. Choose another -o directory."
        )
    with exclusive_lock(path):
        writer.begin_or_resume(resume, overwrite)
        writer.sync()
        yield writer


class CheckpointWriter:
    """Writes the shards of one run into one directory; made by `opened_writer`. Failed writes raise SetupError."""

    def __init__(self, path: Path, run: dict[str, Any], num_shards: int, processes: ProcessGroup) -> None:
        self.path, self._run, self._num_shards, self._processes = path, run, num_shards, processes
        self._files: dict[str, dict[str, Any]] = {}  # of the manifest: digest and notes by name
        self._begun = False  # whether the directory is this run's

    def sync(self) -> None:
        """Tell all processes which files the first one has written; a barrier."""
        self._files = self._processes.broadcast_object(self._files)

    def begin_or_resume(self, resume: bool, overwrite: bool) -> None:
        """Check the directory, and take over the files of an interrupted run if it is to be resumed."""
        path = self.path
        if finished := (path / "config.json").is_file():
            self._remove_manifest()  # left by a run that was killed in `finish`, after config.json
        if overwrite or is_blank(path):  # nothing is deleted before there is something to put in its place
            return
        if finished:
            raise UserError(f"{path} is a finished checkpoint. Choose another -o directory, or --overwrite it.")
        if not resume:
            raise UserError(f"{path} holds an interrupted run. Continue it with --resume, or --overwrite it.")
        before, files = read_manifest(path / RUN_FILE)
        if before != self._run:
            differing = "; ".join(differences(before, self._run)) or "all of it"
            raise UserError(
                f"{path} holds an interrupted run that is another: {differing}. "
                "Resume with the same, choose another -o directory, or --overwrite it."
            )
        self._take_over(files)

    def _take_over(self, listed: dict[str, dict[str, Any]]) -> None:
        """Keep the files whose digest is the manifest's, and delete the others."""
        with translate_io_errors(self.path):
            intact = {name: entry for name, entry in listed.items() if digest(self.path / name) == entry["sha256"]}
            if FIT_FILE in intact:  # without its rotations no shard is of use
                self._files = intact
            patterns = ("model-*", FIT_FILE, f"{SCRATCH}*", "*.tmp", NOTES_FILE)
            stale = {file for pattern in patterns for file in self.path.glob(pattern) if file.name not in self._files}
            for file in stale:
                file.unlink()
        if lost := sorted(listed.keys() - self._files.keys() | {file.name for file in stale if file.match("model-*")}):
            warnings.warn(f"not as the interrupted run finished them, and made again: {', '.join(lost)}.", stacklevel=4)
        self._begun = True

    def _shard(self, number: int) -> Path:
        return self.path / f"model-{number + 1:05}-of-{self._num_shards:05}.safetensors"

    def _shards(self) -> list[Path]:
        return [self._shard(number) for number in range(self._num_shards)]

    def shard_notes(self) -> list[dict[str, Any]]:
        """The notes of all shards that have some, in order."""
        entries = (self._files.get(shard.name, {}) for shard in self._shards())
        return [entry["notes"] for entry in entries if "notes" in entry]

    def has(self, number: int) -> bool:
        """Whether shard `number` is written, by this run or the one that it resumes."""
        return self._shard(number).name in self._files

    def read(self, number: int) -> dict[str, Tensor]:
        """The tensors of a written shard."""
        return {name: tensor.read() for name, tensor in tensors_in(self._shard(number)).items()}

    def write(self, number: int, tensors: dict[str, Tensor], notes: dict[str, Any] | None = None) -> None:
        """Write one shard, durably, under its final name.

        Args:
            notes: JSON that `shard_notes` returns, also in a run that resumes this one.
        """
        if self._processes.is_main:
            self._begin()
            write_tensors(self._shard(number), tensors, {"format": "pt"})
            self._list(self._shard(number), notes)
        self.sync()

    def _begin(self) -> None:
        """Mark the directory as this run's, and delete everything else in it."""
        if self._begun:
            return
        self._write_manifest()
        with translate_io_errors(self.path):
            (self.path / "config.json").unlink(missing_ok=True)  # first, so that the rest is no checkpoint
            for file in self.path.iterdir():
                if file.is_dir() and not file.is_symlink():
                    shutil.rmtree(file)
                elif file.name not in (RUN_FILE, LOCK_FILE):
                    file.unlink()
        self._begun = True

    def _list(self, file: Path, notes: dict[str, Any] | None = None) -> None:
        with translate_io_errors(self.path):
            self._files[file.name] = {"sha256": digest(file)} | ({"notes": notes} if notes else {})
        self._write_manifest()

    def _write_manifest(self) -> None:
        write_json(self.path / RUN_FILE, {"run": self._run, "files": self._files})

    def _remove_manifest(self) -> None:
        for name in (FIT_FILE, RUN_FILE):
            (self.path / name).unlink(missing_ok=True)

    def save_fit(self, record: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """Keep the fitted rotations, so that a resumed run continues with exactly those."""
        if self._processes.is_main:
            self._begin()
            write_fit(self.path / FIT_FILE, record, tensors)
            self._list(self.path / FIT_FILE)
        self.sync()

    def load_fit(self) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
        """The rotations of `save_fit`, if this run or the one that it resumes got so far."""
        return read_fit(self.path / FIT_FILE) if FIT_FILE in self._files else None

    def reuse(self, other: Path) -> None:
        """Take all shards, as links if possible, and their notes from a finished checkpoint with the same blocks."""
        assert self._processes.count == 1, "the runs of a comparison share, and each is one process"
        self._begin()
        notes = read_json(other / NOTES_FILE).get("weights_by_block", []) if (other / NOTES_FILE).is_file() else []
        for number, shard in enumerate(self._shards()):
            with atomically(shard) as temporary:
                temporary.unlink(missing_ok=True)
                try:
                    os.link(other / shard.name, temporary)
                except OSError:  # another file system
                    shutil.copyfile(other / shard.name, temporary)
            # the first and the last shard are no blocks and have no notes
            self._list(shard, notes[number - 1] if 1 <= number <= len(notes) else None)

    def finish(self, config: dict[str, Any], notes: dict[str, Any]) -> None:
        """Write notes (if any), index and config, which makes the directory a checkpoint. For the first process."""
        stored = [tensor for shard in self._shards() for tensor in tensors_in(shard).values()]
        weight_map = {tensor.name: tensor.file.name for tensor in stored}
        metadata = {"total_size": sum(tensor.nbytes for tensor in stored)}
        if notes:
            write_json(self.path / NOTES_FILE, notes)
        write_json(self.path / INDEX_FILE, {"metadata": metadata, "weight_map": weight_map})
        write_json(self.path / "config.json", config)
        self._remove_manifest()


def read_manifest(path: Path) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """The run's identity, and digest and notes of its files by name. Raises UserError if the file is no manifest."""
    manifest = read_json(path)
    run, files = manifest.get("run"), manifest.get("files")
    if not isinstance(run, dict) or not isinstance(files, dict):
        raise UserError(f"{path} is not the manifest of an interrupted run. --overwrite it.")
    names = re.compile(rf"model-\d+-of-\d+\.safetensors|{re.escape(FIT_FILE)}", re.ASCII)  # no path leads elsewhere
    for name, entry in files.items():
        known = isinstance(entry, dict) and isinstance(entry.get("sha256"), str)
        if not known or not names.fullmatch(name) or not isinstance(entry.get("notes", {}), dict):
            raise UserError(f"{path} lists a file that no run writes, {name!r}. --overwrite it.")
    return run, files


def is_blank(path: Path) -> bool:
    """Whether a directory is absent, empty, or left by a run that died before its first write."""
    if not path.is_dir():
        return not path.exists()
    return all(file.name in (LOCK_FILE, RUN_FILE + ".tmp") for file in path.iterdir())


def is_ours(path: Path) -> bool:
    """Whether a directory is a dfrot checkpoint or an interrupted run."""
    if (path / RUN_FILE).is_file():
        return True
    try:
        record = read_json(path / "config.json").get("quantization_config")
    except UserError:
        return False
    return isinstance(record, dict) and record.get("quant_method") == "dfrot"


def digest(path: Path) -> str | None:
    """The sha256 of a file; None if there is no such file."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError:
        return None


def differences(before: dict[str, Any], now: dict[str, Any]) -> Iterator[str]:
    """Where two records of the same form differ."""
    for name, was in before.items():
        is_now = now.get(name, was)  # names that only one of them has are not reported
        if isinstance(was, dict) and isinstance(is_now, dict):
            inner = "" if name == "recipe" else f"{name}."
            yield from (inner + difference for difference in differences(was, is_now))
        elif was != is_now:
            yield f"{name}: {was}, not {is_now}"
