"""The arithmetic every integer method shares: choose a grid, round to it, come back.

    codes = clamp(round(W / scales) + zeros, 0, 2**bits - 1)        W ~ scales * (codes - zeros)

Scales are rounded to the dtype that will be stored *before* codes are computed, so that what a runtime
dequantizes is what was optimised. Rounding is half to even (torch.round). Symmetric grids span
[-amax, amax] in 2**bits - 1 steps, as compressed-tensors' observers do; asymmetric ones always hold zero.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from quantool.errors import QuantoolError
from quantool.kernels.ops import dequantize, pack_bits, unpack_bits
from quantool.scheme import PER_TENSOR, QuantScheme

__all__ = [
    "QuantizedTensor",
    "RoundScales",
    "choose_qparams",
    "dequantize_affine",
    "pack_bits",
    "quantize_affine",
    "require_finite",
    "round_affine",
    "round_to_grid",
    "row_pieces",
    "unpack_bits",
]

PIECE = 1 << 18  # weights: 1 MB in float32, half of a core's L2 on server processors

RoundScales = Callable[[torch.Tensor], torch.Tensor]
"""float32 scales -> the same scales in the dtype and precision that a format stores."""


@dataclass(frozen=True, slots=True)
class QuantizedTensor:
    """Codes and parameters of W [N, K], not yet packed. A method makes it; a format packs it."""

    codes: torch.Tensor  # uint8 [N, K]
    scales: torch.Tensor  # [N, G], in the stored dtype
    zeros: torch.Tensor | None  # uint8 [N, G]; None when symmetric
    scheme: QuantScheme
    input_scale: torch.Tensor | None = None  # static activation scale, float32 [1]


def choose_qparams(
    weight: torch.Tensor, scheme: QuantScheme, round_scales: RoundScales, *, clip: float | torch.Tensor = 1.0
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Grid of every group of W float32 [N, K]: scales [N, G] as stored and zeros uint8 [N, G] (None when symmetric).

    `clip` shrinks the range, one factor for all or one per group [N, G].
    """
    low, high = group_range(weight, scheme)
    low, high = low * clip, high * clip
    if scheme.sym:
        scales = torch.maximum(high, -low) / (scheme.max_code / 2)
        return round_scales(scales), None
    scales = round_scales((high - low) / scheme.max_code)
    zeros = (-low / scales.to(torch.float32)).round_().clamp_(0, scheme.max_code)
    return scales, zeros.to(torch.uint8)


def group_range(weight: torch.Tensor, scheme: QuantScheme) -> tuple[torch.Tensor, torch.Tensor]:
    """Lowest (at most 0) and highest (at least 0) value of every group of W [N, K]: two float32 [N, G]."""
    grouped = weight.view(weight.shape[0], scheme.groups(weight.shape[1]), -1)
    low, high = torch.aminmax(grouped, dim=-1)
    if scheme.group_size == PER_TENSOR:
        low, high = low.min().expand_as(low), high.max().expand_as(high)
    return low.clamp(max=0).to(torch.float32), high.clamp(min=0).to(torch.float32)


def quantize_affine(
    weight: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None, scheme: QuantScheme
) -> torch.Tensor:
    """Nearest codes uint8 [N, K] of W float32 [N, K] on the grid of `scales` and `zeros` [N, G]."""
    grouped = weight.view(weight.shape[0], scales.shape[1], -1) / scales.unsqueeze(-1).to(torch.float32)
    shift = scheme.zero if zeros is None else zeros.unsqueeze(-1).to(torch.float32)
    return grouped.round_().add_(shift).clamp_(0, scheme.max_code).to(torch.uint8).view_as(weight)


def round_affine(
    weight: torch.Tensor, scheme: QuantScheme, round_scales: RoundScales, *, clip: float | torch.Tensor = 1.0
) -> torch.Tensor:
    """What W float32 [N, K] becomes: choose a grid, quantize, dequantize, with no codes in between."""
    return round_to_grid(weight, *choose_qparams(weight, scheme, round_scales, clip=clip), scheme)


def round_to_grid(
    weight: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None, scheme: QuantScheme
) -> torch.Tensor:
    """What W float32 [N, K] becomes on the grid of `scales` and `zeros` [N, G]."""
    step = scales.unsqueeze(-1).to(torch.float32)
    zero = torch.tensor(float(scheme.zero)) if zeros is None else zeros.unsqueeze(-1).to(torch.float32)
    grouped = weight.view(weight.shape[0], scales.shape[1], -1) / step
    return grouped.round_().clamp_(-zero, scheme.max_code - zero).mul_(step).view_as(weight)


def row_pieces(weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """W [N, K] in runs of rows that stay in a core's cache between the passes over them."""
    pieces: tuple[torch.Tensor, ...] = weight.split(max(1, PIECE // weight.shape[1]))
    return pieces


def dequantize_affine(q: QuantizedTensor) -> torch.Tensor:
    """The float32 [N, K] that a runtime sees in place of W."""
    return dequantize(q.codes, q.scales, q.zeros, q.scheme.bits)


def require_finite(name: str, weight: torch.Tensor) -> None:
    """Raise QuantoolError naming the tensor when it holds NaN or Inf: its codes would be meaningless."""
    if torch.isfinite(weight.sum(dtype=torch.float32)) or bool(torch.isfinite(weight).all()):
        return
    bad = int((~torch.isfinite(weight)).sum())
    raise QuantoolError(
        f"tensor '{name}': {bad} of {weight.numel()} values are NaN or Inf, expected finite weights",
        hint="the checkpoint is damaged: download or export it again",
    )
