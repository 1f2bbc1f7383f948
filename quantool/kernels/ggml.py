"""Blocks of ggml from float rows: an operator over two compiled C functions per type.

    int32_t quantool_quantize_q4_k(const float* weight, const float* importance, int64_t rows, int64_t columns,
                                   int32_t exact, uint8_t* blocks);
    int quantool_quantize_q4_k_cuda(weight, importance, workspace, blocks, int64_t rows, columns, exact, void* stream);

`weight` is [rows, columns], `importance` is [columns] or null, `blocks` is [rows, bytes]; the result is 0 or an error
code. The first shares rows out over torch's threads. The second is for tensors on CUDA and gives the same bytes, for
both are compiled from the same headers (csrc/lanes.h); `workspace` is float32 [rows] where there is an importance.

The torch reference is above, in formats/ggml, and computes where nothing is compiled.
"""

import ctypes

import torch

from quantool.kernels import compiled, cuda
from quantool.kernels.ops import operator


def quantize(
    name: str, weight: torch.Tensor, importance: torch.Tensor | None, row_bytes: int, *, exact: bool
) -> torch.Tensor | None:
    """Blocks uint8 [N, row_bytes] of W [N, K] on its device; None when there is no compiled kernel to make them."""
    if compiled() is None and not (weight.is_cuda and _on_cuda(name)):
        return None
    blocks: torch.Tensor = ggml_blocks(weight, importance, name, row_bytes, exact)
    return blocks


def ggml_blocks_cpu(
    weight: torch.Tensor, importance: torch.Tensor | None, name: str, row_bytes: int, exact: bool
) -> torch.Tensor:
    """Blocks uint8 [N, row_bytes] of type `name` from W [N, K] and importance [K], by the kernel for the processor."""
    _require(weight, importance)
    library = compiled()
    if library is None:
        raise RuntimeError("quantool::ggml_blocks: nothing is compiled")
    values, weighing = _ready(weight, "cpu"), None if importance is None else _ready(importance, "cpu")
    blocks = torch.empty(weight.shape[0], row_bytes, dtype=torch.uint8)
    function = library[f"quantool_quantize_{name.lower()}"]
    function.restype = ctypes.c_int32
    code = function(
        ctypes.c_void_p(values.data_ptr()),
        ctypes.c_void_p(0 if weighing is None else weighing.data_ptr()),
        ctypes.c_int64(weight.shape[0]),
        ctypes.c_int64(weight.shape[1]),
        ctypes.c_int32(exact),
        ctypes.c_void_p(blocks.data_ptr()),
    )
    if code:
        raise RuntimeError(f"quantool_quantize_{name.lower()} failed with code {code}")
    return blocks.to(weight.device)


def ggml_blocks_cuda(
    weight: torch.Tensor, importance: torch.Tensor | None, name: str, row_bytes: int, exact: bool
) -> torch.Tensor:
    """`ggml_blocks` by the kernel for CUDA, or by that for the processor where there is none."""
    if not _on_cuda(name):
        return ggml_blocks_cpu(weight, importance, name, row_bytes, exact)
    _require(weight, importance)
    rows, columns = weight.shape
    blocks = torch.empty(rows, row_bytes, dtype=torch.uint8, device=weight.device)
    weighing, workspace = None, None
    if importance is not None:
        weighing = _ready(importance, weight.device)
        workspace = torch.empty(rows, dtype=torch.float32, device=weight.device)
    cuda.call(_launcher(name), _ready(weight, weight.device), weighing, workspace, blocks, rows, columns, exact)
    return blocks


def _fake(
    weight: torch.Tensor, importance: torch.Tensor | None, name: str, row_bytes: int, exact: bool
) -> torch.Tensor:
    return weight.new_empty(weight.shape[0], row_bytes, dtype=torch.uint8)


ggml_blocks = operator("ggml_blocks", ggml_blocks_cpu, _fake, cuda=ggml_blocks_cuda)


def _require(weight: torch.Tensor, importance: torch.Tensor | None) -> None:
    """Raise ValueError when there is not one importance for each column: compiled code would read past its end."""
    columns = weight.shape[1]
    if importance is not None and importance.shape != (columns,):
        raise ValueError(f"importance is {list(importance.shape)}, expected [{columns}] as weight is [N, {columns}]")


def _on_cuda(name: str) -> bool:
    return hasattr(cuda.library(), _launcher(name))


def _launcher(name: str) -> str:
    return f"quantool_quantize_{name.lower()}_cuda"


def _ready(tensor: torch.Tensor, device: str | torch.device) -> torch.Tensor:
    """As float32 on the device, contiguous, and from a multiple of the bytes on that a thread of CUDA loads at once."""
    return cuda.aligned(tensor.to(device, torch.float32))
