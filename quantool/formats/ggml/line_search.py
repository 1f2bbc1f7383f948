"""The search for the line of values of 32 weights, in torch: W ~ d level(code), or d code + m.

ggml's own search is here operation by operation, so that its bytes come out (`make_qx`, `make_qkx3`), and the better
one that is the default. For given codes the best d (and m) is a least-squares fit, and for a given d the nearest codes
are best, so the only question is where to start; the candidates below send the largest weight to some level:

    for top in tops:   q = level(x top / max);   A = sum w q x;   B = sum w q^2;   d = A / B;   gain = A^2 / B

and the one of most gain is taken, d is rounded to float16, and the codes are the nearest ones to the STORED d. Where
ggml minimises an objective of its own besides what a user measures, a candidate counts only when the error under the
first of the two weights is not above ggml's: both are parabolas in d, so d is the minimum of the second, moved into the
interval where the first is low enough. Whatever wins is compared with ggml's block once more, in both sums; the better
block stays. With an importance the second is ggml's objective, which says better what a model loses, else the user's.

Blocks are columns here, x float32 [32, B], and sums run over the 32 in order: csrc/ggml_line.h, in which every SIMD
lane is a block, does the same operations and gives the same bits.

Source: ggml-quants.c of https://github.com/ggml-org/ggml (quantize_row_q4_0_ref, make_qx_quants, make_qkx3_quants)
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Level = Callable[[Tensor], Tensor]
"""x / d -> the nearest level, both float32."""

BLOCK = 32
MAGIC = 12582912.0  # 1.5 * 2**23: adding it leaves the nearest integer, ties to even, in the last bits
GROUP_MAX_EPS = 1e-15  # ggml's: a block below it is all zeros
HALF_MAX = 65504.0
TINY = 1e-30
HUGE = 1e30


def constant(value: float) -> Tensor:
    """A float32 number; a Python number divided by a tensor would be multiplied by its reciprocal."""
    return torch.tensor(value, dtype=torch.float32)


def ordered_sum(terms: Tensor) -> Tensor:
    """The sum over the first dimension, one after the other as a scalar loop adds them."""
    total = torch.zeros_like(terms[0])
    for term in terms:
        total += term
    return total


def nearest(value: Tensor) -> Tensor:
    """ggml's nearest_int as float32: ties to even, and beyond 2**22 whatever bits it leaves."""
    return (((value + MAGIC).view(torch.int32) & 0x7FFFFF) - 0x400000).to(torch.float32)


def rint(value: Tensor) -> Tensor:
    """The nearest integer, ties to even, for less than 2**22."""
    return (value + MAGIC) - MAGIC


def reciprocal(value: Tensor) -> Tensor:
    """1 / value, and 0 where that would overflow."""
    return torch.where(value.abs() < TINY, constant(0.0), torch.div(constant(1.0), value))


def sqrt(value: Tensor) -> Tensor:
    """Rounded correctly, as the processor's instruction does; torch's own may come from a library that does not."""
    return value.to(torch.float64).sqrt().to(torch.float32)


def half(value: Tensor) -> Tensor:
    """Rounded to float16 without ever becoming infinite, as float32."""
    return value.clamp(-HALF_MAX, HALF_MAX).to(torch.float16).to(torch.float32)


def signed_max(x: Tensor) -> Tensor:
    """The first of the values of largest magnitude of each block, with its sign."""
    largest = torch.zeros_like(x[0])
    value = torch.zeros_like(x[0])
    for row in x:
        larger = row.abs() > largest
        largest = torch.where(larger, row.abs(), largest)
        value = torch.where(larger, row, value)
    return value


def extent(x: Tensor) -> tuple[Tensor, Tensor]:
    """The lowest and the highest value of each block; of 0 and -0 the first, as a scalar loop has it."""
    low = high = x[0]
    for row in x[1:]:
        low, high = torch.where(row < low, row, low), torch.where(row > high, row, high)
    return low, high


def blocks_of(weight: Tensor) -> Tensor:
    """W float32 [N, K] as [32, N * K / 32]."""
    return weight.reshape(-1, BLOCK).T.contiguous()


def columns_of(importance: Tensor, weight: Tensor, size: int, *, exact: bool) -> Tensor:
    """Importance [K] beside the blocks of W [N, K]: [32, N * K / 32].

    A block of `size` columns without any importance would leave every code open: there all columns count the same.
    """
    if not exact:
        grouped = importance.view(-1, size)
        importance = torch.where((grouped == 0).all(-1, keepdim=True), constant(1.0), grouped).view(-1)
    return importance.view(-1, BLOCK).repeat(weight.shape[0], 1).T.contiguous()


