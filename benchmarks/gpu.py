"""What the kernels for GPUs compute, checked, and how fast, against torch in bfloat16 in the same run.

    python benchmarks/gpu.py OUT [--seconds 240] [--model DIR] [--only checks,products]

Shapes are those of Llama-3-8B, weights are random. First every kernel is compared with integer arithmetic in float64.
Then it is timed under a CUDA graph, each layer with copies of its weights that do not fit into the cache together;
ratios above 1 are in our favour. Last comes a whole decoder block, eager, beside torch's eager and compiled one, and
with --model, a directory or name as `quantize` takes it, the seconds of quantizing, measuring and generating. When the
time is up the sections that are left are named. Everything is in OUT/gpu.json; the table is printed last.

    TRITON_INTERPRET=1 python benchmarks/gpu.py OUT --tiny

goes through all of it on tiny shapes in Triton's interpreter, without a GPU; its times mean nothing.
"""

import argparse
import json
import statistics
import time
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from transformers import StaticCache

import dfrot
from dfrot.evaluation.bench import decoder_bytes, kv_bytes, random_block
from dfrot.evaluation.run import Measurement, evaluate
from dfrot.kernels.cuda import attention, gptq, linear, training
from dfrot.kernels.cuda.rows import quantize_rows, rotate
from dfrot.kernels.linear import PackedWeight
from dfrot.kernels.lowering import NO_PASSES, Lowered, lower
from dfrot.linalg.rotation import Hadamard, Identity, Kronecker, Rotation
from dfrot.quant.affine import QParams, choose_qparams, dequantize, fake_quantize
from dfrot.quant.grids import IntGrid
from dfrot.quant.packing import pack, unpack
from dfrot.quant.spec import TensorSpec
from dfrot.rounding.gptq import factorize, round_columns
from dfrot.rounding.gptq import gptq as rounded
from dfrot.runtime.kv import KVQuantizer, PackedKV
from dfrot.training.trained import quantized

Row = tuple[str, str, float, str]  # section, what, number, unit
INT4, ACTIVATIONS = TensorSpec(4, True), TensorSpec(4, False, 0.9)
ROUNDING = 2**-8  # of bfloat16


