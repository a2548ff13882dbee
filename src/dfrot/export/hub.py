"""A checkpoint on the Hub: its model card, made from the recipe and result records, and the upload.

Logging in is huggingface_hub's own business (`hf auth login`); no token passes through here.
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from dfrot.checkpoint.load import checkpoint_recipe
from dfrot.evaluation.record import Record, model_size, read_records, reported
from dfrot.models.texts import text_label
from dfrot.pipeline.recipe import Recipe
from dfrot.report.words import metrics_of, number, recipe_label, shown
from dfrot.system.errors import SetupError, UserError
from dfrot.system.files import read_json
from dfrot.version import __version__

PAPERS = {
    "dfrot": ("2412.00648", "Xiang, Jingyang and Zhang, Sai Qian", "DFRot: Achieving Outlier-Free and Massive "
              "Activation-Free for Rotated LLMs with Refined Rotation"),
    "quarot": ("2404.00456", "Ashkboos, Saleh and others", "QuaRot: Outlier-Free 4-Bit Inference in Rotated LLMs"),
    "duquant": ("2406.01721", "Lin, Haokun and others", "DuQuant: Distributing Outliers via Dual Transformation Makes "
                "Stronger Quantized LLMs"),
    "gptq": ("2210.17323", "Frantar, Elias and others", "GPTQ: Accurate Post-Training Quantization for Generative "
             "Pre-trained Transformers"),
    "lwc": ("2308.13137", "Shao, Wenqi and others", "OmniQuant: Omnidirectionally Calibrated Quantization for Large "
            "Language Models"),
}  # fmt: skip
_CONDITIONS = ("text", "tokens", "seq_len", "examples", "seed", "dtype", "backend", "machine", "dfrot", "torch")


def read_results(files: Iterable[Path]) -> list[Record]:
    """The records of `.jsonl` files (`dfrot compare`) and `.json` files (`dfrot eval --json`).

    Raises:
        UserError: a file is not there, or holds something else.
    """
    found: list[Record] = []
    for file in files:
        if not file.is_file():
            raise UserError(f"there are no results in {file}. `dfrot eval CKPT --json FILE` writes some.")
        found += read_records(file) if file.suffix == ".jsonl" else [Record.from_json(read_json(file))]
    return found


def model_card(checkpoint: Path, repository: str, records: Sequence[Record] = (), base_model: str | None = None) -> str:
    """The README.md of a checkpoint, front matter and all.

    Args:
        repository: owner/name, where it will be.
        records: results; those of this recipe, and of the model that is not quantized, are shown.
        base_model: hub id of the model that the checkpoint was made from.

    Raises:
        UserError: there is no checkpoint, or none of the records is of it.
    """
    from huggingface_hub import ModelCardData

    if (recipe := checkpoint_recipe(checkpoint)) is None:
        raise UserError(f"{checkpoint} is a model, but not a dfrot checkpoint.")
    own = [record for record in records if record.recipe == recipe.to_json()]
    if records and not own:
        raise UserError(f"none of the {len(records)} result records is of the recipe of {checkpoint}: {recipe.digest}.")
    size = model_size(checkpoint)
    tags = ["dfrot", "quantized", f"{recipe.spec.weights.bits}-bit"]
    tags += [f"arxiv:{PAPERS[name][0]}" for name in _methods(recipe)]
    data = ModelCardData(base_model=base_model, library_name="transformers", pipeline_tag="text-generation", tags=tags)
    spec = recipe.spec
    grids = {"weights": spec.weights, "activations": spec.activations, "keys and values": spec.keys}
    bits = ", ".join(f"{kind} in {grid.bits} bits" for kind, grid in grids.items() if grid.enabled)
    parts = [
        f"---\n{data.to_yaml()}\n---",
        f"# {base_model or checkpoint.resolve().name}, {spec}",
        f"{bits.capitalize() or 'Nothing quantized'}; rotated by `{recipe.method_name}`, weights rounded by "
        f"`{recipe.weights_name}`; made with dfrot {__version__}. {size['weight_bytes'] / 1e6:.1f} MB, where 16 bits "
        f"take {size['unquantized_bytes'] / 1e6:.1f} MB; {size['decoder_bits_per_weight']:.2f} bits per weight of the "
        "decoder.",
    ]
    if own:
        whole = [record for record in records if record.recipe is None]
        parts.append(f"## Results\n\n{_table([*whole, *own])}\n\n{_conditions(own)}")
    parts += [_HOW.replace("REPOSITORY", repository), _recipe(recipe)]
    if methods := _methods(recipe):
        parts.append("## Citation\n\n```bibtex\n" + "\n".join(map(_bibtex, methods)) + "\n```")
    return "\n\n".join(parts) + "\n"


def push(
    checkpoint: Path,
    repository: str,
    *,
    records: Sequence[Record] = (),
    base_model: str | None = None,
    private: bool = False,
) -> str:
    """Upload a checkpoint and its model card to the Hub, making the repository if it is not there.

    Args:
        repository: owner/name.

    Returns:
        The repository's address.

    Raises:
        UserError: there is no checkpoint, or nobody is logged in who may write there.
        SetupError: the Hub cannot be reached, or refuses.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

    card = model_card(checkpoint, repository, records, base_model)
    api = HfApi(library_name="dfrot", library_version=__version__)
    try:
        address = api.create_repo(repository, private=private, exist_ok=True)
        api.upload_file(path_or_fileobj=card.encode(), path_in_repo="README.md", repo_id=repository)
        # config.json last, as on the disk: without it there is no model
        later = ["config.json", "README.md", ".*", "*.tmp"]
        api.upload_folder(repo_id=repository, folder_path=checkpoint, ignore_patterns=later)
        api.upload_folder(repo_id=repository, folder_path=checkpoint, allow_patterns=["config.json"])
    except HFValidationError as error:
        raise UserError(f"a repository is called owner/name, got '{repository}'.") from error
    except LocalTokenNotFoundError as error:
        raise UserError("nobody is logged in: `hf auth login`.") from error
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        if status in (401, 403):
            raise UserError(f"whoever is logged in may not write to '{repository}': `hf auth login`.") from error
        raise SetupError(f"the Hub refuses '{repository}' ({status}).") from error
    except Exception as error:  # of whichever package huggingface_hub talks HTTP by
        raise SetupError(f"the Hub cannot be reached: {type(error).__name__}.") from error
    return str(address)