def objective_of(weight: Tensor, x: Tensor, users: Tensor, *, exact: bool) -> Tensor:
    """What ggml minimises: importance * sqrt(sum(x^2) / K of the row + x^2), beside the blocks of W [N, K]."""
    mean = ordered_sum((weight * weight).T) / constant(weight.shape[1])
    square = mean.repeat_interleave(weight.shape[1] // BLOCK) + x * x
    return users * sqrt(square if exact else square.clamp(max=HUGE))


def symmetric(low: int, high: int) -> Level:
    """Levels that are the integers from low to high."""
    return lambda value: rint(value).clamp(low, high)


# --- ggml's own ------------------------------------------------------------------------------------------------------


def make_qx(x: Tensor, weight: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """ggml's make_qx_quants: the scale [B] and the codes [32, B] (0 to 2 top - 1) of least error under `weight`."""
    max_ = signed_max(x)

    def codes(i: int) -> Tensor:
        inverse = -(top + constant(0.1) * i) / max_
        return nearest(inverse * x).clamp(-top, top - 1)

    def sums(level: Tensor) -> tuple[Tensor, Tensor]:
        return ordered_sum(weight * x * level), ordered_sum(weight * level * level)

    level = codes(0)
    a, b = sums(level)
    scale = torch.where(b == 0, constant(0.0), a / b)
    best = scale * a
    for i in (*range(-9, 0), *range(1, 10)):
        new = codes(i)
        a, b = sums(new)
        better = (b > 0) & (a * a > best * b)
        level = torch.where(better, new, level)
        scale = torch.where(better, a / b, scale)
        best = torch.where(better, scale * a, best)
    empty = max_.abs() < GROUP_MAX_EPS
    return torch.where(empty, constant(0.0), scale), torch.where(empty, constant(0.0), level + top)


def make_qkx3(x: Tensor, weight: Tensor, max_code: int) -> tuple[Tensor, Tensor, Tensor]:
    """ggml's make_qkx3_quants: scale and minimum (at most 0) [B] and the codes [32, B], x ~ scale code + minimum."""
    low, high = extent(x)
    w, wx = ordered_sum(weight), ordered_sum(weight * x)
    low = torch.where(low > 0, constant(0.0), low)
    empty = high <= low

    def error(scale: Tensor, minimum: Tensor, code: Tensor) -> Tensor:
        difference = scale * code + minimum - x
        return ordered_sum(weight * (difference * difference))

    inverse = constant(max_code) / (high - low)
    scale = constant(1.0) / inverse
    code = nearest(inverse * (x - low)).clamp(0, max_code)
    best = error(scale, low, code)
    for i in range(37):
        inverse = (constant(-0.9) + constant(0.05) * i + max_code) / (high - low)
        new = nearest(inverse * (x - low)).clamp(0, max_code)
        wq = weight * new
        q, qq, qx = ordered_sum(wq), ordered_sum(wq * new), ordered_sum(wq * x)
        determinant = w * qq - q * q
        this_scale = (w * qx - wx * q) / determinant
        this_low = (qq * wx - q * qx) / determinant
        positive = this_low > 0
        this_scale = torch.where(positive, qx / qq, this_scale)
        this_low = torch.where(positive, constant(0.0), this_low)
        this_error = error(this_scale, this_low, new)
        better = (determinant > 0) & (this_error < best)
        code = torch.where(better, new, code)
        best = torch.where(better, this_error, best)
        scale = torch.where(better, this_scale, scale)
        low = torch.where(better, this_low, low)
    zero = constant(0.0)
    return torch.where(empty, zero, scale), low, torch.where(empty, zero, code)


# --- better ----------------------------------------------------------------------------------------------------------

Weights = Sequence[Tensor | None]
"""What the error of each weight [32, B] counts (None: all the same): ggml's objective, if any, then the user's."""


def weighed(weight: Tensor | None, values: Tensor) -> Tensor:
    """Values times what they count."""
    return values if weight is None else weight * values


def line_errors(x: Tensor, weights: Weights, level: Level, step: Tensor) -> list[Tensor]:
    """The error of the blocks under each of the weights when their stored step is `step`, and codes the nearest."""
    difference = x - step * level(x * reciprocal(step))
    return [ordered_sum(weighed(weight, difference * difference)) for weight in weights]


def fit_step(
    x: Tensor, weights: Weights, q: Tensor, squares: Sequence[Tensor], limit: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The best step for levels q, and what it gains: the sum of squares under the last weight less the error.

    With a `limit` of the error under the first weight, the best step that keeps it; NaN where none does.
    """
    a, b = zip(*((ordered_sum(weighed(w, q) * x), ordered_sum(weighed(w, q) * q)) for w in weights), strict=True)
    step = a[-1] / b[-1]
    if limit is None:
        return step, a[-1] * step
    middle = a[0] / b[0]
    reach = sqrt((limit - (squares[0] - a[0] * middle)) / b[0])
    step = torch.where(step > middle + reach, middle + reach, step)
    step = torch.where(step < middle - reach, middle - reach, step)
    step = torch.where(reach.isnan(), reach, step)
    return step, step * (a[-1] + a[-1] - step * b[-1])


def refine(
    x: Tensor, weights: Weights, level: Level, step: Tensor, *, largest: Tensor, tops: Sequence[float], rounds: int
) -> Tensor:
    """A stored step [B] whose error with the nearest codes is at most that of `step`, under each of the weights.

    `largest` is the weight that goes to one of `tops`; each further round fits the step to the codes of the last.
    """
    errors = line_errors(x, weights, level, step)
    limit = errors[0] if len(weights) == 2 else None
    squares = [ordered_sum(weighed(w, x) * x) for w in weights] if limit is not None else []
    inverse = reciprocal(largest)
    best = torch.zeros_like(step)
    found = step
    for top in tops:
        candidate, gain = fit_step(x, weights, level(x * (inverse * top)), squares, limit)
        better = gain > best
        best = torch.where(better, gain, best)
        found = torch.where(better, candidate, found)
    for i in range(rounds):
        if i:
            found, _ = fit_step(x, weights, level(x * reciprocal(found)), squares, limit)
        found = half(torch.where(found.isnan(), step, found))
        new = line_errors(x, weights, level, found)
        better = new[-1] < errors[-1]
        if limit is not None:
            better &= new[0] <= limit
        step = torch.where(better, found, step)
        errors[-1] = torch.where(better, new[-1], errors[-1])
    return step


Line = tuple[Tensor, Tensor]
"""The step and the lowest value of the blocks: W ~ step code + low, both [B]."""

BLENDS = (0.0, 0.25, 1.0, 4.0)  # how much ggml's objective counts in a fit beside the user's measure


def affine_errors(x: Tensor, weights: Weights, max_code: int, line: Line) -> list[Tensor]:
    """As `line_errors`, for d code + m."""
    step, low = line
    code = rint((x - low) * reciprocal(step)).clamp(0, max_code)
    difference = (x - low) - step * code
    return [ordered_sum(weighed(weight, difference * difference)) for weight in weights]


Sums = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
"""Sums over a block under one of the weights: w, w y, w q, w q^2, w q y."""


def solve(sums: Sums) -> Line:
    """The line of least error."""
    w, wy, wq, wqq, wqy = sums
    determinant = w * wqq - wq * wq
    return (w * wqy - wy * wq) / determinant, (wqq * wy - wq * wqy) / determinant


def explained(sums: Sums, line: Line) -> Tensor:
    """The sum of squares of y less the error of the line."""
    w, wy, wq, wqq, wqy = sums
    step, low = line
    return step * (wqy + wqy - step * wqq) + low * (wy + wy - low * w - (step + step) * wq)


def fit_affine(all_sums: Sequence[Sums], room: Tensor | None) -> tuple[Tensor, Line]:
    """The line that explains most under the last weight; with `room`, of those that explain so much under the first."""
    if room is None:
        line = solve(all_sums[0])
        return explained(all_sums[0], line), line
    first, last = all_sums
    unit = last[0] / first[0]
    best, found = torch.zeros_like(unit), (torch.zeros_like(unit), torch.zeros_like(unit))
    for blend in BLENDS:
        factor = unit * blend
        line = solve(tuple(b + factor * a for a, b in zip(first, last, strict=True)))  # type: ignore[arg-type]
        gain = explained(last, line)
        better = (gain > best) & (explained(first, line) >= room)
        best = torch.where(better, gain, best)
        found = torch.where(better, line[0], found[0]), torch.where(better, line[1], found[1])
    return best, found


def refine_affine(
    x: Tensor, weights: Weights, max_code: int, line: Line, shifts: Sequence[tuple[float, float]]
) -> Line:
    """A stored line whose error with the nearest codes is at most that of `line`, under each of the weights.

    A candidate (a, b) of `shifts` sends the smallest weight to a and the largest to max_code + b, both less than a half
    away, so that no code is out of range. The codes nearest to `line` are a candidate as well.
    """
    errors = affine_errors(x, weights, max_code, line)
    base, high = extent(x)
    y = x - base
    totals = [(ordered_sum(torch.ones_like(y) if w is None else w), ordered_sum(weighed(w, y))) for w in weights]
    room = ordered_sum(weighed(weights[0], y) * y) - errors[0] if len(weights) == 2 else None

    def fit(q: Tensor) -> tuple[Tensor, Line]:
        of_metric = []
        for w, total in zip(weights, totals, strict=True):
            wq = weighed(w, q)
            of_metric.append((*total, ordered_sum(wq), ordered_sum(wq * q), ordered_sum(wq * y)))
        return fit_affine(of_metric, room)

    best, found = fit(rint((x - line[1]) * reciprocal(line[0])).clamp(0, max_code))
    inverse = reciprocal(high - base)
    for a, b in shifts:
        levels = constant(max_code) + constant(b) - constant(a)
        gain, candidate = fit(rint(y * (inverse * levels) + constant(a)))
        better = gain > best
        best = torch.where(better, gain, best)
        found = torch.where(better, candidate[0], found[0]), torch.where(better, candidate[1], found[1])
    stored = half(found[0]), half(base + found[1])
    new = affine_errors(x, weights, max_code, stored)
    better = new[-1] < errors[-1]
    if room is not None:
        better &= new[0] <= errors[0]
    return torch.where(better, stored[0], line[0]), torch.where(better, stored[1], line[1])
