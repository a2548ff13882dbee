"""The command line: parse, call one library function, print.

What only one command needs is imported inside it.
"""

import json
import os
import shlex
import signal
import statistics
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from rich.console import Console
from rich.table import Table
from rich.text import Text

from dfrot.system.errors import SetupError, UserError
from dfrot.system.memory import keep_freed_memory, parse_size
from dfrot.version import __version__

if TYPE_CHECKING:
    from dfrot.evaluation.run import Measurement
    from dfrot.pipeline.recipe import Recipe
    from dfrot.system.distributed import ProcessGroup

out = Console()
err = Console(stderr=True)

Model = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
Checkpoint = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="CKPT")]


@dataclass(frozen=True)
class Quantize:
    """Rotate and quantize a model into a checkpoint."""

    model: Model
    """Hub id, directory with safetensors weights, .gguf file, or smollm2-135m."""
    out: Annotated[Path, tyro.conf.arg(aliases=["-o"])]
    """Checkpoint directory to make."""
    method: Literal["none", "quarot", "dfrot", "duquant"] = "dfrot"
    """Which rotations."""
    weights: Literal["rtn", "gptq", "lwc"] | None = None
    """How weights are rounded (default gptq below 8 bits, else rtn)."""
    spec: str = "w4a4kv4"
    """w<bits>[g<group>]a<bits>kv<bits>; 16 leaves alone."""
    preset: Literal["paper", "deploy", "duquant"] = "paper"
    """Symmetry and clip ratios: DFRot's command, what stock servers compute, or DuQuant's command."""
    calib: str = "wikitext2"
    """Calibration text: wikitext2, c4, pydoc, or a path."""
    calib_tokens: int | None = None
    """Calibration tokens in total (default 65536 where weights are fitted to them, else 2048)."""
    calib_seq_len: int | None = None
    """Tokens of one calibration sample (default 2048, or calib-tokens if fewer)."""
    seed: int = 0
    """Of everything random."""
    dtype: Literal["auto", "float16", "bfloat16", "float32", "float64"] = "auto"
    """Of what is left unquantized (auto: the model's own; float16 beside quantized weights if that is wider)."""
    rotation: Literal["hadamard", "orthogonal"] | None = None
    """quarot, dfrot: R1, or its start, is a randomized Hadamard (default) or random orthogonal matrix."""
    head_mixing: bool | None = None
    """quarot: also mix the heads online before o_proj."""
    online: bool | None = None
    """quarot, dfrot: also rotate while the model runs (R3, R4; default); without, all is folded, for other engines."""
    gamma: float | Literal["auto"] | None = None
    """dfrot: weight of tokens with massive activations (default auto; 100 with the paper's objective)."""
    steps: int | None = None
    """dfrot: refinement steps at most (default 100)."""
    objective: Literal["recipe", "paper"] | None = None
    """dfrot: refine for the recipe's activation quantizer (default), or exactly as the paper does."""
    solver: Literal["descent", "procrustes"] | None = None
    """dfrot: descent on ranges (default), or the paper's alternation."""
    massive: Literal["relative", "rotation"] | None = None
    """dfrot: rule for massive tokens: small relative error (default), or error raised by a random rotation."""
    samples: int | None = None
    """dfrot: calibration samples that the rotation is refined on (default 1)."""
    block: int | None = None
    """duquant: size of the rotated blocks (default 128, or the largest power of two that divides)."""
    greedy_steps: int | None = None
    """duquant: steps of the search for a rotation (default 256)."""
    permutations: int | None = None
    """duquant: how often channels are permuted and rotated again (default 1)."""
    order: Literal["zigzag", "random", "none"] | None = None
    """duquant: how channels are dealt to the blocks in between (default zigzag)."""
    smooth: bool | None = None
    """duquant: smooth first (default yes)."""
    alpha: float | None = None
    """duquant: strength of smoothing (default 0.6; with lwc 0.5)."""
    base: Literal["none", "quarot"] | None = None
    """duquant: rotate the model as it is (default), or on top of QuaRot's folded rotations."""
    act_order: bool | None = None
    """gptq: quantize the columns with the largest inputs first (default yes)."""
    damping: float | None = None
    """gptq: share of the Hessian's mean diagonal that is added to it (default 0.01)."""
    epochs: int | None = None
    """lwc: passes over the calibration text for every block (default 20)."""
    learning_rate: float | None = None
    """lwc: of Adam, at the start (default 0.05)."""
    weight_symmetric: bool | None = None
    """Override the preset."""
    weight_clip: float | Literal["search"] | None = None
    """Override the preset's clip ratio of weights (paper, deploy: searched for; duquant: 0.8)."""
    act_symmetric: bool | None = None
    """Override the preset."""
    act_clip: float | None = None
    """Override the preset's clip ratio of activations."""
    kv_clip: float | None = None
    """Override the preset's clip ratio of keys, values and queries."""
    value_clip: float | None = None
    """Override the preset's clip ratio of values."""
    quantize_queries: bool | None = None
    """Override the preset: whether queries are quantized on the grid of the keys."""
    device: str = "cpu"
    """Where to compute: cpu, cuda."""
    resume: bool = False
    """Continue an interrupted run."""
    overwrite: bool = False
    """Replace a checkpoint that is there."""
    memory: str | None = None
    """Memory that may be taken, such as 8GB (default: what is available); what exceeds it goes to disk, if it can."""
    plan: bool = False
    """Only say what is expected: memory, disk, time."""

    def recipe(self) -> "Recipe":
        from dfrot.pipeline.recipe import Recipe

        given = {name: value for name, value in vars(self).items()}
        for name in ("model", "out", "device", "resume", "overwrite", "memory", "plan"):
            del given[name]
        return Recipe.parse(**given)

    def run(self) -> None:
        from dfrot.system.distributed import ProcessGroup
        from dfrot.system.progress import silence

        processes = ProcessGroup.of()
        device = processes.device(self.device)
        if not processes.is_main:
            out.quiet = True
            silence()
        with processes.joined(device):
            self._run(processes, device)

    def _run(self, processes: "ProcessGroup", device: str) -> None:
        from dfrot.models.source import open_source
        from dfrot.pipeline.estimate import Estimate

        recipe = self.recipe()
        memory = None if self.memory is None else parse_size(self.memory)
        expected = Estimate.of(open_source(self.model), recipe, memory, processes)
        if expected.tight:
            keep_freed_memory(largest=1 << 27)  # half the peak for twice the time, as measured
        if self.plan:
            out.print(str(expected), highlight=False, soft_wrap=True)
            expected.require_room(self.out)
            return
        from dfrot.evaluation.record import model_size
        from dfrot.pipeline.run import quantize

        report = quantize(
            self.model,
            recipe,
            self.out,
            device=device,
            resume=self.resume,
            overwrite=self.overwrite,
            memory=memory,
            processes=processes,
        )
        size = model_size(report.path)
        seconds = sum(report.timings_s.values())
        out.print(
            f"[bold]{report.path}[/bold]: {recipe.method_name} {recipe.weights_name} {recipe.spec}, "
            f"{size['weight_bytes'] / 1e6:.1f} MB ({size['unquantized_bytes'] / 1e6:.1f} MB at 16 bits), "
            f"{size['decoder_bits_per_weight']:.2f} bits per decoder weight, {seconds:.0f} s"
        )
        if (massive := report.notes.get("massive_tokens")) is not None:
            where = f", block {massive[0]['block']} position {massive[0]['position']} the first" if massive else ""
            out.print(f"{len(massive)} norm outputs with massive activations{where}; gamma {report.notes['gamma']:g}")
        stages = [s for block in report.notes.get("weights_by_block", []) for s in block.get("stages", {}).values()]
        if ratios := [s["loss"] / s["rtn_loss"] for s in stages if s["loss"] > 0]:
            kept = statistics.geometric_mean(ratios)
            out.print(f"gptq leaves {kept:.0%} of the layers' squared error when rounded to nearest (geometric mean)")
        if raised := [s["damping"] for s in stages if s["damping"] > recipe.weights.damping]:  # type: ignore[union-attr]
            out.print(
                f"{len(raised)} Hessians were singular and damped by up to {max(raised):g} of their mean diagonal"
            )
        out.print(f"folding changed the model by {report.invariance:.0e} (float64, relative)")


