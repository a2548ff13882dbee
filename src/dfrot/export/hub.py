"""A checkpoint on the Hub: its model card, made from the recipe and result records, and the upload.

Logging in is left to huggingface_hub (`hf auth login`); no token passes through here.
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from dfrot.evaluation.record import Record, model_size, read_records, reported, text_label
from dfrot.export.checkpoint import Checkpoint
from dfrot.methods import METHODS
from dfrot.report.records import metrics_of, recipe_label, shown
from dfrot.report.words import number
from dfrot.rounding import ROUNDINGS
from dfrot.system.errors import SetupError, UserError
from dfrot.system.files import read_json
from dfrot.version import __version__

# What a result depends on. Not the model and text paths or the commit, which mean nothing on other machines
_CONDITIONS = ("text", "tokens", "seq_len", "examples", "seed", "dtype", "backend", "machine", "dfrot", "torch")
_CARD = Path(__file__).with_name("model_card.md")


def read_results(files: Iterable[Path]) -> list[Record]:
    """The records of `.jsonl` (`dfrot compare`) and `.json` files (`dfrot eval --json`); UserError if one has none."""
    records: list[Record] = []
    for file in files:
        if not file.is_file():
            raise UserError(f"there are no results in {file}. `dfrot eval CKPT --json FILE` writes some.")
        records += read_records(file) if file.suffix == ".jsonl" else [Record.from_json(read_json(file))]
    return records


def model_card(path: Path, repository: str, records: Sequence[Record] = (), base_model: str | None = None) -> str:
    """The README.md of a checkpoint, front matter and all.

    Args:
        repository: owner/name that it will have.
        records: results; those of this recipe and of the unquantized model are shown.
        base_model: hub id of the model that the checkpoint was made from.

    Raises:
        UserError: there is no checkpoint, or none of the records is of its recipe.
    """
    from huggingface_hub import ModelCardData

    checkpoint = Checkpoint.open(path)
    recipe, spec, size = checkpoint.recipe, checkpoint.runtime.spec, model_size(checkpoint.path)
    own = [record for record in records if record.recipe == recipe]
    if records and not own:
        raise UserError(f"none of the {len(records)} result records is of the recipe of {path}.")
    owners = METHODS.get(str(recipe.get("method"))), ROUNDINGS.get(str(recipe.get("weights")))
    papers = [paper for owner in owners if owner is not None for paper in owner.papers]
    bibtex = "\n".join(paper.bibtex() for paper in papers)
    tags = ["dfrot", "quantized", f"{spec.weights.bits}-bit", *(f"arxiv:{paper.arxiv}" for paper in papers)]
    data = ModelCardData(base_model=base_model, library_name="transformers", pipeline_tag="text-generation", tags=tags)
    kinds = {"weights": spec.weights, "activations": spec.activations, "keys and values": spec.keys}
    grids = ", ".join(f"{kind} in {grid.in_words}" for kind, grid in kinds.items() if grid.enabled)
    if more := sum(bits != spec.keys.bits for bits in checkpoint.runtime.kv_bits):
        grids += f" (more in {more} of {len(checkpoint.runtime.kv_bits)} blocks)"
    provenance = json.loads(json.dumps(recipe))
    if isinstance(calibration := provenance.get("calibration"), dict):
        calibration["text"] = text_label(str(calibration.get("text")))  # without its folder
    return _CARD.read_text(encoding="utf-8").format(
        front_matter=data.to_yaml(),
        title=base_model or checkpoint.path.resolve().name,
        spec=spec,
        grids=grids.capitalize() or "Nothing quantized",
        method=recipe.get("method"),
        rounding=recipe.get("weights"),
        version=__version__,
        size=size,
        megabytes={name: value / 1e6 for name, value in size.items()},
        results=_results([*(record for record in records if record.recipe is None), *own]) if own else "",
        repository=repository,
        provenance=json.dumps(provenance, indent=2),
        citation=f"\n\n## Citation\n\n```bibtex\n{bibtex}\n```" if papers else "",
    )


def push(checkpoint: Path, repository: str, *, private: bool = False, **card_options: Any) -> str:
    """Upload a checkpoint with its model card, whose records and base_model are `card_options`.

    Returns:
        The address of the repository, which is made if it does not exist.

    Raises:
        UserError: there is no checkpoint, nobody is logged in who may write there, or that is no name.
        SetupError: the Hub cannot be reached, or refuses.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

    if repository.count("/") != 1:
        raise UserError(f"a repository is called owner/name, got '{repository}'.")
    card = model_card(checkpoint, repository, **card_options)
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
    except Exception as error:  # of huggingface_hub's HTTP package, whichever that is; its text may hold the token
        raise SetupError(f"the Hub cannot be reached: {type(error).__name__}.") from error
    return str(address)


def _results(records: list[Record]) -> str:
    """A table of metrics, and what those of quantized models depend on."""
    metrics = reported(metrics_of(records))
    rows = [["", *map(shown, metrics)], ["---", *["---:"] * len(metrics)]]
    rows += [[recipe_label(record), *(number(record.metrics.get(name)) for name in metrics)] for record in records]
    table = "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |\n" for row in rows)
    own = [record.conditions for record in records if record.recipe is not None]
    measured = {key: conditions[key] for conditions in own for key in _CONDITIONS if conditions.get(key)}
    words = "; ".join(f"{key} {json.dumps(value)}" for key, value in measured.items()).replace('"', "")
    return f"## Results\n\n{table}\n{words}\n\n"
