"""The operators of GPTQ: schema, shape function for meta tensors, torch reference and compiled kernel of each.

A row of a weight knows nothing of the others, and a column is rounded after all columns before it: the compiled kernels
(csrc/) keep some rows in the lanes of their vectors and walk over the columns of one block. What a block does to the
columns after it is a matrix product, and the caller's.

On CUDA (csrc/cuda/gptq.cuh) a row lies in the registers of eight threads, which a block of up to 128 columns fits into;
a wider one is left to torch. Nothing waits for the GPU there: shapes are checked as everywhere, but a group that is not
there is found by the kernel, which takes its scale for NaN.
"""

import ctypes

import torch

from quantool.kernels import compiled, cuda
from quantool.kernels.ops import operator

WIDEST = 128  # columns of a block on CUDA


def gptq_columns_reference(
    weight: torch.Tensor,
    hinv: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor,
    groups: torch.Tensor,
    max_code: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Round one block of columns, each after the errors of those before it: codes uint8 [N, B], errors float32 [N, B].

    weight float32 [N, B] as earlier blocks left it; hinv float32 [B, B], the block on the diagonal of the upper
    Cholesky factor U of the inverse Hessian (H^-1 = U^T U); scales and zeros float32 [N, G]; groups int32 [B], the
    group of each column. Both results are column-major. A weight that is NaN gets the code 0 and the error NaN.
    What follows, W[:, later] -= errors @ U[block, later], is the caller's. Frantar et al. 2023, algorithm 1.

    This is the oracle of the compiled kernels (csrc/gptq.cpp), and what computes where there are none.
    """
    _require_columns(weight, hinv, scales, zeros, groups, max_code)
    _require_groups(groups, scales)
    columns = weight.T.clone(memory_format=torch.contiguous_format)  # [B, N]: a column's rows lie side by side
    codes = torch.empty_like(columns)
    steps, shifts = scales.T[groups], zeros.T[groups]
    for i in range(len(columns)):
        code = (columns[i] / steps[i]).round_().add_(shifts[i]).clamp_(0, max_code)
        error = (columns[i] - (code - shifts[i]) * steps[i]) / hinv[i, i]
        columns[i + 1 :] -= hinv[i, i + 1 :, None] * error
        columns[i], codes[i] = error, code
    return codes.nan_to_num_(nan=0).to(torch.uint8).T, columns.T


def _gptq_columns_cpu(
    weight: torch.Tensor,
    hinv: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor,
    groups: torch.Tensor,
    max_code: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    library = compiled()
    if library is None:
        return gptq_columns_reference(weight, hinv, scales, zeros, groups, max_code)
    _require_columns(weight, hinv, scales, zeros, groups, max_code)
    _require_groups(groups, scales)
    rows, columns = weight.shape
    weight = weight if weight.stride(1) == 1 else weight.contiguous()
    factor, scales, zeros, groups = hinv.T.contiguous(), scales.contiguous(), zeros.contiguous(), groups.contiguous()
    codes = torch.empty(columns, rows, dtype=torch.uint8)
    errors = torch.empty(columns, rows)
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    failed = library.quantool_gptq_columns(
        pointer(weight.data_ptr()),
        number(weight.stride(0)),
        pointer(factor.data_ptr()),
        pointer(scales.data_ptr()),
        pointer(zeros.data_ptr()),
        number(scales.shape[1]),
        pointer(groups.data_ptr()),
        number(rows),
        number(columns),
        number(max_code),
        pointer(codes.data_ptr()),
        pointer(errors.data_ptr()),
    )
    if failed:
        raise RuntimeError("quantool::gptq_columns: torch's thread pool failed")
    return codes.T, errors.T


def gptq_columns_cuda(
    weight: torch.Tensor,
    hinv: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor,
    groups: torch.Tensor,
    max_code: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`gptq_columns` by the compiled kernel."""
    _require_columns(weight, hinv, scales, zeros, groups, max_code)
    rows, columns = weight.shape
    if columns > WIDEST or not cuda.is_available():
        return gptq_columns_reference(weight, hinv, scales, zeros, groups, max_code)
    codes = weight.new_empty(columns, rows, dtype=torch.uint8)
    errors = weight.new_empty(columns, rows)
    tensors = [cuda.aligned(tensor) for tensor in (weight, _padded(hinv), scales, zeros, groups)]
    cuda.call("quantool_gptq_columns_cuda", *tensors, codes, errors, rows, columns, scales.shape[1], max_code)
    return codes.T, errors.T


def _gptq_columns_fake(
    weight: torch.Tensor,
    hinv: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor,
    groups: torch.Tensor,
    max_code: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    rows, columns = weight.shape
    return weight.new_empty(columns, rows, dtype=torch.uint8).T, weight.new_empty(columns, rows).T


gptq_columns = operator(
    "gptq_columns", gptq_columns_reference, _gptq_columns_fake, cpu=_gptq_columns_cpu, cuda=gptq_columns_cuda
)


def descend_columns_reference(
    gradient: torch.Tensor,
    hessian: torch.Tensor,
    scales: torch.Tensor,
    groups: torch.Tensor,
    codes: torch.Tensor,
    max_code: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Move each code of a block to the best one given all others: new codes uint8 [N, B], moves float32 [N, B].

    gradient float32 [N, B] is (W - rounded W) H of these columns, before any of them moves; hessian float32 [B, B] the
    block of H on its diagonal; scales float32 [N, G]; groups int32 [B], the group of each column; codes uint8 [N, B].
    A move is what its rounded weight changes by. Both results are column-major. Where a gradient is NaN or a diagonal
    element not positive the code stays. What follows, gradient -= moves @ H[block], is the caller's.

    This is the oracle of the compiled kernel (csrc/gptq.cpp), and what computes where there is none.
    """
    _require_descent(gradient, hessian, scales, groups, codes, max_code)
    _require_groups(groups, scales)
    columns = gradient.T.clone(memory_format=torch.contiguous_format)  # [B, N]
    new = codes.T.to(torch.float32, memory_format=torch.contiguous_format, copy=True)
    steps, diagonal = scales.T[groups], hessian.diagonal()
    inverse = torch.where(diagonal > 0, 1 / diagonal, 0)
    for i in range(len(columns)):
        code = (new[i] + columns[i] * inverse[i] / steps[i]).round_().clamp_(0, max_code)
        code = torch.where(code.isnan(), new[i], code)
        move = (code - new[i]) * steps[i]
        columns[i + 1 :] -= hessian[i, i + 1 :, None] * move
        columns[i], new[i] = move, code
    return new.to(torch.uint8).T, columns.T


def _descend_columns_cpu(
    gradient: torch.Tensor,
    hessian: torch.Tensor,
    scales: torch.Tensor,
    groups: torch.Tensor,
    codes: torch.Tensor,
    max_code: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    library = compiled()
    if library is None:
        return descend_columns_reference(gradient, hessian, scales, groups, codes, max_code)
    _require_descent(gradient, hessian, scales, groups, codes, max_code)
    _require_groups(groups, scales)
    rows, columns = gradient.shape
    gradient = gradient if gradient.stride(1) == 1 else gradient.contiguous()
    factor, scales, groups = hessian.T.contiguous(), scales.contiguous(), groups.contiguous()
    new = codes.T.clone(memory_format=torch.contiguous_format)
    moves = torch.empty(columns, rows)
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    failed = library.quantool_descend_columns(
        pointer(gradient.data_ptr()),
        number(gradient.stride(0)),
        pointer(factor.data_ptr()),
        pointer(scales.data_ptr()),
        number(scales.shape[1]),
        pointer(groups.data_ptr()),
        number(rows),
        number(columns),
        number(max_code),
        pointer(new.data_ptr()),
        pointer(moves.data_ptr()),
    )
    if failed:
        raise RuntimeError("quantool::descend_columns: torch's thread pool failed")
    return new.T, moves.T


def descend_columns_cuda(
    gradient: torch.Tensor,
    hessian: torch.Tensor,
    scales: torch.Tensor,
    groups: torch.Tensor,
    codes: torch.Tensor,
    max_code: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`descend_columns` by the compiled kernel."""
    _require_descent(gradient, hessian, scales, groups, codes, max_code)
    rows, columns = gradient.shape
    if columns > WIDEST or not cuda.is_available():
        return descend_columns_reference(gradient, hessian, scales, groups, codes, max_code)
    new = codes.new_empty(columns, rows)
    moves = gradient.new_empty(columns, rows)
    tensors = [cuda.aligned(tensor) for tensor in (gradient, _padded(hessian), scales, groups, codes)]
    cuda.call("quantool_descend_columns_cuda", *tensors, new, moves, rows, columns, scales.shape[1], max_code)
    return new.T, moves.T


def _descend_columns_fake(
    gradient: torch.Tensor,
    hessian: torch.Tensor,
    scales: torch.Tensor,
    groups: torch.Tensor,
    codes: torch.Tensor,
    max_code: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    rows, columns = gradient.shape
    return codes.new_empty(columns, rows).T, gradient.new_empty(columns, rows).T


descend_columns = operator(
    "descend_columns",
    descend_columns_reference,
    _descend_columns_fake,
    cpu=_descend_columns_cpu,
    cuda=descend_columns_cuda,
)


def _padded(factor: torch.Tensor) -> torch.Tensor:
    """F [B, B] as the kernels on CUDA read it, [B, WIDEST]."""
    return torch.nn.functional.pad(factor, (0, WIDEST - len(factor)))


def _require_descent(
    gradient: torch.Tensor,
    hessian: torch.Tensor,
    scales: torch.Tensor,
    groups: torch.Tensor,
    codes: torch.Tensor,
    max_code: int,
) -> None:
    """Raise ValueError when the arguments of `descend_columns` do not fit."""
    _require_columns(gradient, hessian, scales, scales, groups, max_code)
    if codes.shape != gradient.shape or codes.dtype != torch.uint8 or codes.device != gradient.device:
        raise ValueError(f"codes do not fit the gradient {list(gradient.shape)}: {cuda.described(codes)}")


def _require_columns(
    weight: torch.Tensor,
    hinv: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor,
    groups: torch.Tensor,
    max_code: int,
) -> None:
    """Raise ValueError when the arguments of `gptq_columns` do not fit: compiled code would read past their ends."""
    (rows, columns), count = weight.shape, scales.shape[-1]
    floats = (weight, hinv, scales, zeros)
    if (
        hinv.shape != (columns, columns)
        or not scales.shape == zeros.shape == (rows, count)
        or groups.shape != (columns,)
        or any(tensor.dtype != torch.float32 for tensor in floats)
        or groups.dtype != torch.int32
        or any(tensor.device != weight.device for tensor in (*floats, groups))
    ):
        found = ", ".join(cuda.described(tensor) for tensor in (*floats, groups))
        raise ValueError(f"weight, hinv, scales, zeros, groups do not fit each other: {found}")
    if not 0 < max_code < 256:
        raise ValueError(f"max_code is {max_code}, expected 1 to 255")


def _require_groups(groups: torch.Tensor, scales: torch.Tensor) -> None:
    """Raise ValueError when a group has no scale."""
    count = scales.shape[1]
    if len(groups) and not 0 <= int(groups.min()) <= int(groups.max()) < count:
        raise ValueError(f"groups are {int(groups.min())} to {int(groups.max())}, expected 0 to {count - 1}")
