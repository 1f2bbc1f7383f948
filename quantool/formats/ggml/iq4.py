"""IQ4_NL and IQ4_XS: 4-bit codes that stand for 16 levels, denser near 0, where weights are; groups of 32.

    IQ4_NL   d | qs[16]                                       W = d LEVELS[code]                  18 bytes, 32 weights
    IQ4_XS   d | scales_h[2] | scales_l[4] | qs[8][16]        W = d scale[g] LEVELS[code]        136 bytes, 256 weights

    byte j of qs:  code[j] | code[j + 16] << 4, of each group of 32
    scale[g] + 32, 6 bits:  4 in nibble g of scales_l, 2 in bits 2g and 2g + 1 of scales_h (little endian)

ggml fits d to each group, minimising sum w (x - d level)^2 with w = x^2, or importance * sqrt(2 mean(x^2) + x^2), over
15 places of the largest weight near level -127. The levels are not symmetric: the other sign of d is a second chance,
which the default search takes (line_search.py). In IQ4_XS it finds the best step of either sign for each group, tries
several d, such that the largest scale is some other integer, and takes for each group the sign whose rounded step has
less of

    e_user / E_user + blend * e_ggml / E_ggml        E: errors of the super-block that ggml makes

Of the super-blocks so found whose two errors are at most E, the one of least e_user is kept.

Source: ggml-common.h and ggml-quants.c of https://github.com/ggml-org/ggml (quantize_row_iq4_nl_impl)
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quantool.formats.ggml import line_search as search
from quantool.formats.ggml.block import Grid
from quantool.kernels import ggml as compiled
from quantool.quant import row_pieces

__all__ = ["IQ4_NL", "IQ4_XS", "LEVELS"]

LEVELS = (-127.0, -104.0, -83.0, -65.0, -49.0, -35.0, -22.0, -10.0, 1.0, 13.0, 25.0, 38.0, 53.0, 69.0, 89.0, 113.0)
GROUP = 32
NIBBLES = 16
TRIES = 7

NEGATIVE_TOPS = tuple(-141.0 + 4 * i for i in range(9))  # levels to which the largest weight is sent
POSITIVE_TOPS = tuple(93.0 + 4 * i for i in range(9))
DIVISORS = (-32.0, -31.0, -30.0, -29.0, -28.0, 31.0, 30.0, 29.0, 28.0)  # integers that the largest scale becomes
BLEND = 0.5


@dataclass(frozen=True, slots=True)
class Iq4Type:
    """One of the two."""

    name: str
    block_size: int
    block_bytes: int
    group_size: int = GROUP
    max_code: int = 15
    zero: int = 0
    levels: tuple[float, ...] = LEVELS

    def quantize(self, weight: Tensor, importance: Tensor | None = None, *, exact: bool = False) -> Tensor:
        """Blocks uint8 [N, bytes] of W float32 [N, K]; `importance` float32 [K] weighs the error of each column.

        `exact` gives ggml's own bytes, but for blocks where those hold NaN: no importance at all, or sums past float32;
        without it the weighted error is no larger, and mostly smaller.
        """
        row_bytes = weight.shape[1] // self.block_size * self.block_bytes
        blocks = compiled.quantize(self.name, weight, importance, row_bytes, exact=exact)
        return quantize_reference(self, weight, importance, exact=exact) if blocks is None else blocks

    def unpack(self, data: Tensor) -> tuple[Grid, Tensor]:
        """The grid and the codes uint8 [N, K] of blocks uint8 [N, bytes]."""
        rows = data.shape[0]
        blocks = data.view(rows, -1, self.block_bytes)
        d = blocks[..., :2].contiguous().view(torch.float16).squeeze(-1)
        packed = blocks[..., -self.block_size // 2 :].reshape(rows, -1, NIBBLES)
        codes = torch.cat([packed & 15, packed >> 4], -1).view(rows, -1)
        if self.block_size == GROUP:
            return Grid(d.float(), None, {"d": d}), codes
        pairs, nibbles = (torch.arange(0, 8, bits, dtype=torch.uint8, device=data.device) for bits in (2, 4))
        high = blocks[..., 2:4].unsqueeze(-1) >> pairs & 3
        low = blocks[..., 4:8].unsqueeze(-1) >> nibbles & 15
        scales = (high.flatten(-2) << 4 | low.flatten(-2)).to(torch.int8).sub_(32).view(rows, -1)
        step = d.float().repeat_interleave(8, 1) * scales
        return Grid(step, None, {"d": d, "scales": scales}), codes

    def pack(self, grid: Grid, codes: Tensor) -> Tensor:
        """Blocks uint8 [N, bytes] of a grid's `fields` and codes uint8 [N, K]: the inverse of `unpack`."""
        rows = codes.shape[0]
        grouped = codes.view(rows, -1, GROUP)
        nibbles = grouped[..., :NIBBLES] | grouped[..., NIBBLES:] << 4
        d = grid.fields["d"].contiguous().unsqueeze(-1).view(torch.uint8)
        parts = [d, nibbles.view(rows, d.shape[1], -1)]
        if self.block_size != GROUP:
            scales = grid.fields["scales"].add(32).to(torch.uint8).view(rows, -1, 8)
            places = torch.arange(0, 8, 2, dtype=torch.uint8, device=codes.device)
            high = ((scales >> 4).unflatten(-1, (2, 4)) << places).sum(-1, dtype=torch.uint8)
            parts[1:1] = [high, scales[..., ::2] & 15 | (scales[..., 1::2] & 15) << 4]
        return torch.cat(parts, -1).view(rows, -1)


