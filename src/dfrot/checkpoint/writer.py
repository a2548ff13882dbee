"""Writing a checkpoint so that an unfinished one never looks finished.

A checkpoint is a directory of safetensors shards, one per decoder block plus one before and one after, an index, a
tokenizer and a config.json. Each file is written under a temporary name, synced and renamed; config.json comes last.
Until then the directory holds the manifest, `dfrot-run.json` (which run the shards belong to, and the digest and notes
of each finished one), and the fitted rotations, `dfrot-run.safetensors`, so that the run can be resumed.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor

from dfrot.models.files import INDEX_FILE, open_safetensors, tensors_in
from dfrot.system.distributed import SINGLE_PROCESS, ProcessGroup
from dfrot.system.errors import UserError
from dfrot.system.files import (
    LOCK_FILE,
    RUN_FILE,
    SCRATCH,
    atomically,
    exclusive_lock,
    publish,
    read_json,
    translate_io_errors,
    write_json,
    write_tensors,
)

FIT_FILE = "dfrot-run.safetensors"
NOTES_FILE = "fit.json"
TUNE_PREFIX = "dfrot-tune"  # of what tuning keeps until a run is done
PROGRESS_FILE = f"{TUNE_PREFIX}-fit.safetensors"


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
        run: JSON that identifies the run; resuming compares it.
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
    if processes.is_main and not is_blank(path) and not is_ours(path):
        raise UserError(
            f"{path} exists and is not a dfrot checkpoint; nothing there is touched. Choose another -o directory."
        )
    with exclusive_lock(path) if processes.is_main else contextlib.nullcontext():
        if processes.is_main:
            writer.begin_or_resume(resume, overwrite)
        writer.sync()
        yield writer


class CheckpointWriter:
    """Writes the shards of one run into one directory; made by `opened_writer`. Failed writes raise SetupError."""

    def __init__(self, path: Path, run: dict[str, Any], num_shards: int, processes: ProcessGroup) -> None:
        self.path, self._run, self._processes = path, run, processes
        numbers = range(1, num_shards + 1)
        self._shards = [path / f"model-{number:05}-of-{num_shards:05}.safetensors" for number in numbers]
        self._files: dict[str, dict[str, Any]] = {}  # of the manifest: digest and notes by name
        self._begun = False  # whether the directory is this run's

    def sync(self) -> None:
        """Tell all processes which files the first one has written, and whether it has begun; a barrier."""
        self._files, self._begun = self._processes.broadcast_object([self._files, self._begun])

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
            there = {name: entry for name, entry in listed.items() if (self.path / name).is_file()}
            intact = {n: e for n, e in there.items() if digest(self.path / n) in (e["sha256"], e.get("next"))}
            if FIT_FILE in intact:  # without its rotations no shard is of use
                self._files = intact
            patterns = ("model-*", FIT_FILE, f"{SCRATCH}*", "*.tmp", NOTES_FILE)
            stale = {file for pattern in patterns for file in self.path.glob(pattern) if file.name not in self._files}
            for file in stale:
                file.unlink()
        if lost := sorted(listed.keys() - self._files.keys() | {file.name for file in stale if file.match("model-*")}):
            warnings.warn(f"not as the interrupted run finished them, and made again: {', '.join(lost)}.", stacklevel=4)
        self._begun = True

    def shard_notes(self) -> list[dict[str, Any]]:
        """The notes of all shards that have some, in order."""
        entries = (self._files.get(shard.name, {}) for shard in self._shards)
        return [entry["notes"] for entry in entries if "notes" in entry]

    def has(self, number: int) -> bool:
        """Whether shard `number` is written, by this run or the one that it resumes."""
        return self._shards[number].name in self._files

    def read(self, number: int) -> dict[str, Tensor]:
        """The tensors of a written shard."""
        return {name: tensor.read() for name, tensor in tensors_in(self._shards[number]).items()}

    def write(self, number: int, tensors: dict[str, Tensor], notes: dict[str, Any] | None = None) -> None:
        """Write one shard durably; `shard_notes` returns its notes, JSON, also in a run that resumes this one."""
        if self._processes.is_main:
            self._begin()
            write_tensors(self._shards[number], tensors, {"format": "pt"})
            self._list(self._shards[number], notes)
        self.sync()

    def replace(self, number: int, tensors: dict[str, Tensor]) -> None:
        """Write a written shard anew. At every moment what lies there is a shard that the manifest knows."""
        if self._processes.is_main:
            shard, entry = self._shards[number], self._files[self._shards[number].name]
            new = shard.with_name(SCRATCH + shard.name)
            write_tensors(new, tensors, {"format": "pt"})
            entry["next"] = digest(new)
            self._write_manifest()
            publish(new, shard)
            self._list(shard, entry.get("notes"))
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
        self._files[file.name] = {"sha256": digest(file)} | ({"notes": notes} if notes else {})
        self._write_manifest()

    def _write_manifest(self) -> None:
        write_json(self.path / RUN_FILE, {"run": self._run, "files": self._files})

    def _remove_manifest(self) -> None:
        for file in (*self.path.glob(f"{TUNE_PREFIX}*"), self.path / FIT_FILE, self.path / RUN_FILE):
            file.unlink(missing_ok=True)

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

    def save_progress(self, record: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """Keep what an interrupted fit goes on from, until the run is done."""
        if self._processes.is_main:
            self._begin()
            write_fit(self.path / PROGRESS_FILE, record, tensors)

    def load_progress(self) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
        """What `save_progress` kept of the run that this one resumes."""
        return read_fit(self.path / PROGRESS_FILE) if self._begun else None

    def reuse(self, other: Path) -> None:
        """Take all shards, as links if possible, and their notes from a finished checkpoint with the same blocks."""
        assert self._processes.count == 1, "the runs of a comparison share, and each is one process"
        self._begin()
        notes = read_json(other / NOTES_FILE).get("weights_by_block", []) if (other / NOTES_FILE).is_file() else []
        for number, shard in enumerate(self._shards):
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
        stored = [tensor for shard in self._shards for tensor in tensors_in(shard).values()]
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
    own = (LOCK_FILE, RUN_FILE + ".tmp")
    return not path.exists() or (path.is_dir() and all(file.name in own for file in path.iterdir()))


def is_ours(path: Path) -> bool:
    """Whether a directory is a dfrot checkpoint or an interrupted run."""
    if (path / RUN_FILE).is_file():
        return True
    with contextlib.suppress(UserError):
        record = read_json(path / "config.json").get("quantization_config")
        return isinstance(record, dict) and record.get("quant_method") == "dfrot"
    return False


def digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def differences(before: dict[str, Any], now: dict[str, Any]) -> Iterator[str]:
    """Where two records of the same form differ."""
    for name, was in before.items():
        is_now = now.get(name, was)  # names that only one of them has are not reported
        if isinstance(was, dict) and isinstance(is_now, dict):
            inner = "" if name == "recipe" else f"{name}."
            yield from (inner + difference for difference in differences(was, is_now))
        elif was != is_now:
            yield f"{name}: {was}, not {is_now}"


def write_fit(path: Path, record: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Write JSON and tensors into one file, atomically. Raises SetupError if it cannot be written."""
    text = json.dumps(record)
    write_tensors(path, tensors, {"record": text, "sha256": _digest(text, tensors)})


