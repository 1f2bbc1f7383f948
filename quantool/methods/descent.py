r"""Descent after GPTQ: move one code, or the scale of one group, to its best value given all others, over and over.

GPTQ rounds a column once and never comes back to it. With E = W - Q the squared error of a row is e H e^T and
G = E H half its gradient. Along one code, or one scale whose group has the codes c (minus zero), it is a parabola:

    code     q_j' = q_j + G_j / H[j, j]                         to the nearest code
    scale    s'   = s + (G_g c^T) / (c H_g c^T)                 as stored; kept where the error falls

and a move of Q by m changes G by -m H. So the error never rises. Codes are moved in blocks of columns as GPTQ rounds
them (kernels/gptq_ops.py), then the scales of the groups in the block, then G of all other columns in one product.

H has the damping that GPTQ had, which here too keeps directions that calibration hardly saw from being free.

Coordinate descent on this error: Behdin et al. 2023, QuantEase: Optimization-based Quantization for Language Models.
"""

from dataclasses import dataclass

import torch

from quantool.kernels.gptq_ops import descend_columns
from quantool.quant import RoundScales

BLOCK = 128  # columns


@dataclass(slots=True)
class Rounded:
    """A rounded weight, Q = step (codes - zero). Mutable: codes and steps move."""

    codes: torch.Tensor  # uint8 [N, K]
    step: torch.Tensor  # float32 [N, G]
    zero: torch.Tensor  # float32 [N, G]
    max_code: int

    @property
    def width(self) -> int:
        return self.codes.shape[1] // self.step.shape[1]


def descend(
    weight: torch.Tensor,
    rounded: Rounded,
    moment: torch.Tensor,
    cost: torch.Tensor,
    *,
    sweeps: int,
    round_scales: RoundScales | None = None,
) -> None:
    """Make the error of W float32 [N, K] smaller, or leave it, in so many sweeps.

    H is `moment` [K, K] with `cost` [K], its damped diagonal, in place of its own. Without `round_scales`, which
    rounds a scale as stored, the steps stay as they are.
    """
    if not sweeps:
        return
    columns, width = weight.shape[1], rounded.width
    levels = rounded.codes.view(*rounded.step.shape, -1) - rounded.zero.unsqueeze(-1)
    E = weight - levels.mul_(rounded.step.unsqueeze(-1)).view_as(weight)
    gradient = (E @ moment).addcmul_(E, cost - moment.diagonal())
    del levels, E
    span = max(width, BLOCK // width * width)  # whole groups
    for sweep in range(sweeps):
        for start in range(0, columns, span):
            end = min(start + span, columns)
            H = moment[start:end, start:end].clone()
            H.diagonal().copy_(cost[start:end])
            near = gradient[:, start:end]
            moves = _move_codes(rounded, near, H, start)
            if round_scales is not None:
                moves += _move_steps(rounded, near, H, start, round_scales=round_scales)
            gradient[:, end:].addmm_(moves, moment[start:end, end:], alpha=-1)
            if sweep + 1 < sweeps:  # after the last nothing comes back to the columns before
                gradient[:, :start].addmm_(moves, moment[start:end, :start], alpha=-1)


def _move_codes(rounded: Rounded, gradient: torch.Tensor, H: torch.Tensor, first: int) -> torch.Tensor:
    """What Q changes by, float32 [N, S], in the S columns from `first`, whose gradient follows in place."""
    moves = torch.empty_like(gradient)
    for start in range(0, len(H), BLOCK):
        block = slice(start, min(start + BLOCK, len(H)))
        here = slice(first + block.start, first + block.stop)
        groups = torch.arange(here.start, here.stop, dtype=torch.int32, device=H.device) // rounded.width
        rounded.codes[:, here], moves[:, block] = descend_columns(
            gradient[:, block], H[block, block], rounded.step, groups, rounded.codes[:, here], rounded.max_code
        )
        gradient.addmm_(moves[:, block], H[block], alpha=-1)
    return moves


def _move_steps(
    rounded: Rounded, gradient: torch.Tensor, H: torch.Tensor, first: int, *, round_scales: RoundScales
) -> torch.Tensor:
    """The same for the steps of the groups in these columns, one group after the other."""
    moves = torch.empty_like(gradient)
    for start in range(0, len(H), rounded.width):
        group, g = slice(start, start + rounded.width), (first + start) // rounded.width
        here = slice(first + group.start, first + group.stop)
        levels = rounded.codes[:, here] - rounded.zero[:, g, None]
        slope = (gradient[:, group] * levels).sum(1)
        curvature = ((levels @ H[group, group]) * levels).sum(1)
        step = rounded.step[:, g]
        best = round_scales(step + torch.where(curvature > 0, slope / curvature, 0)).float()
        change = best - step
        falls = (best > 0) & (change * (change * curvature - 2 * slope) < 0)
        change = torch.where(falls, change, 0)
        rounded.step[:, g] = torch.where(falls, best, step)
        moves[:, group] = change.unsqueeze(-1) * levels
        gradient.addmm_(moves[:, group], H[group], alpha=-1)
    return moves
