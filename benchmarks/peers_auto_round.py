"""auto-round's side of peers.py: quantize the weights of a model, and save it dequantized.

    PYTHON benchmarks/peers_auto_round.py JOB.json OUT

PYTHON is an interpreter that has auto-round; nothing of dfrot is imported. JOB.json has `model`, a directory of plain
safetensors; `windows`, the token ids of the samples; `scheme`, the grids in auto-round's words; `iterations`,
`seed` and `device`. OUT becomes a model in float32; `seconds.json` in it has the seconds that quantizing took.

On most processors auto-round computes, and would save, in bfloat16. What it leaves unquantized is therefore taken from
the source: its integers and scales are measured, and not that.
"""

import json
import sys
import time
from pathlib import Path

import torch
from auto_round import AutoRound
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    job, out = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    source = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    windows = torch.tensor(job["windows"])
    began = time.perf_counter()
    rounding = AutoRound(
        job["model"],
        tokenizer,
        scheme={**job["scheme"], "data_type": "int", "act_bits": 16},
        dataset=list(windows.split(1)),
        nsamples=len(windows),
        seqlen=windows.shape[1],
        iters=job["iterations"],
        seed=job["seed"],
        device_map=job["device"],
    )
    quantized, layers = rounding.quantize()
    seconds = time.perf_counter() - began
    for name in (name for name, layer in layers.items() if layer["bits"] < 16):
        source.get_submodule(name).weight.data.copy_(quantized.get_submodule(name).weight)
    source.save_pretrained(out)
    tokenizer.save_pretrained(out)
    (out / "seconds.json").write_text(json.dumps(seconds))


if __name__ == "__main__":
    main()
