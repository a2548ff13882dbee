"""Writing a checkpoint so that an unfinished one never looks finished.

A checkpoint is a directory of safetensors shards, one per decoder block plus one before and one after, an index, a
tokenizer and a config.json. Each file is written beside its place, synced and renamed; config.json comes last. Until
then `dfrot-run.json` stands there, the manifest: which run the shards belong to, and the digest and notes of each that
is finished. `dfrot-run.safetensors` keeps the fitted rotations, so that the run can be resumed.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from dfrot.errors import EnvironmentFault, UserError
from dfrot.json_file import parse_json, read_json
from dfrot.lock import LOCK_FILE, alone_in
from dfrot.models.source import open_safetensors, stored_tensors
from dfrot.processes import ALONE, Processes

RUN_FILE = "dfrot-run.json"
FIT_FILE = "dfrot-run.safetensors"
NOTES_FILE = "fit.json"
INDEX_FILE = "model.safetensors.index.json"
_OF_A_RUN = re.compile(rf"model-\d+-of-\d+\.safetensors|{re.escape(FIT_FILE)}", re.ASCII)


@contextlib.contextmanager
def opened_writer(
    path: Path,
    run: dict[str, Any],
    num_shards: int,
    *,
    resume: bool = False,
    overwrite: bool = False,
    processes: Processes = ALONE,
) -> Iterator["CheckpointWriter"]:
    """A `CheckpointWriter` that is alone in its directory, with those of the other processes of its run.

    Args:
        path: the checkpoint directory.
        run: JSON that identifies the run; resuming compares it.
        num_shards: how many shards there will be.
        resume: keep the shards of the same run, interrupted before, that are as it wrote them.
        overwrite: delete a checkpoint, or an interrupted run, that is there.
        processes: of one run: the first writes, the others know what it has written.

    Raises:
        UserError: something is in the way: not ours, finished already, interrupted, of another run, or in use.
        EnvironmentFault: the directory cannot be made.
    """
    path = path.resolve()
    if resume and overwrite:
        raise UserError("--resume keeps what is there and --overwrite deletes it: give one of them.")
    writer = CheckpointWriter(path, run, num_shards, processes)
    if not processes.first:
        writer.agree()
        yield writer
        return
    if not _is_blank(path) and not is_ours(path):
        raise UserError(
            f"{path} exists and is not a dfrot checkpoint; nothing there is touched. Choose another -o directory."
        )
    with alone_in(path):
        writer.enter(resume, overwrite)
        writer.agree()
        yield writer


class CheckpointWriter:
    """Writes the shards of one run into one directory; `opened_writer` makes it."""

    def __init__(self, path: Path, run: dict[str, Any], num_shards: int, processes: Processes) -> None:
        self.path, self._run, self._num_shards, self._processes = path, run, num_shards, processes
        self._files: dict[str, dict[str, Any]] = {}  # of the manifest: digest and notes by name
        self._begun = False  # whether the directory is this run's

    def agree(self) -> None:
        """All processes of the run come here, and go on knowing what the first one has written."""
        self._files = self._processes.told(self._files)

    def enter(self, resume: bool, overwrite: bool) -> None:
        """Find out what is in the directory, and take over what an interrupted run left if it is to be resumed."""
        path, run = self.path, self._run
        if (path / "config.json").is_file():
            self._remove_manifest()  # of a run that was killed while it did so itself
        # with `overwrite` nothing is deleted before there is something to put in its place
        if overwrite or _is_blank(path):
            return
        if (path / "config.json").is_file():
            raise UserError(f"{path} is a finished checkpoint. Choose another -o directory, or --overwrite it.")
        if not resume:
            raise UserError(f"{path} holds an interrupted run. Continue it with --resume, or --overwrite it.")
        before, files = _read_manifest(path / RUN_FILE)
        if before != run:
            differing = "; ".join(_differences(before, run)) or "all of it"
            raise UserError(
                f"{path} holds an interrupted run that is another: {differing}. "
                "Resume with the same, choose another -o directory, or --overwrite it."
            )
        self._take_over(files)

    def _take_over(self, listed: dict[str, dict[str, Any]]) -> None:
        """Keep the files that are as the manifest lists them, and delete the others."""
        with _faults(self.path):
            sound = {name: entry for name, entry in listed.items() if _digest(self.path / name) == entry["sha256"]}
            if FIT_FILE in sound:  # all shards are made by the rotations in it
                self._files = sound
            patterns = ("model-*", FIT_FILE, "dfrot-run-*", "*.tmp", NOTES_FILE)
            stale = {file for pattern in patterns for file in self.path.glob(pattern)} - {
                self.path / name for name in self._files
            }
            for file in stale:
                file.unlink()
        if lost := sorted(listed.keys() - self._files.keys() | {file.name for file in stale if file.match("model-*")}):
            warnings.warn(f"not as the interrupted run finished them, and made again: {', '.join(lost)}.", stacklevel=4)
        self._begun = True

    def _shard(self, number: int) -> Path:
        return self.path / f"model-{number + 1:05}-of-{self._num_shards:05}.safetensors"

    def shard_notes(self) -> list[dict[str, Any]]:
        """The notes of all shards that have some, in order."""
        entries = (self._files.get(self._shard(number).name, {}) for number in range(self._num_shards))
        return [entry["notes"] for entry in entries if "notes" in entry]

    def has(self, number: int) -> bool:
        """Whether shard `number` is there, from this run or the one that it resumes."""
        return self._shard(number).name in self._files

    def read(self, number: int) -> dict[str, Tensor]:
        """The tensors of a shard that is there."""
        with open_safetensors(self._shard(number)) as file:
            return _tensors(file)

    def write(self, number: int, tensors: dict[str, Tensor], notes: dict[str, Any] | None = None) -> None:
        """Write one shard, durably, under its final name.

        Args:
            notes: JSON that `shard_notes` gives back, also to a run that resumes this one.

        Raises:
            EnvironmentFault: it cannot be written (disk full, no permission).
        """
        if self._processes.first:
            self._begin()
            write_tensors(self._shard(number), tensors, {"format": "pt"})
            self._list(self._shard(number), notes)
        self.agree()

    def _begin(self) -> None:
        """Make the directory this run's: from now on it says so, and whatever else was in it goes."""
        if self._begun:
            return
        self._write_manifest()
        with _faults(self.path):
            (self.path / "config.json").unlink(missing_ok=True)  # first: what is left is no checkpoint
            for file in self.path.iterdir():
                if file.is_dir() and not file.is_symlink():
                    shutil.rmtree(file)
                elif file.name not in (RUN_FILE, LOCK_FILE):
                    file.unlink()
        self._begun = True

    def _list(self, file: Path, notes: dict[str, Any] | None = None) -> None:
        with _faults(self.path):
            self._files[file.name] = {"sha256": _digest(file)} | ({"notes": notes} if notes else {})
        self._write_manifest()

    def _write_manifest(self) -> None:
        write_json(self.path / RUN_FILE, {"run": self._run, "files": self._files})

    def _remove_manifest(self) -> None:
        for name in (FIT_FILE, RUN_FILE):
            (self.path / name).unlink(missing_ok=True)

    def save_fit(self, record: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """Keep what was fitted, so that a resumed run goes on with exactly that.

        Raises:
            EnvironmentFault: it cannot be written.
        """
        if self._processes.first:
            self._begin()
            write_fit(self.path / FIT_FILE, record, tensors)
            self._list(self.path / FIT_FILE)
        self.agree()

    def load_fit(self) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
        """What `save_fit` kept, if this run resumes one that got so far."""
        return read_fit(self.path / FIT_FILE) if FIT_FILE in self._files else None

    def adopt(self, other: Path) -> None:
        """Take all shards, as links if possible, and their notes from a finished checkpoint that has the same.

        Raises:
            EnvironmentFault: they cannot be written.
        """
        assert self._processes.count == 1, "the runs of a comparison share, and each is one process"
        self._begin()
        notes = read_json(other / NOTES_FILE).get("weights_by_block", []) if (other / NOTES_FILE).is_file() else []
        for number, shard in enumerate(map(self._shard, range(self._num_shards))):
            temporary = shard.with_suffix(".tmp")
            with _faults(self.path, temporary):
                temporary.unlink(missing_ok=True)
                try:
                    os.link(other / shard.name, temporary)
                except OSError:  # another file system
                    shutil.copyfile(other / shard.name, temporary)
                _publish(temporary, shard)
            self._list(shard, notes[number - 1] if 1 <= number <= len(notes) else None)

    def finish(self, config: dict[str, Any], notes: dict[str, Any]) -> None:
        """Write notes (if any), index and config; only now the directory is a checkpoint. Only the first does it.

        Raises:
            EnvironmentFault: they cannot be written.
        """
        weight_map: dict[str, str] = {}
        total = 0
        for shard in map(self._shard, range(self._num_shards)):
            for name, _, nbytes in stored_tensors([shard]):
                weight_map[name] = shard.name
                total += nbytes
        if notes:
            write_json(self.path / NOTES_FILE, notes)
        write_json(self.path / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": weight_map})
        write_json(self.path / "config.json", config)
        self._remove_manifest()


def write_fit(path: Path, record: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """JSON and tensors in one file, atomically.

    Raises:
        EnvironmentFault: it cannot be written.
    """
    write_tensors(path, tensors, {"record": json.dumps(record)})


def read_fit(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
    """What `write_fit` wrote, if it is there.

    Raises:
        UserError: something else is there.
    """
    if not path.is_file():
        return None
    with open_safetensors(path) as file:
        try:
            record = parse_json((file.metadata() or {})["record"])
        except (KeyError, ValueError) as error:
            raise UserError(f"{path} holds no fitted rotations ({error}). Delete it to fit again.") from error
        parts = [record.get(name) for name in ("transforms", "notes")] if isinstance(record, dict) else [None]
        if not all(isinstance(part, dict) for part in parts):
            raise UserError(f"{path} holds no fitted rotations. Delete it to fit again.")
        return record, _tensors(file)


def _read_manifest(path: Path) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """What identifies the run, and digest and notes of its files by name.

    Raises:
        UserError: it is no manifest.
    """
    manifest = read_json(path)
    run, files = manifest.get("run"), manifest.get("files")
    if not isinstance(run, dict) or not isinstance(files, dict):
        raise UserError(f"{path} is not the manifest of an interrupted run. --overwrite it.")
    for name, entry in files.items():
        known = isinstance(entry, dict) and isinstance(entry.get("sha256"), str)
        if not known or not _OF_A_RUN.fullmatch(name) or not isinstance(entry.get("notes", {}), dict):
            raise UserError(f"{path} lists a file that no run writes, {name!r}. --overwrite it.")
    return run, files


def _tensors(file: Any) -> dict[str, Tensor]:
    return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 — safe_open is no mapping


def _is_blank(path: Path) -> bool:
    """Whether nothing is there, or only what a run leaves that died before its first write."""
    if not path.is_dir():
        return not path.exists()
    return all(file.name in (LOCK_FILE, RUN_FILE + ".tmp") for file in path.iterdir())


def _digest(path: Path) -> str | None:
    """The sha256 of a file; None if it is not there."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError:
        return None


def _differences(before: dict[str, Any], now: dict[str, Any]) -> Iterator[str]:
    """Where two records that are built alike differ."""
    for name in [name for name in before if name in now]:
        was, is_now = before[name], now[name]
        if isinstance(was, dict) and isinstance(is_now, dict):
            inner = "" if name == "recipe" else f"{name}."
            yield from (inner + difference for difference in _differences(was, is_now))
        elif was != is_now:
            yield f"{name}: {was}, not {is_now}"


def is_ours(path: Path) -> bool:
    """Whether a directory is a dfrot checkpoint or an interrupted run."""
    if not path.is_dir():
        return False
    if (path / RUN_FILE).is_file():
        return True
    try:
        config = read_json(path / "config.json")
    except UserError:
        return False
    record = config.get("quantization_config")
    return isinstance(record, dict) and record.get("quant_method") == "dfrot"


def write_json(path: Path, record: dict[str, Any]) -> None:
    """Write JSON atomically.

    Raises:
        EnvironmentFault: it cannot be written.
    """
    write_text(path, json.dumps(record, indent=2, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text atomically; half characters, which UTF-8 does not have, become question marks.

    Raises:
        EnvironmentFault: it cannot be written.
    """
    with atomically(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="replace")


@contextlib.contextmanager
def atomically(path: Path) -> Iterator[Path]:
    """A name beside `path` to write to; what is there in the end is synced and gets its name, or is removed.

    Raises:
        EnvironmentFault: it cannot be written.
    """
    temporary = path.with_name(path.name + ".tmp")
    with _faults(path.parent, temporary):
        yield temporary
        _publish(temporary, path)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    """Write safetensors atomically.

    Raises:
        EnvironmentFault: they cannot be written.
    """
    ready = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    temporary = path.with_suffix(".tmp")
    with _faults(path.parent, temporary):
        save_file(ready, temporary, metadata=metadata)
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # safetensors leaves files that only their owner can read
        _publish(temporary, path)


def _publish(temporary: Path, final: Path) -> None:
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, final)
    folder = os.open(final.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


class _faults:
    """Turns a failed write into a message, and removes what it left."""

    def __init__(self, folder: Path, temporary: Path | None = None) -> None:
        self._folder, self._temporary = folder, temporary

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        if error is None:
            return
        if self._temporary is not None:
            self._temporary.unlink(missing_ok=True)
        # safetensors reports a full disk as its own error type, with the system's text
        if isinstance(error, OSError) or "I/O error" in str(error) or "No space" in str(error):
            resumable = (self._folder / RUN_FILE).is_file()
            hint = " The same command with --resume instead of --overwrite continues." if resumable else ""
            raise EnvironmentFault(
                f"cannot write to {self._folder}: {error}. Make room or allow writing.{hint}"
            ) from error