@dataclass(frozen=True)
class Measured:
    """What is measured, by `eval` and by `compare`."""

    ppl: tuple[str, ...] | None = None
    """Texts for perplexity: wikitext2, c4, pydoc, or paths (default wikitext2, unless there are tasks)."""
    seq_len: int = 2048
    """Tokens of one block of a text."""
    max_tokens: int | None = None
    """Take the first blocks of this many tokens of each text."""
    tasks: str | None = None
    """Tasks or groups of lm-eval, joined by commas: piqa,arc_easy,mmlu."""
    task_path: Path | None = None
    """A folder with further tasks."""
    limit: int | None = None
    """Take the first so many examples of each task."""
    batch_size: int | None = None
    """Sequences of a task at a time (default: as many as fit)."""

    massive_unquantized: bool = False
    """Also perplexity with massive tokens left unquantized, the papers' QuaRot.FP16(); eval needs --against."""

    def measurement(self, against: str | None) -> "Measurement":
        from dfrot.evaluation.run import Measurement

        tasks = _words(self.tasks)
        return Measurement(
            texts=tuple(map(_located, self.ppl)) if self.ppl is not None else () if tasks else ("wikitext2",),
            seq_len=self.seq_len,
            max_tokens=self.max_tokens,
            against=against,
            massive_unquantized=self.massive_unquantized,
            tasks=tasks,
            task_path=None if self.task_path is None else str(self.task_path.resolve()),
            limit=self.limit,
            batch_size=self.batch_size,
        )


