"""Search how far to shrink each group's range: a few values saturate, all others are rounded on a finer grid.

For every group g of a row the ratio r minimises  e H_g e^T,  e = Q(w; r * range) - w,  where H_g is the block of
the inputs' second moment X^T X that belongs to the group's channels: the squared error of the group's own
contribution to the output (AWQ, Lin et al. 2023, section 3.2, over all tokens instead of a sample). Without
activations H_g is the identity and the error is that of the weights.
"""

import torch

from quantool.quant import QuantizedTensor, RoundScales, choose_qparams, quantize_affine, round_affine, row_pieces
from quantool.scheme import PER_TENSOR, QuantScheme

RATIOS = tuple(1 - 0.05 * i for i in range(9))  # 1.0 down to 0.6


def quantize_clipped(
    weight: torch.Tensor, scheme: QuantScheme, round_scales: RoundScales, moment: torch.Tensor | None = None
) -> QuantizedTensor:
    """Codes of W float32 [N, K] with the best ratio per group; `moment` is X^T X [K, K] of its inputs, if known."""
    grams = None if moment is None else _diagonal_blocks(moment, scheme.width(weight.shape[1]))
    pieces = (weight,) if scheme.group_size == PER_TENSOR else row_pieces(weight)
    parts = [_quantize_piece(piece, scheme, round_scales, grams) for piece in pieces]
    zeros = [part.zeros for part in parts if part.zeros is not None]
    return QuantizedTensor(
        torch.cat([part.codes for part in parts]),
        torch.cat([part.scales for part in parts]),
        torch.cat(zeros) if zeros else None,
        scheme,
    )


def best_ratios(
    weight: torch.Tensor, scheme: QuantScheme, round_scales: RoundScales, grams: torch.Tensor | None
) -> torch.Tensor:
    """The ratio of every group [N, G] with the least error."""
    errors = []
    for ratio in RATIOS:
        difference = round_affine(weight, scheme, round_scales, clip=ratio).sub_(weight)
        error = _group_errors(difference, scheme.groups(weight.shape[1]), grams)
        errors.append(error.sum().expand_as(error) if scheme.group_size == PER_TENSOR else error)
    return torch.tensor(RATIOS, device=weight.device)[torch.stack(errors).argmin(0)]


def _quantize_piece(
    weight: torch.Tensor, scheme: QuantScheme, round_scales: RoundScales, grams: torch.Tensor | None
) -> QuantizedTensor:
    ratios = best_ratios(weight, scheme, round_scales, grams)
    scales, zeros = choose_qparams(weight, scheme, round_scales, clip=ratios)
    return QuantizedTensor(quantize_affine(weight, scales, zeros, scheme), scales, zeros, scheme)


def _diagonal_blocks(moment: torch.Tensor, width: int) -> torch.Tensor:
    """[K, K] -> [G, width, width]."""
    return torch.stack([moment[i : i + width, i : i + width] for i in range(0, moment.shape[0], width)])


def _group_errors(difference: torch.Tensor, groups: int, grams: torch.Tensor | None) -> torch.Tensor:
    """Error of every group float32 [N, G] of a difference [N, K]."""
    parts = difference.view(difference.shape[0], groups, -1)
    if grams is None:
        return parts.square().sum(-1)
    by_group = parts.transpose(0, 1).contiguous()
    return ((by_group @ grams) * by_group).sum(-1).T
