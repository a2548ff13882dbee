"""Everything that reads what somebody else may have written, with something valid to read, as targets of fuzzing.

A reader may return, or raise a UserError or an SetupError. Anything else is a failure: another exception, a hang,
memory without measure, a file that appears outside the directory it works in.
"""

import contextlib
import gzip
import json
import os
import random
import resource
import shutil
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from safetensors.torch import save

import dfrot
from dfrot.checkpoint.load import read_checkpoint
from dfrot.checkpoint.writer import is_ours, opened_writer, read_fit, write_fit
from dfrot.evaluation.record import read_records
from dfrot.gguf.header import read_header
from dfrot.inspect.inspection import read_inspection
from dfrot.kernels.library import instruction_set
from dfrot.models.configs import read_config
from dfrot.models.files import open_safetensors, stored_tensors
from dfrot.models.source import open_source
from dfrot.models.texts import load_tokenizer, read_text
from dfrot.pipeline.recipe import Recipe
from dfrot.report.page import page
from dfrot.runtime.config import RuntimeConfig
from dfrot.system.errors import SetupError, UserError
from dfrot.transform.transforms import Transforms
from tests.changes import changed_models
from tests.mutations import mutated_bytes, mutated_json_file, mutated_safetensors
from tests.report.records import record, write_inspection
from tests.sources import directories, gguf_files
from tests.tiny_models import write_tiny_model

SECONDS = 20  # after which an input hangs
MEMORY = 2**30  # bytes that one input may add to the peak

Mutate = Callable[[bytes, random.Random], bytes]


@dataclass(frozen=True)
class Reader:
    """Something that reads a directory.

    Attributes:
        read: of the directory.
        files: what a valid directory holds.
        broken: which of the files is mutated, and how; one of them for each input.
        whose: whose code an input mostly passes through; third parties' is slow, and gets fewer inputs.
        refuses: whether there are inputs that it has to refuse.
    """

    read: Callable[[Path], Any]
    files: dict[str, bytes]
    broken: dict[str, Mutate]
    whose: str = "dfrot"
    refuses: bool = True


@dataclass
class Tally:
    """What became of the inputs of one reader; failures are number and error."""

    accepted: int = 0
    refused: int = 0
    failures: list[tuple[int, str]] = field(default_factory=list)


class Hang(BaseException):
    """An input took too long."""


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir()) if file.is_file()}


def readers(scratch: Path) -> dict[str, Reader]:
    """All readers, with valid files that are made in `scratch`."""
    model = contents(write_tiny_model("llama", scratch / "tiny"))
    untied = write_tiny_model("qwen3", scratch / "untied")
    sharded = scratch / "sharded"
    dfrot.load(untied)[0].save_pretrained(sharded, max_shard_size="40kB")
    text = scratch / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog " * 20)
    recipe = Recipe.parse("duquant", "rtn", block=16, calib=str(text), calib_tokens=32)
    checkpoint = contents(dfrot.quantize(scratch / "tiny", recipe, scratch / "checkpoint").path)
    quarot = Recipe.parse("quarot", "rtn", head_mixing=True)
    plain = contents(dfrot.quantize(scratch / "tiny", quarot, scratch / "quarot").path)
    record_of_plan = json.loads(plain["config.json"])["quantization_config"]
    description, tensors = transforms_of_all_kinds()
    write_fit(scratch / "fit.safetensors", {"transforms": description, "notes": {}, "text": None}, tensors)
    write_inspection(scratch, blocks=2, tokens=8, width=16)
    lines = [
        vars(record(Recipe.parse(method), perplexity)) for method, perplexity in (("none", 2976.0), ("dfrot", 34.0))
    ]
    results = "".join(json.dumps(line) + "\n" for line in lines).encode()
    run = {"model": "0123", "recipe": recipe.to_json(), "dfrot": "0.1.0"}
    shard = {"sha256": "0" * 64, "notes": {"block": 0}}
    manifest = {"run": run, "files": {"model-00001-of-00004.safetensors": shard}}
    rows = b"".join(json.dumps({"text": "a text", "id": number}).encode() + b"\n" for number in range(3))
    return {
        "recipe": Reader(_object(Recipe.from_json), {"o.json": json.dumps(recipe.to_json()).encode()}, _json("o.json")),
        "plan": Reader(
            _object(RuntimeConfig.of_checkpoint), {"o.json": json.dumps(record_of_plan).encode()}, _json("o.json")
        ),
        "config": Reader(read_config, {"config.json": model["config.json"]}, _json("config.json")),
        "index": Reader(stored_tensors, contents(sharded), _json("model.safetensors.index.json")),
        "safetensors": Reader(
            _tensors, {"model.safetensors": save({"a": torch.ones(3, 4), "b": torch.ones(2).half()})}, _weights()
        ),
        "source": Reader(_source, model, {**_weights(), **_json("config.json")}),
        "checkpoint": Reader(_checkpoint, {"config.json": checkpoint["config.json"]}, _json("config.json")),
        "fit": Reader(
            _fit,
            {"fit.safetensors": (scratch / "fit.safetensors").read_bytes()},
            {"fit.safetensors": mutated_safetensors},
        ),
        "run": Reader(
            partial(_resumed, run), {"dfrot-run.json": json.dumps(manifest).encode()}, _json("dfrot-run.json")
        ),
        "records": Reader(
            lambda folder: read_records(folder / "results.jsonl"), {"results.jsonl": results}, {"results.jsonl": _line}
        ),
        "report": Reader(
            _page,
            {name: (scratch / name).read_bytes() for name in ("inspect.json", "inspect.safetensors")}
            | {"results.jsonl": results},
            {**_json("inspect.json"), "inspect.safetensors": mutated_safetensors, "results.jsonl": _line},
        ),
        "texts": Reader(
            _texts,
            {"a.jsonl": rows, "a.jsonl.gz": gzip.compress(rows, mtime=0), "wiki.a.raw": b" \n = A = \n text \n"},
            {"a.jsonl": _line, "a.jsonl.gz": _packed_line, "wiki.a.raw": mutated_bytes},
        ),
        "gguf": Reader(
            _gguf,
            {"a.gguf": small_gguf(scratch / "a.gguf")},
            {"a.gguf": mutated_bytes},
        ),
        "load": Reader(
            dfrot.load,
            checkpoint,
            {
                **_json("config.json", "model.safetensors.index.json", "generation_config.json"),
                **dict.fromkeys((name for name in checkpoint if name.endswith(".safetensors")), mutated_safetensors),
            },
            "transformers",
        ),
        **{
            f"changed {name}": Reader(read, {"seed": b""}, {"seed": _seed}, "transformers")
            for name, read in (
                ("whole", directories(scratch, sharded=False)),
                ("sharded", directories(scratch, sharded=True)),
                ("gguf", gguf_files(scratch)),
            )
        },
        "changed model": Reader(changed_models(scratch), {"seed": b""}, {"seed": _seed}, "transformers", refuses=False),
        "tokenizer": Reader(load_tokenizer, model, _json("tokenizer.json", "tokenizer_config.json"), "transformers"),
    }