_HOW = """## How to load

```
pip install dfrot
dfrot generate REPOSITORY "Once upon a time"
```

```python
import dfrot  # so that transformers knows the format

model, tokenizer = dfrot.load("REPOSITORY")
```

`dfrot export` writes it for vLLM, llama.cpp or plain transformers, as far as they can run it."""


def _methods(recipe: Recipe) -> list[str]:
    """Whose papers a recipe follows; DFRot's rotations are QuaRot's but for one."""
    names = [*(["quarot"] if recipe.method_name == "dfrot" else []), recipe.method_name, recipe.weights_name]
    return [name for name in names if name in PAPERS]


def _table(records: Sequence[Record]) -> str:
    metrics = reported(metrics_of(records))
    rows = [["", *map(shown, metrics)], ["---", *["---:"] * len(metrics)]]
    rows += [[recipe_label(record), *(number(record.metrics.get(name)) for name in metrics)] for record in records]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)


def _conditions(records: Sequence[Record]) -> str:
    """What the numbers depend on, without what is called differently on another machine."""
    found: dict[str, Any] = {}
    for record in records:
        found |= {name: record.conditions[name] for name in _CONDITIONS if record.conditions.get(name)}
    return "; ".join(f"{name} {json.dumps(value)}" for name, value in found.items()).replace('"', "")


def _recipe(recipe: Recipe) -> str:
    record = recipe.to_json()
    record["calibration"]["text"] = text_label(record["calibration"]["text"])  # not where it lay
    return f"## Recipe\n\n```json\n{json.dumps(record, indent=2)}\n```"


def _bibtex(method: str) -> str:
    number, authors, title = PAPERS[method]
    year = f"20{number[:2]}"
    return f"@article{{{method}, title={{{title}}}, author={{{authors}}}, journal={{arXiv:{number}}}, year={{{year}}}}}"
