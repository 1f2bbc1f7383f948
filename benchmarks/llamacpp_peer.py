"""The real llama.cpp as a peer: encode rows, quantize a file, judge a file.

Usage: llamacpp_peer.py LIBRARY SOURCE OUTPUT MIX [--imatrix FILE] [--threads N]        (what llama-quantize does)

Rows and logits come from the wheel xllamacpp. llama-quantize's function is not in it, so libllama is built once into
build/llama.cpp from the source distribution of the same version (some minutes; needs cmake and a C++ compiler).

`Judge` computes what llama-perplexity prints from llama.cpp's own logits, in float64, window by window; the base's
log probabilities are kept in a file of float32 instead of 16 bits. It runs as llama-perplexity does: a cache of
float16, activations rounded to 8 bits where the weights are blocks.
"""

import argparse
import ctypes
import math
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from measure import ROOT, version

sys.path.append(str(ROOT / "tests"))
import llamacpp as api  # the harness of the tests: struct layouts, checked

BUILD = ROOT / "build" / "llama.cpp"
FTYPES = {  # llama_ftype in include/llama.h
    "q4_0": 2,
    "q4_1": 3,
    "q8_0": 7,
    "q5_0": 8,
    "q5_1": 9,
    "q2_k": 10,
    "q3_k_s": 11,
    "q3_k_m": 12,
    "q3_k_l": 13,
    "q4_k_s": 14,
    "q4_k_m": 15,
    "q5_k_s": 16,
    "q5_k_m": 17,
    "q6_k": 18,
    "q2_k_s": 21,
    "iq4_nl": 25,
    "iq4_xs": 30,
}


class ImatrixData(ctypes.Structure):
    """llama_model_imatrix_data; a list of them ends with one whose name is null."""

    _fields_ = [("name", ctypes.c_char_p), ("data", ctypes.c_void_p), ("size", ctypes.c_size_t)]


class QuantizeParams(ctypes.Structure):
    """llama_model_quantize_params; the padding takes what a later version may append."""

    _fields_ = [
        *((name, api.Int) for name in ("nthread", "ftype", "output_tensor_type", "token_embedding_type")),
        *((name, api.Bool) for name in ("allow_requantize", "quantize_output_tensor", "only_copy")),
        *((name, api.Bool) for name in ("pure", "keep_split", "dry_run")),
        *((name, api.Pointer) for name in ("imatrix", "kv_overrides", "tt_overrides", "prune_layers")),
        ("max_buf_size", ctypes.c_size_t),
        ("padding", ctypes.c_char * 128),
    ]


_chunk = api.function(
    "ggml_quantize_chunk",
    ctypes.c_size_t,
    *(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p),
)
_add_bos = api.function("llama_vocab_get_add_bos", api.Bool, api.Pointer)
_bos = api.function("llama_vocab_bos", api.Int, api.Pointer)
_memory = api.function("llama_get_memory", api.Pointer, api.Pointer)
_clear = api.function("llama_memory_clear", None, api.Pointer, api.Bool)


