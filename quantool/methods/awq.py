"""AWQ: scale up the input channels that matter before rounding, so that rounding hurts them less.

For linears that share an input X with second moment H = X^T X / tokens, a scale s > 0 per input channel moves
precision between channels without changing the network: W s is rounded, s is divided out of what produces X.

    s = m**a,  m[k] = sqrt(H[k, k]),   a on a grid of [0, 1]
    loss(a) = sum over the linears of  tr(D H D^T),   D = Q(W s) / s - W

which is the exact squared error of the linears' outputs over all calibration tokens, with no pass over them; it is
a sum over rows of W, taken over some hundred of them. The best few scales are then tried on the block itself: the
one whose block output is nearest to the float block's wins.
After folding, the range of every group is searched (clip.py) on the scaled moment.

Lin et al. 2023, AWQ: Activation-aware Weight Quantization, sections 3.1-3.2. Here m is the root mean square
rather than the mean magnitude, the loss is exact rather than sampled, and scales are also folded from o_proj
into a v_proj whose heads are shared (one scale per shared channel).
"""

from collections.abc import Mapping

import torch

from quantool.methods.clip import quantize_clipped
from quantool.model.blocks import Block
from quantool.model.folds import Group, Source, find_groups, fold
from quantool.quant import QuantizedTensor, RoundScales, round_affine, row_pieces
from quantool.scheme import QuantScheme

FINALISTS = 3  # scales of a group that are tried on the block itself
ROWS = 256  # of each weight, at least, that the loss is summed over when there are more


def quantize_block(
    block: Block,
    schemes: Mapping[str, QuantScheme],
    round_scales: RoundScales,
    *,
    stored: torch.dtype,
    n_grid: int,
) -> dict[str, QuantizedTensor]:
    """Codes of the linears in `schemes`; scales are folded into the block's norms and linears in place."""
    groups = find_groups(block)
    moments = second_moments(block, groups)
    for group in groups:
        if group.source is None or not all(name in schemes for name in group.linears):
            continue
        moment = moments[group.linears[0]]
        scale = _search_scale(block, group, moment, schemes, round_scales=round_scales, n_grid=n_grid)
        exact = fold(block, group, scale, stored)
        moments[group.linears[0]] = moment / exact.outer(exact)
    # Only now: folding into v_proj or up_proj changes weights that an earlier group holds.
    out = {}
    for group in groups:
        for name in group.linears:
            if name in schemes:
                weight = block.linears[name].weight.detach()
                out[name] = quantize_clipped(weight.float(), schemes[name], round_scales, moments[group.linears[0]])
    return out


def second_moments(block: Block, groups: list[Group]) -> dict[str, torch.Tensor]:
    """Mean of x x^T over all calibration tokens, float32 [K, K], for the first linear of each group."""
    sums: dict[str, torch.Tensor] = {}
    tokens = sum(hidden.shape[0] * hidden.shape[1] for hidden in block.states.hidden)

    def add(name: str, args: tuple[torch.Tensor, ...]) -> None:
        x = args[0].reshape(-1, args[0].shape[-1]).float()
        if name not in sums:
            sums[name] = torch.zeros(x.shape[1], x.shape[1], device=x.device)
        sums[name].addmm_(x.T, x, alpha=1 / tokens)

    hooks = [
        block.linears[group.linears[0]].register_forward_pre_hook(
            lambda _m, args, name=group.linears[0]: add(name, args)
        )
        for group in groups
    ]
    try:
        for _ in block.replay():
            pass
    finally:
        for hook in hooks:
            hook.remove()
    return sums


def _search_scale(
    block: Block,
    group: Group,
    moment: torch.Tensor,
    schemes: Mapping[str, QuantScheme],
    *,
    round_scales: RoundScales,
    n_grid: int,
) -> torch.Tensor:
    """The scale [K] of a group: the best few of the grid by the linears' outputs, of these the best by the block's."""
    magnitude = _shared(moment.diagonal().clamp(min=1e-12).sqrt(), group.source)
    scales = [magnitude ** (i / n_grid) for i in range(n_grid + 1)]
    scales = [(scale / (scale.max() * scale.min()).sqrt()).clamp(1e-4, 1e4) for scale in scales]
    losses = torch.zeros(len(scales), dtype=torch.float64)
    for name in group.linears:
        weight = block.linears[name].weight.detach()
        for piece in row_pieces(weight[:: max(1, weight.shape[0] // ROWS)].float()):
            for i, scale in enumerate(scales):
                losses[i] += _output_error(piece, scale, moment, schemes[name], round_scales)
    order = losses.argsort()[:FINALISTS].tolist()
    finalists = [scales[i] for i in order]
    return _best_on_block(block, group, finalists, schemes, round_scales=round_scales)


def _output_error(
    weight: torch.Tensor, scale: torch.Tensor, moment: torch.Tensor, scheme: QuantScheme, round_scales: RoundScales
) -> torch.Tensor:
    """tr(D H D^T) for some rows of W."""
    difference = round_affine(weight * scale, scheme, round_scales).div_(scale).sub_(weight)
    return ((difference @ moment) * difference).sum()


def _best_on_block(
    block: Block,
    group: Group,
    scales: list[torch.Tensor],
    schemes: Mapping[str, QuantScheme],
    *,
    round_scales: RoundScales,
) -> torch.Tensor:
    """The scale whose rounding moves the block's own output least, on the first window."""
    window = block.states.hidden[0][:1]
    wanted = block.run(window)
    errors = []
    originals = {name: block.linears[name].weight.clone() for name in group.linears}
    for scale in scales:
        for name, weight in originals.items():
            rounded = round_affine(weight.float() * scale, schemes[name], round_scales)
            block.linears[name].weight.copy_(rounded.div_(scale))
        errors.append(float((block.run(window) - wanted).float().square().sum()))
    for name, weight in originals.items():
        block.linears[name].weight.copy_(weight)
    return scales[errors.index(min(errors))]


def _shared(magnitude: torch.Tensor, source: Source | None) -> torch.Tensor:
    """Root mean square over the input channels that one row of the source feeds, as with shared key-value heads."""
    if source is None or source.kind != "linear":
        return magnitude
    rows = source.rows.to(magnitude.device)
    none = magnitude.new_zeros(int(rows.max()) + 1)
    total = none.index_add(0, rows, magnitude.square())
    count = none.index_add(0, rows, torch.ones_like(magnitude))
    return (total / count.clamp(min=1)).sqrt()[rows]