@dataclass(frozen=True)
class Eval:
    """Measure a model or checkpoint."""

    model: Model
    """Checkpoint, or a model as `quantize` takes it."""
    measured: Annotated[Measured, tyro.conf.arg(name="")] = Measured()
    against: str | None = None
    """The unquantized model: also KL divergence from its predictions, and top-1 agreement with them."""
    per_token: Path | None = None
    """Also write what --against measures on every token to this safetensors file."""
    json: Path | None = None
    """Also write the result record to this file."""
    log_to: str | None = None
    """Also log it to a tracker: wandb, trackio, mlflow, tensorboard or another that accelerate knows."""
    device: str = "cpu"
    """Where to compute: cpu, cuda, or auto to spread the model over all GPUs."""

    def run(self) -> None:
        from dfrot.evaluation.run import evaluate
        from dfrot.evaluation.trackers import log_records

        if self.json is not None and not self.json.parent.is_dir():
            raise UserError(f"the directory of --json {self.json} does not exist.")
        record = evaluate(
            self.model, self.measured.measurement(self.against), device=self.device, per_token=self.per_token
        )
        errors = record.conditions.get("standard_errors", {})
        for metric, value in record.metrics.items():
            shown = f"{value:.4f}" if value < 1e5 else f"{value:.3e}"
            out.print(f"{metric} {shown}" + (f" ± {errors[metric]:.4f}" if metric in errors else ""))
        if self.json is not None:
            self.json.write_text(json.dumps(record.to_json(), indent=2) + "\n")
        if self.log_to is not None:
            log_records([record], self.log_to)


