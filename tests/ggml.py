"""ggml's own quantizers, called through ctypes in the wheel of xllamacpp: the oracle of our block types.

    int ggml_quantize_chunk(type, const float * src, void * dst, start, nrows, n_per_row, const float * imatrix)

Source: ggml.h of https://github.com/ggml-org/ggml
"""

import ctypes
from pathlib import Path

import numpy as np
import torch
import xllamacpp
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf import quants as gguf_quants


def _library() -> ctypes.CDLL:
    [path] = Path(xllamacpp.__file__).parent.glob("xllamacpp*.so")
    library = ctypes.CDLL(str(path))
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    library.ggml_quantize_chunk.argtypes = [
        ctypes.c_int,
        ctypes.c_void_p,
        ctypes.c_void_p,
        *[ctypes.c_int64] * 3,
        ctypes.c_void_p,
    ]
    return library


_LIBRARY = _library()


def quantize(name: str, weight: torch.Tensor, importance: torch.Tensor | None = None) -> torch.Tensor:
    """Blocks uint8 [N, bytes] of W float32 [N, K]; `importance` is float32 [K]."""
    kind = GGMLQuantizationType[name]
    size, block_bytes = GGML_QUANT_SIZES[kind]
    rows, columns = weight.shape
    weight = weight.to(torch.float32).contiguous()
    importance = None if importance is None else importance.to(torch.float32).contiguous()
    blocks = torch.zeros(rows, columns // size * block_bytes, dtype=torch.uint8)
    pointer = None if importance is None else importance.data_ptr()
    written = _LIBRARY.ggml_quantize_chunk(int(kind), weight.data_ptr(), blocks.data_ptr(), 0, rows, columns, pointer)
    assert written == blocks.numel()
    return blocks


def dequantize(name: str, blocks: torch.Tensor) -> torch.Tensor:
    """W float32 [N, K] of blocks uint8 [N, bytes], by the gguf package, which is bit for bit ggml's."""
    with np.errstate(invalid="ignore", over="ignore"):  # d may be infinite
        return torch.from_numpy(gguf_quants.dequantize(blocks.numpy(), GGMLQuantizationType[name]))
