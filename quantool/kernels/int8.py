"""int8 activations on CUDA: the kernels of `linear_w8a8` and `linear_llm_int8`, and which of them computes what.

A call is up to four kernels, of which the product is most of the time:

    round x to int8, a step for each token     csrc/cuda/w8a8_quantize.cuh, llm_int8.cuh (outliers are found before it)
    int32 products, exact                      w8a8_gemm.cuh up to OWN_TOKENS, torch._int_mm (cuBLAS) above
    scales, zero points, outliers, bias        at the end of w8a8_gemm, or a kernel of its own

The last is a kernel of its own behind torch._int_mm, where K is split to give every multiprocessor a block, and where
tokens have zero points: these need the sums of the rows of W, which the product of one more token, all ones, provides.

Nothing waits for the device and nothing depends on values: a CUDA graph can record a call. Where no kernel fits, the
torch reference of ops.py computes: on cards before Ampere, for float32, for scales of groups within a row, for widths
that are no multiples of 16 bytes.
"""

import torch

from quantool.kernels import cuda, wna16
from quantool.kernels.ops import (
    LIBRARY,
    LLM_INT8_STEP,
    linear_llm_int8,
    linear_llm_int8_reference,
    linear_w8a8,
    linear_w8a8_reference,
)

__all__ = ["linear_llm_int8", "linear_w8a8"]

DTYPES = (torch.bfloat16, torch.float16, torch.float32)  # their places are what the launchers call them
FLOATS = DTYPES[:2]  # of x
# torch._int_mm takes more than 16 tokens and multiples of 8 rows and columns. cuBLAS multiplies with the faster
# instructions of Hopper, which pays once a product is bound by arithmetic. Not yet measured on a GPU.
OWN_TOKENS = 128
BLOCK_ROWS = ((32, 32), (64, 64))  # up to so many tokens a block of w8a8_gemm has so many rows
MANY_BLOCK_ROWS = 128  # above
BLOCKS = 1  # of w8a8_gemm per multiprocessor, wanted: one keeps 24 KB of weights and more on their way
SPLIT_COLUMNS = 1024  # that a split of K should have at least: its pipeline fills and drains
SUM_LIMIT = 1 << 31  # of int32


def linear_w8a8_cuda(
    x: torch.Tensor,
    qweight: torch.Tensor,
    scales: torch.Tensor,
    input_scale: torch.Tensor | None,
    input_zero: torch.Tensor | None,
    bias: torch.Tensor | None,
    act_sym: bool,
) -> torch.Tensor:
    """`linear_w8a8` by the kernels, or by torch where they do not fit; ValueError for arguments of no linear."""
    _require(x, qweight, scales, bias)
    for name, number in ("input_scale", input_scale), ("input_zero", input_zero):
        if number is not None and number.numel() != 1:
            raise ValueError(f"{name} has {number.numel()} numbers, expected 1")
    symmetric = input_zero is None if input_scale is not None else act_sym
    if not _fits(x, qweight, scales, farthest=128 if symmetric else 255):
        return linear_w8a8_reference(x, qweight, scales, input_scale, input_zero, bias, act_sym)
    tokens, y = _tokens(x, qweight)
    if not len(tokens):
        return y
    count, columns = tokens.shape
    codes = tokens.new_empty(count if symmetric else count + 1, columns, dtype=torch.int8)
    steps = tokens.new_empty(count, dtype=torch.float32)
    zeros = None if symmetric else tokens.new_empty(count, dtype=torch.int32)
    step = None if input_scale is None else input_scale.to(torch.float32)
    zero = None if input_zero is None else input_zero.to(torch.int8)
    kind = FLOATS.index(x.dtype)
    cuda.call("quantool_w8a8_quantize", tokens, codes, steps, zeros, step, zero, count, columns, kind)
    return _finish(codes, qweight, steps, zeros, scales, bias, y)