@dataclass(frozen=True)
class Compare:
    """Quantize and measure a model by many recipes. Finished trials are kept: the same command goes on."""

    model: Model
    """Hub id, directory with safetensors weights, .gguf file, or smollm2-135m."""
    out: Annotated[Path, tyro.conf.arg(aliases=["-o"])]
    """Folder for results.jsonl and the checkpoints."""
    methods: str = "none,quarot,dfrot"
    """Methods, joined by commas; RO and RH are quarot with a random orthogonal or a randomized Hadamard matrix."""
    weights: str = "rtn,gptq"
    """Weight quantizers, joined by commas."""
    specs: str = "w4a4kv4"
    """Specs, joined by commas."""
    seeds: str = "0"
    """Seeds, joined by commas."""
    preset: Literal["auto", "paper", "deploy", "duquant"] = "auto"
    """Symmetry and clip ratios (auto: duquant for the method of that name, else paper)."""
    calib: str = "wikitext2"
    """Calibration text: wikitext2, c4, pydoc, or a path."""
    calib_tokens: int | None = None
    """Calibration tokens in total (default 65536 where weights are fitted to them, else 2048)."""
    unquantized: bool = True
    """Also measure the model as it is."""
    measured: Annotated[Measured, tyro.conf.arg(name="")] = Measured()
    divergence: bool = False
    """Also KL divergence from the unquantized model's predictions, and top-1 agreement with them."""
    jobs: int = 1
    """Trials at a time, each in a process of its own."""
    threads: int | None = None
    """Threads of each (default: the cores divided among the jobs)."""
    ray: str | None = None
    """Address of a Ray cluster that takes the trials in place of jobs; auto for the one that runs here."""
    memory: str | None = None
    """Memory that quantizing may take, such as 8GB, divided among the jobs (default: what is available)."""
    device: str = "cpu"
    """Where to compute: cpu, cuda."""
    log_to: str | None = None
    """Also log the records to a tracker: wandb, trackio, mlflow, tensorboard or another that accelerate knows."""

    def run(self) -> None:
        from dfrot.compare.table import LiveTable, recipes
        from dfrot.compare.trials import compare
        from dfrot.evaluation.trackers import log_records

        trials: list[Recipe | None] = [None] if self.unquantized else []
        trials += recipes(
            *map(_words, (self.methods, self.weights, self.specs, self.seeds)),
            preset=self.preset,
            calib=_located(self.calib),
            calib_tokens=self.calib_tokens,
        )
        model = _located(self.model)
        against = model if self.divergence or self.measured.massive_unquantized else None
        with LiveTable(trials, out) as table:
            records = compare(
                model,
                trials,
                self.measured.measurement(against),
                self.out,
                device=self.device,
                jobs=self.jobs,
                threads=self.threads,
                ray=self.ray,
                memory=None if self.memory is None else parse_size(self.memory),
                on_trial=table.on_trial,
            )
        if self.log_to is not None:
            log_records(records, self.log_to)
        if len(records) < len(trials):
            raise SetupError(f"{len(trials) - len(records)} of {len(trials)} trials failed; the others are recorded.")


@dataclass(frozen=True)
class Inspect:
    """Look into a model: massive tokens, outlier channels, quantization errors by rotation."""

    model: Model
    """Hub id, directory with safetensors weights, .gguf file, or smollm2-135m; not a checkpoint."""
    out: Annotated[Path, tyro.conf.arg(aliases=["-o"])]
    """Directory for inspect.json and inspect.safetensors."""
    rotations: tuple[Literal["none", "RO", "RH", "dfrot", "duquant"], ...] = ("none", "RO", "RH", "dfrot", "duquant")
    """What is compared: no rotation, random orthogonal, randomized Hadamard, refined, DuQuant."""
    text: str = "wikitext2"
    """wikitext2, c4, pydoc, or a path; rotations are fitted to its train part, statistics are of its test part."""
    seq_len: int = 2048
    """Tokens that are inspected, the first of the text."""
    spec: str = "w4a4kv4"
    """w<bits>[g<group>]a<bits>kv<bits>."""
    preset: Literal["paper", "deploy", "duquant"] = "paper"
    """Symmetry and clip ratios."""
    seed: int = 0
    """Of everything random."""
    device: str = "cpu"
    """Where to compute: cpu, cuda."""

    def run(self) -> None:
        from dfrot.inspect.inspect import inspect
        from dfrot.inspect.schema import STATS_FILE
        from dfrot.inspect.summary import summary
        from dfrot.system.files import read_json

        stats: Any = read_json(inspect(**vars(self)) / STATS_FILE)
        out.print(summary(stats))


