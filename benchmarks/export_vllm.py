"""Exported checkpoints in the real vLLM: perplexity there, by transformers with compressed-tensors, and here.

    make vllm
    python benchmarks/export_vllm.py CKPT … --ppl wiki.test.raw [--max-tokens 2048]
    python benchmarks/export_vllm.py CKPT … --ppl wiki.test.raw --plugin --dtypes float32 bfloat16

vLLM runs in an environment of its own, offline. All see the same tokens in the same blocks. With --plugin checkpoints
are exported for dfrot's plugin, which then has to be in that environment (`make vllm` puts it there), and transformers,
which has no online rotations, is left out.
"""

import argparse
import json
import math
import os
import platform
import subprocess
import tempfile
from pathlib import Path

import torch

import dfrot
from dfrot.evaluation.perplexity import perplexity, token_windows
from dfrot.export import export
from dfrot.models.texts import read_text

ROOT = Path(__file__).parents[1]


def in_vllm(python: Path, model: Path, dtype: str, blocks: torch.Tensor, **environment: str) -> float:
    """Perplexity by the engine, in a process with another interpreter."""
    with tempfile.TemporaryDirectory() as folder:
        jobs = Path(folder) / "jobs.json"
        jobs.write_text(json.dumps([{"model": str(model), "dtype": dtype, "blocks": blocks.tolist()}]))
        run = subprocess.run(
            [python, ROOT / "benchmarks" / "in_vllm.py", jobs],
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
        )
    found = [json.loads(line.removeprefix("ANSWER")) for line in run.stdout.splitlines() if line.startswith("ANSWER")]
    if not found or "error" in found[0]:
        raise SystemExit(f"vLLM failed on {model}: {found or run.stderr[-4000:]}")
    logs = [log for block in found[0]["log_probabilities"] for log in block]
    return math.exp(-sum(logs) / len(logs))


def by_transformers(path: Path, blocks: torch.Tensor) -> float:
    from transformers import AutoModelForCausalLM

    model: torch.nn.Module = AutoModelForCausalLM.from_pretrained(path)
    model(blocks[:1, :2])  # compressed-tensors unpacks in the whole model's first pass
    return perplexity(model.eval(), blocks, "transformers")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", type=Path, nargs="+")
    parser.add_argument("--python", type=Path, default=ROOT / ".venv-vllm" / "bin" / "python", help="one that has vLLM")
    parser.add_argument("--ppl", required=True)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--max-tokens", type=int, default=2048)
    parser.add_argument("--plugin", action="store_true")
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16"], help="that vLLM computes in")
    options = parser.parse_args()
    print(f"{options.ppl}, {options.max_tokens} tokens in blocks of {options.seq_len}; {platform.machine()}")
    with tempfile.TemporaryDirectory() as scratch:
        for checkpoint in options.checkpoints:
            model, tokenizer = dfrot.load(checkpoint)
            text = read_text(options.ppl, "test")
            sizes = model.config.vocab_size, options.seq_len, options.max_tokens
            blocks = token_windows(tokenizer, text, options.ppl, *sizes)
            ours = perplexity(model, blocks, "dfrot")
            computes = str(model.dtype).removeprefix("torch.")
            out = Path(scratch) / checkpoint.name
            export(checkpoint, "vllm", out, plugin=options.plugin or None)
            figures = {} if options.plugin else {"transformers": by_transformers(out, blocks)}
            wide = "w4" in str(model.config.quantization_config.record["recipe"]["spec"]) and not options.plugin
            for dtype in options.dtypes:
                figures[f"vLLM {dtype}"] = in_vllm(options.python, out, dtype, blocks, VLLM_CPU_INT4_W4A8="0")
                if wide:
                    figures[f"vLLM {dtype} as it comes"] = in_vllm(options.python, out, dtype, blocks)
            if options.plugin and "bfloat16" in options.dtypes:
                figures["dfrot bfloat16"] = perplexity(dfrot.load(checkpoint, dtype=torch.bfloat16)[0], blocks, "dfrot")
            shown = ", ".join(
                f"{name} {ppl:.5f} ({100 * math.log(ppl / ours):+.3f} %)" for name, ppl in figures.items()
            )
            print(f"{checkpoint.name}: dfrot {computes} {ours:.5f}, {shown}", flush=True)


if __name__ == "__main__":
    main()