def linear_llm_int8_cuda(
    x: torch.Tensor,
    qweight: torch.Tensor,
    scales: torch.Tensor,
    bias: torch.Tensor | None,
    threshold: float,
) -> torch.Tensor:
    """`linear_llm_int8` by the kernels, or by torch where they do not fit; ValueError for arguments of no linear.

    The float part is summed in float32 over weights that are not rounded to the dtype of x, and the whole is rounded
    once, so that results are nearer to the formula than those of the reference.
    """
    _require(x, qweight, scales, bias)
    if not _fits(x, qweight, scales, farthest=128):
        return linear_llm_int8_reference(x, qweight, scales, bias, threshold)
    tokens, y = _tokens(x, qweight)
    if not len(tokens):
        return y
    (count, columns), rows = tokens.shape, len(qweight)
    codes = tokens.new_empty(count, columns, dtype=torch.int8)
    steps = tokens.new_empty(count, dtype=torch.float32)
    outliers = found = None
    limit = float(torch.tensor(threshold).to(torch.float16))  # as torch compares float16 with a number
    kind = FLOATS.index(x.dtype)
    if threshold > 0:
        outliers = tokens.new_empty(columns // 8, dtype=torch.uint8)
        found = tokens.new_empty(columns + 1, dtype=torch.int32)
        cuda.call("quantool_llm_int8_outliers", tokens, outliers, count, columns, kind, limit)
    unit = 127 * LLM_INT8_STEP
    cuda.call("quantool_llm_int8_quantize", tokens, outliers, codes, steps, found, count, columns, kind, limit, unit)
    if found is None:
        return _finish(codes, qweight, steps, None, scales, bias, y)
    products = _products(codes, qweight, _splits(rows, columns, count, x.device))
    shape, kinds = (count, rows, columns, len(products)), _kinds(y, scales, bias)
    cuda.call("quantool_llm_int8_finish", products, tokens, qweight, found, steps, scales, bias, y, *shape, *kinds)
    return y


def _finish(
    codes: torch.Tensor,
    qweight: torch.Tensor,
    steps: torch.Tensor,
    zeros: torch.Tensor | None,
    scales: torch.Tensor,
    bias: torch.Tensor | None,
    y: torch.Tensor,
) -> torch.Tensor:
    """y = steps * scales * (codes - zeros) W^T + bias, where with zeros the last of codes is a token of ones."""
    (rows, columns), tokens, kinds = qweight.shape, len(codes), _kinds(y, scales, bias)
    splits = _splits(rows, columns, tokens, y.device)
    if zeros is None and splits == 1 and tokens <= OWN_TOKENS:
        shape = (tokens, rows, columns, splits)
        cuda.call("quantool_w8a8_gemm", codes, qweight, steps, scales, bias, y, None, *shape, *kinds)
        return y
    products = _products(codes, qweight, splits)
    end = (len(steps), rows, len(products), *kinds)
    cuda.call("quantool_w8a8_finish", products, steps, zeros, scales, bias, y, *end)
    return y


def _products(codes: torch.Tensor, qweight: torch.Tensor, splits: int) -> torch.Tensor:
    """int32 [S, tokens, N] whose sum over S is codes W^T: S is `splits`, or 1 where cuBLAS computes it."""
    (rows, columns), tokens = qweight.shape, len(codes)
    if tokens > OWN_TOKENS:
        return torch._int_mm(codes, qweight.t()).unsqueeze(0)
    products = codes.new_empty(splits, tokens, rows, dtype=torch.int32)
    shape = (tokens, rows, columns, splits)
    cuda.call("quantool_w8a8_gemm", codes, qweight, None, None, None, None, products, *shape, 0, 0, 0)
    return products


def _splits(rows: int, columns: int, tokens: int, device: torch.device) -> int:
    """Into how many parts K is split, so that w8a8_gemm has enough blocks for the card."""
    of_block = next((block for most, block in BLOCK_ROWS if tokens <= most), MANY_BLOCK_ROWS)
    wanted = BLOCKS * wna16.card(device).multiprocessors
    return max(1, min(wanted // -(-rows // of_block), columns // SPLIT_COLUMNS))


def _tokens(x: torch.Tensor, qweight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """X as [tokens, K], as the kernels read it, and the memory of y."""
    tokens = cuda.aligned(x.reshape(-1, x.shape[-1]))
    return tokens, x.new_empty(*x.shape[:-1], len(qweight))


def _kinds(y: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None) -> tuple[int, int, int]:
    return DTYPES.index(y.dtype), DTYPES.index(scales.dtype), 0 if bias is None else DTYPES.index(bias.dtype)


def _fits(x: torch.Tensor, qweight: torch.Tensor, scales: torch.Tensor, farthest: int) -> bool:
    """Whether the kernels compute this; `farthest` is the most that a code lies from its zero point."""
    rows, columns = qweight.shape
    return (
        cuda.is_available()
        and wna16.card(x.device).capability >= wna16.TENSOR_CORES
        and x.dtype in FLOATS
        and scales.shape[1] == 1
        and columns % 16 == 0
        and rows % 8 == 0
        and columns * farthest * 128 < SUM_LIMIT
    )


def _require(x: torch.Tensor, qweight: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None) -> None:
    """Raise ValueError when the arguments do not fit each other: a kernel would read past their ends."""
    if qweight.dtype != torch.int8 or qweight.dim() != 2 or not qweight.numel():
        raise ValueError(f"qweight is {cuda.described(qweight)}, expected int8 [rows, columns]")
    rows, columns = qweight.shape
    if x.dim() < 1 or x.shape[-1] != columns:
        raise ValueError(f"x is {cuda.described(x)}, the weight has {columns} columns")
    if scales.dtype not in DTYPES or scales.dim() != 2 or len(scales) != rows:
        raise ValueError(f"scales are {cuda.described(scales)}, expected [{rows}, groups] of a float")
    if bias is not None and (bias.dtype not in DTYPES or bias.shape != (rows,)):
        raise ValueError(f"bias is {cuda.described(bias)}, expected [{rows}] of a float")


LIBRARY.impl("linear_w8a8", linear_w8a8_cuda, "CUDA")
LIBRARY.impl("linear_llm_int8", linear_llm_int8_cuda, "CUDA")
