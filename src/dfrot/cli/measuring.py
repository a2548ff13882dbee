"""The commands that measure: eval, compare, inspect, report, bench. What they are like: see commands.py."""

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import OmitArgPrefixes, Positional, Suppress, arg

from dfrot.cli.flags import (
    TUNE_FLAGS,
    Calib,
    CalibTokens,
    Device,
    Devices,
    LogTo,
    Model,
    Out,
    PresetName,
    Seed,
    Source,
    TuneSeqLen,
    TuneSteps,
    TuneText,
    TuneTokens,
    Words,
    device_for,
    out,
    parse_size,
    separated,
)
from dfrot.evaluation.record import append_records, log_records, read_records, tracker_class
from dfrot.evaluation.run import Measurement, evaluate
from dfrot.gguf.reader import EMBEDDED
from dfrot.methods import ROTATIONS
from dfrot.models.texts import NAMED
from dfrot.pipeline.recipe import Recipe
from dfrot.system.errors import SetupError, UserError
from dfrot.system.files import write_text


@dataclass(frozen=True)
class Measured(Measurement):
    """The flags of `eval` and `compare`: a measurement that is complete, and checked, once `against` is known."""

    rare = ("massive_unquantized", "task_path", "batch_size")

    texts: Annotated[tuple[str, ...] | None, arg(name="ppl", metavar="TEXT …")] = None  # type: ignore[assignment]
    """Texts for perplexity: wikitext2, c4, pydoc, or paths (default wikitext2, unless there are tasks)."""
    tasks: Words = ""  # type: ignore[assignment]
    """Tasks or groups of lm-eval, joined by commas: piqa,arc_easy,mmlu."""
    against: Suppress[str | None] = None  # Each command has its own flag for it.

    def __post_init__(self) -> None:
        """Leave the checks to `measurement`."""

    def measurement(self, against: str | None) -> Measurement:
        texts = (() if self.tasks else ("wikitext2",)) if self.texts is None else tuple(map(_absolute, self.texts))
        folder = None if self.task_path is None else str(Path(self.task_path).resolve())
        tasks = separated(self.tasks)
        return Measurement(**vars(self) | {"texts": texts, "against": against, "tasks": tasks, "task_path": folder})


MeasuringFlags = Annotated[Measured, OmitArgPrefixes, arg(name="measuring", help="")]


@dataclass(frozen=True)
class Eval:
    """Measure a model or checkpoint: perplexity, KL divergence, zero-shot tasks."""

    rare = ("per_token", "log_to")

    model: Model  # Checkpoint, or a model as `quantize` takes it.
    measured: MeasuringFlags = Measured()
    against: str | None = None
    """The unquantized model: also KL divergence from its predictions, and top-1 agreement with them."""
    per_token: Path | None = None  # Also write what --against measures on every token to this safetensors file.
    json: Path | None = None  # Also write the result record to this file; to one named .jsonl it is added.
    log_to: LogTo = None
    device: Devices = "auto"

    def run(self) -> None:
        if self.json is not None and not self.json.parent.is_dir():
            raise UserError(f"the directory of --json {self.json} does not exist.")
        lines = self.json if self.json is not None and self.json.suffix == ".jsonl" else None
        if lines is not None:
            read_records(lines, repair=True)
        if self.log_to is not None:
            tracker_class(self.log_to)  # its errors come before the work
        measurement = self.measured.measurement(self.against)
        record = evaluate(
            self.model, measurement, device=device_for(self.device, spread=True), per_token=self.per_token
        )
        errors = record.conditions.get("standard_errors", {})
        for metric, value in record.metrics.items():
            shown = f"{value:.4f}" if value < 1e5 else f"{value:.3e}"
            out.print(f"{metric} {shown}" + (f" ± {errors[metric]:.4f}" if metric in errors else ""))
        if lines is not None:
            append_records(lines, [record])
        elif self.json is not None:
            write_text(self.json, json.dumps(vars(record), indent=2) + "\n")
        if self.log_to is not None:
            log_records([record], self.log_to)