IQ4_NL = Iq4Type("IQ4_NL", GROUP, 18)
IQ4_XS = Iq4Type("IQ4_XS", 256, 136)


# --- the search, in torch: the oracle of csrc/ggml_iq4.h -------------------------------------------------------------


def nearest_code(value: Tensor) -> Tensor:
    """The index of the level nearest to each value; the upper one of two that are equally near."""
    levels = torch.tensor(LEVELS)
    return torch.bucketize(value, (levels[1:] + levels[:-1]) / 2, right=True)


def nearest_level(value: Tensor) -> Tensor:
    return torch.tensor(LEVELS)[nearest_code(value)]


def quantize_reference(kind: Iq4Type, weight: Tensor, importance: Tensor | None, *, exact: bool) -> Tensor:
    """What `kind.quantize` gives, in torch."""
    importance = None if importance is None else importance.cpu()
    pieces = row_pieces(weight.to("cpu", torch.float32))
    blocks = torch.cat([_quantize_rows(kind, piece, importance, exact=exact) for piece in pieces])
    return blocks.to(weight.device)


def _quantize_rows(kind: Iq4Type, weight: Tensor, importance: Tensor | None, *, exact: bool) -> Tensor:
    """Blocks (super-blocks) are columns here: x is [G, 32, B]."""
    rows, groups = weight.shape[0], kind.block_size // GROUP
    x = weight.reshape(-1, groups, GROUP).permute(1, 2, 0).contiguous()
    users = None
    objective = x * x
    if importance is not None:
        users = search.columns_of(importance, weight, kind.block_size, exact=exact)
        users = users.view(GROUP, -1, groups).permute(2, 0, 1).contiguous()
        square = search.ordered_sum((x * x).flatten(0, 1)) * search.constant(2 / kind.block_size) + x * x
        objective = users * search.sqrt(square if exact else square.clamp(max=search.HUGE))
    scales = torch.stack([fit_scale(*pair) for pair in zip(x, objective, strict=True)])
    if groups == 1:
        d, codes = _plain_block(x[0], objective[0], users, scales[0], exact=exact)
        fields = {"d": d.to(torch.float16).view(rows, -1)}
    else:
        d, integers, codes = _super_block(x, objective, users, scales, exact=exact)
        stored = integers.T.reshape(rows, -1).to(torch.int8)
        fields = {"d": d.to(torch.float16).view(rows, -1), "scales": stored}
    codes = codes.permute(2, 0, 1).reshape(rows, -1).to(torch.uint8)
    return kind.pack(Grid(fields["d"].float(), None, fields), codes)


def fit_scale(x: Tensor, objective: Tensor) -> Tensor:
    """ggml's scale of least error under `objective` of blocks x [32, B]; NaN where it has no weight."""
    top = search.signed_max(x)

    def fit(inverse: Tensor) -> tuple[Tensor, Tensor]:
        q = nearest_level(inverse * x)
        wq = objective * q
        return search.ordered_sum(wq * x), search.ordered_sum(wq * q)

    a, b = fit(torch.div(search.constant(1.0), -top / search.constant(LEVELS[0])))
    scale = a / b
    best = scale * a
    for i in range(-TRIES, TRIES + 1):
        a, b = fit(search.constant(i + LEVELS[0]) / top)
        better = (b > 0) & (a * a > best * b)
        scale = torch.where(better, a / b, scale)
        best = torch.where(better, scale * a, best)
    return torch.where(top.abs() < search.GROUP_MAX_EPS, search.constant(0.0), scale)


def _plain_block(
    x: Tensor, objective: Tensor, users: Tensor | None, scale: Tensor, *, exact: bool
) -> tuple[Tensor, Tensor]:
    scale = torch.where(scale.isnan(), search.constant(0.0), scale)
    if not exact:
        weights = [objective, None] if users is None else [users[0], objective]
        tops = NEGATIVE_TOPS + POSITIVE_TOPS
        scale = search.half(scale)
        scale = search.refine(x, weights, nearest_level, scale, largest=search.signed_max(x), tops=tops, rounds=2)
    return scale, nearest_code(x * search.reciprocal(scale)).unsqueeze(0)


