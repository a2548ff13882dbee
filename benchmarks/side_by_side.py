"""One model in dfrot, in llama.cpp and in torch: speed, memory and perplexity, round after round, in one table.

    python benchmarks/side_by_side.py MODEL --checkpoints CKPT … [--gguf FILE …] --text TEXT
        [--prompt 512] [--new-tokens 32] [--rounds 5] [--max-tokens 2048] [--seq-len 512] [--threads 2]

MODEL unquantized is what torch computes in bfloat16. Of it f16, q8_0 and q4_0 files are made for llama.cpp, the last
two by rounding to nearest (xllamacpp has no quantizer); files of other types, such as Q4_K_M, are given. llama.cpp runs
each with a cache in f16 and in q4_0. All get the same tokens. Every engine is a process of its own that loads once; in
each round all of them read the prompt and continue it greedily, one after the other, and medians are taken. Perplexity
is that of the same blocks. Memory is what the process has resident after the rounds, less what it had before the model
was loaded. Needs xllamacpp. vLLM is not in it.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np


class Torch:
    """A model of transformers, or a checkpoint of dfrot."""

    def __init__(self, path: str, quantized: bool) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        import dfrot

        torch.set_grad_enabled(False)
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
        self._torch, self._path = torch, path
        self._before = resident()
        if quantized:
            self._model, _ = dfrot.load(path, dtype=torch.bfloat16)
        else:
            self._model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).eval()

    def times(self, prompt: np.ndarray, new: int) -> tuple[float, float]:
        """Seconds to the first token, and of one more."""
        ids = self._torch.from_numpy(prompt)[None]
        began = time.perf_counter()
        output = self._model(ids, use_cache=True, logits_to_keep=1)
        token = output.logits[:, -1:].argmax(-1)
        first = time.perf_counter()
        for _ in range(new):
            output = self._model(token, past_key_values=output.past_key_values, use_cache=True)
            token = output.logits[:, -1:].argmax(-1)
        return first - began, (time.perf_counter() - first) / new

    def nats(self, blocks: np.ndarray) -> float:
        total = 0.0
        for block in self._torch.from_numpy(blocks):
            logits = self._model(block[None]).logits[0, :-1].float()
            total += float(self._torch.nn.functional.cross_entropy(logits, block[1:], reduction="sum"))
        return total

    def memory(self) -> int:
        return resident() - self._before


class LlamaCpp:
    """A GGUF file."""

    def __init__(self, path: str, cache: str, length: int) -> None:
        sys.path.insert(0, str(Path(__file__).parent))
        import llama_cpp

        llama_cpp.library()
        self._nats, self._before = llama_cpp.negative_log_likelihood, resident()
        self._model = llama_cpp.Model(Path(path), length, cache == "q4_0")

    def times(self, prompt: np.ndarray, new: int) -> tuple[float, float]:
        began = time.perf_counter()
        token = self._model.next_token(prompt, 0)
        first = time.perf_counter()
        for index in range(new):
            token = self._model.next_token(np.array([token]), len(prompt) + index)
        return first - began, (time.perf_counter() - first) / new

    def nats(self, blocks: np.ndarray) -> float:
        return sum(self._nats(self._model.logits(block)[:-1], block[1:]) for block in blocks)

    def memory(self) -> int:
        return resident() - self._before


def resident() -> int:
    """Bytes."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS")]
    return int(line.split()[1]) * 1024


def work(job: dict[str, Any]) -> None:
    """An engine in this process: a line of JSON is asked for and answered."""
    tokens = np.load(job["tokens"])
    prompt, blocks = tokens["prompt"], tokens["blocks"]
    if job["engine"] == "llama.cpp":
        length = max(len(prompt) + job["new"] + 1, blocks.shape[1])
        engine: Any = LlamaCpp(job["path"], job["cache"], length)
    else:
        engine = Torch(job["path"], job["engine"] == "dfrot")
    engine.times(prompt[:16], 2)  # unmeasured
    for line in sys.stdin:
        asked = line.strip()
        answers: dict[str, Any] = {"times": lambda: engine.times(prompt, job["new"]), "memory": engine.memory}
        answers["nats"] = lambda: engine.nats(blocks)
        print("ANSWER", json.dumps(answers[asked]()), flush=True)