@dataclass(frozen=True)
class Compare:
    """Quantize and measure a model by many recipes.

    Finished trials are kept: the same command goes on.
    """

    rare = (*TUNE_FLAGS, "threads", "ray", "log_to")

    model: Source
    out: Out  # Folder for results.jsonl and the checkpoints.
    methods: Words = "none,quarot,dfrot,rangerot"
    """Methods, joined by commas; RO and RH are quarot with a random orthogonal or a randomized Hadamard matrix."""
    weights: Words = "rtn,gptq"  # Roundings, joined by commas.
    specs: Words = "w4a4kv4"  # Specs, joined by commas.
    seeds: Words = "0"  # Seeds, joined by commas.
    tune: Words = "none"  # What is trained after rounding, parts joined by +: none,biases,biases+scales.
    tune_steps: TuneSteps = None
    tune_tokens: TuneTokens = None
    tune_seq_len: TuneSeqLen = None
    tune_text: TuneText = None
    preset: Literal["auto"] | PresetName = "auto"  # Symmetry and clip ratios (auto: each method's own).
    calib: Calib = "wikitext2"
    calib_tokens: CalibTokens = None
    unquantized: bool = True  # Leave out the unquantized model, which is measured first.
    measured: MeasuringFlags = Measured()
    divergence: bool = False
    """Also KL divergence from the unquantized model's predictions, and top-1 agreement with them."""
    jobs: int = 1  # Trials at a time, each in a separate process.
    threads: int | None = None  # Threads of each (default: the cores divided among the jobs).
    ray: str | None = None
    """Address of a Ray cluster that takes the trials in place of jobs; auto for the one that runs here."""
    memory: str | None = None
    """Memory that quantizing may take, such as 8GB, divided among the jobs (default: what is available)."""
    device: Device = "auto"
    log_to: LogTo = None

    def run(self) -> None:
        from dfrot.compare.table import LiveTable, recipes
        from dfrot.compare.trials import compare

        if self.log_to is not None:
            tracker_class(self.log_to)  # its errors come before the work
        words = (self.methods, self.weights, self.specs, self.seeds, self.tune)
        methods, weights, specs, seeds, tunes = map(separated, words)
        calibration = {"calib": _absolute(self.calib), "calib_tokens": self.calib_tokens}
        tuning: Any = {name: getattr(self, name) for name in ("tune_steps", "tune_tokens", "tune_seq_len")}
        tuning["tune_text"] = self.tune_text and _absolute(self.tune_text)
        trials: list[Recipe | None] = [None] if self.unquantized else []
        trials += recipes(methods, weights, specs, seeds, self.preset, tunes, tuning, **calibration)
        model = _absolute(self.model)
        against = model if self.divergence or self.measured.massive_unquantized else None
        how: Any = {name: getattr(self, name) for name in ("jobs", "threads", "ray")}
        how["device"] = device_for(self.device)
        how["memory"] = None if self.memory is None else parse_size(self.memory)
        with LiveTable(trials, out) as table:
            measurement = self.measured.measurement(against)
            records = compare(model, trials, measurement, self.out, on_trial=table.on_trial, **how)
        if self.log_to is not None:
            log_records(records, self.log_to)
        if len(records) < len(trials):
            raise SetupError(f"{len(trials) - len(records)} of {len(trials)} trials failed; the others are recorded.")


