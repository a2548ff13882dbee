"""What can happen to a loaded model between two forward passes, drawn at random, and what it then has to compute.

The authority is a model that is loaded anew and changed in the same way before it computes for the first time, block by
block and layer by layer: nothing in it can have been kept from an earlier state.
"""

import copy
import functools
import pickle
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import dfrot
from dfrot.fused.block import FusedBlock
from dfrot.quant.spec import TensorSpec
from dfrot.runtime.linear import QuantLinear
from dfrot.runtime.norms import TransformedNorm
from tests.tiny_models import CONFIGS, write_tiny_model

TOKENS = torch.randint(1, 96, (2, 12), generator=torch.Generator().manual_seed(7))
SPECS: dict[str, dict[str, Any]] = {
    "w4a4kv4": {"method": "quarot"},
    "w8a8kv16": {"method": "none"},
    "w4a16kv16": {"method": "quarot"},
    "w4g16a8kv8": {"method": "duquant", "block": 16, "greedy_steps": 2, "preset": "duquant"},
}
# Between the short and the long way, relative to the largest logit; see tests/fused/test_block.py.
DIFFERENCE = 2**-17

Change = Callable[[Any, int], Any]


class Plus(nn.Module):
    """What an adapter, a steering vector or an observer does to a module."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return plus(self.inner(*args, **kwargs))


def plus(output: Any) -> Any:
    return (output[0] + 0.5, *output[1:]) if isinstance(output, tuple) else output + 0.5


def plus_hook(module: nn.Module, args: Any, output: Any) -> Any:
    return plus(output)


def part(model: Any, seed: int, *kinds: type[nn.Module]) -> tuple[str, nn.Module]:
    """A module of the decoder's blocks, by its name."""
    found = [
        (name, module)
        for name, module in model.named_modules()
        if ".layers." in name and not name.endswith(("kv_quantizer", ".rotation", ".inner"))
        if isinstance(module, kinds or nn.Module)
    ]
    return random.Random(seed).choice(found)


def tensor(model: Any, seed: int) -> tuple[nn.Module, str, Tensor]:
    """A tensor of the model: its module, its name there, itself."""
    found = [
        (module, name, value)
        for module in model.modules()
        for name, value in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        if "inv_freq" not in name and name != "orders"
    ]
    return random.Random(seed).choice(found)


