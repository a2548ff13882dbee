"""Logits of a GGUF file by llama.cpp, through the shared library in the Python package xllamacpp.

    PYTHON benchmarks/llama_cpp.py FILE.gguf TOKENS.npy LOGITS.npy       blocks of tokens → logits of all positions
    PYTHON benchmarks/llama_cpp.py FILE.gguf TOKENS.npy NLL.npy --nll    → nats of each block's predictions
        [--cache q4_0]                                                   keys and values in Q4_0
    PYTHON benchmarks/llama_cpp.py FILE.gguf TEXT.txt TOKENS.npy --tokenize

PYTHON is an interpreter that has xllamacpp and numpy; nothing else is imported. The package's own interface gives no
logits of a prompt, llama.cpp's does. Of its structs only the beginning is known here: the rest travels as the library
filled it, in more room than a version needs. x86-64's calling convention allows that for what is passed in memory.
"""

import argparse
import ctypes
import importlib.util
import os
from pathlib import Path
from typing import Any

import numpy as np


class _Batch(ctypes.Structure):
    _fields_ = (
        ("count", ctypes.c_int32),
        ("tokens", ctypes.POINTER(ctypes.c_int32)),
        ("embeddings", ctypes.POINTER(ctypes.c_float)),
        ("positions", ctypes.POINTER(ctypes.c_int32)),
        ("sequence_counts", ctypes.POINTER(ctypes.c_int32)),
        ("sequences", ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))),
        ("wanted", ctypes.POINTER(ctypes.c_int8)),
    )


class _ModelParams(ctypes.Structure):
    _fields_ = (("unknown", ctypes.c_uint64 * 64),)


class _ContextParams(ctypes.Structure):
    _fields_ = (
        ("context", ctypes.c_uint32),
        ("batch", ctypes.c_uint32),
        ("physical_batch", ctypes.c_uint32),
        ("sequences", ctypes.c_uint32),
        ("unknown", ctypes.c_uint64 * 64),
    )


_F16, _Q4_0 = 1, 2  # ggml's numbers of types
_TWICE = 1 + 2**32  # the types of keys and values side by side in a word
_SILENT = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(lambda *_: None)


def library() -> Any:
    """llama.cpp, silent."""
    spec = importlib.util.find_spec("xllamacpp")
    if spec is None or spec.origin is None:
        raise SystemExit("this interpreter has no xllamacpp: pip install xllamacpp")
    (path,) = Path(spec.origin).parent.glob("*.so")
    llama = ctypes.CDLL(str(path))
    pointers = ("llama_model_load_from_file", "llama_init_from_model", "llama_get_logits", "llama_get_memory")
    for name in (*pointers, "llama_model_get_vocab"):
        getattr(llama, name).restype = ctypes.c_void_p
    llama.llama_model_default_params.restype = _ModelParams
    llama.llama_context_default_params.restype = _ContextParams
    llama.llama_batch_init.restype = _Batch
    llama.llama_log_set(_SILENT, None)
    llama.llama_backend_init()
    return llama


class Model:
    """A GGUF file and a context of `seq_len` tokens, keys and values of which are in F16 or Q4_0."""

    def __init__(self, path: Path, seq_len: int, small_cache: bool = False) -> None:
        self._llama = library()
        model = self._llama.llama_model_load_from_file(str(path).encode(), self._llama.llama_model_default_params())
        if not model:
            raise SystemExit(f"llama.cpp cannot load {path}")
        self._vocabulary = ctypes.c_void_p(self._llama.llama_model_get_vocab(ctypes.c_void_p(model)))
        self._size = self._llama.llama_n_vocab(self._vocabulary)
        params = self._llama.llama_context_default_params()
        params.context = params.batch = params.physical_batch = seq_len
        if small_cache:  # of the struct's words there is but one that says F16 twice
            (where,) = [index for index, word in enumerate(params.unknown[:16]) if word == _F16 * _TWICE]
            params.unknown[where] = _Q4_0 * _TWICE
        self._context = ctypes.c_void_p(self._llama.llama_init_from_model(ctypes.c_void_p(model), params))
        if not self._context:
            raise SystemExit(f"llama.cpp makes no context of {seq_len} tokens for {path}")
        threads = int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1))
        self._llama.llama_set_n_threads(self._context, threads, threads)

    def logits(self, tokens: np.ndarray) -> np.ndarray:
        """(tokens, vocabulary), from an empty context."""
        return self._decoded(tokens, 0, len(tokens))

    def next_token(self, tokens: np.ndarray, start: int) -> int:
        """The likeliest after tokens at the positions from `start` on; the context has those before."""
        return int(self._decoded(tokens, start, 1)[0].argmax())

    def _decoded(self, tokens: np.ndarray, start: int, wanted: int) -> np.ndarray:
        """Logits of so many last tokens."""
        count = len(tokens)
        if start == 0:
            self._llama.llama_memory_clear(ctypes.c_void_p(self._llama.llama_get_memory(self._context)), True)
        batch = self._llama.llama_batch_init(count, 0, 1)
        batch.count = count
        for index, token in enumerate(tokens.tolist()):
            batch.tokens[index], batch.positions[index] = token, start + index
            batch.wanted[index] = index >= count - wanted
            batch.sequence_counts[index], batch.sequences[index][0] = 1, 0
        if self._llama.llama_decode(self._context, batch):
            raise SystemExit("llama_decode failed")
        address = ctypes.cast(self._llama.llama_get_logits(self._context), ctypes.POINTER(ctypes.c_float))
        found = np.ctypeslib.as_array(address, (wanted, self._size)).copy()
        self._llama.llama_batch_free(batch)
        return found

    def tokenize(self, text: str) -> np.ndarray:
        """As llama.cpp cuts a text; tokens around it as the file says, special ones in it are read as such."""
        raw = text.encode()
        found = (ctypes.c_int32 * (len(raw) + 8))()
        count = self._llama.llama_tokenize(self._vocabulary, raw, len(raw), found, len(found), True, True)
        return np.array(found[:count])


def negative_log_likelihood(logits: np.ndarray, targets: np.ndarray) -> float:
    wide = logits.astype(np.float64)
    top = wide.max(axis=-1)
    total = top + np.log(np.exp(wide - top[:, None]).sum(axis=-1))
    return float((total - wide[np.arange(len(targets)), targets]).sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("input", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--nll", action="store_true")
    parser.add_argument("--tokenize", action="store_true")
    parser.add_argument("--cache", choices=["f16", "q4_0"], default="f16")
    arguments = parser.parse_args()
    if arguments.tokenize:
        np.save(arguments.output, Model(arguments.model, 8).tokenize(arguments.input.read_text()))
        return
    blocks = np.load(arguments.input)
    model = Model(arguments.model, blocks.shape[1], arguments.cache == "q4_0")
    found = (model.logits(block) for block in blocks)
    if arguments.nll:
        likelihoods = [
            negative_log_likelihood(logits[:-1], block[1:]) for logits, block in zip(found, blocks, strict=True)
        ]
        np.save(arguments.output, np.array(likelihoods))
    else:
        np.save(arguments.output, np.stack(list(found)))


if __name__ == "__main__":
    main()