def read_fit(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
    """The record and tensors of `write_fit`; None without a file. Raises UserError if the file is something else."""
    if not path.is_file():
        return None
    with open_safetensors(path) as file:
        metadata = file.metadata() or {}
    text, tensors = metadata.get("record", ""), {name: tensor.read() for name, tensor in tensors_in(path).items()}
    if metadata.get("sha256") != _digest(text, tensors):  # what is unharmed is what a run wrote, and needs no check
        raise UserError(f"{path} holds no fitted rotations, or damaged ones. Delete it to fit again.")
    return json.loads(text), tensors


def _digest(text: str, tensors: dict[str, Tensor]) -> str:
    ready = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    found = hashlib.sha256(text.encode(errors="replace"))
    found.update(save(ready))
    return found.hexdigest()


class ReuseDir:
    """A folder of fits, and of the places of finished checkpoints whose blocks can be taken over.

    Both are named by a digest of everything that they depend on. Without a folder (None) nothing is kept or found.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        if folder is not None:
            with translate_io_errors(folder):
                folder.mkdir(parents=True, exist_ok=True)

    def _path(self, name: str, depends_on: dict[str, Any]) -> Path | None:
        key = hashlib.sha256(json.dumps(depends_on, sort_keys=True).encode()).hexdigest()[:16]
        return self._folder and self._folder / name.format(key)

    def fit(self, depends_on: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
        """The fit of `keep_fit`."""
        return read_fit(path) if (path := self._path("fit-{}.safetensors", depends_on)) else None

    def keep_fit(self, depends_on: dict[str, Any], record: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """Raises SetupError if it cannot be written."""
        if path := self._path("fit-{}.safetensors", depends_on):
            write_fit(path, record, tensors)

    def checkpoint(self, depends_on: dict[str, Any]) -> Path | None:
        """The checkpoint of `keep_checkpoint`, if it still exists."""
        if (note := self._path("blocks-{}.json", depends_on)) is None or not note.is_file():
            return None
        path = Path(read_json(note)["checkpoint"])
        return path if (path / "config.json").is_file() else None

    def keep_checkpoint(self, depends_on: dict[str, Any], path: Path) -> None:
        """Raises SetupError if it cannot be written."""
        if note := self._path("blocks-{}.json", depends_on):
            write_json(note, {"checkpoint": str(path.resolve())})
