"""Blocks of ggml from float rows, compiled: one C function per type, whose torch reference is in formats/ggml.

    int32_t quantool_quantize_q4_k(const float* weight, const float* importance, int64_t rows, int64_t columns,
                                   int32_t exact, uint8_t* blocks);

`weight` is [rows, columns], `importance` is [columns] or null, `blocks` is [rows, bytes]; the result is 0 or torch's
error code. Rows are shared out over torch's threads.
"""

import ctypes

import torch

from quantool.kernels import compiled


def quantize(
    name: str, weight: torch.Tensor, importance: torch.Tensor | None, row_bytes: int, *, exact: bool
) -> torch.Tensor | None:
    """Blocks uint8 [N, row_bytes] of W float32 [N, K]; None when there is no compiled kernel to make them."""
    library = compiled()
    if library is None:
        return None
    weight = weight.to("cpu", torch.float32).contiguous()
    importance = None if importance is None else importance.to("cpu", torch.float32).contiguous()
    blocks = torch.empty(weight.shape[0], row_bytes, dtype=torch.uint8)
    function = library[f"quantool_quantize_{name.lower()}"]
    function.restype = ctypes.c_int32
    code = function(
        ctypes.c_void_p(weight.data_ptr()),
        ctypes.c_void_p(0 if importance is None else importance.data_ptr()),
        ctypes.c_int64(weight.shape[0]),
        ctypes.c_int64(weight.shape[1]),
        ctypes.c_int32(exact),
        ctypes.c_void_p(blocks.data_ptr()),
    )
    if code:
        raise RuntimeError(f"quantool_quantize_{name.lower()} failed with code {code}")
    return blocks