def encode(name: str, weight: np.ndarray, importance: np.ndarray | None, threads: int) -> np.ndarray:
    """Blocks uint8 [rows, bytes] of float32 [rows, columns] by ggml, rows shared out over threads as llama-quantize."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    kind = GGMLQuantizationType[name]
    block, size = GGML_QUANT_SIZES[kind]
    out = np.empty((len(weight), weight.shape[1] // block * size), np.uint8)
    pointer = None if importance is None else importance.ctypes.data

    def part(rows: np.ndarray) -> None:
        first, count = int(rows[0]), len(rows)
        source, target = weight[first : first + count], out[first : first + count]
        _chunk(int(kind), source.ctypes.data, target.ctypes.data, 0, count, weight.shape[1], pointer)

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(part, np.array_split(np.arange(len(weight)), threads)))
    return out


def source() -> Path:
    """The source tree of llama.cpp that the wheel was built from, unpacked once."""
    tree = BUILD / "source"
    if not tree.exists():
        wanted = f"xllamacpp=={version('xllamacpp')}"
        print(f"fetching the source distribution of {wanted}", file=sys.stderr, flush=True)
        pip = (sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", "xllamacpp", wanted)
        subprocess.run((*pip, "-d", BUILD), check=True)
        with tarfile.open(next(BUILD.glob("xllamacpp-*.tar.gz"))) as archive:
            archive.extractall(BUILD / "sdist", filter="data")
        shutil.move(next((BUILD / "sdist").glob("*/thirdparty/llama.cpp")), tree)
        shutil.rmtree(BUILD / "sdist")
    return tree


def build(tree: Path | None = None) -> Path:
    """libllama of that source tree, or of the one that is given, built once for this machine's processor."""
    library = BUILD / "bin" / "libllama.so"
    if not library.exists():
        if shutil.which("cmake") is None:
            raise SystemExit("error: cmake: not found\nhint: pip install cmake")
        print("building libllama", file=sys.stderr, flush=True)
        off = ("LLAMA_BUILD_TESTS", "LLAMA_BUILD_EXAMPLES", "LLAMA_BUILD_TOOLS", "LLAMA_BUILD_SERVER")
        options = [f"-D{name}=OFF" for name in (*off, "LLAMA_BUILD_COMMON", "LLAMA_CURL")]
        options += ["-DCMAKE_BUILD_TYPE=Release", "-DBUILD_SHARED_LIBS=ON"]
        for command in (
            ("cmake", "-S", tree or source(), "-B", BUILD, *options),
            ("cmake", "--build", BUILD, "--target", "llama", "-j", str(os.cpu_count())),
        ):
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return library


def quantize(library: Path, model: Path, output: Path, *, mix: str, imatrix: Path | None, threads: int) -> None:
    """What llama-quantize does; ends this program if llama.cpp refuses."""
    llama = ctypes.CDLL(str(library))
    llama.llama_log_set(api.collect, None)
    llama.llama_model_quantize_default_params.restype = QuantizeParams
    params = llama.llama_model_quantize_default_params()
    if (params.quantize_output_tensor, params.pure, params.dry_run) != (True, False, False):
        raise SystemExit("error: llama_model_quantize_params of this llama.cpp is laid out differently")
    params.nthread, params.ftype = threads, FTYPES[mix]
    keep: Any = None if imatrix is None else _imatrix(imatrix)
    if keep is not None:
        params.imatrix = ctypes.cast(keep[0], api.Pointer)
    if code := llama.llama_model_quantize(str(model).encode(), str(output).encode(), ctypes.byref(params)):
        raise SystemExit(f"error: llama_model_quantize returned {code}\n{''.join(api.lines)[-2000:]}")


def _imatrix(path: Path) -> tuple[Any, list[np.ndarray]]:
    """The list that llama.cpp takes, and the arrays it points to: the mean square of each column."""
    from quantool.io.imatrix import read_imatrix

    entries = read_imatrix(path).entries
    values = [np.ascontiguousarray(entry.values.numpy().reshape(-1), np.float32) for entry in entries.values()]
    listed = (ImatrixData * (len(values) + 1))()
    for i, (name, value) in enumerate(zip(entries, values, strict=True)):
        listed[i] = ImatrixData(name.encode(), value.ctypes.data, value.size)
    return listed, values


@dataclass(frozen=True, slots=True)
class Judged:
    """llama-perplexity's figures of one file; the divergence is None for the base itself."""

    perplexity: float
    perplexity_error: float
    kl_divergence: float | None = None
    kl_divergence_error: float | None = None
    top1_agreement: float | None = None