def other(value: Tensor, seed: int) -> Tensor:
    """Another tensor like it."""
    if not value.is_floating_point():
        return value.flip(0).contiguous()
    factor = 1 + 0.2 * torch.rand(value.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (value.double() * factor).to(value.dtype)


def written(model: Any, seed: int) -> Any:
    _, _, value = tensor(model, seed)
    with torch.no_grad():
        value.copy_(other(value, seed))
    return model


def exchanged(model: Any, seed: int) -> Any:
    module, name, value = tensor(model, seed)
    new = other(value.detach(), seed)
    setattr(module, name, nn.Parameter(new, requires_grad=False) if isinstance(value, nn.Parameter) else new)
    return model


def data_exchanged(model: Any, seed: int) -> Any:
    _, _, value = tensor(model, seed)
    value.data = other(value.detach(), seed)
    return model


def loaded(model: Any, seed: int) -> Any:
    state = {
        name: other(value, seed) for name, value in model.state_dict().items() if not name.endswith("rotation.orders")
    }
    model.load_state_dict(state, strict=False, assign=bool(seed % 2))
    return model


def cast(model: Any, seed: int) -> Any:
    return model.to(random.Random(seed).choice([torch.float32, torch.bfloat16, torch.float64]))


def wrapped(model: Any, seed: int) -> Any:
    name, module = part(model, seed)
    model.set_submodule(name, Plus(module))
    return model


def patched(model: Any, seed: int) -> Any:
    _, module = part(model, seed)
    module.forward = functools.partial(plus_forward, module)  # whose copy is one of the copied module
    return model


def plus_forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return plus(type(module).forward(module, *args, **kwargs))


def hooked(model: Any, seed: int) -> Any:
    part(model, seed)[1].register_forward_hook(plus_hook)
    return model


def specified(model: Any, seed: int) -> Any:
    """Another grid of activations in one layer."""
    _, layer = part(model, seed, QuantLinear)
    if layer.activations.enabled:  # type: ignore[union-attr]
        layer.activations = TensorSpec(8, symmetric=False, clip_ratio=0.8)  # type: ignore[assignment]
    return model


def unrotated(model: Any, seed: int) -> Any:
    """An online rotation taken away."""
    _, module = part(model, seed, QuantLinear, TransformedNorm)
    module.rotation = None  # type: ignore[assignment]
    return model


def copied(model: Any, seed: int) -> Any:
    return copy.deepcopy(model)


def pickled(model: Any, seed: int) -> Any:
    return pickle.loads(pickle.dumps(model))


CHANGES: dict[str, Change] = {
    change.__name__: change
    for change in (
        *(written, exchanged, data_exchanged, loaded, cast, wrapped, patched, hooked),
        *(specified, unrotated, copied, pickled),
    )
}


@torch.no_grad()
def computed(model: Any) -> Tensor:
    """Logits of a prompt and of a token after it, and without a cache."""
    output = model(TOKENS[:, :9], use_cache=True)
    step = model(TOKENS[:, 9:10], past_key_values=output.past_key_values, use_cache=True)
    whole = model(TOKENS, use_cache=False)
    return torch.cat([output.logits, step.logits, whole.logits], dim=1)


def fault(checkpoint: Path, changes: Sequence[tuple[str, int, bool]]) -> str | None:
    """What is wrong with a model after changes (a name, a seed, and whether the model computes before), if anything."""
    model = dfrot.load(checkpoint)[0]
    fresh = dfrot.load(checkpoint)[0]
    for name, seed, computes in changes:
        if computes:
            computed(model)
        model, fresh = CHANGES[name](model, seed), CHANGES[name](fresh, seed)
    again, short = computed(model), computed(fresh)
    if not torch.equal(again, short) and not (again.isnan() & short.isnan()).any():
        return f"it computes what it was before: off by {float((again - short).abs().max()):.2g}"
    if short.dtype == torch.float32:
        long = the_long_way(fresh)
        if not (short - long).abs().max() <= DIFFERENCE * long.abs().max() and long.isfinite().all():
            return f"the short way is off by {float((short - long).abs().max() / long.abs().max()):.2g}"
    return None


def write_checkpoint(folder: Path, family: str, head_dim: int | None, spec: str) -> Path:
    """A tiny checkpoint, made once."""
    source, out, text = folder / f"{family}-{head_dim}", folder / f"{family}-{head_dim}-{spec}", folder / "text.txt"
    if not source.exists():
        text.write_text("the quick brown fox jumps over the lazy dog; 0123456789! " * 40)
        write_tiny_model(family, source, head_dim=head_dim)
    if not (out / "config.json").exists():
        recipe = dfrot.Recipe.parse(weights="rtn", spec=spec, calib=str(text), calib_tokens=32, **SPECS[spec])
        dfrot.quantize(source, recipe, out, overwrite=True)
    return out


def changed_models(scratch: Path) -> Callable[[Path], None]:
    """A reader for tests/readers.py: a random model, changed as the bytes of the file `seed` say."""

    def read(folder: Path) -> None:
        rng = random.Random((folder / "seed").read_bytes())
        model = rng.choice(sorted(CONFIGS)), rng.choice([32, None]), rng.choice(sorted(SPECS))
        names = rng.choices(sorted(CHANGES), k=rng.randint(1, 5))
        steps = [(name, rng.randrange(2**16), rng.random() < 0.5) for name in names]
        (made := scratch / "changed models").mkdir(exist_ok=True)
        if found := fault(write_checkpoint(made, *model), steps):
            raise AssertionError(f"{model} after {steps}: {found}")

    return read


def the_long_way(model: Any) -> Tensor:
    call = FusedBlock.__call__
    FusedBlock.__call__ = lambda *_, **__: None  # type: ignore[method-assign]
    try:
        return computed(model)
    finally:
        FusedBlock.__call__ = call  # type: ignore[method-assign]