def _super_block(
    x: Tensor, objective: Tensor, users: Tensor | None, scales: Tensor, *, exact: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """d [B], integer scales [8, B] and codes [8, 32, B]."""
    largest, chosen = torch.zeros_like(scales[0]), torch.zeros_like(scales[0])
    for scale in scales:
        larger = scale.abs() > largest
        largest = torch.where(larger, scale.abs(), largest)
        chosen = torch.where(larger, scale, chosen)
    d = -chosen / search.constant(32.0)
    integers = search.nearest(search.reciprocal(d) * scales).clamp(-32, 31)
    if not exact:
        d, integers = improve(x, [objective, users], search.half(d), integers, chosen)
    return d, integers, nearest_code(x * search.reciprocal(d * integers).unsqueeze(1))


Weights = Sequence[Tensor | None]


def improve(x: Tensor, weights: Weights, d: Tensor, integers: Tensor, largest: Tensor) -> tuple[Tensor, Tensor]:
    """d [B] as stored and integer scales [8, B], with two errors that are at most those of the ones given."""
    limits = super_errors(x, weights, d, integers)
    objective, users = (torch.ones_like(x) if weight is None else weight for weight in weights)
    weight = objective * (search.reciprocal(limits[0]) * BLEND) + users * search.reciprocal(limits[1])
    steps = [best_steps(x, weight, tops) for tops in (NEGATIVE_TOPS, POSITIVE_TOPS)]
    best = limits[1]
    found = d, integers
    for divisor in DIVISORS:
        new_d = search.half(largest / search.constant(divisor))
        new_integers = nearest_integers(x, weight, new_d, steps)
        for refitted in (False, True):
            if refitted:
                new_d = refit(x, weight, new_d, new_integers)
            errors = super_errors(x, weights, new_d, new_integers)
            better = (errors[0] <= limits[0]) & (errors[1] < best)
            best = torch.where(better, errors[1], best)
            found = torch.where(better, new_d, found[0]), torch.where(better, new_integers, found[1])
    return found


def super_errors(x: Tensor, weights: Weights, d: Tensor, integers: Tensor) -> list[Tensor]:
    """The errors [B] of super-blocks under each of the weights, codes the nearest."""
    sums = [torch.zeros_like(d) for _ in weights]
    for g, step in enumerate(d * integers):
        of_group = [None if weight is None else weight[g] for weight in weights]
        errors = search.line_errors(x[g], of_group, nearest_level, step)
        sums = [total + error for total, error in zip(sums, errors, strict=True)]
    return sums


def best_steps(x: Tensor, weight: Tensor, tops: Sequence[float]) -> list[Tensor]:
    """The step of most gain of each group, with the largest weight near one of `tops`."""
    steps = []
    for xg, wg in zip(x, weight, strict=True):
        inverse = search.reciprocal(search.signed_max(xg))
        best, found = torch.zeros_like(inverse), torch.zeros_like(inverse)
        for top in tops:
            step, gain = search.fit_step(xg, [wg], nearest_level(xg * (inverse * top)), [], None)
            better = gain > best
            best, found = torch.where(better, gain, best), torch.where(better, step, found)
        steps.append(found)
    return steps


def nearest_integers(x: Tensor, weight: Tensor, d: Tensor, steps: Sequence[Sequence[Tensor]]) -> Tensor:
    """For each group the integer [8, B] of least error among those nearest to its steps, of either sign."""
    inverse = search.reciprocal(d)
    integers = []
    for xg, wg, *of_group in zip(x, weight, *steps, strict=True):
        best, found = torch.full_like(d, torch.inf), torch.zeros_like(d)
        for step in of_group:
            integer = search.rint(step * inverse).clamp(-32, 31)
            [error] = search.line_errors(xg, [wg], nearest_level, d * integer)
            better = error < best
            best, found = torch.where(better, error, best), torch.where(better, integer, found)
        integers.append(found)
    return torch.stack(integers)


def refit(x: Tensor, weight: Tensor, d: Tensor, integers: Tensor) -> Tensor:
    """The best d for these integers and the codes that go with them, as stored."""
    a, b = torch.zeros_like(d), torch.zeros_like(d)
    for xg, wg, integer in zip(x, weight, integers, strict=True):
        q = nearest_level(xg * search.reciprocal(d * integer))
        wq = wg * q
        a += integer * search.ordered_sum(wq * xg)
        b += integer * (integer * search.ordered_sum(wq * q))
    return search.half(a * search.reciprocal(b))
