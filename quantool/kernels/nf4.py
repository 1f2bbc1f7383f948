"""Weights of 4-bit levels: the encoder, and on CUDA the kernels of `linear_nf4` (csrc/cuda/nf4.cuh).

With W flattened row by row and cut into blocks of `block_size` (they may cross rows, the last may be shorter):

    absmax[b] = max |W| over block b        codes[i] = nearest(W[i] / absmax[b])        W[i] ~ absmax[b] * level[code]

`quantize_levels` is an operator. On CUDA it is one pass over the weight in its own dtype (csrc/cuda/nf4_encode.cuh) and
gives the result of the reference to the bit; blocks of no multiple of 8 are left to torch. On a CPU the reference is
called as it is: the pieces of methods/nf4.py are so small that the dispatch of an operator would cost a tenth.

`linear_nf4` is an operator of ops.py, and here is which kernel computes it:

    tokens     kernel
    1 .. 8     gemv: every weight is read once, as 4 bits
    more       dequantize into a workspace, and torch's matrix product

The gemv looks levels up as 16-bit floats and scales sums of 64 products in float32; the other way rounds each weight to
16 bits once, as bitsandbytes does. Both are as near to the float64 product. Where neither fits, the torch reference of
ops.py computes: float32 and blocks of no multiple of 8 weights.

Sources: QLoRA, Dettmers et al. 2023; bitsandbytes, backends/default/ops.py (quantize_4bit).
"""

import functools

import torch

from quantool.kernels import cuda, wna16
from quantool.kernels.ops import LEVELS, LIBRARY, levels, linear_nf4, linear_nf4_reference, operator
from quantool.kernels.rtn import DTYPES

__all__ = ["linear_nf4", "quantize_levels"]

FLOATS = (torch.bfloat16, torch.float16)  # of x; their places are what the launchers call them
GEMV_TOKENS = 8
GEMV_BLOCK = 64  # weights that the gemv takes of a row at once, with one scale
LEAST_ABSMAX = 1e-38


def quantize_levels_reference(weight: torch.Tensor, kind: str, block_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes uint8 of W, in its shape, and absmax float32 [B] of its blocks. `kind` is "nf4" or "fp4".

    An exact midpoint between two levels goes to the lower one, and a NaN to the lowest. As in bitsandbytes on a CPU, a
    whole block is multiplied by the reciprocal of its absmax, of which 1e-38 is the least, and a shorter last block is
    divided by it, and so has an absmax of at least 1e-38.
    """
    _require_weight(weight, kind, block_size)
    flat = weight.reshape(-1).to(torch.float32)
    whole = flat.numel() // block_size
    blocks, rest = flat[: whole * block_size].view(whole, block_size), flat[whole * block_size :]
    absmax = blocks.abs().amax(1)
    relative = (blocks * (1 / absmax.clamp(min=LEAST_ABSMAX)).unsqueeze(1)).view(-1)
    if rest.numel():
        last = rest.abs().amax(0, keepdim=True).clamp_(min=LEAST_ABSMAX)
        absmax, relative = torch.cat((absmax, last)), torch.cat((relative, rest / last))
    bounds, order = _ascending(kind)
    below = torch.zeros_like(relative, dtype=torch.uint8)  # how many of the bounds; faster than torch.bucketize
    above = torch.empty_like(relative, dtype=torch.bool)
    for bound in bounds:
        below += torch.gt(relative, bound, out=above)
    codes = order.to(weight.device).index_select(0, below.to(torch.int32))
    return codes.view(weight.shape), absmax


@functools.cache
def _ascending(kind: str) -> tuple[list[float], torch.Tensor]:
    """The 15 midpoints between levels in ascending order, and the codes uint8 [16] of the levels in that order."""
    table, order = levels(kind).sort(stable=True)
    return ((table[:-1] + table[1:]) / 2).tolist(), order.to(torch.uint8)


def quantize_levels(weight: torch.Tensor, kind: str, block_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`quantize_levels_reference`, by the compiled kernel on CUDA."""
    compute = quantize_levels_op if weight.is_cuda else quantize_levels_reference
    codes, absmax = compute(weight, kind, block_size)
    return codes, absmax


def quantize_levels_cuda(weight: torch.Tensor, kind: str, block_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`quantize_levels` by the compiled kernel."""
    _require_weight(weight, kind, block_size)
    if block_size % 8 or weight.dtype not in DTYPES or not cuda.is_available():
        return quantize_levels_reference(weight, kind, block_size)
    weight, table = cuda.aligned(weight), levels(kind).to(weight.device)
    codes, absmax = _room_for(weight, block_size)
    numbers = (weight.numel(), block_size, DTYPES[weight.dtype])
    cuda.call("quantool_nf4_encode", weight, table, codes, absmax, *numbers)
    return codes, absmax


def _quantize_levels_fake(weight: torch.Tensor, kind: str, block_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    return _room_for(weight, block_size)


quantize_levels_op = operator(
    "quantize_levels", quantize_levels_reference, _quantize_levels_fake, cuda=quantize_levels_cuda
)


def _room_for(weight: torch.Tensor, block_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and absmax, not yet computed."""
    codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    blocks = (weight.numel() + block_size - 1) // block_size
    return codes, torch.empty(blocks, dtype=torch.float32, device=weight.device)


def _require_weight(weight: torch.Tensor, kind: str, block_size: int) -> None:
    """Raise ValueError for arguments of `quantize_levels` that are no weight in blocks of levels."""
    if not weight.is_floating_point():
        raise ValueError(f"weight is {cuda.described(weight)}, expected floating point")
    if kind not in LEVELS or block_size < 1:
        raise ValueError(f"blocks of {block_size} {kind} levels, expected at least 1 of {' or '.join(LEVELS)}")


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


LIBRARY.impl("linear_nf4", linear_nf4_cuda, "CUDA")
