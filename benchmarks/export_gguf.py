"""A checkpoint as a GGUF file, in every type, and llama.cpp's perplexity with it beside ours.

    python benchmarks/export_gguf.py CKPT --python PYTHON --text TEXT [--max-tokens 2048] [--seq-len 512]
    python benchmarks/export_gguf.py --source MODEL --python PYTHON --text TEXT

PYTHON is an interpreter that has xllamacpp (llama.cpp with its CPU kernels). Both sides get the same blocks of tokens,
ours as `dfrot eval` makes them, llama.cpp's from there, and whether llama.cpp cuts the text alike is said. The second
form is what a rotated Q4_0 competes with: the model as it is, its linear layers rounded to Q4_0 as llama.cpp does it,
by the gguf package, as xllamacpp has no quantizer. Embedding and head are never in integers here. Of the f16 file it is
also measured what a cache in Q4_0 costs, which llama.cpp rotates of itself, and what it would without that rotation.
"""

import argparse
import math
import os
import platform
import subprocess
import tempfile
from pathlib import Path

import gguf
import numpy as np
import torch

import dfrot
from dfrot.evaluation.perplexity import perplexity, token_windows
from dfrot.export import export
from dfrot.models.texts import read_text
from dfrot.system.errors import UserError

ENGINE = Path(__file__).parent / "llama_cpp.py"
TYPES = ("f32", "bf16", "f16", "q8_0", "q4_0")


def by_llama_cpp(python: str, file: Path, blocks: torch.Tensor, cache: str = "f16", **environment: str) -> float:
    """Perplexity."""
    with tempfile.TemporaryDirectory() as folder:
        tokens, found = Path(folder) / "tokens.npy", Path(folder) / "found.npy"
        np.save(tokens, blocks.numpy())
        command = [python, str(ENGINE), str(file), str(tokens), str(found), "--nll", "--cache", cache]
        subprocess.run(command, check=True, env={**os.environ, **environment})
        return math.exp(np.load(found).sum() / (blocks.shape[0] * (blocks.shape[1] - 1)))


def cut_by_llama_cpp(python: str, file: Path, text: str) -> list[int]:
    with tempfile.TemporaryDirectory() as folder:
        given, found = Path(folder) / "text.txt", Path(folder) / "found.npy"
        given.write_text(text, newline="")
        subprocess.run([python, ENGINE, file, given, found, "--tokenize"], check=True)
        return np.load(found).tolist()


def rounded(source: Path, out: Path, to: str = "Q4_0") -> None:
    """A GGUF file with every linear layer in a block in Q4_0 or Q8_0, by llama.cpp's rounding to nearest."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(out, reader.fields["general.architecture"].contents())
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name not in ("general.architecture", "general.file_type"):
            writer.add_key_value(name, field.contents(), field.types[0], field.types[-1])
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{to}"])
    for tensor in reader.tensors:
        data, kind = tensor.data, tensor.tensor_type
        if tensor.name.startswith("blk.") and data.ndim == 2:
            kind = gguf.GGMLQuantizationType[to]
            data = gguf.quants.quantize(gguf.quants.dequantize(data, tensor.tensor_type), kind)
        writer.add_tensor(tensor.name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def line(label: str, found: float, ours: float, file: Path) -> None:
    difference = f"{found / ours - 1:+8.3%} of ours"
    print(f"llama.cpp {label:18} {found:10.4f}  {difference}  {file.stat().st_size / 1e6:8.1f} MB", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", nargs="?")
    parser.add_argument("--source", help="a model that is not quantized, instead of a checkpoint")
    parser.add_argument("--python", required=True, help="an interpreter that has xllamacpp")
    parser.add_argument("--text", default="wikitext2")
    parser.add_argument("--max-tokens", type=int, default=2048)
    parser.add_argument("--seq-len", type=int, default=512)
    arguments = parser.parse_args()
    if (arguments.checkpoint is None) == (arguments.source is None):
        parser.error("a checkpoint, or --source")
    print(f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, torch {torch.__version__}")
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = arguments.checkpoint
        if checkpoint is None:
            recipe = dfrot.Recipe.parse("none", "rtn", "w16a16kv16", preset="deploy")
            checkpoint = dfrot.quantize(arguments.source, recipe, Path(folder) / "plain").path
        model, tokenizer = dfrot.load(checkpoint)
        text = read_text(arguments.text, "test")
        blocks = token_windows(
            tokenizer, text, arguments.text, model.config.vocab_size, arguments.seq_len, arguments.max_tokens
        )
        recipe = model.config.quantization_config.record["recipe"]
        label = f"{recipe['method']} {recipe['weights']} {recipe['spec']}"
        ours = perplexity(model, blocks)
        print(f"{label}, {blocks.numel()} tokens in blocks of {blocks.shape[1]}\ndfrot {ours:26.4f}", flush=True)
        del model
        for kind in TYPES:
            file = Path(folder) / f"{kind}.gguf"
            try:
                export(checkpoint, "gguf", file, kind=kind)
            except UserError:
                print(f"llama.cpp {kind:18} does not hold these weights")
                continue
            line(kind, by_llama_cpp(arguments.python, file, blocks), ours, file)
        file = Path(folder) / "f16.gguf"
        line("f16, cache q4_0", by_llama_cpp(arguments.python, file, blocks, "q4_0"), ours, file)
        unrotated = by_llama_cpp(arguments.python, file, blocks, "q4_0", LLAMA_ATTN_ROT_DISABLE="1")
        line("… not rotated", unrotated, ours, file)
        piece = text[:20_000]
        equal = cut_by_llama_cpp(arguments.python, file, piece) == tokenizer(piece).input_ids
        print(f"llama.cpp cuts the first 20 000 characters {'alike' if equal else 'OTHERWISE'}")
        if arguments.source is not None:
            rounded(Path(folder) / "f32.gguf", file := Path(folder) / "own.gguf")
            line("q4_0, its own", by_llama_cpp(arguments.python, file, blocks), ours, file)


if __name__ == "__main__":
    main()
