"""The console script `dfrot`: answers --help and --version in an instant, and imports dfrot for everything else.

It stands beside the package, not in it: importing anything below `dfrot` imports `dfrot` first, which makes checkpoints
known to transformers, and so takes the seconds that torch and transformers take.
"""

import difflib
import importlib.metadata
import os
import sys

COMMANDS = {
    "quantize": "Rotate and quantize a model into a checkpoint.",
    "eval": "Measure a model or checkpoint: perplexity, KL divergence, zero-shot tasks.",
    "generate": "Continue a prompt.",
    "compare": "Quantize and measure a model by many recipes.",
    "inspect": "Show why a model is hard to quantize: massive tokens, outlier channels, errors.",
    "report": "Write result records and inspections as one HTML page.",
    "export": "Write a checkpoint for vLLM, llama.cpp or plain transformers.",
    "push": "Upload a checkpoint to the Hub, with a model card.",
    "bench": "Time a checkpoint against the model that it was made from.",
    "info": "Describe a checkpoint, a model, or this machine and the spec that suits it.",
    "models": "List the known architectures, or show how an unknown one was traced.",
}
HELP = "\n".join(
    [
        "usage: dfrot COMMAND …",
        "",
        "Run large language models in 4 bits and keep their quality.",
        "",
        *(f"  {name:<10} {summary}" for name, summary in COMMANDS.items()),
        "",
        "dfrot COMMAND --help shows the flags that matter most, --help-all every flag.",
        "dfrot --version prints the version, --debug beside a command shows tracebacks.",
        "dfrot --tyro-print-completion bash (or zsh, fish, tcsh) prints a completion script.",
    ]
)


def main(arguments: list[str] | None = None) -> int:
    """Run one command. Returns the exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    first = next((word for word in arguments if word != "--debug"), "")
    try:
        if first == "--version":
            print(f"dfrot {importlib.metadata.version('dfrot')}", flush=True)
            return 0
        if first in ("", "-h", "--help", "help"):
            print(HELP, file=sys.stdout if first else sys.stderr, flush=True)
            return 0 if first else 2
    except BrokenPipeError:  # `dfrot --help | head`: the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    if first not in COMMANDS and first != "--tyro-print-completion":
        near = difflib.get_close_matches(first, COMMANDS, n=1)
        hint = f"Did you mean '{near[0]}'?" if near else f"Commands: {', '.join(COMMANDS)}."
        print(f"dfrot: there is no command '{first}'. {hint}", file=sys.stderr)
        return 2

    try:
        from dfrot import cli
    except KeyboardInterrupt:
        print("dfrot: interrupted.", file=sys.stderr)
        return 130
    return cli.main(arguments)


if __name__ == "__main__":
    sys.exit(main())
