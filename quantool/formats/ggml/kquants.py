"""The K-quants of ggml: 256 weights to a block, whose groups have integer scales (and mins) on top of d (and dmin).

    W ~ d * scales[g] * code - dmin * mins[g]      Q2_K (groups of 16), Q4_K, Q5_K (groups of 32)
    W ~ d * scales[g] * (code - zero)              Q3_K, Q6_K (groups of 16)

                                                                           bytes
    Q2_K   scales and mins 16 (low, high nibble) | codes 64 | d | dmin        84    2.625 bits per weight
    Q3_K   top bits 32 | low two bits 64 | scales 12 | d                     110    3.4375
    Q4_K   d | dmin | scales and mins 12 | codes 128                         144    4.5
    Q5_K   d | dmin | scales and mins 12 | top bits 32 | low nibbles 128     176    5.5
    Q6_K   low nibbles 128 | top two bits 64 | scales 16 (int8) | d          210    6.5625

d and dmin are float16. Codes that share a byte stand 32 weights apart, the first in the lowest bits:

    byte k of 64:   code k | code k + 32 << 2 | code k + 64 << 4 | code k + 96 << 6

and likewise for one or four bits; Q6_K's nibbles stand 64 apart. Q4_K and Q5_K store six bits of eight scales and mins:

    byte j, 4 + j   scale j, min j in the low six bits; above them the top two of scale 4 + j, min 4 + j      j = 0..3
    byte 8 + j      the low nibbles of scale 4 + j and min 4 + j

Q3_K stores six bits of sixteen scales plus 32: low nibbles in byte j and, of scale 8 + j, in its upper half (j = 0..7);
top two bits of scale j + 4 p at bit 2 p of byte 8 + j.

The search is ggml's: a float scale (and min) for each group, the integers from those, and then the codes on the grid as
it is stored. The default goes on from there (kquants_refine.py). Both are compiled (kernels/csrc/kquants.cpp); what
stands here is their oracle, equal bit for bit, and what runs without a compiler.

Source: ggml-common.h and ggml-quants.c of https://github.com/ggml-org/ggml
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from quantool.formats.ggml import kquants_search as search
from quantool.formats.ggml.block import Grid
from quantool.formats.ggml.kquants_refine import Shape, Stored, Tile, finite_half, refine
from quantool.formats.ggml.kquants_search import Affine, Steps, group, nearest, over, square_root, total
from quantool.kernels import ggml

BLOCK = 256
CHUNK = 1024  # blocks searched at a time: a megabyte of weights
WEIGHTED_STEPS = Steps(-0.9, 0.05, 36)


@dataclass(frozen=True, slots=True)
class KQuant:
    """One of the K-quants; see BlockType."""

    name: str
    block_bytes: int
    max_code: int
    zero: int
    shape: Shape
    steps: Steps | None  # of the search without importance; None for Q3_K and Q6_K
    pack_block: Callable[[Stored, Tensor], Tensor]
    unpack_block: Callable[[Tensor], tuple[Stored, Tensor]]
    block_size: int = BLOCK
    levels: tuple[float, ...] | None = None

    @property
    def group_size(self) -> int:
        return self.shape.count

    def quantize(self, weight: Tensor, importance: Tensor | None = None, *, exact: bool = False) -> Tensor:
        """Blocks uint8 [N, bytes] of W float32 [N, K]; `importance` float32 [K] weighs the error of each column."""
        row_bytes = weight.shape[1] // BLOCK * self.block_bytes
        blocks = ggml.quantize(self.name, weight, importance, row_bytes, exact=exact)
        if blocks is None:
            blocks = self.reference(weight, importance, exact=exact)
        return blocks

    def reference(self, weight: Tensor, importance: Tensor | None = None, *, exact: bool = False) -> Tensor:
        """`quantize` in torch alone."""
        x = weight.to("cpu", torch.float32).reshape(-1, BLOCK)
        if importance is not None:
            importance = importance.to("cpu", torch.float32).expand(weight.shape).reshape(-1, BLOCK)
        blocks = [torch.empty(0, self.block_bytes, dtype=torch.uint8)]
        for start in range(0, len(x), CHUNK):
            rows = slice(start, start + CHUNK)
            weighing = None if importance is None else self._tiled(importance[rows])
            stored, codes = _quantize(self._tiled(x[rows]), weighing, self, exact)
            flat = codes.add(self.zero).to(torch.uint8).flatten(0, 1).T.contiguous()
            blocks.append(self.pack_block(stored, flat))
        row_bytes = weight.shape[1] // BLOCK * self.block_bytes
        return torch.cat(blocks).view(weight.shape[0], row_bytes).to(weight.device)

    def _tiled(self, rows: Tensor) -> Tensor:
        """[B, 256] as the search has it: [G, count, B]."""
        return rows.T.reshape(-1, self.group_size, len(rows)).contiguous()

    def unpack(self, data: Tensor) -> tuple[Grid, Tensor]:
        """The grid and the codes uint8 [N, K] of blocks uint8 [N, bytes]."""
        rows = data.shape[0]
        stored, codes = self.unpack_block(data.reshape(-1, self.block_bytes))
        fields = {"d": stored.d.half().view(rows, -1), "scales": stored.scales.T.reshape(rows, -1).to(torch.int8)}
        step = (stored.d * stored.scales).T.reshape(rows, -1)
        if self.shape.signed:
            return Grid(step, None, fields), codes.view(rows, -1)
        fields["dmin"] = stored.dmin.half().view(rows, -1)
        fields["mins"] = stored.mins.T.reshape(rows, -1).to(torch.int8)
        return Grid(step, (stored.dmin * stored.mins).T.reshape(rows, -1), fields), codes.view(rows, -1)

    def pack(self, grid: Grid, codes: Tensor) -> Tensor:
        """Blocks uint8 [N, bytes] of a grid's `fields` and codes uint8 [N, K]: the inverse of `unpack`."""
        fields = {name: value.float().view(-1) for name, value in grid.fields.items()}
        d, scales = fields["d"], fields["scales"].view(-1, BLOCK // self.group_size).T
        dmin = fields.get("dmin", torch.zeros_like(d))
        mins = fields["mins"].view(-1, BLOCK // self.group_size).T if "mins" in fields else torch.zeros_like(scales)
        return self.pack_block(Stored(d, dmin, scales, mins), codes.view(-1, BLOCK)).view(codes.shape[0], -1)


@dataclass(frozen=True, slots=True)
class Found:
    """ggml's grid and codes [G, count, B]; `start` of the default search leaves out its mishap with negative scales."""

    stored: Stored
    codes: Tensor
    start: Stored


def _quantize(x: Tensor, importance: Tensor | None, kind: KQuant, exact: bool) -> tuple[Stored, Tensor]:
    """What blocks [G, count, B] store, and their codes."""
    weight = _weights(x, importance, kind)
    quantize = _quantize_signed if kind.shape.signed else _quantize_affine
    found = quantize(x, weight, kind, importance is not None, exact)
    if exact:
        return found.stored, found.codes
    return refine(Tile(x, weight, importance), found.stored, found.codes, kind.shape, start=found.start)


def _weights(x: Tensor, importance: Tensor | None, kind: KQuant) -> Tensor:
    """ggml's weights of the errors. sigma^2 is the mean square of the block, twice it in Q3_K, Q4_K, Q5_K."""
    shape = kind.shape
    if importance is None and shape.signed:
        return x * x
    if importance is None:
        mean = torch.zeros_like(x[:, 0]) if shape.absolute else square_root(total(x * x) / shape.count)
        return group(mean) + x.abs()
    if kind.name == "Q6_K":
        return importance
    variance = (1 if shape.absolute else 2) * total((x * x).flatten(0, 1)) / BLOCK
    return importance * square_root(variance + x * x)


def _store(value: Tensor, exact: bool) -> Tensor:
    """float16, where ggml overflows to infinity and a finite number serves better."""
    return value.half().float() if exact else finite_half(value)


def _quantize_affine(x: Tensor, weight: Tensor, kind: KQuant, weighted: bool, exact: bool) -> Found:
    steps = WEIGHTED_STEPS if weighted or kind.steps is None else kind.steps
    absolute = kind.shape.absolute and not weighted
    found = search.search_affine(x, weight, max_code=kind.max_code, steps=steps, absolute=absolute)
    weights = total(weight) if weighted else None
    stored = _scale_groups(found.scale, found.min, weights, kind.shape, exact)
    codes = _affine_codes(x, stored, found, kind.max_code)
    negative = (found.scale < 0).any(0)
    if not negative.any():
        return Found(stored, codes, stored)
    positive = _scale_groups(found.scale.clamp(min=0), found.min, weights, kind.shape, exact)
    return Found(stored, codes, positive.choose(negative, stored))


def _scale_groups(scale: Tensor, low: Tensor, weights: Tensor | None, shape: Shape, exact: bool) -> Stored:
    """d, dmin and the integers for them; `weights` [G, B] with importance."""
    if weights is None:
        (d, scales), (dmin, mins) = (_scale_to_largest(part, shape.scales[1]) for part in (scale, low))
    else:
        (d, scales), (dmin, mins) = (
            search.search_positive(part, weights, max_code=shape.scales[1]) for part in (scale, low)
        )
    return Stored(_store(d, exact), _store(dmin, exact), scales, mins)


def _scale_to_largest(x: Tensor, max_code: int) -> tuple[Tensor, Tensor]:
    """x >= 0 over the largest as integers. ggml keeps them in a byte, which matters where 1 / max is infinite."""
    high = torch.where(x.amax(0) > 0, x.amax(0), 0)  # 0, not -0
    inverse = torch.where(high > 0, over(max_code, high), 0)
    return high / max_code, (nearest(inverse * x) & 255).clamp(max=max_code).float()


def _affine_codes(x: Tensor, stored: Stored, found: Affine, max_code: int) -> Tensor:
    """The codes on the stored grid; where a step is 0 they count for nothing, and ggml leaves those of the search."""
    step, offset = stored.d * stored.scales, stored.dmin * stored.mins
    codes = nearest((x + group(offset)) / group(step)).clamp(0, max_code).float()
    return torch.where(group(step) == 0, search.affine_codes(x, found.inverse, found.base, max_code), codes)


def _quantize_signed(x: Tensor, weight: Tensor, kind: KQuant, weighted: bool, exact: bool) -> Found:
    coarse, half, max_scale = kind.shape.coarse, kind.zero, -kind.shape.scales[0]
    if coarse and not weighted:
        found, codes = search.descend_signed(x, weight, half=half)
    else:
        found, inverse = search.search_signed(x, weight, half=half)
        codes = search.signed_codes(x, inverse, half)
    if coarse and weighted:
        d, inverse = search.search_signed(found, total(weight), half=max_scale)
        scales = search.signed_codes(found, inverse, max_scale)
    else:
        d, scales = _scale_to_signed_largest(found, kind.shape)
    none = _is_zero(found, coarse and not weighted)  # ggml leaves a bare block: stored zeros
    scales = torch.where(none, -max_scale if coarse else 0, scales)
    zeros = torch.zeros_like(d)
    stored = Stored(_store(d, exact), zeros, scales, torch.zeros_like(scales))
    step = group(stored.d * stored.scales)
    bare = group((x.abs().amax(1) < search.EPSILON) | (none & (not coarse)))
    rounded = nearest(x / step).clamp(-half, half - 1).float()
    return Found(stored, torch.where(step == 0, torch.where(bare, -half, codes), rounded), stored)


def _scale_to_signed_largest(x: Tensor, shape: Shape) -> tuple[Tensor, Tensor]:
    """The largest becomes the lowest integer, which has one more than the highest."""
    high = search.signed_max(x)
    inverse = over(shape.scales[0], high)
    scales = nearest(inverse * x).clamp(*shape.scales).float()
    return torch.where(_is_zero(x, shape.coarse), 0, over(1, inverse)), scales


def _is_zero(scales: Tensor, coarse: bool) -> Tensor:
    """Whether the scales leave nothing of a block: Q3_K without importance asks for zero itself."""
    high = search.signed_max(scales)
    return high == 0 if coarse else high.abs() < search.EPSILON


def _put_bits(codes: Tensor, bits: int, *, shift: int = 0, apart: int = 32) -> Tensor:
    """`bits` bits of codes uint8 [B, 256] from bit `shift` on, as bytes [B, 32 * bits]."""
    count = 8 // bits
    places = _places(bits, codes.device)
    parts = (codes.view(len(codes), -1, count, apart) >> shift & (1 << bits) - 1) << places
    return parts.sum(2, dtype=torch.uint8).flatten(1)


def _get_bits(data: Tensor, bits: int, *, apart: int = 32) -> Tensor:
    """The inverse of `_put_bits`: uint8 [B, 256] of bytes [B, 32 * bits]."""
    return (data.reshape(len(data), -1, 1, apart) >> _places(bits, data.device) & (1 << bits) - 1).flatten(1)


def _places(bits: int, device: torch.device) -> Tensor:
    """Where `bits` bits of several codes stand in a byte, as a column."""
    return torch.arange(0, 8, bits, dtype=torch.uint8, device=device).view(-1, 1)


def _put_half(value: Tensor) -> Tensor:
    """float16 values [B] as bytes [B, 2], little-endian."""
    return value.half().view(-1, 1).view(torch.uint8)


def _get_half(data: Tensor) -> Tensor:
    return data.contiguous().view(torch.float16).view(-1).float()


def _put_scales_and_mins(stored: Stored) -> Tensor:
    s, m = stored.scales.T.to(torch.uint8), stored.mins.T.to(torch.uint8)
    first = torch.cat([s[:, :4] | s[:, 4:] >> 4 << 6, m[:, :4] | m[:, 4:] >> 4 << 6], 1)
    return torch.cat([first, s[:, 4:] & 15 | (m[:, 4:] & 15) << 4], 1)


def _get_scales_and_mins(data: Tensor) -> tuple[Tensor, Tensor]:
    """Scales and mins [8, B] of bytes [B, 12]."""
    first, second, low = data[:, :4], data[:, 4:8], data[:, 8:]
    scales = torch.cat([first & 63, low & 15 | first >> 6 << 4], 1)
    mins = torch.cat([second & 63, low >> 4 | second >> 6 << 4], 1)
    return scales.T.float(), mins.T.float()


def _pack_q2_k(stored: Stored, codes: Tensor) -> Tensor:
    scales = stored.scales.T.to(torch.uint8) | stored.mins.T.to(torch.uint8) << 4
    return torch.cat([scales, _put_bits(codes, 2), _put_half(stored.d), _put_half(stored.dmin)], 1)


def _unpack_q2_k(data: Tensor) -> tuple[Stored, Tensor]:
    d, dmin = _get_half(data[:, 80:82]), _get_half(data[:, 82:84])
    scales = data[:, :16]
    return Stored(d, dmin, (scales & 15).T.float(), (scales >> 4).T.float()), _get_bits(data[:, 16:80], 2)


def _pack_q3_k(stored: Stored, codes: Tensor) -> Tensor:
    scales = (stored.scales.T + 32).to(torch.uint8)
    top = ((scales >> 4).view(-1, 4, 4) << _places(2, scales.device)).sum(1, dtype=torch.uint8)
    low = scales[:, :8] & 15 | (scales[:, 8:] & 15) << 4
    return torch.cat([_put_bits(codes, 1, shift=2), _put_bits(codes, 2), low, top, _put_half(stored.d)], 1)


def _unpack_q3_k(data: Tensor) -> tuple[Stored, Tensor]:
    codes = _get_bits(data[:, 32:96], 2) | _get_bits(data[:, :32], 1) << 2
    low = data[:, 96:104]
    top = (data[:, 104:108].unsqueeze(1) >> _places(2, data.device) & 3).flatten(1)
    scales = (torch.cat([low & 15, low >> 4], 1) | top << 4).T.float() - 32
    d = _get_half(data[:, 108:])
    return Stored(d, torch.zeros_like(d), scales, torch.zeros_like(scales)), codes


def _pack_q4_k(stored: Stored, codes: Tensor) -> Tensor:
    head = [_put_half(stored.d), _put_half(stored.dmin), _put_scales_and_mins(stored)]
    return torch.cat([*head, _put_bits(codes, 4)], 1)


def _unpack_q4_k(data: Tensor) -> tuple[Stored, Tensor]:
    d, dmin = _get_half(data[:, :2]), _get_half(data[:, 2:4])
    return Stored(d, dmin, *_get_scales_and_mins(data[:, 4:16])), _get_bits(data[:, 16:], 4)


def _pack_q5_k(stored: Stored, codes: Tensor) -> Tensor:
    head = [_put_half(stored.d), _put_half(stored.dmin), _put_scales_and_mins(stored)]
    return torch.cat([*head, _put_bits(codes, 1, shift=4), _put_bits(codes, 4)], 1)


def _unpack_q5_k(data: Tensor) -> tuple[Stored, Tensor]:
    d, dmin = _get_half(data[:, :2]), _get_half(data[:, 2:4])
    codes = _get_bits(data[:, 48:], 4) | _get_bits(data[:, 16:48], 1) << 4
    return Stored(d, dmin, *_get_scales_and_mins(data[:, 4:16])), codes


def _pack_q6_k(stored: Stored, codes: Tensor) -> Tensor:
    scales = stored.scales.T.to(torch.int8).contiguous().view(torch.uint8)
    low, top = _put_bits(codes, 4, apart=64), _put_bits(codes, 2, shift=4)
    return torch.cat([low, top, scales, _put_half(stored.d)], 1)


def _unpack_q6_k(data: Tensor) -> tuple[Stored, Tensor]:
    codes = _get_bits(data[:, :128], 4, apart=64) | _get_bits(data[:, 128:192], 2) << 4
    scales, d = data[:, 192:208].contiguous().view(torch.int8).T.float(), _get_half(data[:, 208:])
    return Stored(d, torch.zeros_like(d), scales, torch.zeros_like(scales)), codes


_Q2 = Shape(16, (0, 3), (0, 15), reach=1, weighted_reach=4, signed=False, absolute=True)
_Q3 = Shape(16, (-4, 3), (-32, 31), reach=2, weighted_reach=6, signed=True, coarse=True)
_Q4 = Shape(32, (0, 15), (0, 63), reach=2, weighted_reach=4, signed=False)
_Q5 = Shape(32, (0, 31), (0, 63), reach=2, weighted_reach=4, signed=False)
_Q6 = Shape(16, (-32, 31), (-128, 127), reach=8, weighted_reach=8, signed=True)

Q2_K = KQuant("Q2_K", 84, 3, 0, _Q2, Steps(-0.5, 0.1, 15), _pack_q2_k, _unpack_q2_k)
Q3_K = KQuant("Q3_K", 110, 7, 4, _Q3, None, _pack_q3_k, _unpack_q3_k)
Q4_K = KQuant("Q4_K", 144, 15, 0, _Q4, Steps(-1.0, 0.1, 20), _pack_q4_k, _unpack_q4_k)
Q5_K = KQuant("Q5_K", 176, 31, 0, _Q5, Steps(-0.5, 0.1, 15), _pack_q5_k, _unpack_q5_k)
Q6_K = KQuant("Q6_K", 210, 63, 32, _Q6, None, _pack_q6_k, _unpack_q6_k)
KQUANTS = (Q2_K, Q3_K, Q4_K, Q5_K, Q6_K)
