"""inspect(): why a model is hard to quantize, and what each rotation does about it, in figures.

The original model is streamed block by block over one sequence of the text. Every rotation is what `quantize` itself
would use: the method fits it, to the train part of the text, while the figures are of its test part (a text from a file
has but one). Then one block at a time has its norm outputs quantized, for its share of the damage.

The figures are data, for `dfrot report` and for whoever wants to plot them: inspect.json, and inspect.safetensors with
what is by token (docs/index.md). inspect.json is written last; where it is, everything is.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

from dfrot.checkpoint.load import usable_device
from dfrot.evaluation.record import conditions
from dfrot.inspect.norm_stats import NormFigures, Surface, as_quantized, norm_figures, norm_output
from dfrot.inspect.storage_errors import kv_errors, weight_errors
from dfrot.linalg.rotation import Identity
from dfrot.methods import METHODS
from dfrot.methods.method import Context
from dfrot.methods.sensitivity import sensitivity_by_block
from dfrot.models.source import Source, open_source
from dfrot.models.stream import BlockRunner, captured_inputs
from dfrot.models.texts import read_text, text_label, token_windows
from dfrot.pipeline.recipe import Recipe
from dfrot.pipeline.run import calibration_tokens
from dfrot.quant.spec import Spec
from dfrot.system.errors import SetupError, UserError
from dfrot.system.files import write_json, write_tensors
from dfrot.system.progress import track
from dfrot.transform.transforms import Transforms

SCHEMA = 1
FIGURES, BY_TOKEN = "inspect.json", "inspect.safetensors"

# What is compared: the papers' names, the method and its options.
ROTATIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "none": ("none", {}),
    "RO": ("quarot", {"rotation": "orthogonal"}),
    "RH": ("quarot", {"rotation": "hadamard"}),
    "dfrot": ("dfrot", {}),
    "duquant": ("duquant", {}),
}
DAMAGE_TOKENS = 256  # for damage by block, whose cost grows with the square of the number of blocks


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
        out: the directory for the figures; older ones in it are replaced.
        rotations: some of none, RO, RH, dfrot, duquant.
        text: wikitext2, c4, pydoc, or a path; its first tokens are inspected.
        seq_len: tokens that are inspected, and as many that rotations are fitted to.

    Returns:
        The directory.

    Raises:
        UserError: model, text, spec or rotations do not fit, or the model is quantized already.
        SetupError: model or text cannot be had, or the figures cannot be written.
    """
    there = usable_device(device)
    recipes = _recipes(rotations, spec, preset, text, seq_len, seed)
    recipe = next(iter(recipes.values()))  # they differ in their methods only
    source = open_source(model)
    tokenizer = source.tokenizer()
    token_ids = token_windows(tokenizer, read_text(text, "test"), text, seq_len, seq_len)  # (1, seq_len)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SetupError(f"cannot make the directory {out}: {error}") from error

    calibration = functools.cache(lambda: calibration_tokens(source, recipe))
    contexts = {name: Context(source, recipe, calibration, there) for name, recipe in recipes.items()}
    fitted = {name: METHODS[context.recipe.method_name](context) for name, context in contexts.items()}
    # DuQuant's rotations differ from layer to layer and run online: there is no R for damage, and none is folded.
    residual = {name: transforms for name, transforms in fitted.items() if not transforms.inputs}
    figures = _stream(source, fitted, residual, recipe.spec, token_ids, there)
    damage: list[list[float]] = []
    if residual:
        bases = [transforms.residual or Identity(source.config.hidden_size) for transforms in residual.values()]
        context = next(iter(contexts.values()))
        damage = sensitivity_by_block(context, bases, recipe.spec.activations, token_ids[:, :DAMAGE_TOKENS])

    tokens = [tokenizer.decode([token]) for token in token_ids[0].tolist()]
    depended_on = conditions(
        torch.empty(0, device=there),
        text=text_label(text),
        tokens=token_ids.numel(),
        damage_tokens=min(DAMAGE_TOKENS, seq_len),
        seq_len=seq_len,
        seed=seed,
        spec=f"a{recipe.spec.activations.bits}",
        clip=recipe.spec.activations.clip,
        preset=preset,
        grids=dataclasses.asdict(recipe.spec),
    )
    record, tensors = figures.described(tokens)
    head = {"schema": SCHEMA, "model": model, "conditions": depended_on, "tokens": tokens}
    (out / FIGURES).unlink(missing_ok=True)
    write_tensors(out / BY_TOKEN, tensors, {"format": "pt"})
    write_json(out / FIGURES, {**head, **record, "damage": dict(zip(residual, damage, strict=True))})
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


