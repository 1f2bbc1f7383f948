"""The default search of the K-quants: from ggml's blocks downhill, without losing what ggml was after.

Two errors of a block of 256 weights count. E1 is ggml's own objective, whose weights favour large values; E2 is what a
user measures: sum (x - x')^2, times the importance where there is one. With E1 = E2 = 1 for ggml's block, minimise

    a E1 + b E2 = sum v (x - x')^2        first a = b = 1/2

by turns: d (and dmin) by least squares for the integers and codes as they are, rounded to float16; then, for every
group, its integer scale (and min) among the neighbours, with the codes rounded anew for each. After a round in which
E1 has room to spare, a is halved, and doubled where it had none. What is kept is the block with the least E2 among
those in which neither error is above ggml's; ggml's own, if there is no other.

With an importance E1 alone is minimised, and the least E1 kept: its weights, importance * sqrt(sigma^2 + x^2), say
better than E2's what a model loses (Q2_K on stories-4m: KL divergence 0.1257 by E1, 0.1292 by E2, 0.1276 by ggml).

The compiled kernels do the same, bit for bit (kernels/csrc/kquants_refine.h). Tensors as in kquants_search.py: the
weights of B blocks are [G, count, B], the scales of their groups [G, B].
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quantool.formats.ggml.kquants_search import clamp, group, over, scalar, total

ROUNDS = 2
MARGIN = 0.9999  # "lower" by more than the rounding of the sums
MAX_HALF = 65504.0


@dataclass(frozen=True, slots=True)
class Shape:
    """What tells the types apart: groups of `count`, codes and integer scales between these bounds."""

    count: int
    codes: tuple[int, int]
    scales: tuple[int, int]
    reach: int  # how far an integer scale moves
    weighted_reach: int  # the same with importance
    signed: bool  # no mins
    coarse: bool = False  # Q3_K: scales stored from 0 on, and with searches of its own
    absolute: bool = False  # Q2_K without importance: ggml sums |error|, not its square


@dataclass(frozen=True, slots=True)
class Stored:
    """What blocks store of their grids, as float32: d, dmin [B] (float16 values), scales, mins [G, B] (integers)."""

    d: Tensor
    dmin: Tensor
    scales: Tensor
    mins: Tensor

    def choose(self, mask: Tensor, other: "Stored") -> "Stored":
        """This where the mask [B] is set, the other elsewhere."""
        mine = (self.d, self.dmin, self.scales, self.mins)
        theirs = (other.d, other.dmin, other.scales, other.mins)
        return Stored(*(torch.where(mask, a, b) for a, b in zip(mine, theirs, strict=True)))


@dataclass(frozen=True, slots=True)
class Tile:
    """B blocks: weights, ggml's weights of their errors, the importance (None: 1 each)."""

    x: Tensor
    weight: Tensor
    importance: Tensor | None


@dataclass(frozen=True, slots=True)
class Costs:
    """What an error e costs: weight e^2, or weight |e| + plain e^2 where ggml sums magnitudes."""

    weight: Tensor  # [G, count, B]
    plain: Tensor  # [B]


def finite_half(value: Tensor) -> Tensor:
    """The nearest float16 that is finite, in float32; 0 for NaN."""
    return value.nan_to_num(0.0, MAX_HALF, -MAX_HALF).clamp(-MAX_HALF, MAX_HALF).half().float()


def inverse_of(step: Tensor) -> Tensor:
    """1 / step, and 0 for a step of 0: its codes are 0."""
    return torch.where(step == 0, 0, over(1, step))


def round_codes(x: Tensor, step: Tensor, offset: Tensor, shape: Shape) -> Tensor:
    """The codes nearest to x [..., count, B] on grids [..., B]."""
    return clamp(torch.round((x + group(offset)) * group(inverse_of(step))), *shape.codes)


def refine(tile: Tile, stored: Stored, codes: Tensor, shape: Shape, *, start: Stored) -> tuple[Stored, Tensor]:
    """A grid and codes [G, count, B] with neither error above those of ggml's, which are given."""
    own_ggml, plain_ggml = _measure(tile, stored, codes, shape)
    weighted = tile.importance is not None
    own = torch.where(own_ggml > 0, over(0.5, own_ggml), 0)
    plain = torch.zeros_like(own) if weighted else torch.where(plain_ggml > 0, over(0.5, plain_ggml), 0)
    bound, least = (plain_ggml, own_ggml) if weighted else (own_ggml, plain_ggml)
    bound, least = bound * MARGIN, least * MARGIN
    best, improved, stored = stored, torch.zeros_like(own, dtype=torch.bool), start
    for _ in range(ROUNDS):
        costs = _mix(tile, own, plain, shape)
        stored = _move_groups(tile, costs, _refit(tile, costs, stored, shape), shape)
        rounded = round_codes(tile.x, stored.d * stored.scales, stored.dmin * stored.mins, shape)
        own_error, plain_error = _measure(tile, stored, rounded, shape)
        aim, other = (own_error, plain_error) if weighted else (plain_error, own_error)
        room = other <= bound
        better = room & (aim < least)
        least = torch.where(better, aim, least)
        best = stored.choose(better, best)
        improved |= better
        if not weighted:
            own = own * torch.where(room, 0.5, 2.0)
    rounded = round_codes(tile.x, best.d * best.scales, best.dmin * best.mins, shape)
    return best, torch.where(improved, rounded, codes)


