"""Round to nearest: the range of every group of a weight, and its codes on a grid. Operators of `quantool.quant`.

    low, high = min(group, 0), max(group, 0)          codes = clamp(round(W / scales) + zeros, 0, 2**bits - 1)

What is between them, scales from ranges as a format stores them, is a few operations on [N, G] and stays in torch.
On CUDA each is one pass over the weight in its own dtype (csrc/cuda/rtn.cuh) and gives the result of the reference to
the bit; groups of no multiple of 8 are left to torch. On a CPU the functions call the reference as it is: the pieces of
methods/rtn.py are so small that the dispatch of an operator would cost a tenth of their time.
"""

from collections.abc import Iterable

import torch

from quantool.kernels import cuda
from quantool.kernels.ops import operator

DTYPES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}  # as the launchers number them


def group_range_reference(weight: torch.Tensor, groups: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Lowest (at most 0) and highest (at least 0) value of every group of W [N, K]: float32 [N, G] both. NaN stays."""
    _require_groups(weight, groups)
    low, high = torch.aminmax(weight.unflatten(1, (groups, -1)), dim=-1)
    return low.clamp(max=0).to(torch.float32), high.clamp(min=0).to(torch.float32)


def quantize_affine_reference(
    weight: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None, bits: int
) -> torch.Tensor:
    """Nearest codes uint8 [N, K] of W [N, K] on the grid of `scales` [N, G] and `zeros` uint8 [N, G] (None: symmetric).

    Ties go to even. A NaN has the code 0, also that of 0 on a scale of 0.
    """
    _require_grid(weight, scales, zeros, bits)
    grouped = weight.unflatten(1, (scales.shape[1], -1)) / scales.unsqueeze(-1).to(torch.float32)
    shift = 1 << (bits - 1) if zeros is None else zeros.unsqueeze(-1).to(torch.float32)
    codes = grouped.round_().add_(shift).clamp_(0, (1 << bits) - 1)
    stored: torch.Tensor = codes.to(torch.uint8, memory_format=torch.contiguous_format).view(weight.shape)
    return stored


def group_range(weight: torch.Tensor, groups: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`group_range_reference`, by the compiled kernel on CUDA."""
    compute = group_range_op if weight.is_cuda else group_range_reference
    low, high = compute(weight, groups)
    return low, high


def quantize_affine(weight: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None, bits: int) -> torch.Tensor:
    """`quantize_affine_reference`, by the compiled kernel on CUDA."""
    compute = quantize_affine_op if weight.is_cuda else quantize_affine_reference
    codes: torch.Tensor = compute(weight, scales, zeros, bits)
    return codes


def group_range_cuda(weight: torch.Tensor, groups: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`group_range` by the compiled kernel."""
    _require_groups(weight, groups)
    width = weight.shape[1] // groups
    if width % 8 or not cuda.is_available():
        return group_range_reference(weight, groups)
    low, high = (weight.new_empty(weight.shape[0], groups, dtype=torch.float32) for _ in range(2))
    cuda.call("quantool_group_range", cuda.aligned(weight), low, high, low.numel(), width, DTYPES[weight.dtype])
    return low, high


def quantize_affine_cuda(
    weight: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None, bits: int
) -> torch.Tensor:
    """`quantize_affine` by the compiled kernel."""
    _require_grid(weight, scales, zeros, bits)
    width = weight.shape[1] // scales.shape[1]
    if width % 8 or not cuda.is_available():
        return quantize_affine_reference(weight, scales, zeros, bits)
    codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    aligned = [None if tensor is None else cuda.aligned(tensor) for tensor in (weight, scales, zeros)]
    numbers = (scales.numel(), width, bits, DTYPES[weight.dtype], DTYPES[scales.dtype])
    cuda.call("quantool_quantize_affine", *aligned, codes, *numbers)
    return codes


def _group_range_fake(weight: torch.Tensor, groups: int) -> tuple[torch.Tensor, torch.Tensor]:
    shape = (weight.shape[0], groups)
    return weight.new_empty(shape, dtype=torch.float32), weight.new_empty(shape, dtype=torch.float32)


group_range_op = operator("group_range", group_range_reference, _group_range_fake, cuda=group_range_cuda)


def _quantize_affine_fake(
    weight: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None, bits: int
) -> torch.Tensor:
    return weight.new_empty(weight.shape, dtype=torch.uint8)


quantize_affine_op = operator(
    "quantize_affine", quantize_affine_reference, _quantize_affine_fake, cuda=quantize_affine_cuda
)


def _require_groups(weight: torch.Tensor, groups: int) -> None:
    """Raise ValueError unless W is a matrix of floats whose rows have that many groups."""
    if weight.dtype not in DTYPES or weight.dim() != 2:
        raise ValueError(f"weight is {cuda.described(weight)}, expected a matrix of {_either(DTYPES)}")
    if groups < 1 or weight.shape[1] % groups:
        raise ValueError(f"weight has {weight.shape[1]} columns, which {groups} groups do not share equally")


def _require_grid(weight: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None, bits: int) -> None:
    """Raise ValueError when the arguments of `quantize_affine` do not fit: compiled code would read past their ends."""
    _require_groups(weight, scales.shape[-1])
    if not 1 <= bits <= 8:
        raise ValueError(f"bits is {bits}, expected 1 to 8")
    shape = (weight.shape[0], scales.shape[-1])
    for name, tensor, dtypes in (("scales", scales, DTYPES), ("zeros", zeros, (torch.uint8,))):
        if tensor is None:
            continue
        if tensor.shape != shape or tensor.dtype not in dtypes or tensor.device != weight.device:
            found = f"{cuda.described(tensor)} on {tensor.device}"
            raise ValueError(f"{name} is {found}, expected {_either(dtypes)} {list(shape)} on {weight.device}")


def _either(dtypes: Iterable[torch.dtype]) -> str:
    return " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
