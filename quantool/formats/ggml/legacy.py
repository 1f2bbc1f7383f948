"""Q4_0, Q4_1, Q5_0, Q5_1, Q8_0: blocks of 32 weights with a float16 step d, and a float16 minimum m in Q4_1 and Q5_1.

    Q4_0   d | qs[16]              W = d (code - 8)          18 bytes
    Q4_1   d | m | qs[16]          W = d code + m            20 bytes
    Q5_0   d | qh[4] | qs[16]      W = d (code - 16)         22 bytes
    Q5_1   d | m | qh[4] | qs[16]  W = d code + m            24 bytes
    Q8_0   d | int8[32]            W = d (code - 128)        34 bytes, the byte is code - 128

    byte j of qs:  low 4 bits of code[j] | low 4 bits of code[j + 16] << 4
    bit i of qh (little endian):  bit 4 of code[i]

The default search is in line_search.py; in Q8_0 it stays within -127 to 127, as ggml does, since kernels may negate.

Codes that exist already, from GPTQ say, are moved in by `from_affine` and out by `to_affine`, without a new rounding.

Source: ggml-common.h and ggml-quants.c of https://github.com/ggml-org/ggml (quantize_row_q4_0_ref, ..._q4_0_impl)
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from quantool.formats.ggml import line_search as search
from quantool.formats.ggml.block import Grid
from quantool.kernels import ggml as compiled
from quantool.quant import QuantizedTensor, row_pieces
from quantool.scheme import QuantScheme

__all__ = ["LEGACY", "LegacyType", "Repacked", "from_affine", "to_affine", "why_not_affine"]

BLOCK = 32
NIBBLES = 16


@dataclass(frozen=True, slots=True)
class LegacyType:
    """One of the five. Symmetric types have a zero and candidates `tops`, the others a minimum and `shifts`."""

    name: str
    bits: int
    zero: int
    tops: tuple[float, ...] = ()  # levels to which the largest weight is sent
    shifts: tuple[tuple[float, float], ...] = ()  # and for the others the smallest and the largest
    weighted_tops: tuple[float, ...] = ()
    weighted_shifts: tuple[tuple[float, float], ...] = ()
    block_size: int = BLOCK
    group_size: int = BLOCK
    levels: None = None

    @property
    def affine(self) -> bool:
        return bool(self.shifts)

    @property
    def max_code(self) -> int:
        return (1 << self.bits) - 1

    @property
    def block_bytes(self) -> int:
        return 2 + 2 * self.affine + self.bits * BLOCK // 8

    def quantize(self, weight: Tensor, importance: Tensor | None = None, *, exact: bool = False) -> Tensor:
        """Blocks uint8 [N, bytes] of W float32 [N, K]; `importance` float32 [K] weighs the error of each column.

        `exact` gives ggml's own bytes; without it the weighted error is no larger, and mostly smaller.
        """
        row_bytes = weight.shape[1] // BLOCK * self.block_bytes
        blocks = compiled.quantize(self.name, weight, importance, row_bytes, exact=exact)
        return quantize_reference(self, weight, importance, exact=exact) if blocks is None else blocks

    def unpack(self, data: Tensor) -> tuple[Grid, Tensor]:
        """The grid and the codes uint8 [N, K] of blocks uint8 [N, bytes]."""
        rows = data.shape[0]
        blocks = data.view(rows, -1, self.block_bytes)
        d = _halves(blocks[..., :2])
        head = 4 if self.affine else 2
        grid = Grid(d.float(), None, {"d": d})
        if self.affine:
            m = _halves(blocks[..., 2:4])
            grid = Grid(d.float(), -m.float(), {"d": d, "m": m})
        if self.bits == 8:
            return grid, (blocks[..., head:] ^ 128).reshape(rows, -1)
        low = blocks[..., -NIBBLES:]
        codes = torch.cat([low & 15, low >> 4], -1)
        if self.bits == 5:
            places = torch.arange(8, dtype=torch.uint8, device=data.device)
            codes |= (blocks[..., head : head + 4].unsqueeze(-1) >> places & 1).flatten(-2) << 4
        return grid, codes.reshape(rows, -1)

    def pack(self, grid: Grid, codes: Tensor) -> Tensor:
        """Blocks uint8 [N, bytes] of a grid's `fields` and codes uint8 [N, K]: the inverse of `unpack`."""
        rows = codes.shape[0]
        codes = codes.view(rows, -1, BLOCK)
        parts = [_bytes(grid.fields["d"])]
        if self.affine:
            parts.append(_bytes(grid.fields["m"]))
        if self.bits == 8:
            parts.append(codes ^ 128)
        else:
            if self.bits == 5:
                places = torch.arange(8, dtype=torch.uint8, device=codes.device)
                parts.append(((codes >> 4).unflatten(-1, (4, 8)) << places).sum(-1, dtype=torch.uint8))
            parts.append(codes[..., :NIBBLES] & 15 | codes[..., NIBBLES:] << 4)
        return torch.cat(parts, -1).view(rows, -1)