def _measure(tile: Tile, stored: Stored, codes: Tensor, shape: Shape) -> tuple[Tensor, Tensor]:
    """E1 and E2 [B]."""
    step, offset = stored.d * stored.scales, stored.dmin * stored.mins
    error = group(step) * codes - group(offset) - tile.x
    square = error * error
    own = tile.weight * (error.abs() if _linear(tile, shape) else square)
    plain = square if tile.importance is None else tile.importance * square
    return total(total(own)), total(total(plain))


def _linear(tile: Tile, shape: Shape) -> bool:
    return shape.absolute and tile.importance is None


def _mix(tile: Tile, own: Tensor, plain: Tensor, shape: Shape) -> Costs:
    weight = own * tile.weight
    if not _linear(tile, shape):
        weight += plain if tile.importance is None else plain * tile.importance
    return Costs(weight, plain)


def _group_cost(tile: Tile, costs: Costs, step: Tensor, offset: Tensor, shape: Shape) -> Tensor:
    """The cost of each group [G, B] for its step and offset, its codes rounded for them."""
    error = group(step) * round_codes(tile.x, step, offset, shape) - (tile.x + group(offset))
    if _linear(tile, shape):
        return total((costs.plain * error.abs() + costs.weight) * error.abs())
    return total(costs.weight * (error * error))


def _refit(tile: Tile, costs: Costs, stored: Stored, shape: Shape) -> Stored:
    """d and dmin by least squares: x ~ d (s l) - dmin m over the block. A magnitude |e| counts as e^2 / (2 |e|)."""
    step, offset = stored.d * stored.scales, stored.dmin * stored.mins
    codes, weight = round_codes(tile.x, step, offset, shape), costs.weight
    if _linear(tile, shape):
        error = (group(step) * codes - (tile.x + group(offset))).abs()
        magnitude = weight * 0.5 / torch.maximum(error, group(step * scalar(0.05)))
        weight = costs.plain + torch.where(group(step) == 0, 0, magnitude)
    product = weight * codes
    wll, wxl = total(product * codes), total(product * tile.x)
    s, m = stored.scales, stored.mins
    ss, xs = total(s * s * wll), total(s * wxl)
    if shape.signed:
        d = xs / ss
        return replace(stored, d=torch.where((d > 0) | (d < 0), finite_half(d), stored.d))
    w, wx, wl = total(weight), total(weight * tile.x), total(product)
    sm, mm, xm = total(s * m * wl), total(m * m * w), total(m * wx)
    determinant = ss * mm - sm * sm
    d, dmin = (xs * mm - sm * xm) / determinant, (sm * xs - ss * xm) / determinant
    valid = (determinant > 0) & (d > 0) & (dmin >= 0)
    return replace(
        stored,
        d=torch.where(valid, finite_half(d), stored.d),
        dmin=torch.where(valid, finite_half(dmin), stored.dmin),
    )


def _move_groups(tile: Tile, costs: Costs, stored: Stored, shape: Shape) -> Stored:
    """The best of the integers near those of each group. Scale and min mostly move together: both widen the range."""
    weighted = tile.importance is not None
    reach = shape.weighted_reach if weighted else shape.reach
    slack = 0 if shape.signed else 1
    candidates = [(stored.scales, 0)]
    if shape.coarse and weighted:
        candidates.append((-stored.scales, 0))  # of 8 levels, 4 are below zero and 3 above
    for change in range(-reach, reach + 1):
        candidates += [(stored.scales + change, c) for c in range(change - slack, change + slack + 1)]
    scales, mins, least = stored.scales, stored.mins, None
    for candidate, change in candidates:
        s = candidate.clamp(*shape.scales)
        m = stored.mins if shape.signed else (stored.mins + change).clamp(0, shape.scales[1])
        cost = _group_cost(tile, costs, stored.d * s, stored.dmin * m, shape)
        if least is None:
            least = cost
            continue
        better = cost < least
        least = torch.where(better, cost, least)
        scales, mins = torch.where(better, s, scales), torch.where(better, m, mins)
    return replace(stored, scales=scales, mins=mins)
