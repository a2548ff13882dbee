"""inspect(): why a model is hard to quantize, and what each rotation does about it, in numbers.

The original model is streamed block by block over one sequence of the text. Every rotation is the one that `quantize`
would use: the method fits it to the train part of the text, while the statistics are of its test part (a text from a
file has only one part). Then each block's sensitivity is measured: its norm outputs alone are quantized.
"""

import dataclasses
import functools
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from rich.console import Group
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

from dfrot.checkpoint.load import usable_device
from dfrot.evaluation.perplexity import token_windows
from dfrot.evaluation.record import conditions, text_label
from dfrot.inspect.inspection import SCHEMA, STATS_FILE, TENSORS_FILE, LayerErrors, NormChannels, Stats
from dfrot.linalg.rotation import Identity, Rotation
from dfrot.methods import ROTATIONS
from dfrot.methods.massive import describe_massive, massive_tokens
from dfrot.methods.method import FitContext
from dfrot.methods.quarot import hadamard
from dfrot.methods.sensitivity import kl_divergences
from dfrot.models.source import Source, open_source
from dfrot.models.stream import BlockRunner, captured_inputs
from dfrot.models.texts import load_tokenizer, read_text
from dfrot.pipeline.recipe import Calibration, Recipe
from dfrot.pipeline.run import calibration_tokens
from dfrot.quant.affine import dequantize
from dfrot.quant.spec import Spec, TensorSpec
from dfrot.rounding.rtn import rtn
from dfrot.runtime.key_bias import KeyBias
from dfrot.runtime.kv import KVQuantizer
from dfrot.system.errors import UserError
from dfrot.system.files import translate_io_errors, write_json, write_tensors
from dfrot.system.products import with_fast_products
from dfrot.system.progress import track
from dfrot.transform.transforms import Transforms

# What is compared: the papers' names, the method and its options.
SENSITIVITY_TOKENS = 256  # the cost of the sensitivities grows with the square of the number of blocks
SURFACE_TOKENS = 64  # as many as the papers' surfaces, token × channel, show
LISTED_TOKENS = 5  # massive ones, on the terminal
LARGEST = 8  # outlier channels that are listed of every norm
_TINY = 1e-30  # keeps the statistics of a token of zeros finite