class Run:
    """The clock, the device, and what was found."""

    def __init__(self, given: argparse.Namespace) -> None:
        self.began, self.seconds, self.tiny = time.perf_counter(), given.seconds, given.tiny
        self.device = torch.device("cpu" if self.tiny else "cuda")
        self.generator = torch.Generator(self.device).manual_seed(0)
        self.rows: list[Row] = []
        self.wrong: list[str] = []
        self.given = given

    @property
    def left(self) -> float:
        return self.seconds - (time.perf_counter() - self.began)

    def note(self, section: str, what: str, number: float, unit: str) -> None:
        self.rows.append((section, what, number, unit))
        print(f"{time.perf_counter() - self.began:6.1f} s  {section}: {what} {number:.4g} {unit}", flush=True)

    def check(self, what: str, error: float, bound: float) -> None:
        """An error that is NaN is too large."""
        self.note("check", what, error / bound, "of the bound")
        if not error <= bound:
            self.wrong.append(what)

    def randn(self, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.randn(*shape, generator=self.generator, device=self.device).to(dtype)

    def microseconds(self, calls: list[Callable[[], Any]]) -> float:
        """Of one of the calls, which follow one another in a graph."""
        if self.tiny:
            began = time.perf_counter()
            calls[0]()
            return (time.perf_counter() - began) * 1e6
        for call in calls:  # compiles
            call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for call in calls:
                call()
        return 1e3 * triton.testing.do_bench(graph.replay, warmup=10, rep=60, return_mode="median") / len(calls)


def weight(run: Run, out: int, width: int, spec: TensorSpec) -> PackedWeight:
    groups = 1 if spec.group is None else width // spec.group
    codes = torch.randint(0, 2**spec.bits, (out, width), generator=run.generator, device=run.device, dtype=torch.uint8)
    zeros = torch.randint(0, 2**spec.bits, (out, groups), generator=run.generator, device=run.device)
    scales = torch.rand(out, groups, generator=run.generator, device=run.device).add_(0.1).bfloat16()
    return PackedWeight(pack(codes, spec.bits), scales, None if spec.symmetric else zeros.to(torch.uint8), None)


def wide(packed: PackedWeight, spec: TensorSpec) -> Tensor:
    """What a weight stands for, in float64."""
    codes = unpack(packed.qweight, spec.bits, packed.qweight.shape[1] * 8 // spec.bits).double()
    zeros = torch.full_like(packed.scales, 2 ** (spec.bits - 1)) if packed.zeros is None else packed.zeros
    return dequantize(codes, spec.weight_granularity, QParams(packed.scales.double(), zeros.double()))


def product(x: Tensor, packed: PackedWeight, passes: Lowered, spec: TensorSpec, activations: TensorSpec) -> Tensor:
    grid = activations.bits, activations.symmetric, activations.fixed_clip
    return linear.products(x, list(packed), *passes, spec.bits, *grid)[0]


def lowered(rotation: Rotation) -> Lowered:
    passes = lower(rotation)
    assert passes is not None, "these have passes"
    return passes


def checks(run: Run) -> None:
    """Every kernel against float64."""
    width, out = (128, 48) if run.tiny else (4096, 512)
    for rows in (1, 5, 20) if run.tiny else (1, 16, 100, 1000):
        for bits, group, symmetric in [(4, None, True), (8, None, True), (4, None, False), (4, 64, True)]:
            for activations in (ACTIVATIONS, TensorSpec(8, False, 0.9)):
                spec = TensorSpec(bits, symmetric, group=group)
                packed, x = weight(run, out, width, spec), run.randn(rows, width, dtype=torch.float32)
                y = product(x, packed, NO_PASSES, spec, activations).double()
                inputs, weights = activations.fake_quantize(x).double(), wide(packed, spec)
                error = (y - inputs @ weights.T).abs() / (inputs.abs() @ weights.abs().T)
                name = f"w{bits}{'g64' * bool(group)}{'' if symmetric else ' asymmetric'} a{activations.bits}"
                run.check(f"{name}, {rows} rows", float(error.max()), 2**-20)
    for name, rotation in rotations(run).items():
        for dtype, bound in ((torch.bfloat16, ROUNDING), (torch.float32, 2**-16)):
            x = run.randn(7, rotation.size, dtype=dtype)
            error = (rotate(x, *lowered(rotation)).double() - rotation.apply(x.double())).norm() / x.norm()
            run.check(f"rotation of {name}, {dtype}", float(error), bound * (2 if run.tiny else 1))
    x = run.randn(3, width)
    x[1, 5] = torch.nan
    y = product(x, weight(run, out, width, INT4), NO_PASSES, INT4, ACTIVATIONS)
    run.check("NaN stays in its row", float(not (y[1].isnan().all() and y[[0, 2]].isfinite().all())), 0.5)
    for bits in (4, 8):
        check_attention(run, TensorSpec(bits, False, 0.95))
    for symmetric in (True, False):
        check_training(run, TensorSpec(4, symmetric, 0.9))
        check_columns(run, IntGrid(4, symmetric))


def check_training(run: Run, spec: TensorSpec) -> None:
    """Tokens on their grid, and the gradient behind it, for a slope that has no structure."""
    x, slope = (run.randn(9, 128 if run.tiny else 14336, dtype=torch.float32) for _ in range(2))
    kind = "symmetric" if spec.symmetric else "asymmetric"
    wanted = fake_quantize(x, spec.grid, spec.token_granularity, 0.9)
    error = (training.on_grid(x, spec, 0.9, narrow=False) - wanted).abs().max()
    run.check(f"tokens on a grid, {kind}", float(error), 2**-20)
    wide = x.double().requires_grad_()
    quantized(wide, spec).backward(slope.double())
    assert wide.grad is not None, "it was asked for"
    error = (training.quantize_backward(x, slope, spec, 0.9)[0] - wide.grad).norm() / wide.grad.norm()
    run.check(f"gradient of tokens, {kind}", float(error), 2**-12)


def check_columns(run: Run, grid: IntGrid) -> None:
    """GPTQ's columns, of numbers whose sums float32 holds."""
    width, out = gptq.COLUMNS, 40 if run.tiny else 6144

    def drawn(low: int, high: int, step: float, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=run.generator, device=run.device) * step

    error, upper = drawn(-64, 65, 1 / 16, width, out), drawn(-8, 9, 1 / 8, width, width).triu(1)
    scale, zero = torch.full((1, out), 0.5, device=run.device), drawn(0, 16, 1.0, 1, out)
    arguments: list[Any] = [upper, torch.zeros(width, dtype=torch.int64, device=run.device), scale]
    arguments += [None if grid.symmetric else zero, slice(0, width), grid]
    made = [[error.clone(), error.clone(), torch.empty_like(error)] for _ in range(2)]
    for function, arrays in zip((gptq.round_columns, round_columns), made, strict=True):
        function(*[*arrays, *arguments])
    differ = sum(int((ours != theirs).sum()) for ours, theirs in zip(*made, strict=True))
    run.check(f"columns of GPTQ, {'symmetric' if grid.symmetric else 'asymmetric'}, entries", differ, 0.5)


def check_attention(run: Run, spec: TensorSpec) -> None:
    batch, heads, length, head_dim = (1, 2, 70, 64) if run.tiny else (2, 8, 3000, 128)
    quantizer = KVQuantizer(spec, spec, None, head_dim)
    keys, values = (cache(run, batch, heads, length, head_dim, spec.bits) for _ in range(2))
    for part in (keys, values):
        x = run.randn(batch, heads, length, head_dim)
        attention.append(x, [*part], 0, *NO_PASSES, spec.bits, spec.fixed_clip)
        expected = quantizer.pack(x, spec)
        differ = sum(int((a != b).sum()) for a, b in zip(part, expected, strict=True))
        run.check(f"{spec.bits}-bit cache, entries that differ", differ, 0.5)
    k, v = (attention.unpack([*part], spec.bits, torch.float32).double() for part in (keys, values))
    for new in (1, 3):
        query, mask = run.randn(batch, 4 * heads, new, head_dim), None
        if new > 1:
            mask = torch.rand(batch, 1, new, length, generator=run.generator, device=run.device) > 0.3
        y = attention.attend(query, [*keys], [*values], mask, None, *NO_PASSES, head_dim**-0.5, spec.bits)
        k4, v4 = k.repeat_interleave(4, 1), v.repeat_interleave(4, 1)
        wanted = torch.nn.functional.scaled_dot_product_attention(query.double(), k4, v4, attn_mask=mask)
        error = (y.double() - wanted.transpose(1, 2)).abs().max() / v.abs().max()
        run.check(f"attention of {new} over {spec.bits} bits", float(error), 4 * ROUNDING)


def rotations(run: Run) -> dict[str, Rotation]:
    if run.tiny:
        return {"96 channels": Hadamard(96), "4 heads": Kronecker(Hadamard(4), Identity(32))}
    return {"14336 channels": Hadamard(14336), "4096 channels": Hadamard(4096), "11008 channels": Hadamard(11008)} | {
        "32 heads": Kronecker(Hadamard(32), Identity(128)),
        "28672 channels": Hadamard(28672),
    }


def products(run: Run) -> None:
    """Quantizing and multiplying, against a product in bfloat16."""
    shapes = {"qkv": (4096, 6144), "o": (4096, 4096), "gate and up": (4096, 28672), "down": (14336, 4096)}
    if run.tiny:
        shapes = {"tiny": (128, 64)}
    for name, (width, out) in shapes.items():
        for spec in (INT4, TensorSpec(4, True, group=128)):
            copies = 1 if run.tiny else max(1, -(-(120 << 20) // (width * out // 2)))
            packed = [weight(run, out, width, spec) for _ in range(copies)]
            dense = [run.randn(out, width) for _ in range(min(copies, 4))]
            for rows in (1, 16, 128, 2048, 8192)[: 1 if run.tiny else None]:
                x = run.randn(rows, width)
                ours = run.microseconds([partial(product, x, p, NO_PASSES, spec, ACTIVATIONS) for p in packed])
                other = run.microseconds([partial(torch.nn.functional.linear, x, w) for w in dense])
                what = f"{name}{' in groups' * bool(spec.group)}, {rows} rows"
                run.note("product", what, ours, "µs")
                run.note("product", what, other / ours, "× bfloat16")
            del packed, dense


def quantizers(run: Run) -> None:
    """What stands before a product, against the time that its bytes take."""
    cases = {
        "quantize 4096": (4096, None),
        "quantize 14336": (14336, None),
        "rotate and quantize 14336": (14336, 14336),
    }
    if run.tiny:
        cases = {"rotate and quantize 96": (96, 96)}
    how: dict[str, Any] = {"evens_first": True, "groups": 0}
    for name, (width, size) in cases.items():
        passes = NO_PASSES if size is None else lowered(Hadamard(size))
        for rows in (1, 2) if run.tiny else (1, 2048):
            x = run.randn(rows, width)
            call = partial(quantize_rows, x, *passes, IntGrid(ACTIVATIONS.bits, ACTIVATIONS.symmetric), 0.9, **how)
            run.note("quantizer", f"{name}, {rows} rows", run.microseconds([call]), "µs")
            copied = torch.empty(rows, width + width // 2, dtype=torch.bfloat16, device=run.device)
            run.note("quantizer", f"{name}, {rows} rows, bytes alone", run.microseconds([copied.zero_]), "µs")


def calibration(run: Run) -> None:
    """What quantizing waits for: GPTQ of a layer, and quantization forward and backward as tuning meets it."""
    width, out = (128, 64) if run.tiny else (4096, 4096)
    hessian = run.randn(2 * width, width, dtype=torch.float32)
    factor = factorize(hessian.T @ hessian, 0.01, act_order=True)
    matrix = run.randn(out, width, dtype=torch.float32)
    qparams = choose_qparams(matrix, INT4.grid, INT4.weight_granularity)
    for _ in range(2):  # the first compiles
        taken = elapsed(run, partial(rounded, matrix, factor, qparams, INT4))
    run.note("calibration", f"gptq of {out} × {width}", 1e3 * taken, "ms")
    for size in (64,) if run.tiny else (128, 4096, 14336):
        x, spec = run.randn(1 if run.tiny else 2048 * 4096 // size, size, dtype=torch.float32), ACTIVATIONS
        taken = run.microseconds([partial(training.on_grid, x, spec, 0.9, narrow=False)])
        run.note("calibration", f"rows of {size} on their grid", taken, "µs")
        taken = run.microseconds([partial(training.quantize_backward, x, x, spec, 0.9)])
        run.note("calibration", f"rows of {size}, gradient", taken, "µs")
        run.note("calibration", f"rows of {size}, one copied", run.microseconds([x.clone]), "µs")


def elapsed(run: Run, call: Callable[[], Any]) -> float:
    """Seconds, the launches in it."""
    began = time.perf_counter()
    call()
    if not run.tiny:
        torch.cuda.synchronize()
    return time.perf_counter() - began


def cache(run: Run, batch: int, heads: int, length: int, head_dim: int, bits: int) -> PackedKV:
    parts = (head_dim * bits // 8, torch.uint8), (1, torch.bfloat16), (1, torch.uint8)
    return PackedKV(*(torch.ones(batch, heads, length, n, dtype=dtype, device=run.device) for n, dtype in parts))


def attentions(run: Run) -> None:
    """One new token over the cache, against SDPA over one in bfloat16."""
    for batch, length in [(1, 70)] if run.tiny else [(1, 4096), (1, 32768), (16, 4096), (16, 32768)]:
        heads, head_dim = (2, 64) if run.tiny else (8, 128)
        keys, values = (cache(run, batch, heads, length, head_dim, 4) for _ in range(2))
        query, passes = run.randn(batch, 4 * heads, 1, head_dim), lowered(Hadamard(head_dim))
        call = partial(attention.attend, query, [*keys], [*values], None, None, *passes, head_dim**-0.5, 4)
        ours = run.microseconds([call])
        k, v = run.randn(batch, heads, length, head_dim), run.randn(batch, heads, length, head_dim)
        sdpa = torch.nn.functional.scaled_dot_product_attention
        other = run.microseconds([partial(sdpa, query, k, v, enable_gqa=True)])
        run.note("attention", f"batch {batch}, {length} tokens", ours, "µs")
        run.note("attention", f"batch {batch}, {length} tokens", other / ours, "× bfloat16")


def blocks(run: Run) -> dict[str, Any]:
    """A decoder block as transformers runs it, ours and in bfloat16."""
    recipe = dfrot.Recipe.parse("quarot", "rtn", "w4a4kv4", tune="none")
    with torch.inference_mode(False):  # nothing that is derived from inference tensors is kept
        return {
            "ours": random_block("llama-3-8b", recipe, torch.bfloat16).to(run.device),
            "bfloat16": random_block("llama-3-8b", None, torch.bfloat16).to(run.device),
        }


@torch.inference_mode()
def prefill(run: Run) -> None:
    """A prompt through a block, eager and compiled."""
    models = blocks(run)
    models |= {f"{name} compiled": torch.compile(made) for name, made in models.items()}
    for prompt in (2048, 8192):
        tokens = torch.randint(256, (1, prompt), device=run.device)
        call = {name: partial(made, tokens, logits_to_keep=1, use_cache=False) for name, made in models.items()}
        compare(run, f"prompt of {prompt}", {name: milliseconds(each) for name, each in call.items()})
    for name in ("ours", "bfloat16"):
        run.note("prefill", f"weights of a block, {name}", decoder_bytes(models[name]) / 1e6, "MB")


@torch.no_grad()
def decode(run: Run) -> None:
    """One more token over a full static cache, compiled and under a CUDA graph."""
    for batch in (1, 16):
        times = {}
        for name, made in blocks(run).items():
            cache = StaticCache(made.config, max_cache_len=4096)
            made(torch.randint(256, (batch, 64), device=run.device), past_key_values=cache, use_cache=True)
            layer: Any = cache.layers[0]
            if name == "ours":
                for part in layer._room:
                    part.codes.random_(0, 256)
                    part.scale.fill_(0.1)
            else:
                layer.keys.normal_()
                layer.values.normal_()
            step, token = torch.compile(made), torch.randint(256, (batch, 1), device=run.device)

            def one(step: Any = step, token: Tensor = token, cache: Any = cache, layer: Any = layer) -> None:
                layer.cumulative_length.fill_(4095)
                step(token, past_key_values=cache, use_cache=True)

            for _ in range(3):  # compiles, and meets what may compile anew
                one()
            times[name] = run.microseconds([one]) / 1e3
            run.note("decode", f"cache of batch {batch}, {name}", kv_bytes(cache) / 1e6, "MB")
        compare(run, f"decode of batch {batch} over 4096 tokens", times)


def compare(run: Run, what: str, times: dict[str, float]) -> None:
    """Milliseconds, and as multiples of ours, compiled if that was measured."""
    ours = times.get("ours compiled", times["ours"])
    for name, taken in times.items():
        run.note("block", f"{what}, {name}", taken, "ms")
        run.note("block", f"{what}, {name}", taken / ours, "× ours")


def milliseconds(call: Callable[[], Any]) -> float:
    call()
    times = []
    for _ in range(5):
        torch.cuda.synchronize()
        began = time.perf_counter()
        call()
        torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - began))
    return statistics.median(times)


def model(run: Run) -> None:
    """Quantizing, measuring and generating with a real model."""
    given, out = run.given, run.given.out / "checkpoint"
    recipe = dfrot.Recipe.parse("rangerot", "gptq", "w4a4kv4", calib=given.calib, calib_tokens=16384, tune=given.tune)
    began = time.perf_counter()
    result = dfrot.quantize(given.model, recipe, out, device=run.device, overwrite=True, check_source="never")
    run.note("model", "quantize", time.perf_counter() - began, "s")
    for stage, taken in result.timings_s.items():
        run.note("model", f"quantize, {stage}", taken, "s")
    for name, path in (("ours", str(out)), ("unquantized", given.model)):
        began = time.perf_counter()
        measured = evaluate(path, Measurement(("pydoc",), 2048, 16384), device=str(run.device))
        run.note("model", f"eval of 16384 tokens, {name}", time.perf_counter() - began, "s")
        run.note("model", f"pydoc, {name}", measured.metrics["ppl/pydoc"], "perplexity")


SECTIONS = {"checks": checks, "products": products, "quantizers": quantizers, "attention": attentions}
SECTIONS |= {"calibration": calibration, "prefill": prefill, "decode": decode}


def sections(run: Run) -> Iterator[tuple[str, Callable[[Run], None]]]:
    wanted = {name: section for name, section in SECTIONS.items() if not (run.tiny and name in ("prefill", "decode"))}
    if run.given.model:
        wanted["model"] = model
    chosen = run.given.only.split(",") if run.given.only else wanted
    yield from ((name, section) for name, section in wanted.items() if name in chosen)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seconds", type=float, default=240)
    parser.add_argument("--only", help="sections, joined by commas")
    parser.add_argument("--model")
    parser.add_argument("--calib", default="pydoc", help="calibration text of --model")
    parser.add_argument("--tune", default="none", help="what is tuned of --model")
    parser.add_argument("--tiny", action="store_true")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    run, failed = Run(given), []
    device = "Triton's interpreter" if run.tiny else torch.cuda.get_device_name()
    about = {"device": device, "torch": torch.__version__, "triton": triton.__version__}
    for name, section in sections(run):
        if run.left < 20:
            failed.append(f"{name}: no time was left")
            continue
        try:
            section(run)
        except Exception:  # the other sections are wanted all the same
            failed.append(f"{name}: {traceback.format_exc(limit=-3)}")
        record = {**about, "rows": run.rows, "wrong": run.wrong, "failed": failed}
        (given.out / "gpu.json").write_text(json.dumps(record, indent=1))
    print(f"\n{device}, torch {torch.__version__}, triton {triton.__version__}\n\n| what | | |\n|---|---|---|")
    for section_name, what, number, unit in run.rows:
        if section_name != "check":
            print(f"| {what} | {number:.4g} | {unit} |")
    checked = sum(row[0] == "check" for row in run.rows)
    print(f"\n{checked - len(run.wrong)} of {checked} checks passed", *run.wrong, *failed, sep="\n")
    raise SystemExit(bool(run.wrong or failed))


if __name__ == "__main__":
    main()
