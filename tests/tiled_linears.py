"""Arguments of linear_tiles, those that it must refuse, and what it is measured against: the formula in float64."""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from quantool.kernels.tiles import pack_tiles, tile_rows

BF16, FP16 = torch.bfloat16, torch.float16
TOLERANCE = {BF16: 4e-3, FP16: 1e-3}


@dataclass(frozen=True)
class Case:
    """Arguments of the op, and W in float64."""

    x: torch.Tensor
    tiles: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None
    bias: torch.Tensor | None
    bits: int
    weight: torch.Tensor

    @property
    def arguments(self) -> tuple[Any, ...]:
        return self.x, self.tiles, self.scales, self.zeros, self.bias, self.bits

    @property
    def expected(self) -> torch.Tensor:
        return self.x.double() @ self.weight.T + (0 if self.bias is None else self.bias.double())


def make(
    tokens: int | tuple[int, ...] = 3,
    rows: int = 48,
    columns: int = 192,
    group: int = 64,
    *,
    bits: int = 4,
    sym: bool = True,
    dtype: torch.dtype = BF16,
    scale_dtype: torch.dtype = BF16,
    biased: bool = True,
    device: str = "cpu",
) -> Case:
    """Random codes, scales and tokens; the same for the same arguments on every device."""
    random = torch.Generator().manual_seed(rows * columns + bits)
    codes = torch.randint(0, 1 << bits, (rows, columns), generator=random, dtype=torch.uint8)
    grid = rows, columns // group
    scales = (torch.rand(grid, generator=random) * 0.05 + 0.01).to(scale_dtype)
    zeros = None if sym else torch.randint(0, 1 << bits, grid, generator=random, dtype=torch.uint8)
    x = torch.randn(*((tokens,) if isinstance(tokens, int) else tokens), columns, generator=random).to(dtype)
    zero = torch.tensor(1 << (bits - 1)) if zeros is None else zeros.repeat_interleave(group, 1)
    case = Case(
        x,
        pack_tiles(codes, "codes", bits, rows, columns),
        tile_rows(scales),
        None if zeros is None else tile_rows(zeros),
        torch.randn(rows, generator=random).to(dtype) if biased else None,
        bits,
        scales.double().repeat_interleave(group, 1) * (codes.double() - zero.double()),
    )
    tensors = {f.name: getattr(case, f.name) for f in fields(case)}
    return replace(case, **{name: t.to(device) for name, t in tensors.items() if isinstance(t, torch.Tensor)})


def assert_close(found: torch.Tensor, case: Case, tolerance: float | None = None) -> None:
    assert found.shape == (*case.x.shape[:-1], len(case.weight))
    assert found.dtype == case.x.dtype
    error = float((found.double() - case.expected).norm() / case.expected.norm())
    assert error < (tolerance or TOLERANCE[case.x.dtype])


def with_offset(tensor: torch.Tensor) -> torch.Tensor:
    """The same values 8 bytes further on."""
    skip = 8 // tensor.element_size()
    return torch.cat([tensor.new_zeros(skip), tensor.flatten()])[skip:].view_as(tensor)


BAD: dict[str, tuple[Callable[[Case], Case], str]] = {
    "dtype": (lambda c: replace(c, x=c.x.float(), bias=None), r"x is float32 \[\d+, 192\], .* bfloat16 and float16"),
    "columns": (lambda c: replace(c, x=c.x[:, :-1]), r"x is bfloat16 \[\d+, 191\], expected \[\.\.\., 192\]"),
    "scalar": (lambda c: replace(c, x=c.x[0, 0]), r"x is bfloat16 \[\], expected \[\.\.\., 192\]"),
    "bits": (lambda c: replace(c, bits=3), "bits is 3, tiles hold 4 or 8"),
    "other bits": (lambda c: replace(c, bits=8), r"tiles of 8 bits are int32 \[3, 3, 128\], .* 256\]"),
    "tiles": (lambda c: replace(c, tiles=c.tiles.to(torch.int64)), r"tiles of 4 bits are int64 \[3, 3, 128\]"),
    "no tiles": (lambda c: replace(c, tiles=c.tiles[:0]), r"tiles of 4 bits are int32 \[0, 3, 128\]"),
    "scale dtype": (lambda c: replace(c, scales=c.scales.float()), r"scales are float32 \[3, 3, 8, 2\]"),
    "scale rows": (lambda c: replace(c, scales=c.scales[1:]), r"scales are bfloat16 \[2, 3, 8, 2\], .* \[3, groups"),
    "flat scales": (lambda c: replace(c, scales=c.scales.flatten()), r"scales are bfloat16 \[144\]"),
    "no groups": (lambda c: replace(c, scales=c.scales[:, :0]), r"scales are bfloat16 \[3, 0, 8, 2\]"),
    "group": (lambda c: replace(c, scales=c.scales[:, :1].repeat(1, 5, 1, 1)), "rows of 192 are not 5 groups"),
    "small group": (lambda c: replace(c, scales=c.scales.repeat(1, 4, 1, 1)), "rows of 192 are not 12 groups"),
    "zero dtype": (lambda c: replace(c, zeros=c.scales), r"zeros are bfloat16 \[3, 3, 8, 2\], expected uint8"),
    "zero shape": (lambda c: replace(c, zeros=c.scales[:, 1:].byte()), r"zeros are uint8 \[3, 2, 8, 2\]"),
    "bias dtype": (lambda c: replace(c, bias=torch.zeros(48)), r"bias is float32 \[48\], expected bfloat16 \[48\]"),
    "bias shape": (lambda c: replace(c, bias=torch.zeros(47, dtype=BF16)), r"bias is bfloat16 \[47\]"),
    "contiguity": (lambda c: replace(c, tiles=c.tiles.transpose(0, 1)), "contiguous"),
    "alignment": (lambda c: replace(c, tiles=with_offset(c.tiles)), "starts 8 bytes after a multiple of 16"),
    "device": (lambda c: replace(c, scales=c.scales.to("meta")), "scales is on meta, x on cpu"),
}
