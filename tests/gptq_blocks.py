"""Blocks of columns for the tests of GPTQ's loops, whatever compiles them; what is expected of a block in float64."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from hypothesis import strategies as st

Arguments = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, int]


@dataclass(frozen=True)
class Case:
    rows: int
    columns: int
    groups: int
    bits: int
    sym: bool = True
    values: str = "normal"
    scattered: bool = False  # the groups of an act-order
    strided: bool = False  # columns of a wider matrix
    seed: int = 0

    def arguments(self) -> Arguments:
        generator = torch.Generator().manual_seed(self.seed)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator)

        max_code = (1 << self.bits) - 1
        weight = normal(self.rows, self.columns + 3)
        weight = weight[:, 2:-1] if self.strided else weight[:, : self.columns].contiguous()
        if self.values == "constant":
            weight[:] = weight[:, :1]
        elif self.values == "zeros":
            weight.zero_()
        elif self.values == "large":
            weight.mul_(1e36)
        elif self.values == "small":
            weight.mul_(1e-40)
        elif self.values in {"inf", "nan"}:
            weight[torch.rand(weight.shape, generator=generator) < 0.01] = float(self.values)
        factor = (0.2 * normal(self.columns, self.columns)).triu(1)
        factor.diagonal().copy_(0.5 + normal(self.columns).abs())
        scales = (0.5 + normal(self.rows, self.groups).abs()) * 4 / max_code
        zeros = torch.full_like(scales, (max_code + 1) / 2)
        if not self.sym:
            zeros = torch.randint(0, max_code + 1, zeros.shape, generator=generator).float()
        groups = (torch.arange(self.columns) * self.groups // self.columns).to(torch.int32)
        if self.scattered:
            groups = groups[torch.randperm(self.columns, generator=generator)]
        if self.values == "ties":  # half way between two codes, until an error reaches the column
            weight.copy_((scales[:, groups] * 16).round() / 16 * (weight.round() + 0.5))
            scales = (scales * 16).round().clamp(min=1) / 16
        return weight, factor, scales, zeros, groups, max_code

    def descent(self) -> tuple[torch.Tensor, ...]:
        """Arguments of `descend_columns`: a gradient in place of the weight, and a Hessian."""
        weight, factor, scales, _, groups, max_code = self.arguments()
        generator = torch.Generator().manual_seed(self.seed + 1000)
        hessian = factor.T @ factor
        hessian.diagonal()[self.columns // 2] *= -1 if self.seed % 3 == 0 else 1  # not what a Hessian may have
        codes = torch.randint(0, max_code + 1, weight.shape, generator=generator, dtype=torch.uint8)
        return weight, hessian, scales * torch.randn(scales.shape, generator=generator).sign(), groups, codes, max_code


def cases(rows: int, columns: int) -> st.SearchStrategy[Case]:
    """Blocks of up to so many rows and columns."""
    return st.builds(
        Case,
        rows=st.integers(1, rows),
        columns=st.integers(1, columns),
        groups=st.integers(1, 9),
        bits=st.integers(2, 8),
        sym=st.booleans(),
        values=st.sampled_from(["normal", "constant", "zeros", "large", "small", "ties", "inf", "nan"]),
        scattered=st.booleans(),
        strided=st.booleans(),
        seed=st.integers(0, 99),
    )


def require_same(found: tuple[torch.Tensor, torch.Tensor], expected: tuple[torch.Tensor, torch.Tensor]) -> None:
    """To the bit, the bits of a NaN aside, and to the stride."""
    for a, b in zip(found, expected, strict=True):
        assert (a.dtype, a.shape, a.stride()) == (b.dtype, b.shape, b.stride())
    assert torch.equal(found[0], expected[0])
    bits = [errors.masked_fill(errors.isnan(), math.nan).T.view(torch.int32) for errors in (found[1], expected[1])]
    assert torch.equal(*bits)


def one_column_at_a_time(arguments: Arguments) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes, errors, and how far each weight was from a tie, in steps: algorithm 1 of the paper in float64."""
    weight, U, scales, zeros = (tensor.double().numpy().copy() for tensor in arguments[:4])
    groups, max_code = arguments[4].numpy(), arguments[5]
    codes, errors, gaps = np.empty(weight.shape), np.empty(weight.shape), np.empty(weight.shape)
    for i in range(weight.shape[1]):
        scale, zero = scales[:, groups[i]], zeros[:, groups[i]]
        steps = weight[:, i] / scale
        codes[:, i] = np.clip(np.rint(steps) + zero, 0, max_code)
        gaps[:, i] = np.abs(steps - np.floor(steps) - 0.5)
        errors[:, i] = (weight[:, i] - scale * (codes[:, i] - zero)) / U[i, i]
        weight[:, i + 1 :] -= np.outer(errors[:, i], U[i, i + 1 :])
    return codes, errors, gaps


MISFITS = {
    "hinv": lambda a: (a[0], a[1][:, :-1], *a[2:]),
    "scales": lambda a: (*a[:2], a[2][1:], *a[3:]),
    "zeros": lambda a: (*a[:3], a[3][:, 1:], *a[4:]),
    "groups": lambda a: (*a[:4], a[4][1:], a[5]),
    "dtype": lambda a: (a[0].double(), *a[1:]),
    "group dtype": lambda a: (*a[:4], a[4].long(), a[5]),
    "group 3 of 3": lambda a: (*a[:4], a[4] + 1, a[5]),
    "group -1": lambda a: (*a[:4], a[4] - 1, a[5]),
    "codes of 9 bits": lambda a: (*a[:5], 511),
}


MISFITS_OF_DESCENT = {
    "hessian": lambda a: (a[0], a[1][:, :-1], *a[2:]),
    "scales": lambda a: (*a[:2], a[2][1:], *a[3:]),
    "group 3 of 3": lambda a: (*a[:3], a[3] + 1, *a[4:]),
    "codes": lambda a: (*a[:4], a[4][1:], a[5]),
    "code dtype": lambda a: (*a[:4], a[4].int(), a[5]),
    "codes of 9 bits": lambda a: (*a[:5], 511),
}