@dataclass(frozen=True)
class Report:
    """Write result records and inspections as one HTML page that needs no network."""

    directory: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DIR")]
    """What `dfrot compare` or `dfrot inspect` wrote."""
    out: Annotated[Path | None, tyro.conf.arg(aliases=["-o"])] = None
    """The page (default: report.html in the directory)."""

    def run(self) -> None:
        from dfrot.report import report

        path = report(self.directory, self.out)
        out.print(f"[bold]{path}[/bold]: {path.stat().st_size / 1e6:.1f} MB", soft_wrap=True)


@dataclass(frozen=True)
class Export:
    """Write a checkpoint for another engine."""

    checkpoint: Checkpoint
    """Directory written by `dfrot quantize`."""
    to: Literal["huggingface", "vllm", "gguf"]
    """huggingface: plain weights, without dfrot; vllm: compressed-tensors; gguf: a file for llama.cpp."""
    out: Annotated[Path, tyro.conf.arg(aliases=["-o"])]
    """Directory to make; for gguf a file."""
    device: Literal["cpu", "cuda"] | None = None
    """vllm: where it is to run (default cpu); the two do not run the same."""
    plugin: bool = False
    """vllm: dfrot is installed beside it; a CPU then computes online rotations and 4-bit activations."""
    tensor_parallel: int | None = None
    """vllm: number of GPUs that every layer is split among (default 1)."""
    type: Literal["f16", "bf16", "f32", "q8_0", "q4_0"] | None = None
    """gguf: of the weights (default q4_0 or q8_0 if that keeps the checkpoint's integers, else f16)."""

    def run(self) -> None:
        from dfrot.export import export

        different = export(
            self.checkpoint,
            self.to,
            self.out,
            device=self.device,
            plugin=self.plugin or None,
            tensor_parallel=self.tensor_parallel,
            kind=self.type,
        )
        out.print(f"[bold]{self.out}[/bold]", soft_wrap=True)
        for sentence in different:
            out.print(f"different there: {sentence}", soft_wrap=True, markup=False)


@dataclass(frozen=True)
class Push:
    """Upload a checkpoint to the Hub, with a model card."""

    checkpoint: Checkpoint
    """Directory written by `dfrot quantize`."""
    repository: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="OWNER/NAME")]
    """Where to: made if it is not there."""
    results: tuple[Path, ...] = ()
    """What `dfrot eval --json` or `dfrot compare` wrote, for the card."""
    base_model: str | None = None
    """Hub id of the model that it was made from, for the card."""
    private: bool = False
    """Make a private repository."""
    card: bool = False
    """Only print the card."""

    def run(self) -> None:
        from dfrot.export.hub import model_card, push, read_results

        records = read_results(self.results)
        if self.card:
            print(model_card(self.checkpoint, self.repository, records, self.base_model), end="")
            return
        address = push(
            self.checkpoint, self.repository, records=records, base_model=self.base_model, private=self.private
        )
        out.print(address, soft_wrap=True)