def _seed(_: bytes, rng: random.Random) -> bytes:
    """From which a reader of tests/sources.py or tests/changes.py makes what it reads."""
    return rng.randbytes(8)


def small_gguf(path: Path) -> bytes:
    """A GGUF file with metadata of all kinds and two tensors."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_rope_freq_base(1e4)
    writer.add_token_list(["<s>", "a", "b"])
    writer.add_token_scores([0.0, 1.0, 2.0])
    for name in ("token_embd.weight", "blk.0.attn_q.weight"):
        writer.add_tensor(name, np.ones((4, 8), np.float32))
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        write()
    writer.close()
    return path.read_bytes()


def transforms_of_all_kinds() -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """A description with every type of rotation, and its tensors."""
    generator = torch.Generator().manual_seed(0)
    from dfrot.linalg.rotation import Hadamard, Permutation, block_diagonal, random_hadamard, random_orthogonal
    from dfrot.transform.transforms import InputTransform

    order = torch.randperm(8, generator=generator)
    tensors: dict[str, torch.Tensor] = {}
    stages = [{"q": InputTransform(torch.ones(8), torch.eye(4).repeat(2, 1, 1), order[None].clone())} for _ in range(2)]
    transforms = Transforms(
        residual=random_hadamard(8, generator),
        values=random_orthogonal(4, generator) @ Permutation(torch.randperm(4, generator=generator)),
        keys=Hadamard(12),
        ffn=block_diagonal(Hadamard(4), 3),
        inputs=tuple(stages),
    )
    return transforms.describe(tensors), tensors


def _json(*names: str) -> dict[str, Mutate]:
    return dict.fromkeys(names, mutated_json_file)


def _weights() -> dict[str, Mutate]:
    return {"model.safetensors": mutated_safetensors}


def _object(read: Callable[[Any], Any]) -> Callable[[Path], Any]:
    """A reader of JSON objects that others have parsed."""

    def parsed(folder: Path) -> Any:
        try:
            value = json.loads((folder / "o.json").read_bytes())
        except (ValueError, RecursionError) as error:
            raise UserError("no JSON") from error
        if not isinstance(value, dict):
            raise UserError("no object")
        return read(value)

    return parsed


def _line(data: bytes, rng: random.Random) -> bytes:
    """JSON lines with one of them mutated, mostly."""
    if rng.randrange(10) == 0:
        return mutated_bytes(data, rng)
    lines = data.splitlines()
    number = rng.randrange(len(lines))
    lines[number] = mutated_json_file(lines[number], rng)
    return b"\n".join(lines) + b"\n"


def _packed_line(data: bytes, rng: random.Random) -> bytes:
    if rng.randrange(2):
        return mutated_bytes(data, rng)
    return gzip.compress(_line(gzip.decompress(data), rng), mtime=0)


def _tensors(folder: Path) -> None:
    path = folder / "model.safetensors"
    stored_tensors(folder)
    with open_safetensors(path) as file:
        file.metadata()


def _source(folder: Path) -> None:
    source = open_source(str(folder))
    for index in range(source.num_blocks):
        source.block(index)
    _ = source.dtype, source.embedding(), source.head(), source.final_norm(), source.fingerprint()


def _checkpoint(folder: Path) -> None:
    is_ours(folder)
    read_checkpoint(folder)


def _fit(folder: Path) -> None:
    kept = read_fit(folder / "fit.safetensors")
    assert kept is not None, "the file is there"
    Transforms.from_description(kept[0]["transforms"], kept[1])


def _gguf(folder: Path) -> None:
    """What our check lets through, the package gguf has to get through; its exceptions are caught in `unpack`."""
    read_header(folder / "a.gguf")
    try:
        gguf.GGUFReader(folder / "a.gguf")
    except Exception as error:
        raise UserError(f"gguf: {error!r}") from error


def _resumed(run: dict[str, Any], folder: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a file that is not as the manifest says is made again, with a warning
        with opened_writer(folder, run, 4, resume=True) as writer:
            writer.shard_notes()


def _page(folder: Path) -> None:
    records, inspection = read_records(folder / "results.jsonl"), read_inspection(folder)
    page(records, inspection).encode(errors="replace")


def _texts(folder: Path) -> None:
    faults = []
    for file in sorted(folder.iterdir()):
        try:
            read_text(str(file))
        except UserError as error:
            faults.append(error)
    if faults:
        raise faults[0]


def fuzz(
    name: str, reader: Reader, numbers: range, seed: int, scratch: Path, before: Callable[[int], Any] = lambda _: None
) -> Tally:
    """Feed a reader the broken directories of these numbers.

    Args:
        before: called with each number first, for whoever wants to know where a crash was.
    """
    tally = Tally()
    with _surroundings(scratch) as folder:
        for number in numbers:
            before(number)
            broken_directory(name, reader, number, seed, folder)
            wrong = _outcome(reader, folder)
            if stray := sorted(path.name for path in scratch.iterdir() if path not in (folder, scratch / "cache")):
                wrong = f"left {stray}"
            if wrong is None:
                tally.accepted += 1
            elif wrong == "":
                tally.refused += 1
            else:
                tally.failures.append((number, wrong))
            shutil.rmtree(scratch / "cache", ignore_errors=True)
    return tally


def broken_directory(name: str, reader: Reader, number: int, seed: int, folder: Path) -> None:
    """Write the broken directory of a number."""
    rng = random.Random(f"{name} {seed} {number}")
    which = rng.choice(sorted(reader.broken))
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for file, content in reader.files.items():
        (folder / file).write_bytes(reader.broken[which](content, rng) if file == which else content)


def _outcome(reader: Reader, folder: Path) -> str | None:
    """None if the reader accepts the directory, nothing if it refuses it, else what went wrong."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        reader.read(folder)
        wrong = None
    except (UserError, SetupError) as error:
        wrong = "" if str(error) and len(str(error)) < 10_000 else f"a message of {len(str(error))} characters"
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # panics of Rust are no Exceptions
        at = error.__traceback__
        places = []
        while at is not None:
            places.append(f"{Path(at.tb_frame.f_code.co_filename).name}:{at.tb_lineno}")
            at = at.tb_next
        wrong = f"{type(error).__name__}: {str(error)[:120]!r} at {' '.join(places[-4:])}"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) * (1 if sys.platform == "darwin" else 1024)
    return f"took {grown >> 20} MB" if grown > MEMORY else wrong


@contextlib.contextmanager
def _surroundings(scratch: Path) -> Iterator[Path]:
    """A directory to break, alone in `scratch`, which is the working directory and has the cache."""

    def hang(*_: Any) -> None:
        raise Hang(f"no answer in {SECONDS} s")

    from transformers.utils import logging as transformers_logging

    instruction_set()  # compiled, where they are not, before an input is given its seconds
    scratch.mkdir()
    here, cache = Path.cwd(), os.environ.get("DFROT_CACHE")
    handler, level = signal.signal(signal.SIGALRM, hang), transformers_logging.get_verbosity()
    os.chdir(scratch)
    os.environ["DFROT_CACHE"] = str(scratch / "cache")
    transformers_logging.set_verbosity(transformers_logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # transformers warns of what it finds odd
            yield scratch / "model"
    finally:
        os.chdir(here)
        os.environ.pop("DFROT_CACHE")
        if cache is not None:
            os.environ["DFROT_CACHE"] = cache
        signal.signal(signal.SIGALRM, handler)
        transformers_logging.set_verbosity(level)