class Judge:
    """Compares files with `base`, whose log probabilities are in a file in `folder`, on windows of a text."""

    def __init__(self, base: Path, text: Path, folder: Path, *, n_ctx: int, chunks: int, threads: int) -> None:
        self._n_ctx, self._threads = n_ctx, threads
        with api.loaded(base, vocab_only=True) as model:
            vocab = api.get_vocab(model)
            data = text.read_bytes().removesuffix(b"\n")
            room = (api.Int * (len(data) + 16))()
            count = api.vocab_tokenize(vocab, data, len(data), room, len(room), True, False)
            tokens = np.array(room[: min(count, chunks * n_ctx)], np.int64).reshape(-1, n_ctx)
            self._targets = tokens[:, n_ctx // 2 + 1 :].copy()
            if _add_bos(vocab):
                tokens[:, 0] = _bos(vocab)
            self._windows, size = tokens, api.vocab_size(vocab)
        shape = (len(tokens), n_ctx - 1 - n_ctx // 2, size)
        self._base = np.memmap(folder / "base-log-probabilities", np.float32, "w+", shape=shape)
        for i, rows in enumerate(self._log_probabilities(base)):
            self._base[i] = rows
        self.base = self._judged(*(self._targets_of(self._base[i], i) for i in range(len(tokens))))

    def judge(self, path: Path) -> Judged:
        """How far the file is from the base."""
        nll, kld, same = [], [], []
        for i, log_q in enumerate(self._log_probabilities(path)):
            log_p = self._base[i].astype(np.float64)
            kld.append(np.where(log_p > -16, np.exp(log_p) * (log_p - log_q), 0).sum(-1))
            same.append(log_p.argmax(-1) == log_q.argmax(-1))
            nll.append(self._targets_of(log_q, i))
        divergence, error = mean_and_error(np.concatenate(kld))
        found = self._judged(*nll)
        top1 = float(np.concatenate(same).mean())
        return Judged(found.perplexity, found.perplexity_error, divergence, error, top1)

    def _targets_of(self, log_p: np.ndarray, window: int) -> np.ndarray:
        return -log_p[np.arange(len(log_p)), self._targets[window]].astype(np.float64)

    def _judged(self, *nll: np.ndarray) -> Judged:
        mean, error = mean_and_error(np.concatenate(nll))
        return Judged(math.exp(mean), math.exp(mean) * error)

    def _log_probabilities(self, path: Path) -> Iterator[np.ndarray]:
        """float64 [targets, V] of each window."""
        params = api.known_context_params()
        params.n_ctx = params.n_batch = params.n_ubatch = self._n_ctx
        params.n_threads = params.n_threads_batch = self._threads
        with api.loaded(path) as model:
            context = api.context_new(model, params)
            batch = api.batch_new(self._n_ctx, 0, 1)
            size = api.vocab_size(api.get_vocab(model))
            try:
                for window in self._windows.tolist():
                    _clear(_memory(context), True)
                    api.fill(batch, window)
                    if api.decode(context, batch):
                        raise SystemExit(f"error: llama.cpp cannot decode {path}")
                    logits = np.ctypeslib.as_array(api.get_logits(context), shape=(self._n_ctx, size))
                    rows = logits[self._n_ctx // 2 : -1].astype(np.float64)
                    rows -= rows.max(-1, keepdims=True)
                    yield rows - np.log(np.exp(rows).sum(-1, keepdims=True))
            finally:
                api.batch_free(batch)
                api.context_free(context)


def mean_and_error(values: np.ndarray) -> tuple[float, float]:
    """The mean, and its standard error."""
    mean = float(values.mean())
    return mean, math.sqrt(max(0.0, float((values * values).mean()) - mean * mean) / (len(values) - 1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("library", "source", "output"):
        parser.add_argument(name, type=Path)
    parser.add_argument("mix", choices=FTYPES)
    parser.add_argument("--imatrix", type=Path)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    args = parser.parse_args()
    quantize(args.library, args.source, args.output, mix=args.mix, imatrix=args.imatrix, threads=args.threads)


if __name__ == "__main__":
    main()
