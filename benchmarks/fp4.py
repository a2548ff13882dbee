"""Which 4-bit grid for which rotation: integers, NVFP4 and MXFP4 by rotation, in a table.

    python benchmarks/fp4.py OUT --calib TEXT --ppl TEXT TEXT [--seeds 0,1,2] [--fold-only] [--only NAME ...]
    python benchmarks/fp4.py OUT --calib TEXT --ppl TEXT --errors

The first measures perplexity and KL divergence with weights and activations on the grid, keys and values in 16 bits.
`blocks` are of the group's size; refined is R1 by DFRot's alternation, across the whole width or in such blocks. With
--fold-only nothing is rotated while the model runs: that is what can be exported for vLLM. One of the texts should be
of another kind than the one that weights are fitted to. Finished rows are lines of OUT/results.jsonl and are not
measured again, so --only can add rows.

The second measures how far rounding moves norm outputs of the first text, ‖x − x̂‖² on average, with rotations that were
refined on the calibration text. That takes minutes.
"""

import argparse
import itertools
from functools import partial
from typing import Any

import torch
from rows import Rows, Trial, by_recipe, measure, parser, seeds, unquantized

import dfrot
from dfrot.linalg.rotation import Identity, Rotation
from dfrot.methods.dfrot import DFRot
from dfrot.methods.massive import sample_norm_outputs
from dfrot.methods.method import FitContext
from dfrot.methods.quarot import random_rotation
from dfrot.methods.refinement import ORDINARY_TOKENS, class_errors, squared_errors
from dfrot.models.source import open_source
from dfrot.models.texts import calibration_windows, load_tokenizer, read_text
from dfrot.quant.spec import Spec, TensorSpec
from dfrot.system.distributed import SINGLE_PROCESS

SPECS = {"int4": "w4a4kv16", "int4 g{group}": "w4g{group}a4kv16", "NVFP4": "nvfp4", "MXFP4": "mxfp4"}
BLOCKS = {"NVFP4": 16, "MXFP4": 32}
ROTATIONS: dict[str, tuple[str, bool]] = {  # method, and whether in blocks
    "none": ("none", False),
    "RH": ("quarot", False),
    "blocks": ("quarot", True),
    "refined": ("dfrot", False),
    "refined blocks": ("dfrot", True),
    "descended": ("rangerot", False),
}
GAMMA = 10.0
HELD_TOKENS = 1024


def by_grid(given: argparse.Namespace) -> Rows:
    """A row for every grid, rotation, rounding and tuning."""
    rows: dict[str, Any] = {}
    every = itertools.product(SPECS, ROTATIONS, given.rounding.split(","), given.tune.split(","))
    for grid, rotation, rounding, parts in every:
        method, in_blocks = ROTATIONS[rotation]
        name = f"{grid.format(group=given.group)}, {rotation}, {rounding}, {parts}"
        if (in_blocks and grid not in BLOCKS) or (given.only and name not in given.only):
            continue
        words: dict[str, Any] = {"calib": given.calib, "calib_tokens": given.calib_tokens, "preset": "deploy"}
        words |= {"block": BLOCKS[grid]} if in_blocks else {}
        words |= {"gamma": GAMMA} if method == "dfrot" else {}
        words |= {"fold_only": given.fold_only} if method != "none" else {}
        words["tune"] = parts.replace("+", ",")
        if parts != "none":
            words |= {"tune_steps": int(given.steps), "tune_text": given.tune_text}
            words |= {"tune_tokens": given.tokens, "tune_seq_len": given.seq_len}
        spec = SPECS[grid].format(group=given.group)
        recipes = [dfrot.Recipe.parse(method, rounding, spec, seed=seed, **words) for seed in seeds(given)]
        rows[name] = [Trial(recipe.digest, recipe.seed, partial(by_recipe, given, recipe)) for recipe in recipes]
    return rows


def print_errors(given: argparse.Namespace) -> None:
    """Ordinary and massive norm outputs of a text that no rotation has seen, by grid and rotation."""
    source = open_source(given.model)
    tokenizer, rows = load_tokenizer(source.path), source.config.vocab_size

    def norm_outputs(text: str, split: Any, tokens: int, grid: TensorSpec) -> Any:
        generator = torch.Generator().manual_seed(0)
        ids = calibration_windows(tokenizer, read_text(text, split), text, rows, tokens, tokens, generator)
        on = FitContext(source, grid, lambda: ids, torch.device("cpu"))
        return on, sample_norm_outputs(on, ids, "relative", ORDINARY_TOKENS)[0]

    print("| grid | rotation | ordinary | massive |\n|---|---|---|---|")
    sampled = None
    for name, words in SPECS.items():
        if "{" in words or (given.only and name not in given.only):
            continue
        grid = Spec.parse(words, "deploy").activations
        if sampled is None:
            sampled = norm_outputs(given.calib, "train", given.calib_tokens or 2048, grid)
            held = norm_outputs(given.ppl[0], "test", HELD_TOKENS, grid)[1]
        on, seen = sampled
        found: dict[str, Rotation] = {"none": Identity(source.config.hidden_size)}
        for in_blocks in (False, True) if name in BLOCKS else (False,):
            block, place = (BLOCKS[name], f", blocks of {BLOCKS[name]}") if in_blocks else (None, "")
            start = random_rotation(on, "hadamard", block=block)
            found[f"RH{place}"] = start
            method = DFRot(block=block, steps=int(given.steps))
            found[f"refined{place}"], _ = method.refine(start, seen, grid, GAMMA, SINGLE_PROCESS)
        for rotation, matrix in found.items():
            error = class_errors(squared_errors(held.tokens, matrix, grid), held)
            print(f"| {name} | {rotation} | {error['ordinary']:.2f} | {error['massive']:.2f} |", flush=True)


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--group", type=int, default=128, help="of the integers with groups")
    options.add_argument("--rounding", default="rtn,gptq", help="joined by commas")
    options.add_argument("--fold-only", action="store_true", help="leave out what is rotated while the model runs")
    options.add_argument("--only", nargs="*", help="rows, such as 'NVFP4, blocks, gptq, none', or with --errors grids")
    options.add_argument("--errors", action="store_true", help="measure norm outputs instead")
    given = options.parse_args()
    if given.errors:
        print_errors(given)
    else:
        measure(given, {**unquantized(given), **by_grid(given)})


if __name__ == "__main__":
    main()
