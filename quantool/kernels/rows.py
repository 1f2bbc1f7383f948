"""Linears over packed rows on the CPU, compiled: few tokens straight from the codes, many through slabs of weights.

    few     a weight is unpacked into a register and multiplied by all tokens there (csrc/wna16.cpp)
    many    some rows of W at a time become floats, in memory that stays in the cache, and torch multiplies them

Either way W as floats is never in memory as a whole: to write it there took longer than all the rest.
The layout of a row is said in ops.py, whose `linear_wna16` comes here.
"""

import ctypes
import threading

import torch

CHUNK = 32  # codes that begin with a whole word at any width: the kernels take groups of whole chunks
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
FEW_TOKENS = {torch.float32: 48, torch.bfloat16: 12}  # beyond, torch's products in that type are faster
SLAB = 1 << 21  # weights
_memory = threading.local()

Packed = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, int]  # qweight, scales, zeros, bits


def fits(x: torch.Tensor, packed: Packed) -> bool:
    """Whether the compiled kernels take these; torch computes the rest."""
    _, scales, _, bits = packed
    columns, groups = x.shape[-1], scales.shape[1]
    whole = groups == 1 or columns // groups % CHUNK == 0
    return 2 <= bits <= 8 and x.dtype in TYPES and scales.dtype in TYPES and columns > 0 and whole


def linear_rows(library: ctypes.CDLL, x: torch.Tensor, packed: Packed, bias: torch.Tensor | None) -> torch.Tensor:
    """What `ops.linear_wna16` computes, of arguments that are checked and fit."""
    qweight, scales, zeros, bits = packed
    packed = qweight.contiguous(), scales.contiguous(), None if zeros is None else zeros.contiguous(), bits
    tokens = x.reshape(-1, x.shape[-1])
    few = len(tokens) <= FEW_TOKENS[_product_dtype(x)]
    y = (_few if few else _many)(library, tokens, packed, bias)
    return y.to(x.dtype).view(*x.shape[:-1], len(qweight))


def _few(library: ctypes.CDLL, x: torch.Tensor, packed: Packed, bias: torch.Tensor | None) -> torch.Tensor:
    """y float32, the same bits whatever the number of threads."""
    columns = x.shape[1]
    x = torch.nn.functional.pad(x.to(torch.float32), (0, -columns % CHUNK)).contiguous()
    y = torch.empty(len(x), len(packed[0]))
    _call(library.quantool_linear_rows, packed, columns, x, len(x), y)
    return y if bias is None else y.add_(bias)


def _many(library: ctypes.CDLL, x: torch.Tensor, packed: Packed, bias: torch.Tensor | None) -> torch.Tensor:
    x = x.to(_product_dtype(x))
    qweight, scales, zeros, bits = packed
    (tokens, columns), rows = x.shape, len(qweight)
    y = torch.empty(tokens, rows, dtype=x.dtype)
    slab = _slab(min(rows, max(1, SLAB // columns)), columns, x.dtype)
    for first in range(0, rows, len(slab)):
        some = slice(first, min(first + len(slab), rows))
        weight = slab[: some.stop - first]
        dequantize_rows(library, (qweight[some], scales[some], None if zeros is None else zeros[some], bits), weight)
        y[:, some] = torch.nn.functional.linear(x, weight, None if bias is None else bias[some].to(x.dtype))
    return y


def _product_dtype(x: torch.Tensor) -> torch.dtype:
    """In which torch multiplies X fastest: float32, or bfloat16 where its products have vectors."""
    vectors = x.dtype == torch.bfloat16 and torch.backends.cpu.get_cpu_capability() == "AVX512"
    return torch.bfloat16 if vectors else torch.float32


def _slab(rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    """Memory of this thread, kept: malloc gives so much back to the system, and to get it again took half of a call."""
    nbytes = rows * columns * dtype.itemsize
    if nbytes > getattr(_memory, "bytes", torch.empty(0)).numel():
        _memory.bytes = torch.empty(nbytes, dtype=torch.uint8)
    found: torch.Tensor = _memory.bytes[:nbytes].view(dtype).view(rows, columns)
    return found


def dequantize_rows(library: ctypes.CDLL, packed: Packed, weight: torch.Tensor) -> None:
    """Fill WEIGHT [N, K] with what `ops.dequantize` makes of these codes, rounded once to its type."""
    _call(library.quantool_dequantize_rows, packed, weight.shape[1], weight, TYPES[weight.dtype])


def _call(function: "ctypes._NamedFuncPointer", packed: Packed, columns: int, *rest: torch.Tensor | int) -> None:
    qweight, scales, zeros, bits = packed
    pointers = [ctypes.c_void_p(0 if t is None else t.data_ptr()) for t in (qweight, scales, zeros)]
    numbers = (TYPES[scales.dtype], len(qweight), columns, scales.shape[1], bits)
    others = (ctypes.c_int64(v) if isinstance(v, int) else ctypes.c_void_p(v.data_ptr()) for v in rest)
    if function(*pointers, *map(ctypes.c_int64, numbers), *others):
        raise RuntimeError(f"{function.__name__}: torch's thread pool failed")
