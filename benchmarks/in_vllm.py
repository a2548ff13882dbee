"""What vLLM predicts; run by the interpreter of its own environment, which need not have dfrot.

    VLLM/bin/python benchmarks/in_vllm.py JOBS.json

JOBS.json: [{"model": directory, "dtype": name, "blocks": [[token, …], …], "eager": true, "emulate": false}, …]; not
eager is compiled, as `vllm serve` does it. Prints a line of JSON for each job: the log-probabilities of every block's
tokens but the first, or the error that vLLM made. `emulate` gives CPUs vLLM's own emulation of NVFP4, which vLLM keeps
for GPUs otherwise.
"""

import gc
import json
import os
import sys
from typing import Any

SETTINGS = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "HF_HUB_OFFLINE": "1",
}


def log_probabilities(
    model: str, dtype: str, blocks: list[list[int]], eager: bool = True, emulate: bool = False
) -> list[list[float]]:
    from vllm import LLM, SamplingParams
    from vllm.inputs import TokensPrompt

    if emulate:
        from vllm.model_executor.kernels import linear
        from vllm.platforms import PlatformEnum

        linear._POSSIBLE_NVFP4_KERNELS[PlatformEnum.CPU] = [linear.EmulationNvFp4LinearKernel]

    longest = max(map(len, blocks))
    engine = LLM(
        model=model,
        dtype=dtype,
        max_model_len=longest + 1,
        enforce_eager=eager,
        enable_prefix_caching=False,
        skip_tokenizer_init=True,
    )
    sampling = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0, detokenize=False)
    answers = engine.generate([TokensPrompt(prompt_token_ids=block) for block in blocks], sampling, use_tqdm=False)
    return [
        [found[token].logprob for token, found in zip(block[1:], answer.prompt_logprobs[1:], strict=True)]
        for block, answer in zip(blocks, answers, strict=True)
    ]


def main() -> None:
    os.environ.update({name: os.environ.get(name, value) for name, value in SETTINGS.items()})
    with open(sys.argv[1], encoding="utf-8") as file:
        jobs = json.load(file)
    for job in jobs:
        answer: dict[str, Any]
        try:
            answer = {"log_probabilities": log_probabilities(**job)}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print("ANSWER", json.dumps(answer), flush=True)
        gc.collect()


if __name__ == "__main__":
    main()
