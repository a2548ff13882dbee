"""The commands that make and use checkpoints. Each is a dataclass: its fields are flags, and what stands behind a
field, or below it, is its help. What one command alone needs is imported when it runs."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from rich.table import Table
from tyro.conf import Positional, arg

from dfrot.cli.flags import (
    NONE_GIVEN,
    Calib,
    CalibTokens,
    Checkpoint,
    Device,
    Devices,
    MethodName,
    MethodOptions,
    Model,
    Out,
    PresetName,
    RoundingName,
    Seed,
    Source,
    Tune,
    TuneSeqLen,
    TuneSteps,
    TuneText,
    TuneTokens,
    device_for,
    err,
    flat,
    out,
    parse_size,
)
from dfrot.evaluation.record import model_size
from dfrot.models.source import open_source, pending
from dfrot.pipeline.estimate import Estimate
from dfrot.pipeline.recipe import Recipe
from dfrot.pipeline.run import quantize, require_fitting
from dfrot.system.distributed import ProcessGroup
from dfrot.system.errors import UserError
from dfrot.system.memory import keep_freed_memory
from dfrot.system.progress import console


@dataclass(frozen=True)
class Quantize:
    """Rotate and quantize a model into a checkpoint."""

    rare = (
        "check_source",
        "dtype",
        "calib_seq_len",
        "kv_bits_by_block",
        "tune_steps",
        "tune_tokens",
        "tune_seq_len",
        "tune_text",
        "options",
    )

    model: Source
    out: Out  # Checkpoint directory to make.
    method: MethodName = "rangerot"  # Which rotations.
    spec: str = "w4a4kv4"  # w<bits>[g<group>]a<bits>kv<bits>; 16 leaves alone; nvfp4, mxfp4: 4-bit floats.
    weights: RoundingName | None = None  # How weights are rounded (default gptq below 8 bits, else rtn).
    preset: PresetName = "paper"
    """Symmetry and clip ratios: the papers', what stock servers compute, or DuQuant's command."""
    calib: Calib = "wikitext2"
    calib_tokens: CalibTokens = None
    tune: Tune = "auto"
    seed: Seed = 0
    device: Device = "auto"
    memory: str | None = None
    """Memory that may be taken, such as 8GB (default: what is available); hidden states beyond it go to disk."""
    dry_run: Annotated[bool, arg(aliases=["--plan"])] = False  # Only print what is expected: memory and disk.
    resume: bool = False  # Continue an interrupted run.
    overwrite: bool = False  # Replace a checkpoint that is there.
    check_source: Literal["never", "auto", "always"] = "auto"
    """Compare logits of a few tokens with those of transformers on the source before the work (auto: if it fits)."""
    dtype: Literal["auto", "float16", "bfloat16", "float32", "float64"] = "auto"
    """Of unquantized tensors (auto: the model's own; float16 beside quantized weights if that is wider)."""
    calib_seq_len: int | None = None  # Tokens of one calibration sequence (default 2048, or calib-tokens if fewer).
    kv_bits_by_block: float | None = None
    """Average bits of keys and values, such as 4.5: blocks that lose most by the spec's get 8."""
    tune_steps: TuneSteps = None
    tune_tokens: TuneTokens = None
    tune_seq_len: TuneSeqLen = None
    tune_text: TuneText = None
    options: Annotated[MethodOptions, arg(name="")] = NONE_GIVEN

    def recipe(self) -> Recipe:
        """From everything given except where to write and how to run."""
        names = ["method", "weights", "spec", "preset", "calib", "calib_tokens", "calib_seq_len", "dtype", "seed"]
        names += ["kv_bits_by_block", *(name for name in vars(self) if name.startswith("tune"))]
        given = flat(self.options).items() - flat(NONE_GIVEN).items()
        return Recipe.parse(**{name: getattr(self, name) for name in names}, **dict(given))

    def run(self) -> None:
        processes = ProcessGroup.of()
        device = processes.device(device_for(self.device, quiet=not processes.is_main))
        if not processes.is_main:
            out.quiet = console.quiet = True
        with processes.joined(device):
            recipe, memory = self.recipe(), None if self.memory is None else parse_size(self.memory)
            source = open_source(self.model, fetch=False)
            if source.graph.traced:
                told = f"'{source.config.model_type}' has no table; what was traced of its blocks is proved on the way"
                err.print(told, style="dim", highlight=False)
            if source.part_of:
                told = f"'{source.part_of}' is a model of text and more; its language model alone is quantized"
                err.print(told, style="dim", highlight=False)
            expected = Estimate.of(source, recipe, memory, processes, self.check_source)
            if expected.tight:
                keep_freed_memory(largest=1 << 27)  # half the peak for twice the time, as measured
            if self.dry_run:
                require_fitting(source, recipe, processes)
                out.print(str(expected), highlight=False, soft_wrap=True)
                return expected.require_room(self.out)
            how: Any = {"resume": self.resume, "overwrite": self.overwrite, "memory": memory, "processes": processes}
            how["check_source"] = self.check_source
            result = quantize(self.model, recipe, self.out, device=device, **how)
        size = model_size(result.path)
        out.print(
            f"[bold]{result.path}[/bold]: {recipe.method.name} {recipe.rounding.name} {recipe.spec}, "
            f"{size['weight_bytes'] / 1e6:.1f} MB ({size['unquantized_bytes'] / 1e6:.1f} MB at 16 bits), "
            f"{size['decoder_bits_per_weight']:.2f} bits per decoder weight, {sum(result.timings_s.values()):.0f} s"
        )
        out.print(*result.summary(), sep="\n")


@dataclass(frozen=True)
class Export:
    """Write a checkpoint for vLLM, llama.cpp or plain transformers."""

    checkpoint: Checkpoint
    to: Literal["huggingface", "vllm", "gguf"]
    """huggingface: plain weights, without dfrot; vllm: compressed-tensors; gguf: a file for llama.cpp."""
    out: Out  # Directory to make; for gguf a file.
    device: Literal["cpu", "cuda"] | None = None  # vllm: where it is to run (default cpu); the two do not run the same.
    plugin: bool = False
    """vllm: dfrot is installed beside it; a CPU then computes online rotations and 4-bit activations."""
    tensor_parallel: int | None = None  # vllm: number of GPUs that every layer is split among (default 1).
    type: Literal["f16", "bf16", "f32", "q8_0", "q4_0"] | None = None
    """gguf: of the weights (default q4_0 or q8_0 if that keeps the checkpoint's integers, else f16)."""

    def run(self) -> None:
        from dfrot.export import export

        options = {"device": self.device, "tensor_parallel": self.tensor_parallel, "kind": self.type}
        different = export(self.checkpoint, self.to, self.out, plugin=self.plugin or None, **options)
        out.print(f"[bold]{self.out}[/bold]", soft_wrap=True)
        for sentence in different:
            out.print(f"different there: {sentence}", soft_wrap=True, markup=False)


@dataclass(frozen=True)
class Push:
    """Upload a checkpoint to the Hub, with a model card."""

    checkpoint: Checkpoint
    repository: Annotated[str, Positional, arg(metavar="OWNER/NAME")]  # Where to: made if it is not there.
    results: tuple[Path, ...] = ()  # What `dfrot eval --json` or `dfrot compare` wrote, for the card.
    base_model: str | None = None  # Hub id of the model that it was made from, for the card.
    private: bool = False  # Make a private repository.
    card: bool = False  # Only print the card.

    def run(self) -> None:
        from dfrot.export.hub import model_card, push, read_results

        records = read_results(self.results)
        if self.card:
            print(model_card(self.checkpoint, self.repository, records, self.base_model), end="")
            return
        card = {"records": records, "base_model": self.base_model}
        out.print(push(self.checkpoint, self.repository, private=self.private, **card), soft_wrap=True)


@dataclass(frozen=True)
class Generate:
    """Continue a prompt."""

    model: Model  # Checkpoint, or a model as `quantize` takes it.
    prompt: Annotated[str, Positional, arg(metavar="PROMPT")]  # Text to continue.
    max_new_tokens: int = 50  # Tokens to add at most.
    sample: bool = False  # Sample instead of taking the likeliest token.
    seed: int = 0  # Of sampling.
    device: Devices = "auto"

    def run(self) -> None:
        import torch
        from transformers import TextStreamer

        from dfrot.checkpoint.load import load
        from dfrot.evaluation.perplexity import checked
        from dfrot.models.texts import token_ids

        if self.max_new_tokens < 1:
            raise UserError(f"max-new-tokens is at least 1, got {self.max_new_tokens}.")
        model, tokenizer = load(self.model, device=device_for(self.device, spread=True))
        ids = token_ids(tokenizer, self.prompt, model.get_input_embeddings().num_embeddings)[None].to(model.device)
        if ids.numel() == 0:
            raise UserError("the prompt has no tokens. Give some text to continue.")
        torch.manual_seed(self.seed)
        settings: Any = {"max_new_tokens": self.max_new_tokens, "do_sample": self.sample}
        settings |= {"attention_mask": torch.ones_like(ids), "pad_token_id": tokenizer.eos_token_id}
        with checked(model):
            model.generate(ids, **settings, streamer=TextStreamer(tokenizer))


@dataclass(frozen=True)
class Info:
    """Describe a checkpoint, a model, or this machine and the spec that suits it."""

    model: Annotated[
        str | None, Positional, arg(metavar="[MODEL]", help="Checkpoint, or a model as `quantize` takes it.")
    ] = None
    device: Device = "auto"

    def run(self) -> None:
        from dfrot.checkpoint.load import read_checkpoint
        from dfrot.kernels.library import backend

        if self.model is None:
            return self._machine()
        coming = pending(self.model)
        folder = Path(self.model).expanduser() if coming is None else coming.folder
        known = coming is None or (folder / "config.json").is_file()
        checkpoint = read_checkpoint(folder) if known else None
        if checkpoint is not None:
            size = model_size(folder, None if coming is None or coming.is_there else coming.described)
            found: dict[str, Any] = {"recipe": checkpoint.recipe, "size": size, "backend": backend()}
        else:
            source = open_source(self.model, fetch=False)
            shapes = [tensor.shape for tensor in source.stored.values()]
            found = {"model_type": source.config.model_type, "traced": source.graph.traced}
            found |= {"blocks": source.num_blocks, "parameters": sum(map(math.prod, shapes))}
            found |= {"dtype": str(source.dtype).removeprefix("torch."), "quantized": False}
            found |= {"part_of": source.part_of} if source.part_of else {}
        out.print_json(json.dumps(found))

    def _machine(self) -> None:
        from dfrot.checkpoint.load import usable_device
        from dfrot.evaluation import machine

        device = usable_device(device_for(self.device, quiet=True))
        out.print(machine.computes_with(device), markup=False)
        table = Table("spec", "a prompt, × bfloat16", "a token, × bfloat16")
        for speed in (found := machine.speeds(device)):
            table.add_row(speed.spec, f"{speed.prompt:.2f}", f"{speed.token:.2f}")
        out.print(table, machine.advice(found))


@dataclass(frozen=True)
class Models:
    """List the known architectures, or show how an unknown one was traced."""

    model: Annotated[str | None, Positional, arg(metavar="[MODEL]")] = None  # A model, as for quantize.

    def run(self) -> None:
        from dfrot.models.graph import GRAPHS

        if self.model is not None:
            from dfrot.models.tracing import table_of

            source = open_source(self.model, fetch=False)
            return out.print(table_of(source.graph, source.config.model_type), markup=False, soft_wrap=True)
        table = Table("model_type", "models", "linear layers of a block")
        for model_type, graph in GRAPHS.items():
            table.add_row(model_type, graph.name, ", ".join(name.rpartition(".")[2] for name in graph.linears))
        out.print(table)