@dataclass(frozen=True)
class Inspect:
    """Show why a model is hard to quantize: massive tokens, outlier channels, errors."""

    model: Model  # Hub id, directory with safetensors weights, .gguf file, or smollm2-135m; not a checkpoint.
    out: Out  # Directory for inspect.json and inspect.safetensors.
    rotations: tuple[Literal[tuple(ROTATIONS)], ...] = tuple(ROTATIONS)  # type: ignore[valid-type]
    """What is compared: no rotation, random orthogonal, randomized Hadamard, refined (two ways), DuQuant."""
    text: str = "wikitext2"
    """wikitext2, c4, pydoc, or a path; rotations are fitted to its train part, statistics are of its test part."""
    seq_len: int = 2048  # Tokens that are inspected, the first of the text.
    spec: str = "w4a4kv4"  # w<bits>[g<group>]a<bits>kv<bits>.
    preset: PresetName = "paper"  # Symmetry and clip ratios.
    seed: Seed = 0
    device: Device = "auto"

    def run(self) -> None:
        from dfrot.inspect.inspect import inspect, summary
        from dfrot.inspect.inspection import STATS_FILE
        from dfrot.system.files import read_json

        stats: Any = read_json(inspect(**vars(self) | {"device": device_for(self.device)}) / STATS_FILE)
        out.print(summary(stats))


@dataclass(frozen=True)
class Report:
    """Write result records and inspections as one HTML page."""

    directory: Annotated[Path, Positional, arg(metavar="DIR")]  # What `dfrot compare` or `dfrot inspect` wrote.
    out: Annotated[Path | None, arg(aliases=["-o"])] = None  # The page (default: report.html in the directory).

    def run(self) -> None:
        from dfrot.report.page import report

        path = report(self.directory, self.out)
        out.print(f"[bold]{path}[/bold]: {path.stat().st_size / 1e6:.1f} MB", soft_wrap=True)


@dataclass(frozen=True)
class Bench:
    """Time a checkpoint against the model that it was made from."""

    checkpoint: Annotated[str | None, Positional, arg(metavar="[CKPT]")] = None  # Checkpoint; none with --shape.
    source: str | None = None  # The unquantized model.
    shape: str | None = None  # Instead time one block of a real model's shape with random weights, such as llama-3-8b.
    spec: str = "w4a4kv4"  # Of that block.
    baseline: tuple[Literal["bfloat16", "float32"], ...] = ("bfloat16",)  # Dtypes of the unquantized model.
    dtype: Literal["bfloat16", "float32"] = "bfloat16"  # In which the checkpoint computes.
    prompt: int = 1024  # Tokens of the prompt.
    new_tokens: int = 32  # Tokens that are generated after it.
    rounds: int = 5  # How often each model is timed.
    threads: int | None = None  # Threads (default: torch's).
    json: Path | None = None  # Also write everything to this file.

    def run(self) -> None:
        import torch

        from dfrot.checkpoint.load import load
        from dfrot.evaluation.bench import bench, described, random_block

        if (self.checkpoint is None) == (self.shape is None):
            raise UserError("bench takes a checkpoint, or --shape.")
        if self.shape is not None and self.source is not None:
            raise UserError("--source goes with a checkpoint; a block of --shape has a source of its own.")
        if self.checkpoint is not None and self.source is None:
            raise UserError("a checkpoint is timed against the model that it was made from: say which, --source MODEL.")
        if self.threads is not None:
            if self.threads < 1:
                raise UserError(f"threads is at least 1, got {self.threads}.")
            torch.set_num_threads(self.threads)
        settings = {name: getattr(self, name) for name in ("dtype", "prompt", "new_tokens", "rounds")}
        settings["baselines"] = self.baseline
        models: list[Any]
        if self.shape is not None:
            recipe = Recipe.parse("quarot", "rtn", self.spec)
            models = [functools.partial(random_block, self.shape, each) for each in (recipe, None)]
        else:
            paths = str(self.checkpoint), str(self.source)
            models = [lambda dtype, path=path: load(path, dtype=dtype)[0] for path in paths]
        result = bench(*models, **settings)
        result["conditions"] |= {"model": self.checkpoint or self.shape, "source": self.source}
        out.print(*described(result), sep="\n")
        if self.json is not None:
            self.json.write_text(json.dumps(result, indent=2) + "\n")


def _absolute(name: str) -> str:
    """The absolute path of a file that exists; other names, and those that dfrot knows, unchanged."""
    if name in (*NAMED, *EMBEDDED):
        return name
    path = Path(name).expanduser()
    return str(path.resolve()) if path.exists() else name
