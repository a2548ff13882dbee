"""Load, measure, record."""

import functools
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from dfrot.checkpoint.load import Device, load, read_checkpoint
from dfrot.evaluation.perplexity import divergence, massive_unquantized, perplexity, perplexity_of, token_windows
from dfrot.evaluation.record import MASSIVE_UNQUANTIZED, Record, conditions, model_size, text_label
from dfrot.evaluation.zero_shot import find_tasks, zero_shot
from dfrot.models.source import locate
from dfrot.models.texts import read_text
from dfrot.system.errors import UserError
from dfrot.system.files import write_tensors
from dfrot.system.products import with_fast_products
from dfrot.system.progress import console


@dataclass(frozen=True)
class Measurement:
    """What is measured on a model."""

    texts: tuple[str, ...] = ()
    """For perplexity: wikitext2, c4, pydoc, or paths."""
    seq_len: int = 2048
    """Tokens of one block of a text."""
    max_tokens: int | None = None
    """Take the first blocks of this many tokens of each text."""
    against: str | None = None
    """The unquantized model, whose predictions on the texts are compared; None leaves that out."""
    massive_unquantized: bool = False
    """Also perplexity with massive tokens left unquantized, the papers' QuaRot.FP16(); eval needs --against."""
    tasks: tuple[str, ...] = ()
    """Tasks or groups of lm-eval."""
    task_path: str | None = None
    """A folder with further tasks."""
    limit: int | None = None
    """Take the first so many examples of each task."""
    batch_size: int | None = None
    """Sequences of a task at a time (default: as many as fit)."""

    def __post_init__(self) -> None:
        if not self.texts and not self.tasks:
            raise UserError("nothing is to be measured: give texts for perplexity, or tasks.")
        if len({text_label(text) for text in self.texts}) < len(self.texts):
            raise UserError(
                f"results name a text after its file, so the names must differ; got {', '.join(self.texts)}."
            )
        if self.massive_unquantized and self.against is None:
            raise UserError("massive tokens are found in the unquantized model: say which, --against MODEL.")
        if self.against is not None and not self.texts:
            raise UserError("predictions are compared on texts: give one, --ppl TEXT.")
        of_tasks = {"task_path": self.task_path, "limit": self.limit, "batch_size": self.batch_size}
        if not self.tasks and (given := [name for name, value in of_tasks.items() if value is not None]):
            raise UserError(f"--{given[0].replace('_', '-')} is for tasks: give some, --tasks TASK,TASK.")
        for name in ("limit", "batch_size"):
            if (value := of_tasks[name]) is not None and int(value) < 1:
                raise UserError(f"--{name.replace('_', '-')} is at least 1, got {value}.")

    def prepared(self) -> tuple[dict[str, str], Any]:
        """The texts, and lm-eval's manager of the tasks, if there are some: read before the work.

        Raises:
            UserError: there is no such text, task or folder.
            SetupError: a text has to come from the hub, which cannot be reached; lm-eval is not installed.
        """
        manager = find_tasks(self.tasks, self.task_path) if self.tasks else None
        return {text: read_text(text, "test") for text in self.texts}, manager


@with_fast_products
def evaluate(model: str, measurement: Measurement, *, device: Device = "cpu", per_token: Path | None = None) -> Record:
    """Measure a model or checkpoint.

    Args:
        device: as `load` takes it.
        per_token: also write the divergence of every token of the texts to this safetensors file; needs
            `measurement.against`.

    Raises:
        UserError: model, text, tasks or lengths do not fit.
        SetupError: something has to come from the hub, which cannot be reached; an optional package is missing;
            the file cannot be written.
    """
    if per_token is not None and measurement.against is None:
        raise UserError("figures by token compare the model with another: say which, --against MODEL.")
    if per_token is not None and not per_token.parent.is_dir():
        raise UserError(f"the directory of --per-token {per_token} does not exist.")
    path = locate(model)
    contents, manager = measurement.prepared()
    loaded, tokenizer = load(model, device=device)
    original = None if measurement.against is None else load(measurement.against, device=device)[0]
    if original is not None and original.config.vocab_size != loaded.config.vocab_size:
        raise UserError(
            f"predictions can be compared over one vocabulary; the model has {loaded.config.vocab_size} tokens, "
            f"{measurement.against} has {original.config.vocab_size}."
        )
    sizes = loaded.get_input_embeddings().num_embeddings, measurement.seq_len, measurement.max_tokens
    blocks = {text_label(text): token_windows(tokenizer, content, text, *sizes) for text, content in contents.items()}
    started = time.perf_counter()
    metrics: dict[str, float] = {}
    of_tasks: dict[str, Any] = {}
    tensors: dict[str, Tensor] = {}
    for label, tokens in blocks.items():
        if original is None:
            metrics[f"ppl/{label}"] = perplexity(loaded, tokens, label)
            continue
        found = divergence(loaded, original, tokens, label)
        tensors |= {f"{label}/{name}": tensor for name, tensor in found.items()} | {f"{label}/token_ids": tokens}
        nll, kl, top1 = (float(found[name].double().mean()) for name in ("nll", "kl", "agrees"))
        metrics |= {f"ppl/{label}": perplexity_of(nll), f"kl/{label}": kl, f"top1/{label}": top1}
        if measurement.massive_unquantized:
            during = functools.partial(massive_unquantized, loaded, original)
            bound = perplexity(loaded, tokens, "massive tokens unquantized", during)
            metrics[f"{MASSIVE_UNQUANTIZED}/{label}"] = bound
    if measurement.tasks:
        console.print(f"tasks: {', '.join(measurement.tasks)}")
        how = manager, measurement.limit, measurement.batch_size
        accuracies, of_tasks = zero_shot(loaded, tokenizer, measurement.tasks, *how)
        metrics |= accuracies
    if per_token is not None:
        write_tensors(per_token, tensors, {"format": "pt"})
    checkpoint = read_checkpoint(path)
    recipe = checkpoint and checkpoint.recipe
    return Record(
        model=model,
        recipe=recipe,
        metrics=metrics,
        size=model_size(path),
        timings_s={"evaluate": time.perf_counter() - started},
        conditions=conditions(
            loaded,
            text=", ".join(blocks),
            seq_len=measurement.seq_len,
            tokens={label: tokens.numel() for label, tokens in blocks.items()},
            against=measurement.against,
            seed=recipe and recipe.get("seed"),
            **of_tasks,
        ),
    )
