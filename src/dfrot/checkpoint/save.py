"""Writing a checkpoint so that an unfinished one never looks finished.

A checkpoint is a directory of safetensors shards, one per decoder block plus one before and one after, an index, a
tokenizer and a config.json. Each file is written beside its place, synced and renamed; config.json comes last. Until
then `dfrot-run.json` stands there and says which run the shards belong to, and `dfrot-run.safetensors` keeps the fitted
rotations, so that the run can be resumed.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from dfrot.errors import EnvironmentFault, UserError
from dfrot.json_file import parse_json, read_json
from dfrot.models.source import open_safetensors, stored_tensors

RUN_FILE = "dfrot-run.json"
FIT_FILE = "dfrot-run.safetensors"
NOTES_FILE = "fit.json"
INDEX_FILE = "model.safetensors.index.json"


class CheckpointWriter:
    """Writes the shards of one run into one directory.

    Args:
        path: the checkpoint directory. Nothing is created before the first shard is written.
        run: JSON that identifies the run; resuming compares it.
        num_shards: how many shards there will be.
        resume: keep the shards of the same run, interrupted before.
        overwrite: delete a checkpoint, or an interrupted run, that is there.

    Raises:
        UserError: something is in the way: not ours, finished already, interrupted, or of another run.
    """

    def __init__(
        self, path: Path, run: dict[str, Any], num_shards: int, *, resume: bool = False, overwrite: bool = False
    ) -> None:
        self.path, self._run, self._num_shards, self._replaced = path.resolve(), run, num_shards, overwrite
        if resume and overwrite:
            raise UserError("--resume keeps what is there and --overwrite deletes it: give one of them.")
        if not path.exists() or (path.is_dir() and not any(file.name != RUN_FILE + ".tmp" for file in path.iterdir())):
            self._replaced = False
            return
        if not is_ours(path):
            raise UserError(
                f"{path} exists and is not a dfrot checkpoint; nothing there is touched. Choose another -o directory."
            )
        if overwrite:  # nothing is deleted before there is something to put in its place
            return
        if (path / "config.json").is_file():
            raise UserError(f"{path} is a finished checkpoint. Choose another -o directory, or --overwrite it.")
        if not resume:
            raise UserError(f"{path} holds an interrupted run. Continue it with --resume, or --overwrite it.")
        if (before := read_json(path / RUN_FILE)) != run:
            differing = sorted(key for key in {*before, *run} if before.get(key) != run.get(key))
            raise UserError(
                f"{path} holds an interrupted run with another {', '.join(differing)}. "
                "Resume with the same, choose another -o directory, or --overwrite it."
            )

    def _shard(self, number: int) -> Path:
        return self.path / f"model-{number + 1:05}-of-{self._num_shards:05}.safetensors"

    def _notes(self, number: int) -> Path:
        return self.path / f"dfrot-run-{number + 1:05}.json"

    def shard_notes(self) -> list[dict[str, Any]]:
        """The notes of all shards that have some, in order."""
        return [read_json(path) for path in map(self._notes, range(self._num_shards)) if path.is_file()]

    def has(self, number: int) -> bool:
        """Whether shard `number` is there from the run that is being resumed."""
        return self._shard(number).is_file()

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
        self._begin()
        if notes:
            write_json(self._notes(number), notes)
        write_tensors(self._shard(number), tensors, {"format": "pt"})

    def _begin(self) -> None:
        """Make the directory, or clear it if it is to be replaced, and say in it which run it belongs to."""
        if self._replaced:
            self._replaced = False
            with _faults(self.path):
                doomed = Path(tempfile.mkdtemp(dir=self.path.parent, prefix=f".{self.path.name}-"))
                os.rename(self.path, doomed)
                shutil.rmtree(doomed)
        if not (self.path / RUN_FILE).is_file():
            with _faults(self.path):
                self.path.mkdir(parents=True, exist_ok=True)
            write_json(self.path / RUN_FILE, self._run)

    def save_fit(self, record: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """Keep what was fitted, so that a resumed run goes on with exactly that.

        Raises:
            EnvironmentFault: it cannot be written.
        """
        self._begin()
        write_fit(self.path / FIT_FILE, record, tensors)

    def load_fit(self) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
        """What `save_fit` kept, if this run resumes one that got so far."""
        return None if self._replaced else read_fit(self.path / FIT_FILE)

    def adopt(self, other: Path) -> list[dict[str, Any]]:
        """Take all shards, as links where that is possible, from a finished checkpoint that has the same.

        Returns:
            The notes of its shards.

        Raises:
            EnvironmentFault: they cannot be written.
        """
        self._begin()
        for shard in map(self._shard, range(self._num_shards)):
            temporary = shard.with_suffix(".tmp")
            with _faults(self.path, temporary):
                temporary.unlink(missing_ok=True)
                try:
                    os.link(other / shard.name, temporary)
                except OSError:  # another file system
                    shutil.copyfile(other / shard.name, temporary)
                _publish(temporary, shard)
        notes = other / NOTES_FILE
        return read_json(notes).get("weights_by_block", []) if notes.is_file() else []

    def finish(self, config: dict[str, Any], notes: dict[str, Any]) -> None:
        """Write notes (if any), index and config; only now the directory is a checkpoint.

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
        for path in (*map(self._notes, range(self._num_shards)), self.path / FIT_FILE, self.path / RUN_FILE):
            path.unlink(missing_ok=True)


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


def _tensors(file: Any) -> dict[str, Tensor]:
    return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 — safe_open is no mapping


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
    temporary = path.with_name(path.name + ".tmp")
    with _faults(path.parent, temporary):
        temporary.write_text(json.dumps(record, indent=2, allow_nan=False) + "\n", encoding="utf-8")
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
