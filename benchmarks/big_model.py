"""A big model without a download: random weights, or a sparse file of zeros, in the shape of a Llama 2 or 3 model.

    python benchmarks/big_model.py DIR [--size 7b] [--layers 4]
    python benchmarks/quantize.py --model DIR --weights rtn --memory 4GB
    python benchmarks/big_model.py HOLES --size 70b --sparse
    dfrot quantize HOLES -o CKPT --weights gptq --calib wiki.test.raw --plan

32 layers of 7b are 13.5 GB in bfloat16; a sparse file has its size and takes no room. The weights have the standard
deviation of an initialisation; perplexities of such a model mean nothing. The tokenizer, bytes as tokens, is made on
the spot.
"""

import argparse
import json
import os
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from dfrot.system.progress import track

# hidden size, intermediate size, attention heads, heads of keys and values, layers, vocabulary (arXiv 2307.09288,
# 2407.21783, and the hub)
SIZES = {
    "7b": (4096, 11008, 32, 32, 32, 32000),
    "8b": (4096, 14336, 32, 8, 32, 128256),
    "13b": (5120, 13824, 40, 40, 40, 32000),
    "70b": (8192, 28672, 64, 8, 80, 32000),
}


def shapes(config: LlamaConfig) -> list[dict[str, torch.Size]]:
    """Names and shapes of the tensors of every shard: the embedding, every block, the norm, the head."""
    with torch.device("meta"):
        tensors = AutoModelForCausalLM.from_config(config).state_dict()
    blocks = [f"model.layers.{index}." for index in range(config.num_hidden_layers)]
    prefixes = ["model.embed_tokens.", *blocks, "model.norm.", "lm_head."]
    return [{name: t.shape for name, t in tensors.items() if name.startswith(prefix)} for prefix in prefixes]


def write_random(file: Path, tensors: dict[str, torch.Size], scale: float, generator: torch.Generator) -> None:
    made = {}
    for name, shape in tensors.items():
        made[name] = torch.ones(shape, dtype=torch.bfloat16)
        if "norm" not in name:
            made[name].normal_(0, scale, generator=generator)
    save_file(made, file, metadata={"format": "pt"})


def write_holes(file: Path, tensors: dict[str, torch.Size]) -> None:
    """A safetensors file of zeros, none of which is written."""
    header, stop = {}, 0
    for name, shape in tensors.items():
        start, stop = stop, stop + 2 * shape.numel()
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, stop]}
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(file, file.stat().st_size + stop)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dir", type=Path)
    parser.add_argument("--size", choices=SIZES, default="7b")
    parser.add_argument("--layers", type=int, help="fewer than the model has")
    parser.add_argument("--sparse", action="store_true", help="zeros that take no room")
    options = parser.parse_args(arguments)
    hidden, intermediate, heads, kv_heads, layers, rows = SIZES[options.size]
    config = LlamaConfig(
        vocab_size=rows,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=options.layers or layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=4096,
        rms_norm_eps=1e-5,
        dtype="bfloat16",
    )
    options.dir.mkdir(parents=True)
    weight_map: dict[str, str] = {}
    generator = torch.Generator().manual_seed(0)
    parts = shapes(config)
    for number, tensors in enumerate(track(parts, "writing"), start=1):
        file = options.dir / f"model-{number:05}-of-{len(parts):05}.safetensors"
        if options.sparse:
            write_holes(file, tensors)
        else:
            write_random(file, tensors, config.initializer_range, generator)
        weight_map |= dict.fromkeys(tensors, file.name)
    total = sum(2 * shape.numel() for tensors in parts for shape in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (options.dir / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate(["<s>", "</s>", *letters])}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(options.dir)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(options.dir)  # last: a directory without it is no model
    print(f"{options.dir}: {total / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
