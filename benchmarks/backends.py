"""Whether the native kernels compute what the torch reference computes, on a real checkpoint.

    python benchmarks/backends.py CHECKPOINT --ppl TEXT [--max-tokens 40960] [--prompts 10] [--new-tokens 64]

Perplexities, how they differ (± the standard error over blocks), and the largest difference of a logit on the first
block. At 4 bits a difference in the last bit of a float puts some value on the other side of a tie, and what follows in
a deep model differs from there on. How much that is on its own is measured by the reference in float64 beside the
reference in float32 (`--control`). For greedy continuations of the first words of each block: where they part, and the
distance of the reference's two largest logits there.
"""

import argparse
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch

import dfrot
from dfrot.evaluation.perplexity import negative_log_likelihood, token_windows
from dfrot.kernels.library import backend
from dfrot.models.texts import read_text
from dfrot.system.memory import keep_freed_memory
from dfrot.system.progress import track

PROMPT = 32  # tokens


@contextmanager
def reference() -> Iterator[None]:
    """Inside, a model that was not used before computes without the kernels."""
    with patch("dfrot.kernels.library.instruction_set", lambda: 0):
        yield


def losses(model: Any, blocks: torch.Tensor, label: str) -> torch.Tensor:
    """Mean negative log-likelihood of each block."""
    sums = [negative_log_likelihood(model, block) for block in track(blocks, label)]
    return torch.tensor(sums, dtype=torch.float64) / (blocks.shape[1] - 1)


def continued(model: Any, prompt: torch.Tensor, new_tokens: int) -> torch.Tensor:
    given = {"attention_mask": torch.ones_like(prompt[None]), "pad_token_id": 0, "do_sample": False}
    made = model.generate(prompt[None], **given, max_new_tokens=new_tokens, min_new_tokens=new_tokens)
    return made[0, len(prompt) :]


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--ppl", required=True)
    parser.add_argument("--max-tokens", type=int, default=40960)
    parser.add_argument("--prompts", type=int, default=10)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--control", action="store_true", help="also the reference in float64")
    arguments = parser.parse_args()
    keep_freed_memory()
    print(f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads; {backend()}")
    (native, tokenizer), (slow, _) = dfrot.load(arguments.checkpoint), dfrot.load(arguments.checkpoint)
    text = read_text(arguments.ppl, "test")
    blocks = token_windows(tokenizer, text, arguments.ppl, native.config.vocab_size, 2048, arguments.max_tokens)
    with reference():
        expected, logits = losses(slow, blocks, "reference"), slow(blocks[:1]).logits
    print(f"reference: perplexity {expected.mean().exp():.4f} on {blocks.numel()} tokens", flush=True)

    def compare(label: str, model: Any) -> None:
        difference = losses(model, blocks, label) - expected
        perplexity, error = (expected + difference).mean().exp(), difference.std() / len(blocks) ** 0.5
        largest = (model(blocks[:1]).logits - logits).abs().max()
        print(
            f"{label}: perplexity {perplexity:.4f}, {difference.mean().expm1():+.3%} ± {error:.3%}; "
            f"logits differ by at most {largest:.2f}",
            flush=True,
        )

    compare("kernels", native)
    if arguments.control:
        with reference():
            compare("reference in float64", dfrot.load(arguments.checkpoint, dtype=torch.float64)[0])
    for number, block in enumerate(blocks[: arguments.prompts]):
        prompt = block[:PROMPT]
        made = continued(native, prompt, arguments.new_tokens)
        with reference():
            wanted = continued(slow, prompt, arguments.new_tokens)
            if torch.equal(made, wanted):
                print(f"prompt {number}: equal")
                continue
            parted = int((made != wanted).nonzero()[0])
            known = torch.cat([prompt, wanted[:parted]])
            first, second = slow(known[None]).logits[0, -1].topk(2).values.tolist()
        print(
            f"prompt {number}: parts after {parted} tokens, where the two largest logits are {first - second:.3f} apart"
        )


if __name__ == "__main__":
    main()