@dataclass(frozen=True)
class Generate:
    """Continue a prompt with a quantized model."""

    model: Model
    """Checkpoint, or a model as `quantize` takes it."""
    prompt: tyro.conf.Positional[str]
    """Text to continue."""
    max_new_tokens: int = 50
    """Tokens to add at most."""
    sample: bool = False
    """Sample instead of taking the likeliest token."""
    seed: int = 0
    """Of sampling."""
    device: str = "cpu"
    """Where to compute: cpu, cuda, or auto to spread the model over all GPUs."""

    def run(self) -> None:
        import torch
        from transformers import TextStreamer

        from dfrot.checkpoint.load import load

        if self.max_new_tokens < 1:
            raise UserError(f"max-new-tokens is at least 1, got {self.max_new_tokens}.")
        model, tokenizer = load(self.model, device=self.device)
        inputs = tokenizer(self.prompt, return_tensors="pt").to(model.device)
        if inputs.input_ids.shape[1] == 0:
            raise UserError("the prompt has no tokens. Give some text to continue.")
        torch.manual_seed(self.seed)
        model.generate(
            **inputs,
            max_new_tokens=self.max_new_tokens,
            do_sample=self.sample,
            streamer=TextStreamer(tokenizer),
            pad_token_id=tokenizer.eos_token_id,
        )


