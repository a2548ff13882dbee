"""A model of LLaMA-2-7B's shape with random weights, written block by block: what quantizing it costs.

    python benchmarks/big_model.py DIR [--layers 32]
    dfrot quantize DIR -o CKPT --weights gptq --calib wiki.test.raw --plan

32 layers are 13.5 GB in bfloat16. The weights have the standard deviation of an initialisation; perplexities of such a
model mean nothing. The tokenizer, bytes as tokens, is made on the spot.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from dfrot.progress import track


def shards(config: LlamaConfig) -> Iterator[dict[str, Tensor]]:
    """The tensors of the embedding, of every block, of the norm and the head."""
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config)
    shapes = {name: tensor.shape for name, tensor in skeleton.state_dict().items()}
    blocks = [f"model.layers.{index}." for index in range(config.num_hidden_layers)]
    ends = ["model.embed_tokens.", "model.norm.", "lm_head."]
    generator = torch.Generator().manual_seed(0)
    for prefix in track([ends[0], *blocks, *ends[1:]], "writing"):
        made = {}
        for name, shape in shapes.items():
            if name.startswith(prefix):
                made[name] = torch.empty(shape, dtype=torch.bfloat16)
                if "norm" in name:
                    made[name].fill_(1)
                else:
                    made[name].normal_(0, config.initializer_range, generator=generator)
        yield made


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dir", type=Path)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--width", type=int, nargs=3, default=(4096, 11008, 32), help="hidden, intermediate, heads")
    options = parser.parse_args(arguments)
    hidden, intermediate, heads = options.width
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=options.layers,
        num_attention_heads=heads,
        max_position_embeddings=4096,
        rms_norm_eps=1e-5,
        dtype="bfloat16",
    )
    options.dir.mkdir(parents=True)
    weight_map: dict[str, str] = {}
    total = 0
    for number, tensors in enumerate(shards(config), start=1):
        file = f"model-{number:05}-of-{options.layers + 3:05}.safetensors"
        save_file(tensors, options.dir / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
        total += sum(tensor.nbytes for tensor in tensors.values())
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
