"""Search how far to shrink each group's range: a few values saturate, all others are rounded on a finer grid.

For every group g of a row the ratio r minimises  e H_g e^T,  e = Q(w; r * range) - w,  where H_g is the block of
the inputs' second moment X^T X that belongs to the group's channels: the squared error of the group's own
contribution to the output (AWQ, Lin et al. 2023, section 3.2, over all tokens instead of a sample). Without
activations H_g is the identity and the error is that of the weights.

The scale is then fitted to the codes it gave, s = (q H_g w^T) / (q H_g q^T) with q = codes - zero, and kept where
rounding with it errs less: what the grid's end points cannot say.
"""

import torch

from quantool.methods.statistics import Inputs
from quantool.quant import (
    QuantizedTensor,
    RoundScales,
    choose_qparams,
    quantize_affine,
    round_affine,
    round_to_grid,
    row_pieces,
)
from quantool.scheme import PER_TENSOR, MethodOptions, QuantScheme

FITS = 2  # rounds of fitting the scale to its codes; a third changes nothing that can be measured
RATIOS = tuple(1 - 0.05 * i for i in range(9))  # 1.0 down to 0.6


def quantize_weight(
    weight: torch.Tensor, scheme: QuantScheme, round_scales: RoundScales, *, inputs: Inputs, options: MethodOptions
) -> QuantizedTensor:
    """The rounding step of a block method: `quantize_clipped` for the moment of what reaches the linear."""
    return quantize_clipped(weight, scheme, round_scales, inputs.moment)


def quantize_clipped(
    weight: torch.Tensor, scheme: QuantScheme, round_scales: RoundScales, moment: torch.Tensor | None = None
) -> QuantizedTensor:
    """Codes of W float32 [N, K] on the best grid of every group; `moment` as for `search_grid`."""
    scales, zeros = search_grid(weight, scheme, round_scales, moment)
    return QuantizedTensor(quantize_affine(weight, scales, zeros, scheme), scales, zeros, scheme)


def search_grid(
    weight: torch.Tensor, scheme: QuantScheme, round_scales: RoundScales, moment: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Scales [N, G] and zeros uint8 [N, G] (None when symmetric) of least error for every group of W float32 [N, K].

    `moment` is what an error costs: X^T X [K, K] of the inputs, a cost per channel [K], or None, all the same.
    """
    grams = None if moment is None else _grams(moment, scheme.width(weight.shape[1]))
    pieces = (weight,) if scheme.group_size == PER_TENSOR else row_pieces(weight)
    scales, zeros = zip(*(_search_piece(piece, scheme, round_scales, grams) for piece in pieces), strict=True)
    return torch.cat(scales), None if scheme.sym else torch.cat(zeros)


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


def _search_piece(
    weight: torch.Tensor, scheme: QuantScheme, round_scales: RoundScales, grams: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    ratios = best_ratios(weight, scheme, round_scales, grams)
    scales, zeros = choose_qparams(weight, scheme, round_scales, clip=ratios)
    if scheme.group_size != PER_TENSOR:
        for _ in range(FITS):
            scales = _fitted(weight, scales, zeros, scheme, round_scales=round_scales, grams=grams)
    return scales, zeros


def _fitted(
    weight: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    scheme: QuantScheme,
    *,
    round_scales: RoundScales,
    grams: torch.Tensor | None,
) -> torch.Tensor:
    """Scales [N, G] of least error for the codes that `scales` gives, where rounding with them errs less."""
    groups = scales.shape[1]
    rounded = round_to_grid(weight, scales, zeros, scheme)
    steps = (rounded.view(weight.shape[0], groups, -1) / scales.unsqueeze(-1).float()).view_as(weight)
    fitted = _inner(steps, weight, groups, grams) / _inner(steps, steps, groups, grams)
    # No code but zero, or a fit of the wrong sign: keep what there was.
    fitted = round_scales(torch.where(fitted > 0, fitted, scales.float()))
    old_error = _group_errors(rounded.sub_(weight), groups, grams)
    new_error = _group_errors(round_to_grid(weight, fitted, zeros, scheme).sub_(weight), groups, grams)
    return torch.where(new_error < old_error, fitted, scales)


def _grams(moment: torch.Tensor, width: int) -> torch.Tensor:
    """[K, K] -> its diagonal blocks [G, width, width]; [K] -> [G, width]."""
    if moment.dim() == 1:
        return moment.view(-1, width)
    return torch.stack([moment[i : i + width, i : i + width] for i in range(0, moment.shape[0], width)])


def _group_errors(difference: torch.Tensor, groups: int, grams: torch.Tensor | None) -> torch.Tensor:
    """Error of every group float32 [N, G] of a difference [N, K]."""
    return _inner(difference, difference, groups, grams)


def _inner(a: torch.Tensor, b: torch.Tensor, groups: int, grams: torch.Tensor | None) -> torch.Tensor:
    """a H_g b^T of every group: float32 [N, G] from [N, K] each."""
    left, right = (t.view(t.shape[0], groups, -1) for t in (a, b))
    if grams is None:
        return (left * right).sum(-1)
    if grams.dim() == 2:
        return (left * grams * right).sum(-1)
    return ((left.transpose(0, 1).contiguous() @ grams) * right.transpose(0, 1)).sum(-1).T
