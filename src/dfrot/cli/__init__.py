"""The command line: parse, call one library function, print."""

import dataclasses
import os
import shlex
import signal
import sys
import typing
import warnings
from typing import Annotated, Any

import tyro
from rich.text import Text
from tyro.conf import DisallowNone, FlagCreatePairsOff, Suppress, arg

from dfrot.cli.commands import Export, Generate, Info, Models, Push, Quantize
from dfrot.cli.flags import QUIET, err
from dfrot.cli.measuring import Bench, Compare, Eval, Inspect, Report
from dfrot.system.distributed import ProcessGroup
from dfrot.system.errors import SetupError, UserError
from dfrot.system.files import RUN_FILE
from dfrot.system.interrupt import interruptible
from dfrot.system.memory import keep_freed_memory
from dfrot.transform.invariance import InvarianceError

COMMANDS: dict[str, Any] = {
    kind.__name__.lower(): kind
    for kind in (Quantize, Eval, Compare, Inspect, Report, Export, Push, Generate, Bench, Info, Models)
}
MORE = "These are the flags that matter most; --help-all shows every flag."


def _shown(kind: type, everything: bool) -> type:
    """The command as its help shows it: rare flags only if `everything`, defaults only where they say something."""
    hints = typing.get_type_hints(kind, include_extras=True)
    rare = () if everything else getattr(kind, "rare", ())
    fields: list[tuple[str, Any, Any]] = []
    for field in dataclasses.fields(kind):
        hint, default = hints[field.name], field
        if dataclasses.is_dataclass(field.default):
            nested, *marks = typing.get_args(hint)
            nested = _shown(nested, everything)
            hint, default = Annotated[nested, *marks], nested()
        if field.name in rare:
            hint = Annotated[hint, Suppress]
        elif field.default in (None, "", ()) or isinstance(field.default, bool):
            hint = Annotated[hint, arg(**QUIET)]
        fields.append((field.name, hint, default))
    shown: Any = dataclasses.make_dataclass(kind.__name__, fields, bases=(kind,), frozen=True)
    for name in ("__module__", "__qualname__", "__firstlineno__"):  # where tyro finds the comments
        if hasattr(kind, name):
            setattr(shown, name, getattr(kind, name))
    shown.__doc__ = f"{kind.__doc__}\n\n{MORE}" if rare else kind.__doc__
    return shown


def parse(arguments: list[str]) -> Any:
    """The command that the words ask for, as an instance of its class. A mistake in them ends the program."""
    everything = not {"-h", "--help"} & set(arguments)
    return tyro.extras.subcommand_cli_from_dict(
        {name: _shown(kind, everything) for name, kind in COMMANDS.items()},
        prog="dfrot",
        args=["--help" if word == "--help-all" else word for word in arguments],
        config=(DisallowNone, FlagCreatePairsOff),
    )


def main(arguments: list[str] | None = None) -> int:
    """Run one command. Returns the exit code: 2 for the user's mistake, 1 for the environment's fault or dfrot's."""
    arguments = sys.argv[1:] if arguments is None else arguments
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    keep_freed_memory()
    warnings.showwarning = _show_warning  # type: ignore[assignment]
    command = parse(arguments)
    try:
        if not isinstance(command, Quantize) and (count := ProcessGroup.of().count) > 1:
            raise UserError(f"only `dfrot quantize` can be shared by processes; torchrun has started {count}.")
        with interruptible():
            command.run()
    except KeyboardInterrupt:
        hint = ""
        if isinstance(command, Compare):
            hint = " Finished trials are kept: the same command goes on."
        elif isinstance(command, Quantize) and (command.out / RUN_FILE).is_file():
            words = [word for word in arguments if word not in ("--overwrite", "--resume")]
            hint = f" Finished blocks are kept; this continues:\n{shlex.join(['dfrot', *words, '--resume'])}"
        _complain(f"interrupted.{hint}")
        return 128 + signal.SIGINT
    except BrokenPipeError:  # `dfrot … | head`: the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (UserError, SetupError, InvarianceError, OSError) as error:
        if debug:
            raise
        _complain(str(error))
        return 2 if isinstance(error, UserError) else 1
    return 0


def _complain(message: str, kind: str = "", colour: str = "red") -> None:
    text = Text("dfrot: ", style=f"bold {colour}").append(Text(kind + message, style="none"))
    err.print(text, soft_wrap=True)


def _show_warning(message: Warning | str, category: type[Warning], *_: Any) -> None:
    _complain(str(message), "warning: ", "yellow")
