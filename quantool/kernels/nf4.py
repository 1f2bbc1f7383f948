"""Weights of 4-bit levels on CUDA: the kernels of `linear_nf4` (csrc/cuda/nf4.cuh), and which of them computes what.

    tokens     kernel
    1 .. 8     gemv: every weight is read once, as 4 bits
    more       dequantize into a workspace, and torch's matrix product

The gemv looks levels up as 16-bit floats and scales sums of 64 products in float32; the other way rounds each weight to
16 bits once, as bitsandbytes does. Both are as near to the float64 product. Where neither fits, the torch reference of
ops.py computes: float32 and blocks of no multiple of 8 weights.
"""

import torch

from quantool.kernels import cuda, wna16
from quantool.kernels.ops import linear_nf4, linear_nf4_reference

__all__ = ["linear_nf4"]

FLOATS = (torch.bfloat16, torch.float16)  # of x; their places are what the launchers call them
GEMV_TOKENS = 8
GEMV_BLOCK = 64  # weights that the gemv takes of a row at once, with one scale


@linear_nf4.register_kernel("cuda")
def linear_nf4_cuda(
    x: torch.Tensor,
    qweight: torch.Tensor,
    absmax: torch.Tensor,
    table: torch.Tensor,
    bias: torch.Tensor | None,
    rows: int,
    block_size: int,
) -> torch.Tensor:
    """`linear_nf4` by the kernels, or by torch where they do not fit; ValueError for arguments of no linear."""
    _require(x, qweight, absmax, table, bias, rows, block_size)
    if not cuda.is_available() or x.dtype not in FLOATS or block_size % 8:
        return linear_nf4_reference(x, qweight, absmax, table, bias, rows, block_size)
    columns, kind = x.shape[-1], FLOATS.index(x.dtype)
    y = x.new_empty(*x.shape[:-1], rows)
    tokens = y.numel() // rows
    if not tokens:
        return y
    if tokens > GEMV_TOKENS or not _suits_gemv(x, bias, rows, block_size):
        weight = x.new_empty(rows, columns)
        cuda.call("quantool_nf4_dequantize", qweight, absmax, table, weight, rows * columns, block_size, kind)
        return torch.nn.functional.linear(x, weight, bias)
    x = cuda.aligned(x)
    shape = (tokens, rows, columns, block_size)
    cuda.call("quantool_nf4_gemv", x, qweight, absmax, table, bias, y, *shape, kind)
    return y


def _suits_gemv(x: torch.Tensor, bias: torch.Tensor | None, rows: int, block_size: int) -> bool:
    """Whether scales begin with rows and change where the gemv can follow them."""
    return (
        wna16.card(x.device).capability >= wna16.TENSOR_CORES
        and x.shape[-1] % block_size == 0
        and block_size >= GEMV_BLOCK
        and block_size.bit_count() == 1
        and rows % 2 == 0
        and (bias is None or bias.dtype == x.dtype)
    )


def _require(
    x: torch.Tensor,
    qweight: torch.Tensor,
    absmax: torch.Tensor,
    table: torch.Tensor,
    bias: torch.Tensor | None,
    rows: int,
    block_size: int,
) -> None:
    """Raise ValueError when the arguments do not fit each other: a kernel would read past their ends."""
    if x.dim() < 1 or rows < 1 or block_size < 1 or not x.shape[-1]:
        raise ValueError(f"x is {cuda.described(x)} for {rows} rows and blocks of {block_size}")
    count = rows * x.shape[-1]
    for name, tensor, dtype, length in (
        ("qweight", qweight, torch.uint8, -(-count // 2)),
        ("absmax", absmax, torch.float32, -(-count // block_size)),
        ("table", table, torch.float32, 16),
    ):
        if tensor.dtype != dtype or tensor.shape != (length,):
            raise ValueError(
                f"{name} is {cuda.described(tensor)}, expected {str(dtype).removeprefix('torch.')} [{length}] "
                f"for {rows} rows of {x.shape[-1]} columns in blocks of {block_size}"
            )
    if bias is not None and bias.shape != (rows,):
        raise ValueError(f"bias is {cuda.described(bias)}, expected [{rows}]")