@dataclass(frozen=True)
class Bench:
    """Time a checkpoint against the model that it was made from, and compare their memory."""

    checkpoint: tyro.conf.Positional[str | None] = None
    """Checkpoint; none with --shape."""
    source: str = "smollm2-135m"
    """The unquantized model."""
    shape: str | None = None
    """Instead time one block of a real model's shape with random weights, such as llama-3-8b."""
    spec: str = "w4a4kv4"
    """Of that block."""
    baseline: tuple[Literal["bfloat16", "float32"], ...] = ("bfloat16",)
    """Dtypes of the unquantized model."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """In which the checkpoint computes."""
    prompt: int = 1024
    """Tokens of the prompt."""
    new_tokens: int = 32
    """Tokens that are generated after it."""
    rounds: int = 5
    """How often each model is timed."""
    threads: int | None = None
    """Threads (default: torch's)."""
    json: Path | None = None
    """Also write everything to this file."""

    def run(self) -> None:
        import torch

        from dfrot.evaluation.bench import bench, bench_shape
        from dfrot.pipeline.recipe import Recipe

        if (self.checkpoint is None) == (self.shape is None):
            raise UserError("bench takes a checkpoint, or --shape.")
        if self.threads is not None:
            torch.set_num_threads(self.threads)
        words: dict[str, Any] = {
            "baselines": self.baseline,
            "dtype": self.dtype,
            "prompt": self.prompt,
            "new_tokens": self.new_tokens,
            "rounds": self.rounds,
        }
        if self.shape is not None:
            result = bench_shape(self.shape, Recipe.parse("quarot", "rtn", self.spec), **words)
        else:
            result = bench(str(self.checkpoint), self.source, **words)
        table = Table("", "prefill tokens/s", "decode tokens/s", "first token s", "decoder MB", "cache MB")
        rows = {"checkpoint": result["checkpoint"], **result["baselines"]}
        for name, timed in rows.items():
            prefill, decode = (statistics.median(timed[key]) for key in ("prefill_s", "decode_s"))
            speeds = (f"{self.prompt / prefill:.0f}", f"{1 / decode:.1f}", f"{prefill:.3f}")
            table.add_row(name, *speeds, *(f"{timed[key] / 1e6:.1f}" for key in ("decoder_bytes", "kv_bytes")))
        out.print(table)
        for name, ratios in result["ratios"].items():
            out.print(
                f"against {name}: prefill {ratios['prefill']:.2f} times as fast, decode {ratios['decode']:.2f} times; "
                f"decoder weights {ratios['decoder_bytes']:.3f} and cache {ratios['kv_bytes']:.3f} of the memory"
            )
        conditions = result["conditions"]
        out.print(f"{conditions['backend']}, {conditions['threads']} threads, {conditions['machine']}")
        if self.json is not None:
            self.json.write_text(json.dumps(result, indent=2) + "\n")


@dataclass(frozen=True)
class Info:
    """Say what a checkpoint is, and what computes here."""

    checkpoint: Checkpoint
    """Directory written by `dfrot quantize`."""

    def run(self) -> None:
        from dfrot.checkpoint.load import checkpoint_recipe
        from dfrot.evaluation.record import model_size
        from dfrot.kernels.library import backend

        recipe = checkpoint_recipe(self.checkpoint)
        if recipe is None:
            raise UserError(f"{self.checkpoint} is a model, but not a dfrot checkpoint: it is not quantized.")
        size = model_size(self.checkpoint)
        out.print_json(json.dumps({"recipe": recipe.to_json(), "size": size, "backend": backend()}))


@dataclass(frozen=True)
class Models:
    """List the known architectures."""

    def run(self) -> None:
        from dfrot.models.families import GRAPHS

        table = Table("model_type", "models", "linear layers of a block")
        for model_type, graph in GRAPHS.items():
            table.add_row(model_type, graph.name, ", ".join(name.rpartition(".")[2] for name in graph.linears))
        out.print(table)


COMMANDS = {
    "quantize": Quantize,
    "eval": Eval,
    "compare": Compare,
    "inspect": Inspect,
    "report": Report,
    "export": Export,
    "push": Push,
    "generate": Generate,
    "bench": Bench,
    "info": Info,
    "models": Models,
}


def main(arguments: list[str] | None = None) -> int:
    """Run one command. Returns the exit code: 2 for the user's mistake, 1 for the environment's fault."""
    arguments = sys.argv[1:] if arguments is None else arguments
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    if arguments == ["--version"]:
        out.print(f"dfrot {__version__}")
        return 0
    keep_freed_memory()
    warnings.showwarning = _show_warning  # type: ignore[assignment]
    command: Any = tyro.extras.subcommand_cli_from_dict(
        COMMANDS,  # type: ignore[arg-type]
        prog="dfrot",
        args=arguments,
        description="Run large language models in 4 bits and keep their quality. --debug shows tracebacks.",
    )
    try:
        _check_processes(command)
        command.run()
    except (UserError, SetupError) as error:
        if debug:
            raise
        _complain(str(error))
        return 2 if isinstance(error, UserError) else 1
    except KeyboardInterrupt:
        hint = ""
        if isinstance(command, Compare):
            hint = " Finished cells are kept: the same command goes on."
        elif isinstance(command, Quantize) and command.out.is_dir():
            words = [word for word in arguments if word not in ("--overwrite", "--resume")]
            hint = f" Finished blocks are kept; this continues:\n{shlex.join(['dfrot', *words, '--resume'])}"
        _complain(f"interrupted.{hint}")
        return 128 + signal.SIGINT
    except BrokenPipeError:  # `dfrot … | head`: the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        if debug:
            raise
        _complain(str(error))
        return 1
    return 0


def _check_processes(command: Any) -> None:
    from dfrot.system.distributed import ProcessGroup

    if not isinstance(command, Quantize) and (count := ProcessGroup.of().count) > 1:
        raise UserError(f"`dfrot quantize` is what several processes can share; torchrun has started {count}.")


def _located(name: str) -> str:
    """A path as it is called from everywhere; a name that is none as it is."""
    path = Path(name).expanduser()
    return str(path.resolve()) if path.exists() else name


def _words(joined: str | None) -> tuple[str, ...]:
    """The words of an option that are joined by commas."""
    return tuple(word.strip() for word in (joined or "").split(",") if word.strip())


def _complain(message: str) -> None:
    err.print(Text("dfrot: ", style="bold red").append(Text(message, style="none")), soft_wrap=True)


def _show_warning(message: Warning | str, category: type[Warning], *_: Any) -> None:
    err.print(Text("dfrot: ", style="bold yellow").append(Text(f"warning: {message}", style="none")), soft_wrap=True)


def run() -> None:
    """The console script."""
    sys.exit(main())
