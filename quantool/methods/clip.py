"""Search how far to shrink each group's range: a few values saturate, all others are rounded on a finer grid.

For every group g of a row the ratio r minimises  e H_g e^T,  e = Q(w; r * range) - w,  where H_g is the block of
the inputs' second moment X^T X that belongs to the group's channels: the squared error of the group's own
contribution to the output (AWQ, Lin et al. 2023, section 3.2, without its sampling of tokens). Without
activations H_g is the identity and the error is that of the weights.
"""

import torch

from quantool.quant import QuantizedTensor, RoundScales, choose_qparams, dequantize, quantize_affine
from quantool.scheme import PER_TENSOR, QuantScheme

RATIOS = tuple(1 - 0.05 * i for i in range(9))  # 1.0 down to 0.6


def quantize_clipped(
    weight: torch.Tensor, scheme: QuantScheme, round_scales: RoundScales, moment: torch.Tensor | None = None
) -> QuantizedTensor:
    """Codes of W float32 [N, K] with the best ratio per group; `moment` is X^T X [K, K] of its inputs, if known."""
    grams = None if moment is None else _diagonal_blocks(moment, scheme.width(weight.shape[1]))
    best_error: torch.Tensor | None = None
    best: QuantizedTensor | None = None
    for ratio in RATIOS:
        scales, zeros = choose_qparams(weight, scheme, round_scales, clip=ratio)
        codes = quantize_affine(weight, scales, zeros, scheme)
        difference = dequantize(codes, scales, zeros, scheme.bits).sub_(weight)
        error = _group_errors(difference, scales.shape[1], grams)
        if scheme.group_size == PER_TENSOR:
            error = error.sum().expand_as(error)
        tried = QuantizedTensor(codes, scales, zeros, scheme)
        if best is None or best_error is None:
            best, best_error = tried, error
        else:
            better = error < best_error
            best, best_error = _merge(better, tried, best), torch.where(better, error, best_error)
    if best is None:
        raise ValueError("no clipping ratios to try")
    return best


def _merge(better: torch.Tensor, new: QuantizedTensor, old: QuantizedTensor) -> QuantizedTensor:
    """Take the groups of `new` where `better` bool [N, G] holds."""
    rows, columns = new.codes.shape
    wide = better.unsqueeze(-1).expand(-1, -1, columns // better.shape[1]).reshape(rows, columns)
    zeros = None
    if new.zeros is not None and old.zeros is not None:
        zeros = torch.where(better, new.zeros, old.zeros)
    return QuantizedTensor(
        torch.where(wide, new.codes, old.codes), torch.where(better, new.scales, old.scales), zeros, new.scheme
    )


def _diagonal_blocks(moment: torch.Tensor, width: int) -> torch.Tensor:
    """[K, K] -> [G, width, width]."""
    groups = moment.shape[0] // width
    return torch.stack([moment[i * width : (i + 1) * width, i * width : (i + 1) * width] for i in range(groups)])


def _group_errors(difference: torch.Tensor, groups: int, grams: torch.Tensor | None) -> torch.Tensor:
    """Error of every group float32 [N, G] of a difference [N, K]."""
    parts = difference.view(difference.shape[0], groups, -1)
    if grams is None:
        return parts.square().sum(-1)
    by_group = parts.transpose(0, 1)
    return ((by_group @ grams) * by_group).sum(-1).T
