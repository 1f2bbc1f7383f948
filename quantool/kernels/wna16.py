"""y = x W^T + bias from tiles: the operator, its torch reference, and which CUDA kernel computes how many tokens.

    tokens       kernel (csrc/cuda/wna16*.cu)            what bounds it
    1 .. 8       gemv, a block has 16 rows               memory: every weight is read once, whatever the tokens
    9 .. 128     gemm, a block has 128 rows              memory, then the rate at which codes become fragments
    more         dequantize into a workspace, and        arithmetic: the copy of W is read by a matrix product
                 torch's matrix product                  that nobody writes faster

Both read W as `tiles` (layout: kernels/tiles.py), accumulate in float32 and add the same numbers in the same order in
every run. Where rows are too few to give every multiprocessor a block, K is split: each split writes float32 partial
sums into a workspace and a second kernel adds them. Cards before Ampere have no bfloat16 tensor cores and no cp.async:
there a plain loop stands in for the gemv, and 9 tokens are many.

All workspaces are torch's, nothing waits for the device and nothing depends on values: a CUDA graph can record a call.
"""

import functools
from typing import NamedTuple

import torch

from quantool.kernels import cuda
from quantool.kernels.ops import dequantize, operator
from quantool.kernels.tiles import COLUMNS as TILE_COLUMNS
from quantool.kernels.tiles import ROWS as TILE_ROWS
from quantool.kernels.tiles import unpack_tiles, untile_rows

FLOATS = (torch.bfloat16, torch.float16)  # of x and of scales; their places are what the launchers call them
BITS = (4, 8)
GEMV_TOKENS, GEMM_TOKENS = 8, 128  # the most that each takes
GEMV_ROWS, GEMM_ROWS = 16, 128  # of a block
TENSOR_CORES = (8, 0)  # the first capability with mma of bfloat16 and cp.async
# Blocks per multiprocessor up to which K is split. One of gemv has 32 KB of codes under way, what an H200 needs
# to stay busy, and adding up the parts costs a kernel of its own; of gemm two fit, and with more than 64 tokens one.
GEMV_BLOCKS, GEMM_BLOCKS, WIDE_GEMM_BLOCKS, WIDE_GEMM = 1, 2, 1, 64
# Columns that a split should have at least: a stage for each warp of a gemv block, a full ring of a gemm block.
GEMV_COLUMNS, GEMM_COLUMNS = 2048, 512


class Card(NamedTuple):
    """What the choice of a kernel depends on."""

    multiprocessors: int
    capability: tuple[int, int]


@functools.cache
def card(device: torch.device) -> Card:
    """Of a CUDA device. Asked once."""
    found = torch.cuda.get_device_properties(device)
    return Card(found.multi_processor_count, (found.major, found.minor))


