"""What the block types of ggml have in common: a row is cut into blocks, a block into groups with a step each.

    W[n, k] ~ step[n, g] * level(code[n, k]) - offset[n, g]          g = k // group_size

`level(code)` is `code - zero`, or an entry of `levels` where a type has a table (IQ4). Steps and offsets are what the
stored fields give in float32, in the order of operations of ggml, so that what is computed here is what it computes:
Q4_K has step = d * scales[g] and offset = dmin * mins[g], d and dmin in float16, one of each per 256 weights.

Source: ggml-common.h and ggml-quants.c of https://github.com/ggml-org/ggml
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch


@dataclass(frozen=True, slots=True)
class Grid:
    """The values that each group of W [N, K] can take. `fields` is what the blocks store of it, per block or group."""

    step: torch.Tensor  # float32 [N, G]
    offset: torch.Tensor | None  # float32 [N, G]; None where the type has none
    fields: Mapping[str, torch.Tensor]  # d, dmin (m in Q4_1): float16 [N, B]; scales, mins: integers [N, G]


class BlockType(Protocol):
    """One block type: how rows are searched, packed and unpacked. Rows are whole blocks, checked by the caller."""

    @property
    def name(self) -> str:
        """ggml's, "Q4_K"."""
        ...

    @property
    def block_size(self) -> int:
        """Weights of a block."""
        ...

    @property
    def block_bytes(self) -> int: ...

    @property
    def group_size(self) -> int:
        """Weights that share a step."""
        ...

    @property
    def max_code(self) -> int: ...

    @property
    def zero(self) -> int:
        """The code whose level is 0, where there is no table."""
        ...

    @property
    def levels(self) -> tuple[float, ...] | None:
        """What each code stands for, where that is not code - zero."""
        ...

    def quantize(
        self, weight: torch.Tensor, importance: torch.Tensor | None = None, *, exact: bool = False
    ) -> torch.Tensor:
        """Blocks uint8 [N, bytes] of W float32 [N, K]; `importance` float32 [K] weighs the error of each column.

        `exact` gives ggml's own bytes; without it the weighted error is no larger, and mostly smaller.
        """
        ...

    def unpack(self, data: torch.Tensor) -> tuple[Grid, torch.Tensor]:
        """The grid and the codes uint8 [N, K] of blocks uint8 [N, bytes]."""
        ...

    def pack(self, grid: Grid, codes: torch.Tensor) -> torch.Tensor:
        """Blocks uint8 [N, bytes] of a grid's `fields` and codes uint8 [N, K]: the inverse of `unpack`."""
        ...