def _halves(data: Tensor) -> Tensor:
    """float16 [N, B] of their bytes [N, B, 2]."""
    return data.contiguous().view(torch.float16).squeeze(-1)


def _bytes(halves: Tensor) -> Tensor:
    return halves.contiguous().unsqueeze(-1).view(torch.uint8)


Found = tuple[Tensor, Tensor | None, Tensor]
"""d and m [B] as float32, and the codes [32, B]."""


def quantize_reference(kind: LegacyType, weight: Tensor, importance: Tensor | None, *, exact: bool) -> Tensor:
    """What `kind.quantize` gives, in torch: the oracle of csrc/ggml_legacy.h."""
    importance = None if importance is None else importance.cpu()
    pieces = row_pieces(weight.to("cpu", torch.float32))
    blocks = torch.cat([_quantize_rows(kind, piece, importance, exact=exact) for piece in pieces])
    return blocks.to(weight.device)


def _quantize_rows(kind: LegacyType, weight: Tensor, importance: Tensor | None, *, exact: bool) -> Tensor:
    rows = weight.shape[0]
    x = search.blocks_of(weight)
    users = None if importance is None else search.columns_of(importance, weight, BLOCK, exact=exact)
    objective = None
    if users is not None and kind.bits < 8:
        objective = search.objective_of(weight, x, users, exact=exact)
    d, m, codes = _ggml(kind, x, objective)
    if not exact:
        d, m, codes = _better(kind, x, (d, m), [users] if objective is None else [users, objective])
    fields = {"d": d.to(torch.float16).view(rows, -1)}
    if m is not None:
        fields["m"] = m.to(torch.float16).view(rows, -1)
    stored = codes.to(torch.uint8).T.reshape(rows, -1)
    return kind.pack(Grid(fields["d"].float(), None, fields), stored)


def _ggml(kind: LegacyType, x: Tensor, objective: Tensor | None) -> Found:
    """ggml's own d, m and codes."""
    if objective is not None:
        if not kind.affine:
            scale, codes = search.make_qx(x, objective, kind.zero)
            return scale, None, codes
        return search.make_qkx3(x, objective, kind.max_code)
    zero, one = search.constant(0.0), search.constant(1.0)
    low, high = search.extent(x)
    if kind.affine:
        d = (high - low) / search.constant(kind.max_code)
    elif kind.bits == 8:
        d = x.abs().amax(0) / search.constant(127.0)
    else:
        d = search.signed_max(x) / search.constant(-kind.zero)
    inverse = torch.where(d == 0, zero, one / d)
    usable = inverse.abs() < torch.inf  # beyond it, and for NaN, C's conversion to an integer gives 0
    inverse = torch.where(usable, inverse, zero)
    if kind.affine:
        value = (x - low) * inverse + search.constant(0.5)
        return d, low, value.nan_to_num(0.0).trunc().clamp(0, kind.max_code)
    if kind.bits == 8:
        value = x * inverse  # half away from zero: the number before 0.5 is added, with the sign
        return d, None, (value + search.constant(0.49999997).copysign(value)).trunc() + kind.zero
    shift = torch.where(usable, search.constant(kind.zero + 0.5), zero)
    return d, None, (x * inverse + shift).trunc().clamp(max=kind.max_code)


def _better(kind: LegacyType, x: Tensor, found: tuple[Tensor, Tensor | None], weights: list[Tensor | None]) -> Found:
    """d and m as stored and the codes nearest to their line: no worse than `found`."""
    d, m = found
    plain = weights[-1] is None
    if m is not None:
        usable = d.isfinite() & m.isfinite()
        shifts = kind.shifts if plain else kind.weighted_shifts
        low, high = search.extent(x)
        d = torch.where(usable, d, (high - low) / search.constant(kind.max_code))
        line = search.half(d), search.half(torch.where(usable, m, low))
        d, m = search.refine_affine(x, weights, kind.max_code, line, shifts)
        return d, m, search.rint((x - m) * search.reciprocal(d)).clamp(0, kind.max_code)
    tops = kind.tops if plain else kind.weighted_tops
    level = search.symmetric(-127 if kind.bits == 8 else -kind.zero, kind.max_code - kind.zero)
    top = search.signed_max(x) if kind.bits < 8 else x.abs().amax(0)
    start = search.half(torch.where(d.isnan(), top / search.constant(-kind.zero), d))
    d = search.refine(x, weights, level, start, largest=top, tops=tops, rounds=len(weights))
    return d, None, level(x * search.reciprocal(d)) + kind.zero