class Process:
    def __init__(self, label: str, job: dict[str, Any], threads: int) -> None:
        self.label = label
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--work", json.dumps(job)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": str(threads)},
        )

    def ask(self, what: str) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(what + "\n")
        self._process.stdin.flush()
        for line in self._process.stdout:
            if line.startswith("ANSWER"):
                return json.loads(line.removeprefix("ANSWER"))
        raise SystemExit(f"{self.label} ended with status {self._process.wait()}")

    def end(self) -> None:
        self._process.stdin.close()  # type: ignore[union-attr]
        self._process.wait()


def prepared(model: str, folder: Path) -> tuple[Path, dict[str, Path]]:
    """What is not quantized as a directory of transformers, and GGUF files of it by their type."""
    sys.path.insert(0, str(Path(__file__).parent))
    import export_gguf

    import dfrot
    from dfrot.export import export

    recipe = dfrot.Recipe.parse("none", "rtn", "w16a16kv16", preset="deploy")
    plain = dfrot.quantize(model, recipe, folder / "plain").path
    export(plain, "huggingface", folder / "transformers")
    files = {kind: folder / f"{kind}.gguf" for kind in ("f16", "q8_0", "q4_0")}
    export(plain, "gguf", files["f16"], kind="f16")
    export(plain, "gguf", folder / "f32.gguf", kind="f32")
    for kind in ("q8_0", "q4_0"):
        export_gguf.rounded(folder / "f32.gguf", files[kind], kind.upper())
    return folder / "transformers", files


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--checkpoints", nargs="*", default=[])
    parser.add_argument("--gguf", nargs="*", default=[])
    parser.add_argument("--text", required=True)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--max-tokens", type=int, default=2048)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        plain, files = prepared(arguments.model, folder)
        from transformers import AutoTokenizer

        from dfrot.evaluation.perplexity import token_windows
        from dfrot.models.texts import read_text

        tokenizer = AutoTokenizer.from_pretrained(plain)
        text = read_text(arguments.text, "test")
        blocks = token_windows(tokenizer, text, arguments.text, 2**31, arguments.seq_len, arguments.max_tokens).numpy()
        prompt = token_windows(tokenizer, text, arguments.text, 2**31, arguments.prompt, arguments.prompt)[0].numpy()
        np.savez(folder / "tokens.npz", prompt=prompt, blocks=blocks)
        common = {"tokens": str(folder / "tokens.npz"), "new": arguments.new_tokens}
        jobs = {"torch bfloat16": {"engine": "torch", "path": str(plain)}}
        jobs |= {f"dfrot {Path(path).name}": {"engine": "dfrot", "path": path} for path in arguments.checkpoints}
        for kind, file in (files | {Path(path).stem: Path(path) for path in arguments.gguf}).items():
            for cache in ("f16", "q4_0"):
                job = {"engine": "llama.cpp", "path": str(file), "cache": cache}
                jobs[f"llama.cpp {kind}, cache {cache}"] = job
        engines = [Process(label, job | common, arguments.threads) for label, job in jobs.items()]
        load = os.getloadavg()[0]
        times: list[list[Any]] = [[] for _ in engines]
        for _ in range(arguments.rounds):
            for engine, own in zip(engines, times, strict=True):
                own.append(engine.ask("times"))
        count = blocks.shape[0] * (blocks.shape[1] - 1)
        print(f"{processor()}, {arguments.threads} threads, load {load:.1f} before and {os.getloadavg()[0]:.1f} after.")
        print(f"Prompt of {arguments.prompt} tokens, {arguments.new_tokens} new, medians of {arguments.rounds} rounds;")
        print(f"perplexity of {count} predictions in {arguments.text}.\n")
        print("| | prompt, tokens/s | first token, ms | tokens/s then | memory, MB | perplexity |\n" + "|---" * 6 + "|")
        for engine, own in zip(engines, times, strict=True):
            first, more = (median(each) for each in zip(*own, strict=True))
            memory, nats = engine.ask("memory") / 1e6, engine.ask("nats")
            speed = f"{arguments.prompt / first:.0f} | {first * 1e3:.0f} | {1 / more:.1f}"
            print(f"| {engine.label} | {speed} | {memory:.0f} | {math.exp(nats / count):.2f} |", flush=True)
            engine.end()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--work"]:
        work(json.loads(sys.argv[2]))
    else:
        main()