@dataclasses.dataclass
class Figures:
    """What one pass over the blocks has found.

    Attributes:
        rotations: names, in order.
        norms: in the order in which they run.
        weights, kv: as they stand in inspect.json.
        surface: of the norm with the largest channel so far.
    """

    rotations: list[str]
    norms: list[NormFigures] = dataclasses.field(default_factory=list)
    weights: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    kv: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    surface: Surface | None = None

    def described(self, tokens: list[str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """The figures as JSON, and as tensors those by token."""
        assert self.surface is not None, "a model has norms"
        massive = torch.stack([norm.massive for norm in self.norms])  # (norms, tokens)
        error = {name: torch.stack([norm.error[name] for norm in self.norms]) for name in self.rotations}
        record = {
            "norms": [f"{norm.block}.{norm.norm}" for norm in self.norms],
            "massive": [_with_text(found, tokens) for norm in self.norms for found in norm.found],
            "channels": [
                {"block": norm.block, "norm": norm.norm, "median": norm.median, "largest": norm.largest}
                for norm in self.norms
            ],
            "rotations": self.rotations,
            "kurtosis": {name: [norm.kurtosis[name] for norm in self.norms] for name in self.rotations},
            "error": {
                name: {"ordinary": _mean(by_token[~massive]), "massive": _mean(by_token[massive])}
                for name, by_token in error.items()
            },
            "weights": self.weights,
            "kv": self.kv,
            "surface": self.surface.described(),
        }
        tensors = {f"error/{name}": by_token for name, by_token in error.items()}
        tensors |= {f"surface/{name}": surface for name, surface in self.surface.by_rotation.items()}
        return record, {**tensors, "massive": massive.to(torch.uint8)}


@torch.no_grad()
def _stream(
    source: Source,
    fitted: Mapping[str, Transforms],
    residual: Mapping[str, Transforms],
    grids: Spec,
    token_ids: Tensor,
    device: torch.device,
) -> Figures:
    """One pass over the blocks of the original model."""
    figures = Figures(list(fitted))
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
            x = norm_output(seen[name][0][0], norm)
            rotated = {key: as_quantized(x, fit, index, reader, norm.weight) for key, fit in fitted.items()}
            figures.norms.append(norm_figures(x, rotated, grids.activations, index, name, token_ids[0]))
            if figures.surface is None or x.abs().max() > figures.surface.peak:
                figures.surface = Surface.of(f"{index}.{name}", x, rotated)
        figures.weights += weight_errors(block, index, source, residual, grids.weights)
        kept = cache.layers[index]
        keys, values = kv_errors(kept.keys, grids.keys), kv_errors(kept.values, grids.values)
        figures.kv.append({"block": index, "keys": keys, "values": values})
    return figures


def _with_text(found: dict[str, Any], tokens: list[str]) -> dict[str, Any]:
    """A massive token with its text in place of its id."""
    named = {**found, "token": tokens[found["position"]]}
    del named["token_id"]
    return named


def _mean(error: Tensor) -> float | None:
    """None where there are no such tokens."""
    return float(error.mean(dtype=torch.float64)) if error.numel() else None
