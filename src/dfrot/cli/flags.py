"""Flags that several commands have, and those that methods, roundings and presets bring as options of their classes."""

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from rich.console import Console
from tyro.conf import FlagConversionOff, OmitArgPrefixes, Positional, arg

from dfrot.methods import METHODS
from dfrot.quant.spec import PRESETS, Preset
from dfrot.rounding import ROUNDINGS
from dfrot.system.devices import chosen_device
from dfrot.system.errors import UserError
from dfrot.system.options import Options
from dfrot.tuning.tuning import Tuning

out = Console()
err = Console(stderr=True)

# Flags of several commands. tyro takes the first of a flag's metavars, helps and so on that it meets.
Model = Annotated[str, Positional, arg(metavar="MODEL")]
Source = Annotated[Model, arg(help="Hub id, directory with safetensors weights, .gguf file, or smollm2-135m.")]
Checkpoint = Annotated[Path, Positional, arg(metavar="CKPT", help="Directory written by `dfrot quantize`.")]
Out = Annotated[Path, arg(aliases=["-o"])]
Device = Annotated[str, arg(help="Where to compute: cpu, cuda, or auto: on a GPU where torch sees one.")]
Devices = Annotated[str, arg(help="Where to compute: cpu, cuda, or auto: spread over all GPUs that torch sees.")]
Seed = Annotated[int, arg(help="Of everything random.")]
Calib = Annotated[str, arg(help="Calibration text: wikitext2, c4, pydoc, or a path.")]
CalibTokens = Annotated[
    int | None, arg(help="Calibration tokens in total (default 65536 where weights are fitted to them, else 2048).")
]
Words = Annotated[str, arg(metavar="A,B,…")]
QUIET: Any = {"help_behavior_hint": ""}  # no "(default: None)"
Tune = Annotated[
    str,
    arg(
        metavar="PART,…",
        help="What is trained after rounding, towards the unquantized model's predictions: biases of all linear "
        "layers, clip ratios, gains of norms, roundings and scales of weights, joined by commas; all (but roundings), "
        "none, or auto: biases where activations have at most 4 bits and weights are fitted to data.",
    ),
]
TuneSteps = Annotated[int | None, arg(help=f"Steps of training (default {Tuning.steps}).")]
TuneTokens = Annotated[int | None, arg(help=f"Tokens of one step (default {Tuning.tokens}).")]
TuneSeqLen = Annotated[
    int | None, arg(help=f"Tokens of one window of text (default {Tuning.seq_len}, at most calib-seq-len).")
]
TuneText = Annotated[str | None, arg(help="Text for training (default: that of the calibration).")]
TUNE_FLAGS = ("tune_steps", "tune_tokens", "tune_seq_len", "tune_text")
LogTo = Annotated[
    str | None,
    arg(help="Also log it to a tracker: wandb, trackio, mlflow, tensorboard or another that accelerate knows."),
]
MethodName: Any = Literal[tuple(METHODS)]
RoundingName: Any = Literal[tuple(ROUNDINGS)]
PresetName: Any = Literal[tuple(PRESETS)]


_UNITS = {"k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


def parse_size(text: str) -> int:
    """Bytes of a size such as 8GB, 6GiB or 512MB. Raises UserError for anything else."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?i?)b?", text.strip().lower())
    if found is None or found[2] not in _UNITS or not (size := int(float(found[1]) * _UNITS[found[2]])):
        raise UserError(f"a size of memory is a number with a unit, such as 8GB, 6GiB or 512MB, got '{text}'.")
    return size


def separated(words: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in words.split(",") if word.strip())


def device_for(name: str, *, spread: bool = False, quiet: bool = False) -> str:
    """The device that `--device` means; says so if it is a GPU that nobody asked for."""
    device, why = chosen_device(name, spread=spread)
    if why is not None and not quiet:
        err.print(f"computing on {why}; --device cpu if that is not wanted", style="dim", highlight=False)
    return device


def _options() -> dict[str, list[tuple[str, Any, Any]]]:
    """The options of all methods, roundings and presets as fields, by the names of the classes that have them."""
    types: dict[str, Any] = {}
    owners: dict[str, dict[str, list[str]]] = {}  # name → help → who has it
    flags: dict[str, bool] = {}  # name → whether every owner's default is off
    kinds: dict[str, type[Options]] = {**METHODS, **ROUNDINGS, "preset": Preset}
    for owner, kind in kinds.items():
        hints, helps = kind.types(), kind.help()
        for field in dataclasses.fields(kind):
            name, hint = field.name, hints[field.name]
            types[name] = types.get(name, hint) | hint
            flags[name] = flags.get(name, True) and field.default is False
            text = helps[name].rstrip(".")
            if field.default not in (None, False, dataclasses.MISSING):
                text += f" (default {field.default})"
            owners.setdefault(name, {}).setdefault(text, []).append(owner)
    found: dict[str, list[tuple[str, Any, Any]]] = {}
    for name, hint in types.items():
        texts = [f"{', '.join(whose)}: {text}." for text, whose in owners[name].items()]
        if len(texts) == 1:  # the group says whose it is
            texts = [text + "." for text in owners[name]]
        # None means not given, so that True and False are words there; a switch that is off says as much
        hint, default = (bool, False) if flags[name] else (hint | None, None)
        group = ", ".join(owner for owner, kind in kinds.items() if name in kind.types())
        shown: Any = Annotated[hint, arg(help=" ".join(texts), **QUIET)]
        if default is None:
            shown = Annotated[shown, FlagConversionOff]
        found.setdefault(group, []).append((name, shown, default))
    return found


def _groups() -> Iterator[tuple[str, Any, Any]]:
    """A field for each group of options, itself a dataclass."""
    for number, (owners, fields) in enumerate(_options().items()):
        kind = dataclasses.make_dataclass(f"Group{number}", fields, frozen=True)
        yield f"group{number}", Annotated[kind, OmitArgPrefixes, arg(name=owners, help="")], kind()


MethodOptions: Any = dataclasses.make_dataclass("MethodOptions", _groups(), frozen=True)
NONE_GIVEN: Any = MethodOptions()


def flat(options: Any) -> dict[str, Any]:
    """The options of all groups, by name."""
    return {name: value for group in vars(options).values() for name, value in vars(group).items()}