def plan(rows: int, columns: int, tokens: int, multiprocessors: int) -> int:
    """Into how many parts K is split: as many as keep all blocks of W [rows, columns] on the card at once."""
    if tokens <= GEMV_TOKENS:
        blocks, wanted, least = rows // GEMV_ROWS, GEMV_BLOCKS, GEMV_COLUMNS
    else:
        wanted = GEMM_BLOCKS if tokens <= WIDE_GEMM else WIDE_GEMM_BLOCKS
        blocks, least = -(-rows // GEMM_ROWS), GEMM_COLUMNS
    return max(1, min(wanted * multiprocessors // blocks, columns // least))


def linear_tiles_reference(
    x: torch.Tensor,
    tiles: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    bias: torch.Tensor | None,
    bits: int,
) -> torch.Tensor:
    """y = x W^T + bias with W [N, K] in tiles: x [..., K], tiles int32 [N / 16, K / 64, 32 * bits], bias [N].

    scales bfloat16 or float16 [N / 16, G, 8, 2] and zeros uint8, the same, or None: see `tiles.tile_rows`.
    """
    _require(x, tiles, scales, zeros, bias, bits)
    codes = unpack_tiles(tiles, "codes", bits)
    weight = dequantize(codes, untile_rows(scales), None if zeros is None else untile_rows(zeros), bits)
    return torch.nn.functional.linear(x, weight.to(x.dtype), bias)


def linear_cuda(
    x: torch.Tensor,
    tiles: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    bias: torch.Tensor | None,
    bits: int,
) -> torch.Tensor:
    """`linear_tiles` by the kernels, for x of bfloat16 and float16. Raises ValueError for what they cannot read."""
    if x.dtype not in FLOATS:
        raise ValueError(f"x is {cuda.described(x)}, the kernels compute in bfloat16 and float16")
    rows, columns, group = _require(x, tiles, scales, zeros, bias, bits)
    multiprocessors, capability = card(x.device)
    if capability < cuda.OLDEST:
        raise ValueError(f"{x.device} has capability {capability}, the kernels need {cuda.OLDEST}")
    y = x.new_empty(*x.shape[:-1], rows)
    tokens = y.numel() // rows
    if not tokens:
        return y
    kind = bits, FLOATS.index(x.dtype), FLOATS.index(scales.dtype)
    if tokens > (GEMM_TOKENS if capability >= TENSOR_CORES else GEMV_TOKENS):
        weight = x.new_empty(rows, columns)
        cuda.call("quantool_wna16_dequantize", tiles, scales, zeros, weight, rows, columns, group, *kind)
        return torch.nn.functional.linear(x, weight, bias)
    x = cuda.aligned(x)
    if capability < TENSOR_CORES:
        cuda.call("quantool_wna16_simt", x, tiles, scales, zeros, bias, y, tokens, rows, columns, group, *kind)
        return y
    splits = plan(rows, columns, tokens, multiprocessors)
    partials = x.new_empty(splits, tokens, rows, dtype=torch.float32) if splits > 1 else None
    kernel = "quantool_wna16_gemv" if tokens <= GEMV_TOKENS else "quantool_wna16_gemm"
    cuda.call(kernel, x, tiles, scales, zeros, bias, y, partials, tokens, rows, columns, group, splits, *kind)
    return y


def _fake(x: torch.Tensor, tiles: torch.Tensor, *_: object) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], TILE_ROWS * tiles.shape[0])


linear_tiles = operator("linear_tiles", linear_tiles_reference, _fake, cuda=linear_cuda)


def _require(
    x: torch.Tensor,
    tiles: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    bias: torch.Tensor | None,
    bits: int,
) -> tuple[int, int, int]:
    """Rows, columns and group of arguments that fit each other. Raises ValueError for others.

    Memory that is not contiguous or not aligned is refused by `cuda.call`.
    """
    for name, tensor in (("tiles", tiles), ("scales", scales), ("zeros", zeros), ("bias", bias)):
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device}, x on {x.device}")
    if bits not in BITS:
        raise ValueError(f"bits is {bits}, tiles hold 4 or 8")
    if tiles.dtype != torch.int32 or tiles.dim() != 3 or not tiles.numel() or tiles.shape[2] != 32 * bits:
        raise ValueError(
            f"tiles of {bits} bits are {cuda.described(tiles)}, expected int32 [rows / 16, columns / 64, {32 * bits}]"
        )
    rows, columns = TILE_ROWS * tiles.shape[0], TILE_COLUMNS * tiles.shape[1]
    if x.dim() < 1 or x.shape[-1] != columns:
        raise ValueError(f"x is {cuda.described(x)}, expected [..., {columns}] for tiles {list(tiles.shape)}")
    groups = scales.shape[1] if scales.dim() == 4 else 0
    if scales.dtype not in FLOATS or not groups or scales.shape != (tiles.shape[0], groups, 8, 2):
        wanted = f"bfloat16 or float16 [{tiles.shape[0]}, groups, 8, 2]"
        raise ValueError(f"scales are {cuda.described(scales)}, expected {wanted}")
    if columns % groups or columns // groups % 32:
        raise ValueError(f"rows of {columns} are not {groups} groups of a multiple of 32")
    if zeros is not None and (zeros.dtype != torch.uint8 or zeros.shape != scales.shape):
        raise ValueError(f"zeros are {cuda.described(zeros)}, expected uint8 {list(scales.shape)}")
    if bias is not None and (bias.dtype != x.dtype or bias.shape != (rows,)):
        raise ValueError(f"bias is {cuda.described(bias)}, expected {cuda.described(x).split()[0]} [{rows}]")
    return rows, columns, columns // groups