@with_fast_products
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
    """Measure massive tokens, outlier channels and quantization errors of a model, by rotation; returns `out`.

    Args:
        model: whatever `quantize` takes; not a checkpoint.
        out: the directory for the two files; older ones in it are replaced.
        rotations: some of none, RO, RH, dfrot, rangerot, duquant.
        text: wikitext2, c4, pydoc, or a path; its first tokens are inspected.
        seq_len: tokens that are inspected, and as many that rotations are fitted to.

    Raises:
        UserError: model, text, spec or rotations do not fit, or the model is quantized already.
        SetupError: model or text cannot be had, or the files cannot be written.
    """
    device = usable_device(device)
    if not rotations or not set(rotations) <= ROTATIONS.keys():
        raise UserError(f"rotations are some of {', '.join(ROTATIONS)}; got {', '.join(rotations) or 'none at all'}.")
    length = min(seq_len, Calibration.seq_len)
    words: Any = {"calib": text, "calib_tokens": seq_len // length * length, "calib_seq_len": length, "seed": seed}
    recipes = {
        name: Recipe.parse(method, "rtn", spec, preset=preset, **words, **options)
        for name, (method, options) in ROTATIONS.items()
        if name in rotations
    }
    recipe = next(iter(recipes.values()))  # they differ in their methods only
    grids = recipe.spec
    if not (grids.weights.enabled and grids.activations.enabled and grids.keys.enabled):
        raise UserError(
            f"inspect shows errors of weights, activations and cache, so the spec has a grid for each; got '{spec}'. "
            "Give one such as w4a4kv4."
        )
    source = open_source(model)
    if not source.graph.norms:
        raise UserError(f"inspect shows what norms hand to linear layers; in {source.graph.name} none does.")
    tokenizer = load_tokenizer(source.path)
    rows = source.config.vocab_size
    token_ids = token_windows(tokenizer, read_text(text, "test"), text, rows, seq_len, seq_len)  # (1, seq_len)
    with translate_io_errors(out):
        out.mkdir(parents=True, exist_ok=True)

    calibration = functools.cache(lambda: calibration_tokens(source, recipe))
    on = FitContext(source, grids.activations, calibration, device, seed)
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
            spec=f"a{grids.activations}",
            clip=grids.activations.clip_ratio,
            preset=preset,
            grids=dataclasses.asdict(grids),
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
    tensors = _stream(stats, on, fitted, grids, token_ids)
    # DuQuant's rotations differ from layer to layer: there is no R in whose basis one block could be quantized alone.
    unrotated = Identity(source.config.hidden_size)
    bases = {name: transforms.residual or unrotated for name, transforms in fitted.items() if not transforms.inputs}
    if bases:
        by_basis = sensitivity_by_block(on, list(bases.values()), grids.activations, token_ids[:, :SENSITIVITY_TOKENS])
        stats["sensitivity"] = dict(zip(bases, by_basis, strict=True))
    (out / STATS_FILE).unlink(missing_ok=True)  # it is written last: where it is, both files are complete
    write_tensors(out / TENSORS_FILE, tensors, {"format": "pt"})
    write_json(out / STATS_FILE, {**stats})
    return out


@torch.no_grad()
def _stream(
    stats: Stats, on: FitContext, fitted: Mapping[str, Transforms], grids: Spec, token_ids: Tensor
) -> dict[str, Tensor]:
    """One pass over the blocks of the original model. Fills `stats`, all but the sensitivity; returns the tensors."""
    source, device = on.source, on.device
    masks: list[Tensor] = []  # (tokens,) for every norm, as are the errors
    errors: dict[str, list[Tensor]] = {name: [] for name in fitted}
    surfaces: dict[str, Tensor] = {}
    peak = -1.0
    hidden = source.embedded(token_ids).float().to(device)  # (1, seq_len, hidden)
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
            for entry in describe_massive(x, masks[-1], token_ids, index, name):
                stats["massive"].append({**entry, "token": stats["tokens"][entry["position"]]})  # type: ignore[typeddict-item]
            stats["norms"].append(f"{index}.{name}")
            stats["channels"].append(outliers(x))
            rotated = {key: as_quantized(x, fit, index, reader, norm.weight) for key, fit in fitted.items()}
            for key, y in rotated.items():
                stats["kurtosis"][key].append(float(excess_kurtosis(y).mean()))
                errors[key].append(relative_error(y, grids.activations.fake_quantize(y)))
            if float(x.abs().max()) > peak:  # the surfaces are of the norm with the largest channel
                peak = float(x.abs().max())
                surfaces = {f"surface/{key}": y[:SURFACE_TOKENS].abs() for key, y in rotated.items()}
                stats["surface"] = stats["norms"][-1]
        stats["weights"] += weight_errors(block, index, source, fitted, grids.weights)
        kept = cache.layers[index]
        keys = kept.keys
        if (
            bias := KeyBias.of(block, source.graph, source.rotary, grids.keys)
        ) is not None:  # it stays out of the cache
            whole = block.get_submodule(str(source.graph.key)).bias
            positions = torch.arange(keys.shape[2], device=device)[None]
            keys = (keys - bias.at(whole, positions, keys.dtype).keys(None)).float()  # type: ignore[arg-type]
        for kind, x, grid in (("keys", keys, grids.keys), ("values", kept.values, grids.values)):
            for how, error in kv_errors(x, grid).items():
                stats["kv"][kind][how].append(error)
    massive = torch.stack(masks)  # (norms, tokens)
    by_token = {key: torch.stack(of_norms) for key, of_norms in errors.items()}
    stats["error"] = {
        key: {"ordinary": _mean(error[~massive]), "massive": _mean(error[massive])} for key, error in by_token.items()
    }
    return {f"error/{key}": error for key, error in by_token.items()} | surfaces | {"massive": massive.to(torch.uint8)}


def sensitivity_by_block(
    on: FitContext, rotations: Sequence[Rotation], quantizer: TensorSpec, token_ids: Int[Tensor, "sequences seq_len"]
) -> list[list[float]]:
    """`kl_divergences` with one block quantized and no other: for every R, by block.

    Every R costs half the square of the number of blocks in runs of one block, and as many hidden states as there are
    blocks: meant for short texts.
    """
    count = on.source.num_blocks
    alone = [(rotation, range(index, index + 1)) for rotation in rotations for index in range(count)]
    found = kl_divergences(on, alone, quantizer, token_ids)
    return [found[start : start + count] for start in range(0, len(found), count)]


def _mean(error: Tensor) -> float | None:
    """None where there are no such tokens."""
    return float(error.mean(dtype=torch.float64)) if error.numel() else None


# The pictures of the DFRot paper: ordinary tokens are equally easy under every random rotation, and the few massive
# ones decide. Norm outputs x̂ are without gain, which is folded into the readers, and have RMS 1.


def as_quantized(
    x: Float[Tensor, "tokens hidden"], transforms: Transforms, index: int, reader: str, gain: Float[Tensor, " hidden"]
) -> Float[Tensor, "tokens hidden"]:
    """The output x̂ of a norm of block `index`, which the layer `reader` reads, in the form in which it is quantized.

    That is x̂ R; where the gain is left in place, (x̂ g) R, and for DuQuant, which smooths, (x̂ g / s) R. Without
    rotation it is x̂, the same tokens as with one, as in the papers' figures, although `none` leaves the gain, too.
    """
    if transforms.inputs:
        transform = transforms.inputs[index][reader]
        x = x * gain
        return transform.rotation.apply(x if transform.smooth is None else x / transform.smooth)
    if transforms.readers is not None:
        return transforms.readers.apply(x * gain)
    return x if transforms.residual is None else transforms.residual.apply(x)


def outliers(x: Float[Tensor, "tokens hidden"]) -> NormChannels:
    """The outlier channels of a norm's outputs x̂."""
    peaks = x.abs().amax(0)  # (hidden,)
    largest = zip(*(part.tolist() for part in peaks.topk(min(LARGEST, len(peaks)))), strict=True)
    return {
        "median": float(peaks.median()),
        "largest": [{"channel": channel, "value": value} for value, channel in largest],
    }


def excess_kurtosis(x: Float[Tensor, "*tokens channels"]) -> Float[Tensor, "*tokens"]:
    """How heavy the tails of every token's entries are: 0 for Gaussian ones, large where few channels stick out."""
    squared = (x - x.mean(-1, keepdim=True)).square()
    return squared.square().mean(-1) / squared.mean(-1).square().clamp(min=_TINY) - 3


def relative_error(
    x: Float[Tensor, "*tokens channels"], q: Float[Tensor, "*tokens channels"]
) -> Float[Tensor, "*tokens"]:
    """‖x − Q(x)‖ / ‖x‖ of every token."""
    return (x - q).norm(dim=-1) / x.norm(dim=-1).clamp(min=_TINY)


def weight_errors(
    block: nn.Module, index: int, source: Source, fitted: Mapping[str, Transforms], spec: TensorSpec
) -> list[LayerErrors]:
    """‖W − Q(W)‖ / ‖W‖ of every linear layer of a block, folded and rounded to nearest without clipping by search."""
    spec = spec if spec.clip_ratio is not None else dataclasses.replace(spec, clip_ratio=1.0)
    errors: dict[str, dict[str, float]] = {name: {} for name in source.graph.linears}
    for method, transforms in fitted.items():
        if transforms.inputs:  # DuQuant's rotations run online: nothing is folded into weights
            continue
        folds = transforms.folds(index, source.graph, source.config, block)
        for name in errors:
            weight = folds[name].weight(block.get_submodule(name).weight.data).float()  # type: ignore[arg-type]
            codes, qparams = rtn(weight, spec)
            left = weight - dequantize(codes, spec.weight_granularity, qparams)
            errors[name][method] = float(left.norm() / weight.norm())
    return [{"block": index, "layer": name, "error": by_method} for name, by_method in errors.items() if by_method]


def kv_errors(x: Float[Tensor, "batch heads tokens head_dim"], spec: TensorSpec) -> dict[str, float]:
    """‖x − Q(x)‖ / ‖x‖ of keys or values in the cache, plain and rotated; mean over heads and tokens."""
    size, errors = x.shape[-1], {}
    for how, rotation in {"plain": None, "rotated": hadamard("one head", size)}.items():
        quantizer = KVQuantizer(spec, spec, rotation, size)
        rotated = quantizer.rotate(x)
        unpacked = quantizer.unpack(quantizer.pack_keys(x), x.dtype)
        errors[how] = float(relative_error(rotated, unpacked).mean())
    return errors


def summary(stats: Stats) -> Group:
    """For the terminal: a row for every rotation, and the tokens that are massive in most norms."""
    table = Table("rotation", "error: ordinary", "massive", "kurtosis", "sensitivity, nats")
    for name in stats["rotations"]:
        error, by_block = stats["error"][name], stats["sensitivity"].get(name)
        numbers = (error["ordinary"], error["massive"], None if by_block is None else sum(by_block))
        ordinary, massive, nats = ("—" if value is None else f"{value:.4f}" for value in numbers)
        table.add_row(name, ordinary, massive, f"{statistics.mean(stats['kurtosis'][name]):.2f}", nats)
    lines = [f"{len(stats['massive'])} norm outputs of {len(stats['norms'])} norms with massive activations"]
    seen = Counter((token["position"], token["token"], token["channel"]) for token in stats["massive"])
    for (position, token, channel), norms in seen.most_common(LISTED_TOKENS):
        lines.append(f"position {position} {token!r}, channel {channel}: in {norms} norms")
    return Group(table, *map(Text, lines))
