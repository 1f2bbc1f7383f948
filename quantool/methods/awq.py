"""AWQ: scale up the input channels that matter before rounding, so that rounding hurts them less.

For linears that share an input X with second moment H = X^T X / tokens, a scale s > 0 per input channel moves
precision between channels without changing the network: W s is rounded, s is divided out of what produces X.

    s = m**a,  m[k] = sqrt(H[k, k]),   a on a grid of [0, 1]
    loss(a) = sum over the linears of  tr(D H D^T),   D = Q(W s) / s - W

which is the exact squared error of the linears' outputs over all calibration tokens, with no pass over them; it is
a sum over rows of W, taken over some hundred of them. The best few scales are then tried on the block itself: the
one whose block output is nearest to the float block's wins.
After folding, awq searches the range of every group (clip.py) on the scaled moment, and awq+gptq rounds by GPTQ.

Lin et al. 2023, AWQ: Activation-aware Weight Quantization, sections 3.1-3.2. Here m is the root mean square
rather than the mean magnitude, the loss is exact rather than sampled, and scales are also folded from o_proj
into a v_proj whose heads are shared (one scale per shared channel).
"""

from collections.abc import Mapping

import torch

from quantool.methods.statistics import Inputs, shared_by_source
from quantool.model.blocks import Block
from quantool.model.folds import Group
from quantool.quant import RoundScales, round_affine, row_pieces
from quantool.scheme import MethodOptions, QuantScheme

FINALISTS = 3  # scales of a group that are tried on the block itself
ROWS = 256  # of each weight, at least, that the loss is summed over when there are more


def search_scale(
    block: Block,
    group: Group,
    inputs: Inputs,
    schemes: Mapping[str, QuantScheme],
    *,
    round_scales: RoundScales,
    options: MethodOptions,
) -> torch.Tensor:
    """The scale [K] of a group: the best few of the grid by the linears' outputs, of these the best by the block's."""
    moment, n_grid = inputs.moment, options.n_grid
    magnitude = shared_by_source(moment.diagonal().clamp(min=1e-12), group.source, "mean").sqrt()
    scales = [magnitude ** (i / n_grid) for i in range(n_grid + 1)]
    scales = [(scale / (scale.max() * scale.min()).sqrt()).clamp(1e-4, 1e4) for scale in scales]
    losses = torch.zeros(len(scales), dtype=torch.float64)
    for name in group.linears:
        weight = block.linears[name].weight.detach()
        for piece in row_pieces(weight[:: max(1, weight.shape[0] // ROWS)].float()):
            for i, scale in enumerate(scales):
                losses[i] += float(_output_error(piece, scale, moment, schemes[name], round_scales))
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
