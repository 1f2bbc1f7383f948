"""Rows that a quantizer of ggml's blocks meets, and the two errors by which it is judged."""

import torch

from quantool.formats.ggml import BlockType, dequantize


def rows(columns: int, count: int = 24, seed: int = 0) -> torch.Tensor:
    """W float32 [count, columns] as networks have it: nearly Gaussian, with some heavier tails."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(count, columns, generator=generator) * 0.02
    weight[::3] *= 1 + torch.rand(len(weight[::3]), columns, generator=generator) ** 8 * 4
    return weight


def edges(columns: int) -> torch.Tensor:
    """Rows at the edge of what floats and float16 hold; all of them finite."""
    weight = rows(columns, 17, seed=1)
    weight[0] = 0
    weight[1] = 1
    weight[2] = -0.3
    weight[3, 7] = 1e4
    weight[4] *= 1e-39  # denormals
    weight[5] *= 1e-6  # d is denormal in float16, or 0
    weight[6] = weight[6].abs()
    weight[7] = -weight[7].abs() - 0.2
    weight[8, ::2] *= 0  # -0 among them
    weight[9] *= 1e-17
    weight[10] *= 1e7  # d overflows float16 in some
    weight[11] *= 1e30
    weight[12] = torch.arange(columns) % 19 - 9.0  # ties
    weight[13] += 100  # spread far below the mean
    weight[14, 5:] = 0
    weight[15] = torch.arange(columns) % 2 * 2.0 - 1
    return weight


def importance(columns: int, seed: int = 2) -> torch.Tensor:
    """float32 [columns], some of them 0, 32 in a row among them."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.rand(columns, generator=generator) ** 4 + 1e-4
    values[::17] = 0
    values[64:96] = 0
    return values


def block_errors(
    kind: BlockType, weight: torch.Tensor, weighing: torch.Tensor | None, blocks: torch.Tensor
) -> torch.Tensor:
    """sum w (x - x^)^2 of every block, float64, `weighing` [N, K] or [K] or None."""
    square = (weight.double() - dequantize(kind, blocks).double()) ** 2
    if weighing is not None:
        square = square * weighing
    return square.view(weight.shape[0], -1, kind.block_size).sum(-1)


def assert_no_worse(
    kind: BlockType, weight: torch.Tensor, weighing: torch.Tensor | None, ours: torch.Tensor, ggml: torch.Tensor
) -> None:
    """In every block; what float32 cannot tell apart is equal. ggml's blocks may hold Inf and NaN, ours may not."""
    error = block_errors(kind, weight, weighing, ours)
    bound = block_errors(kind, weight, weighing, ggml)
    square = weight.double() ** 2 if weighing is None else weight.double() ** 2 * weighing
    noise = square.view(weight.shape[0], -1, kind.block_size).sum(-1) * 1e-13
    assert torch.isfinite(error).all()
    worse = error > bound * (1 + 1e-5) + noise  # false where the bound is NaN
    assert not worse.any(), (kind.name, worse.nonzero()[:5], error[worse][:5], bound[worse][:5])
