"""inspect(): why a model is hard to quantize, and what each rotation does about it, in numbers.

The original model is streamed block by block over one sequence of the text. Every rotation is the one that `quantize`
would use: the method fits it to the train part of the text, while the statistics are of its test part (a text from a
file has only one part). Then each block's sensitivity is measured: its norm outputs alone are quantized.

`dfrot.inspect.schema` defines the two files. inspect.json is written last: where it is, both are complete.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

from dfrot.checkpoint.load import usable_device
from dfrot.evaluation.record import conditions
from dfrot.inspect.norm_stats import as_quantized, channel_stats, excess_kurtosis, relative_error
from dfrot.inspect.schema import SCHEMA, STATS_FILE, TENSORS_FILE, Stats
from dfrot.inspect.storage_errors import kv_errors, weight_errors
from dfrot.linalg.rotation import Identity
from dfrot.methods import variants
from dfrot.methods.massive import describe_massive, massive_tokens
from dfrot.methods.method import FitContext
from dfrot.methods.sensitivity import sensitivity_by_block
from dfrot.models.source import Source, load_tokenizer, open_source
from dfrot.models.stream import BlockRunner, captured_inputs
from dfrot.models.texts import read_text, text_label, token_windows
from dfrot.pipeline.recipe import Recipe
from dfrot.pipeline.run import calibration_tokens
from dfrot.quant.spec import Spec
from dfrot.system.errors import SetupError, UserError
from dfrot.system.files import write_json, write_tensors
from dfrot.system.progress import track
from dfrot.transform.transforms import Transforms

# What is compared: the papers' names, the method and its options.
ROTATIONS = variants()
SENSITIVITY_TOKENS = 256  # the cost of the sensitivities grows with the square of the number of blocks
SURFACE_TOKENS = 64  # as many as the papers' surfaces, token × channel, show


def inspect(
    model: str,
    out: Path,
    *,
    rotations: Sequence[str] = tuple(ROTATIONS),
    text: str = "wikitext2",
    seq_len: int = 2048,
    spec: str = "w4a4kv4",
    preset: str = "paper",
    seed: int = 0,
    device: str | torch.device = "cpu",
) -> Path:
    """Measure massive tokens, outlier channels and quantization errors of a model, by rotation.

    Args:
        model: whatever `quantize` takes; not a checkpoint.
        out: the directory for the two files; older ones in it are replaced.
        rotations: some of none, RO, RH, dfrot, rangerot, duquant.
        text: wikitext2, c4, pydoc, or a path; its first tokens are inspected.
        seq_len: tokens that are inspected, and as many that rotations are fitted to.

    Returns:
        The directory.

    Raises:
        UserError: model, text, spec or rotations do not fit, or the model is quantized already.
        SetupError: model or text cannot be had, or the files cannot be written.
    """
    device = usable_device(device)
    recipes = _recipes(rotations, spec, preset, text, seq_len, seed)
    recipe = next(iter(recipes.values()))  # they differ in their methods only
    source = open_source(model)
    tokenizer = load_tokenizer(source.path)
    token_ids = token_windows(tokenizer, read_text(text, "test"), text, seq_len, seq_len)  # (1, seq_len)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SetupError(f"cannot make the directory {out}: {error}") from error

    calibration = functools.cache(lambda: calibration_tokens(source, recipe))
    on = FitContext(source, recipe.spec.activations, calibration, device, seed)
    fitted = {name: recipe.method.fit(on).transforms for name, recipe in recipes.items()}
    stats: Stats = {
        "schema": SCHEMA,
        "model": model,
        "conditions": conditions(
            torch.empty(0, device=device),
            text=text_label(text),
            tokens=token_ids.numel(),
            sensitivity_tokens=min(SENSITIVITY_TOKENS, seq_len),
            seq_len=seq_len,
            seed=seed,
            spec=f"a{recipe.spec.activations.bits}",
            clip=recipe.spec.activations.clip_ratio,
            preset=preset,
            grids=dataclasses.asdict(recipe.spec),
        ),
        "tokens": [tokenizer.decode([token]) for token in token_ids[0].tolist()],
        "norms": [],
        "massive": [],
        "channels": [],
        "rotations": list(fitted),
        "kurtosis": {name: [] for name in fitted},
        "error": {},
        "weights": [],
        "kv": {kind: {"plain": [], "rotated": []} for kind in ("keys", "values")},
        "surface": "",
        "sensitivity": {},
    }
    # DuQuant's rotations differ from layer to layer and run online: there is no R in whose basis one block could be
    # quantized alone, and nothing that is folded into weights.
    residual = {name: transforms for name, transforms in fitted.items() if not transforms.inputs}
    tensors = _stream(stats, source, fitted, residual, recipe.spec, token_ids, device)
    if residual:
        bases = [transforms.residual or Identity(source.config.hidden_size) for transforms in residual.values()]
        first = token_ids[:, :SENSITIVITY_TOKENS]
        by_rotation = sensitivity_by_block(on, bases, recipe.spec.activations, first)
        stats["sensitivity"] = dict(zip(residual, by_rotation, strict=True))
    (out / STATS_FILE).unlink(missing_ok=True)
    write_tensors(out / TENSORS_FILE, tensors, {"format": "pt"})
    write_json(out / STATS_FILE, {**stats})
    return out


def _recipes(rotations: Sequence[str], spec: str, preset: str, text: str, seq_len: int, seed: int) -> dict[str, Recipe]:
    """The recipe of every rotation that was asked for, in the order of `ROTATIONS`; they differ in nothing else.

    Raises:
        UserError: one is not known, none was given, or the spec leaves something alone.
    """
    if not rotations or not set(rotations) <= ROTATIONS.keys():
        raise UserError(f"rotations are some of {', '.join(ROTATIONS)}; got {', '.join(rotations) or 'none at all'}.")
    recipes = {
        name: Recipe.parse(method, "rtn", spec, preset=preset, calib=text, calib_tokens=seq_len, seed=seed, **options)
        for name, (method, options) in ROTATIONS.items()
        if name in rotations
    }
    grids = next(iter(recipes.values())).spec
    if not (grids.weights.enabled and grids.activations.enabled and grids.keys.enabled):
        raise UserError(
            f"inspect shows errors of weights, activations and cache, so the spec has a grid for each; got '{spec}'. "
            "Give one such as w4a4kv4."
        )
    return recipes


@torch.no_grad()
def _stream(
    stats: Stats,
    source: Source,
    fitted: Mapping[str, Transforms],
    residual: Mapping[str, Transforms],
    grids: Spec,
    token_ids: Tensor,
    device: torch.device,
) -> dict[str, Tensor]:
    """One pass over the blocks of the original model. Fills `stats`, all but the sensitivity; returns the tensors."""
    masks: list[Tensor] = []  # (tokens,) for every norm, as are the errors
    errors: dict[str, list[Tensor]] = {name: [] for name in fitted}
    surfaces: dict[str, Tensor] = {}
    peak = -1.0
    hidden = source.embedding()[token_ids].float().to(device)  # (1, seq_len, hidden)
    run = BlockRunner(source, hidden)
    for index in track(range(source.num_blocks), "inspecting"):
        block = source.block(index).float().to(device)
        cache = DynamicCache()
        with captured_inputs({name: block.get_submodule(name) for name in source.graph.norms}) as seen:
            hidden = run(block, index, hidden, cache)
        for name, (reader, *_) in source.graph.norms.items():
            norm = block.get_submodule(name)
            assert isinstance(norm, nn.RMSNorm), "the skeleton has torch's norms"
            x = nn.functional.rms_norm(seen[name][0][0], norm.normalized_shape, eps=norm.eps)  # x̂: (tokens, hidden)
            masks.append(massive_tokens(x))
            at = torch.nonzero(masks[-1]).flatten()
            for entry in describe_massive(x[at], at, token_ids[0].to(device)[at], index, name):
                stats["massive"].append({**entry, "token": stats["tokens"][entry["position"]]})  # type: ignore[typeddict-item]
            stats["norms"].append(f"{index}.{name}")
            stats["channels"].append(channel_stats(x))
            rotated = {key: as_quantized(x, fit, index, reader, norm.weight) for key, fit in fitted.items()}
            for key, y in rotated.items():
                stats["kurtosis"][key].append(float(excess_kurtosis(y).mean()))
                errors[key].append(relative_error(y, grids.activations))
            if float(x.abs().max()) > peak:  # the surfaces are of the norm with the largest channel
                peak = float(x.abs().max())
                surfaces = {f"surface/{key}": y[:SURFACE_TOKENS].abs() for key, y in rotated.items()}
                stats["surface"] = stats["norms"][-1]
        stats["weights"] += weight_errors(block, index, source, residual, grids.weights)
        kept = cache.layers[index]
        for kind, x, grid in (("keys", kept.keys, grids.keys), ("values", kept.values, grids.values)):
            for how, error in kv_errors(x, grid).items():
                stats["kv"][kind][how].append(error)
    massive = torch.stack(masks)  # (norms, tokens)
    by_token = {key: torch.stack(of_norms) for key, of_norms in errors.items()}
    stats["error"] = {
        key: {"ordinary": _mean(error[~massive]), "massive": _mean(error[massive])} for key, error in by_token.items()
    }
    return {f"error/{key}": error for key, error in by_token.items()} | surfaces | {"massive": massive.to(torch.uint8)}


def _mean(error: Tensor) -> float | None:
    """None where there are no such tokens."""
    return float(error.mean(dtype=torch.float64)) if error.numel() else None
