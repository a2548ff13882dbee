"""Compile what the operators launch for processors that are not here: one line of JSON a kernel. Run as a program."""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from dfrot.kernels.cuda import attention, gptq, linear, training
from dfrot.kernels.lowering import NO_PASSES, Lowered, lower
from dfrot.linalg.rotation import Hadamard, Identity, Kronecker
from dfrot.quant.grids import IntGrid
from dfrot.quant.spec import TensorSpec

TYPES = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.int8: "*i8"}
TYPES |= {torch.int32: "*i32", torch.uint8: "*u8", torch.int64: "*i64"}
OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def launches() -> list[tuple[JITFunction, tuple[Any, ...], dict[str, Any]]]:
    """What is launched for layers of Llama-3-8B, on tensors without contents."""
    found: list[Any] = []
    run = JITFunction.run
    JITFunction.run = lambda self, *args, grid, warmup, **how: found.append((self, args, how))
    try:
        specs = [((4, 4), None, False), ((4, 8), None, False), ((4, 4), 128, True)]
        for rows in (1, 8, 64, 2048):
            for bits, group, varied in specs:
                layer(rows, 4096, 6144, NO_PASSES, bits, group, varied)
        for bits, group, varied in specs:
            layer(1, 14336, 4096, lower(Hadamard(14336)), bits, group, varied)
        layer(1, 4096, 4096, lower(Kronecker(Hadamard(32), Identity(128))), *specs[0])
        for batch, tokens, static in [(1, 1, False), (16, 1, True), (1, 8, True)]:
            cache(batch, tokens, static)
        for width, symmetric in [(4096, False), (14336, False), (128, False), (4096, True)]:
            tokens_on_a_grid(width, symmetric)
        for symmetric in (True, False):
            columns(4096, 6144, symmetric)
    finally:
        JITFunction.run = run
    return found


def layer(
    rows: int, width: int, out: int, rotation: Lowered | None, bits: tuple[int, int], group: int | None, varied: bool
) -> None:
    assert rotation is not None
    with torch.device("meta"):
        x = torch.empty(rows, width, dtype=torch.bfloat16)
        groups = 1 if group is None else width // group
        parts: list[Tensor | None] = [torch.empty(out, width * bits[0] // 8, dtype=torch.uint8)]
        parts += [torch.empty(out, groups, dtype=torch.bfloat16)]
        parts += [torch.empty(out, groups, dtype=torch.uint8) if varied else None, torch.empty(out)]
    linear.products(x, parts, *rotation, bits[0], bits[1], False, 0.9)


def cache(batch: int, tokens: int, static: bool) -> None:
    heads, query_heads, head_dim, length = 8, 32, 128, 4096
    rotation = lower(Hadamard(head_dim))
    assert rotation is not None
    with torch.device("meta"):
        keys, query = (torch.empty(batch, n, tokens, head_dim, dtype=torch.bfloat16) for n in (heads, query_heads))
        mask = torch.empty(batch, 1, tokens, length, dtype=torch.bool) if static else None
        start = torch.empty((), dtype=torch.int64) if static else None
        parts = (head_dim // 2, torch.uint8), (1, torch.bfloat16), (1, torch.uint8)
        packed = [torch.empty(batch, heads, length, width, dtype=dtype) for width, dtype in parts]
    attention.append(keys, packed, 0, *rotation, 4, 0.95, start)
    attention.append(keys, packed, 0, *NO_PASSES, 4, 0.95, start)
    attention.attend(query, packed, packed, mask, None, *rotation, head_dim**-0.5, 4)
    attention.unpack(packed, 4, torch.bfloat16)


def tokens_on_a_grid(width: int, symmetric: bool) -> None:
    with torch.device("meta"):
        x, clip = torch.empty(2048, width), torch.empty(1)
    spec = TensorSpec(4, symmetric)
    for ratio in (0.9, clip):
        training.on_grid(x, spec, ratio, narrow=width == 128)
        training.quantize_backward(x, x, spec, ratio)


def columns(width: int, out: int, symmetric: bool) -> None:
    with torch.device("meta"):
        arrays: list[Any] = [torch.empty(width, out) for _ in range(3)]
        scale, group = torch.empty(1, out), torch.empty(width, dtype=torch.int64)
        upper = torch.empty(width, width)
    zero = None if symmetric else scale
    arrays += [upper, group, scale, zero, slice(0, gptq.COLUMNS), IntGrid(4, symmetric)]
    gptq.round_columns(*arrays)


def specialized(kernel: JITFunction, args: tuple[Any, ...], how: dict[str, Any]) -> tuple[ASTSource, dict[str, Any]]:
    """What is compiled for a launch, and with which options."""
    signature, attributes, constants = {}, {}, {}
    for number, (parameter, value) in enumerate(zip(kernel.params, args, strict=False)):
        if parameter.is_constexpr:
            signature[parameter.name], constants[parameter.name] = "constexpr", value
        elif isinstance(value, Tensor):
            signature[parameter.name], attributes[number,] = TYPES[value.dtype], [["tt.divisibility", 16]]
        else:
            signature[parameter.name] = "fp32" if isinstance(value, float) else "i32"
            if isinstance(value, int) and value % 16 == 0 and not parameter.do_not_specialize:
                attributes[number,] = [["tt.divisibility", 16]]
    for name, value in how.items():
        if name not in OPTIONS:
            signature[name], constants[name] = "constexpr", value
    source = ASTSource(kernel, signature, constants, attributes)
    return source, {name: how[name] for name in OPTIONS if name in how}


def compiled(source: ASTSource, options: dict[str, Any], capability: int) -> dict[str, Any]:
    """Registers, and bytes of the stack, which is where registers are spilled to."""
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        command = [str(TOOLS / "cuobjdump"), "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    used = {name: int(number) for name, number in re.findall(r"\b(REG|STACK):(\d+)", usage)}
    return {"registers": used["REG"], "stack": used["STACK"], "shared": made.metadata.shared}


if __name__ == "__main__":
    found = {}
    for kernel, args, how in launches():
        source, options = specialized(kernel, args, how)
        found[kernel.__name__, source.hash(), str(options)] = source, options
    for (name, *_), (source, options) in found.items():
        constants = {key: value for key, value in source.constants.items() if isinstance(value, int)}
        for capability in map(int, sys.argv[1:]):
            line = {"sm": capability, "kernel": name, **compiled(source, options, capability)}
            print(json.dumps(line | options | {str(key): value for key, value in constants.items()}), flush=True)
