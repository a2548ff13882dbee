"""Realistic results and inspections, drawn from a seeded generator: what `dfrot compare` and `dfrot inspect` write."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from dfrot.evaluation.record import Record, append_records
from dfrot.pipeline.recipe import Recipe

MODEL = "smollm2-135m"
TEXT = "wiki.test.raw"
# method, weights, spec → perplexity of seed 0 (README); the method fixes how well the rest goes
CELLS = {
    ("none", "rtn", "w4a4kv4"): 2976.0,
    ("quarot", "rtn", "w4a4kv4"): 124.36,
    ("quarot", "gptq", "w4a4kv4"): 39.95,
    ("quarot", "gptq", "w4a4kv16"): 37.16,
    ("quarot", "rtn", "w16a4kv16"): 31.67,
    ("dfrot", "rtn", "w4a4kv4"): 79.43,
    ("dfrot", "gptq", "w4a4kv4"): 33.99,
    ("dfrot", "gptq", "w4a4kv16"): 31.57,
    ("dfrot", "rtn", "w16a4kv16"): 28.16,
    ("duquant", "rtn", "w4a4kv4"): 37.02,
    ("duquant", "gptq", "w4a4kv4"): 31.57,
}
SEEDED = {("quarot", "gptq", "w4a4kv4"): (39.27, 40.19), ("dfrot", "gptq", "w4a4kv4"): (34.09, 34.56)}
UNQUANTIZED_BITS = 20.97


def record(recipe: Recipe | None, perplexity: float, model: str = MODEL, **conditions: Any) -> Record:
    """A record whose other metrics follow from its perplexity."""
    loss = np.log(perplexity / UNQUANTIZED_BITS)
    metrics = {
        **{f"ppl/{TEXT}": perplexity, f"kl/{TEXT}": float(loss), f"top1/{TEXT}": float(np.exp(-0.8 * loss))},
        **{f"{task}_local": float(0.5 + 0.18 * np.exp(-loss)) for task in ("acc/piqa", "acc_norm/arc_easy")},
    }
    metrics["zero_shot_average"] = (metrics["acc/piqa_local"] + metrics["acc_norm/arc_easy_local"]) / 2
    weights = 16 if recipe is None else recipe.spec.weights.bits
    kv = 16 if recipe is None else recipe.spec.keys.bits
    return Record(
        model=model,
        recipe=None if recipe is None else recipe.to_json(),
        metrics=metrics,
        size={
            "weight_bytes": 538_000_000 if weights == 16 else 167_000_000,
            "decoder_bits_per_weight": 16.0 if weights == 16 else 4.02,
            "unquantized_bytes": 269_000_000,
            "kv_bytes_per_token": 23040 if kv == 16 else 6300,
            "unquantized_kv_bytes_per_token": 23040,
        },
        timings_s={"evaluate": 61.5} if recipe is None else {"quantize": 188.2, "evaluate": 63.9},
        conditions={
            **{"text": TEXT, "seq_len": 2048, "tokens": {TEXT: 40960}, "seed": None if recipe is None else recipe.seed},
            **{"device": "cpu", "dtype": "float32", "threads": 2, "backend": "native kernels (AMX)"},
            **{"machine": "Linux x86_64", "dfrot": "0.1.0", "commit": "0123456789ab"},
            **{"torch": "2.13.0", "transformers": "5.23.0", **conditions},
        },
        peak_rss_bytes=1_220_000_000,
    )


def records() -> list[Record]:
    made = [record(None, UNQUANTIZED_BITS)]
    for (method, weights, spec), perplexity in CELLS.items():
        values = (perplexity, *SEEDED.get((method, weights, spec), ()))
        for seed, value in enumerate(values):
            published: dict[str, Any] = {"published": {f"ppl/{TEXT}": {"value": 6.21, "source": "DFRot, Table 2"}}}
            more: dict[str, Any] = (
                published if (method, weights, seed) == ("dfrot", "gptq", 0) and spec == "w4a4kv4" else {}
            )
            made.append(record(Recipe.parse(method, weights, spec, tune="none", seed=seed), value, **more))
    made.append(record(Recipe.parse("dfrot", "gptq", "w4a4kv4", tune="none", gamma=1.0, steps=50), 35.1))
    return made


def write_results(directory: Path) -> list[Record]:
    made = records()
    append_records(directory / "results.jsonl", made)
    return made


def write_inspection(
    directory: Path,
    blocks: int = 30,
    tokens: int = 2048,
    width: int = 576,
    names: Sequence[str] = ("none", "RO", "RH", "dfrot", "duquant"),
    **changes: Any,
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Write inspect.json and inspect.safetensors; returns what is in them."""
    rng = np.random.default_rng(0)
    norms = [f"{block}.{kind}" for block in range(blocks) for kind in ("input_layernorm", "post_attention_layernorm")]
    levels = {"none": 0.19, "RO": 0.115, "RH": 0.105, "dfrot": 0.095, "duquant": 0.09}
    rotations = {name: levels[name] for name in names}
    massive = np.zeros((len(norms), tokens), np.uint8)
    massive[3:, 0] = 1
    massive[5:-2, rng.integers(1, tokens, 4)] = 1
    tensors: dict[str, np.ndarray] = {"massive": massive}
    for name, level in rotations.items():
        error = level * np.exp(rng.normal(0, 0.14, massive.shape) + 0.06 * np.sin(np.arange(len(norms)))[:, None])
        high = {"none": 0.06, "RO": 2.6, "RH": 3.4, "dfrot": 1.5, "duquant": 1.2}[name]
        tensors[f"error/{name}"] = np.where(massive, error * high, error).astype(np.float32)
    x = rng.normal(0, 1, (64, width))
    x[:, 507 % width] *= 4
    x[0] = 0.05 * rng.normal(0, 1, width)
    x[0, 507 % width] = 23.9
    for name in rotations:
        q = np.eye(width) if name == "none" else np.linalg.qr(rng.normal(0, 1, (width, width)))[0]
        tensors[f"surface/{name}"] = np.abs(x @ q).astype(np.float32)
    found = {
        "schema": 2,
        "model": MODEL,
        "conditions": {
            **{"text": TEXT, "tokens": tokens, "seq_len": tokens, "seed": 0, "device": "cpu", "dtype": "float32"},
            **{
                "threads": 1,
                "machine": "Linux x86_64",
                "dfrot": "0.1.0",
                "commit": "0123456789ab",
                "spec": "a4",
                "clip": 0.9,
            },
        },
        "norms": norms,
        "tokens": ["<s>", "\n", " the", " of"] * (tokens // 4),
        "massive": [
            {
                **{"block": i // 2, "norm": norms[i].partition(".")[2], "position": j},
                **{
                    "token": "<s>" if j == 0 else "\n",
                    "token_id": 1,
                    "channel": 507,
                    "peak_over_rms": float(23.9 - 0.01 * i),
                },
            }
            for i, j in np.argwhere(massive).tolist()
        ],
        "channels": [
            {
                "median": 4.0 + 0.02 * i,
                "largest": [
                    {"channel": (507 + 7 * k) % width, "value": (24.0 if i > 2 else 9.0) / (1 + k)} for k in range(3)
                ],
            }
            for i in range(len(norms))
        ],
        "rotations": list(rotations),
        "kurtosis": {
            name: (level * np.exp(rng.normal(0, 0.3, len(norms)))).tolist()
            for name, level in {"none": 30.0, "RO": 0.3, "RH": 0.2, "dfrot": 0.15, "duquant": 0.1}.items()
            if name in names
        },
        "error": {name: {"ordinary": level, "massive": 0.2} for name, level in rotations.items()},
        "sensitivity": {
            name: (level**3 * np.exp(rng.normal(0, 0.4, blocks))).tolist() for name, level in rotations.items()
        },
        "weights": [
            {
                **{"block": block, "layer": layer},
                "error": {n: level * float(rng.normal(1, 0.04)) for n, level in {"none": 0.13, "RH": 0.105}.items()},
            }
            for block in range(blocks)
            for layer in (
                *("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
                *("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
            )
        ],
        "kv": {
            kind: {how: (low + spread * rng.random(blocks)).tolist() for how, (low, spread) in levels.items()}
            for kind, levels in {
                "keys": {"plain": (0.12, 0.02), "rotated": (0.085, 0.005)},
                "values": {"plain": (0.1, 0.01), "rotated": (0.09, 0.005)},
            }.items()
        },
        "surface": "1.input_layernorm",
        **changes,
    }
    (directory / "inspect.json").write_text(json.dumps(found))
    save_file(tensors, directory / "inspect.safetensors")
    return found, tensors
