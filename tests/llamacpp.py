"""The real llama.cpp as an oracle: logits and tokens of a GGUF file, through the C API that xllamacpp exports.

    model file -> llama_model -> llama_context -> one llama_decode of all tokens -> float32 [T, V]

The cache of keys and values is float32 and flash attention is off, so that what differs from transformers is the order
of float32 sums and ggml's own tables (GELU goes through a table of float16). The structs are those of include/llama.h
in the sdist of the wheel; their defaults are checked first, so that a wheel with other structs is an error and not
nonsense. A file that breaks a GGML_ASSERT ends the process: only what llama.cpp itself reports is an exception here.
"""

import ctypes
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import xllamacpp

F32, F16 = 0, 1  # ggml_type
OFF, AUTO = 0, -1  # llama_flash_attn_type
Pointer, Int, UInt, Float, Bool = ctypes.c_void_p, ctypes.c_int32, ctypes.c_uint32, ctypes.c_float, ctypes.c_bool


class ModelParams(ctypes.Structure):
    """llama_model_params; the padding takes what a later version may append."""

    _fields_ = [
        *((name, Pointer) for name in ("devices", "tensor_buft_overrides")),
        *((name, Int) for name in ("n_gpu_layers", "split_mode", "load_mode", "lazy_mode", "main_gpu")),
        *((name, Pointer) for name in ("tensor_split", "progress", "progress_data", "kv_overrides")),
        *((name, Bool) for name in ("vocab_only", "check_tensors", "use_extra_bufts", "no_host", "no_alloc")),
        ("padding", ctypes.c_char * 256),
    ]


class ContextParams(ctypes.Structure):
    """llama_context_params."""

    _fields_ = [
        *((name, UInt) for name in ("n_ctx", "n_batch", "n_ubatch", "n_seq_max")),
        *((name, UInt) for name in ("n_rs_seq", "n_outputs_max", "n_outputs_max_per_seq")),
        *((name, Int) for name in ("n_threads", "n_threads_batch", "ctx_type")),
        *((name, Int) for name in ("rope_scaling_type", "pooling_type", "attention_type", "flash_attn_type")),
        *((name, Float) for name in ("rope_freq_base", "rope_freq_scale", "yarn_ext_factor", "yarn_attn_factor")),
        *((name, Float) for name in ("yarn_beta_fast", "yarn_beta_slow")),
        *(("yarn_orig_ctx", UInt), ("defrag_thold", Float), ("cb_eval", Pointer), ("cb_eval_data", Pointer)),
        *(("type_k", Int), ("type_v", Int), ("moe_cache_size", ctypes.c_size_t)),
        *((name, Pointer) for name in ("abort", "abort_data")),
        *((name, Bool) for name in ("embeddings", "offload_kqv", "no_perf", "op_offload", "swa_full", "kv_unified")),
        ("padding", ctypes.c_char * 256),
    ]


class Batch(ctypes.Structure):
    """llama_batch: arrays of n_tokens; seq_id has one array per token."""

    _fields_ = [
        ("n_tokens", Int),
        ("token", ctypes.POINTER(Int)),
        ("embd", Pointer),
        ("pos", ctypes.POINTER(Int)),
        ("n_seq_id", ctypes.POINTER(Int)),
        ("seq_id", ctypes.POINTER(ctypes.POINTER(Int))),
        ("logits", ctypes.POINTER(ctypes.c_int8)),
    ]


os.environ.setdefault("GGML_NO_BACKTRACE", "1")  # an assertion of ggml starts a debugger otherwise
LIBRARY = ctypes.CDLL(str(Path(xllamacpp.__file__).parent / "xllamacpp.abi3.so"))
Log = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, Pointer)
lines: list[str] = []  # what llama.cpp said since the last file was opened


@Log
def collect(level: int, text: bytes, data: int | None) -> None:
    lines.append(text.decode(errors="replace"))


def function(name: str, result: Any, *arguments: Any) -> Any:
    found = getattr(LIBRARY, name)
    found.restype, found.argtypes = result, list(arguments)
    return found


