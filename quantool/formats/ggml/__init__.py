"""The block types of ggml by name, and what is the same for all of them."""

import torch

from quantool.formats.ggml.block import BlockType, Grid
from quantool.formats.ggml.iq4 import IQ4_NL, IQ4_XS
from quantool.formats.ggml.kquants import KQUANTS
from quantool.formats.ggml.legacy import LEGACY

__all__ = ["GGML_TYPES", "BlockType", "Grid", "dequantize"]

GGML_TYPES: dict[str, BlockType] = {kind.name: kind for kind in (*LEGACY, *KQUANTS, IQ4_NL, IQ4_XS)}


def dequantize(kind: BlockType, data: torch.Tensor) -> torch.Tensor:
    """What a runtime sees in place of W: float32 [N, K] of blocks uint8 [N, bytes], bit for bit ggml's."""
    return values(kind, *kind.unpack(data))


def values(kind: BlockType, grid: Grid, codes: torch.Tensor) -> torch.Tensor:
    """W float32 [N, K] of codes uint8 [N, K] on a grid."""
    table = kind.levels
    if table is None:
        level = codes.to(torch.float32).sub_(kind.zero)
    else:
        level = torch.tensor(table, device=codes.device)[codes.long()]
    grouped = level.view(*grid.step.shape, -1).mul_(grid.step.unsqueeze(-1))
    if grid.offset is not None:
        grouped -= grid.offset.unsqueeze(-1)
    return grouped.view(codes.shape)