# Where the largest weight is sent, or the smallest and the largest: picked greedily out of a fine grid, on Gaussian and
# on real rows. With importance ggml searches itself, slowly, and there is time for more.
TOPS_4 = (-8.2, -7.2, -8.6, -7.8)
TOPS_5 = (-16.2, -15.2, -15.8, -16.6, -14.2, -14.8)
TOPS_8 = (127.0, 125.0, 125.8, 123.0, 124.2, 121.0, 122.2, 120.2)
WEIGHTED_TOPS_4 = (
    *(-9.0, -8.8, -8.6, -8.4, -8.2, -8.0, -7.8, -7.6, -7.4, -7.2),
    *(-6.9, -6.6, -6.2, 6.2, 6.6, 6.8, 7.0, 7.2, 7.4, 7.8),
)
WEIGHTED_TOPS_5 = (
    *(-17.0, -16.6, -16.4, -16.2, -16.0, -15.8, -15.5, -15.2, -14.8, -14.2),
    *(-13.8, -13.0, 13.0, 13.6, 14.0, 14.3, 14.6, 14.9, 15.2, 15.6),
)
SHIFTS_4 = ((0.15, 0.45), (-0.45, -0.15))
SHIFTS_5 = ((0.15, 0.3), (-0.45, -0.15))
ENDS = (-0.45, -0.15, 0.15, 0.45)
WEIGHTED_SHIFTS = tuple((a, b) for a in ENDS for b in ENDS)

LEGACY = (
    LegacyType("Q4_0", 4, 8, tops=TOPS_4, weighted_tops=WEIGHTED_TOPS_4),
    LegacyType("Q4_1", 4, 0, shifts=SHIFTS_4, weighted_shifts=WEIGHTED_SHIFTS),
    LegacyType("Q5_0", 5, 16, tops=TOPS_5, weighted_tops=WEIGHTED_TOPS_5),
    LegacyType("Q5_1", 5, 0, shifts=SHIFTS_5, weighted_shifts=WEIGHTED_SHIFTS),
    LegacyType("Q8_0", 8, 128, tops=TOPS_8, weighted_tops=TOPS_8),
)


# --- codes that exist already ----------------------------------------------------------------------------------------

AFFINE_TYPES = {(4, True): "Q4_0", (4, False): "Q4_1", (5, True): "Q5_0", (5, False): "Q5_1", (8, True): "Q8_0"}
BY_NAME = {kind.name: kind for kind in LEGACY}


class Repacked(NamedTuple):
    """Blocks that hold given codes; `exact` says whether the weights are the same too, or m was rounded to float16."""

    type: str  # "Q4_0"
    blocks: Tensor  # uint8 [N, bytes]
    exact: bool


def from_affine(q: QuantizedTensor) -> Repacked | None:
    """The codes and scales of q as they are, in the type that holds them; None where `why_not_affine` has a reason."""
    if why_not_affine(q) is not None:
        return None
    columns = q.codes.shape[1]
    kind = BY_NAME[AFFINE_TYPES[q.scheme.bits, q.scheme.sym]]
    repeats = columns // q.scales.shape[1] // BLOCK
    d = q.scales.to(torch.float16)
    fields = {"d": d.repeat_interleave(repeats, 1)}
    exact = True
    if q.zeros is not None:
        low = -d.float() * q.zeros
        m = low.to(torch.float16)
        exact = torch.equal(m.float(), low)
        fields["m"] = m.repeat_interleave(repeats, 1)
    return Repacked(kind.name, kind.pack(Grid(fields["d"].float(), None, fields), q.codes), exact)


def why_not_affine(q: QuantizedTensor) -> str | None:
    """Why no legacy type can hold the codes of q, in a few words; None when one can."""
    scheme, (_, columns) = q.scheme, q.codes.shape
    if scheme.flat or (scheme.bits, scheme.sym) not in AFFINE_TYPES:
        return f"GGUF has no blocks for {scheme}"
    if q.g_idx is not None:
        return "columns are in groups out of order (act-order)"
    width = columns // q.scales.shape[1]
    if width % BLOCK:
        return f"groups of {width} columns are no multiple of {BLOCK}"
    scales = q.scales.float()
    if not torch.equal(scales.to(torch.float16).float(), scales):
        return f"scales ({str(q.scales.dtype).removeprefix('torch.')}) are not exact in float16"
    if q.zeros is not None and not bool((scales * q.zeros).abs().le(search.HALF_MAX).all()):
        return "scale * zero point is out of float16's range"
    return None


def to_affine(name: str, data: Tensor) -> QuantizedTensor | None:
    """Blocks uint8 [N, bytes] of a symmetric type as codes and float16 scales in groups of 32; None for other types.

    The values are the same bit for bit. Steps may be negative, as ggml's are.
    """
    kind = BY_NAME.get(name)
    if kind is None or kind.affine:
        return None
    grid, codes = kind.unpack(data)
    scales = grid.fields["d"]
    if not bool(scales.isfinite().all()):
        return None
    return QuantizedTensor(codes, scales, None, QuantScheme(bits=kind.bits, group_size=BLOCK, sym=True))