log_set = function("llama_log_set", None, Log, Pointer)
model_defaults = function("llama_model_default_params", ModelParams)
context_defaults = function("llama_context_default_params", ContextParams)
model_load = function("llama_model_load_from_file", Pointer, ctypes.c_char_p, ModelParams)
model_free = function("llama_model_free", None, Pointer)
get_vocab = function("llama_model_get_vocab", Pointer, Pointer)
vocab_size = function("llama_vocab_n_tokens", Int, Pointer)
vocab_tokenize = function("llama_tokenize", Int, Pointer, ctypes.c_char_p, Int, ctypes.POINTER(Int), Int, Bool, Bool)
context_new = function("llama_init_from_model", Pointer, Pointer, ContextParams)
context_free = function("llama_free", None, Pointer)
batch_new = function("llama_batch_init", Batch, Int, Int, Int)
batch_free = function("llama_batch_free", None, Batch)
decode = function("llama_decode", Int, Pointer, Batch)
get_logits = function("llama_get_logits", ctypes.POINTER(Float), Pointer)


def logits(path: str | Path, ids: Sequence[int]) -> np.ndarray:
    """Logits float32 [T, V] of the T tokens `ids` (nothing is added to them), computed in one batch.

    Raises RuntimeError with llama.cpp's own words when it refuses the file or the tokens.
    """
    params = known_context_params()
    params.n_ctx = params.n_batch = params.n_ubatch = (len(ids) + 31) // 32 * 32
    params.n_threads = params.n_threads_batch = 1  # several threads wait for each other by spinning
    params.type_k = params.type_v = F32
    params.flash_attn_type = OFF
    with loaded(path) as model:
        context = context_new(model, params)
        if not context:
            raise failed(f"llama.cpp made no context for {path}")
        batch = batch_new(len(ids), 0, 1)
        try:
            if cache := [line for line in lines if "K (" in line and not ("K (f32)" in line and "V (f32)" in line)]:
                raise failed(f"the cache is not float32: {cache}")
            fill(batch, ids)
            if code := decode(context, batch):
                raise failed(f"llama_decode returned {code} for {path}")
            shape = (len(ids), vocab_size(get_vocab(model)))
            return np.ctypeslib.as_array(get_logits(context), shape=shape).copy()
        finally:
            batch_free(batch)
            context_free(context)


def tokenize(path: str | Path, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
    """Token ids of a text, by the vocabulary of the file alone (it needs no tensors).

    `add_special` adds BOS and EOS where the file asks for them; `parse_special` reads "</s>" as the token of that name.
    """
    data = text.encode()
    with loaded(path, vocab_only=True) as model:
        room = len(data) + 16
        ids = (Int * room)()
        count = vocab_tokenize(get_vocab(model), data, len(data), ids, room, add_special, parse_special)
        if count < 0:
            raise failed(f"llama_tokenize returned {count} for {path}")
        return list(ids[:count])


@contextmanager
def loaded(path: str | Path, *, vocab_only: bool = False) -> Iterator[int]:
    """A llama_model of the file, its numbers validated, freed at the end."""
    params = known_model_params()
    params.vocab_only, params.check_tensors = vocab_only, True
    lines.clear()
    model = model_load(str(path).encode(), params)
    if not model:
        raise failed(f"llama.cpp refuses {path}")
    try:
        yield model
    finally:
        model_free(model)


def fill(batch: Batch, ids: Sequence[int]) -> None:
    batch.n_tokens = len(ids)
    for i, token in enumerate(ids):
        batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, i, 1, 1
        batch.seq_id[i][0] = 0


def known_model_params() -> ModelParams:
    log_set(collect, None)  # again each time: others set it too
    params = model_defaults()
    if (params.vocab_only, params.check_tensors, params.use_extra_bufts) != (False, False, True):
        raise RuntimeError("llama_model_params of this xllamacpp is laid out differently")
    return params


def known_context_params() -> ContextParams:
    params = context_defaults()
    found = (params.n_ctx, params.flash_attn_type, params.yarn_ext_factor, params.type_k, params.type_v)
    if found != (512, AUTO, -1.0, F16, F16) or (params.embeddings, params.offload_kqv) != (False, True):
        raise RuntimeError("llama_context_params of this xllamacpp is laid out differently")
    return params


def failed(message: str) -> RuntimeError:
    return RuntimeError(f"{message}\n{''.join(lines)[-4000:]}")
