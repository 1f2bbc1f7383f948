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
from quantool.kernels import rtn
from quantool.kernels.ops import dequantize, pack_bits, round_input, unpack_bits
from quantool.scheme import PER_TENSOR, QuantScheme

__all__ = [
    "QuantizedTensor",
    "RoundScales",
    "choose_input_qparams",
    "choose_qparams",
    "dequantize_affine",
    "divide",
    "pack_bits",
    "quantize_affine",
    "require_finite",
    "round_activations",
    "round_affine",
    "round_to_grid",
    "row_pieces",
    "unpack_bits",
]

PIECE = 1 << 18  # weights: 1 MB in float32, half of a core's L2 on server processors

RoundScales = Callable[[torch.Tensor], torch.Tensor]
"""float32 scales -> the same scales in the dtype and precision that a format stores."""


@dataclass(frozen=True, slots=True)
class DoubleQuant:
    """Scales of blocks that are quantized themselves (QLoRA, Dettmers et al. 2023, section 3).

    scales[i] = quant_map[codes[i]] * absmax[i // 256] + offset
    """

    codes: torch.Tensor  # uint8 [B]
    quant_map: torch.Tensor  # float32 [256]
    absmax: torch.Tensor  # float32 [ceil(B / 256)]
    offset: torch.Tensor  # float32 []


@dataclass(frozen=True, slots=True)
class QuantizedTensor:
    """Codes and parameters of W [N, K], not yet packed. A method makes it; a format packs it."""

    codes: torch.Tensor  # uint8 [N, K]
    scales: torch.Tensor  # [N, G], in the stored dtype; of nf4 and fp4 the absmax float32 [B] of the flat blocks
    zeros: torch.Tensor | None  # uint8 [N, G]; None when symmetric
    scheme: QuantScheme
    input_scale: torch.Tensor | None = None  # static activation scale, float32 [1]
    input_zero: torch.Tensor | None = None  # static asymmetric activation zero point, int8 [1]
    g_idx: torch.Tensor | None = None  # int32 [K], the group of each column; None when groups are contiguous
    double: DoubleQuant | None = None  # what `scales` were decoded from
    weight_dtype: torch.dtype | None = None  # of W itself, where a format records it (bitsandbytes)
    blocks: torch.Tensor | None = None  # uint8 [N, bytes]: the codes as packed already, on a grid of ggml


def choose_qparams(
    weight: torch.Tensor, scheme: QuantScheme, round_scales: RoundScales, *, clip: float | torch.Tensor = 1.0
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Grid of every group of W [N, K]: scales [N, G] as stored and zeros uint8 [N, G] (None when symmetric).

    `clip` shrinks the range, one factor for all or one per group [N, G].
    """
    low, high = group_range(weight, scheme)
    low, high = low * clip, high * clip
    if scheme.sym:
        scales = divide(torch.maximum(high, -low), scheme.max_code / 2)
        return round_scales(scales), None
    scales = round_scales(divide(high - low, scheme.max_code))
    zeros = (-low / scales.to(torch.float32)).round_().clamp_(0, scheme.max_code)
    return scales, zeros.to(torch.uint8)


def divide(values: torch.Tensor, by: float) -> torch.Tensor:
    """values / by, rounded once on every device: on CUDA torch multiplies by the reciprocal of a number."""
    return values / (values.new_full((), by) if values.is_cuda else by)


def group_range(weight: torch.Tensor, scheme: QuantScheme) -> tuple[torch.Tensor, torch.Tensor]:
    """Lowest (at most 0) and highest (at least 0) value of every group of W [N, K]: two float32 [N, G]."""
    low, high = rtn.group_range(weight, scheme.groups(weight.shape[1]))
    if scheme.group_size == PER_TENSOR:
        low, high = low.min().expand_as(low), high.max().expand_as(high)
    return low, high


def quantize_affine(
    weight: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None, scheme: QuantScheme
) -> torch.Tensor:
    """Nearest codes uint8 [N, K] of W [N, K] on the grid of `scales` and `zeros` [N, G]."""
    return rtn.quantize_affine(weight, scales, zeros, scheme.bits)


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
    zero = (
        torch.tensor(float(scheme.zero), device=weight.device)
        if zeros is None
        else zeros.unsqueeze(-1).to(torch.float32)
    )
    grouped = weight.view(weight.shape[0], scales.shape[1], -1) / step
    return grouped.round_().clamp_(-zero, scheme.max_code - zero).mul_(step).view_as(weight)


def round_activations(x: torch.Tensor, scheme: QuantScheme) -> torch.Tensor:
    """What X float32 [..., K] becomes when a runtime rounds every token to 8 bits; as it is for float activations.

    For a static scheme too: what one scale for all tokens costs is not of a method's choosing.
    """
    return x if scheme.act_bits == 16 else round_input(x, None, None, scheme.act_sym)


def choose_input_qparams(
    low: torch.Tensor, high: torch.Tensor, stored: torch.dtype, *, sym: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The scale float32 [1] of int8 activations in [low, high], and zero point int8 [1] (None when symmetric).

    The scale is a value that `stored` holds too.
    """
    steps = torch.maximum(high, -low) / 127.5 if sym else (high - low) / 255
    least = torch.finfo(stored).tiny
    scale = steps.reshape(1).clamp(min=least).to(stored).to(torch.float32)
    if sym:
        return scale, None
    return scale, (-128 - low.reshape(1) / scale).round().clamp(-128, 127).to(torch.int8)


def row_pieces(weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """W [N, K] in runs of rows that stay in a core's cache between the passes over them."""
    pieces: tuple[torch.Tensor, ...] = weight.split(max(1, PIECE // weight.shape[1]))
    return pieces


def dequantize_affine(q: QuantizedTensor) -> torch.Tensor:
    """The float32 [N, K] that a runtime sees in place of W. Raises ValueError for nf4 and fp4, which have levels."""
    if q.scheme.flat:
        raise ValueError(f"{q.scheme} is not affine")
    if q.g_idx is None:
        return dequantize(q.codes, q.scales, q.zeros, q.scheme.bits)
    order = q.g_idx.argsort(stable=True)  # groups together, as in the unordered layout
    weight = dequantize(q.codes[:, order].contiguous(), q.scales, q.zeros, q.scheme.bits)
    return torch.empty_like(weight).index_copy_(1, order, weight)


def require_finite(name: str, weight: torch.Tensor) -> None:
    """Raise QuantoolError naming the tensor when it holds NaN or Inf: its codes would be meaningless."""
    # On a CPU torch adds up a copy in float32: of a piece it is small, and stays in the cache.
    pieces = row_pieces(weight) if weight.device.type == "cpu" and weight.dim() == 2 and weight.numel() else (weight,)
    if all(bool(torch.isfinite(piece.sum(dtype=torch.float32))) for piece in pieces):
        return
    if bool(torch.isfinite(weight).all()):
        return
    bad = int((~torch.isfinite(weight)).sum())
    raise QuantoolError(
        f"tensor '{name}': {bad} of {weight.numel()} values are NaN or Inf, expected finite weights",
        hint="the checkpoint is damaged: download or export it again",
    )
