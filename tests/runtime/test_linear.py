"""QuantLinear for every kind of scheme: its buffers, and what it computes, against the formulas in float64."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from quantool.kernels.ops import levels
from quantool.quant import QuantizedTensor
from quantool.runtime.linear import BUFFERS, QuantLinear, packed_shapes, runtime_tensors
from quantool.scheme import QuantScheme

ROWS, COLUMNS = 24, 96
W8A8 = QuantScheme(8, -1, act_bits=8)
INT8 = replace(W8A8, outlier_threshold=6.0)
NF4 = QuantScheme(4, 64, dtype="nf4")


def random_tensor(scheme: QuantScheme, rows: int = ROWS, columns: int = COLUMNS, **changes: Any) -> QuantizedTensor:
    random = torch.Generator().manual_seed(0)
    codes = torch.randint(1, scheme.max_code + 1, (rows, columns), generator=random, dtype=torch.uint8)
    grid: tuple[int, ...] = (rows, scheme.groups(columns))
    if scheme.flat:
        grid = (-(-codes.numel() // scheme.group_size),)
    scales = torch.rand(grid, generator=random) * 0.05 + 0.01
    zeros = None if scheme.sym else torch.randint(0, scheme.max_code + 1, grid, generator=random, dtype=torch.uint8)
    return QuantizedTensor(codes, scales, zeros, scheme, **changes)


def linear(q: QuantizedTensor, bias: torch.Tensor | None) -> QuantLinear:
    """The module as `load` makes it: from shapes, then filled."""
    rows, columns = q.codes.shape
    like = nn.Linear(columns, rows, bias=bias is not None, device="meta")
    shapes = packed_shapes(q.scheme, (rows, columns), q.scales.dtype, ordered=q.g_idx is not None)
    module = QuantLinear(like, q.scheme, shapes)
    tensors = runtime_tensors(q)
    assert set(tensors) == set(shapes) <= set(BUFFERS)
    assert {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()} == shapes
    for name, tensor in tensors.items():
        module._buffers[name] = tensor
    module.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
    return module


def by_hand(q: QuantizedTensor) -> torch.Tensor:
    """W in float64, column by column."""
    if q.scheme.flat:
        scales = q.scales.double().repeat_interleave(q.scheme.group_size)[: q.codes.numel()]
        return (levels(q.scheme.dtype).double()[q.codes.flatten().long()] * scales).view(q.codes.shape)
    columns = q.codes.shape[1]
    group = torch.arange(columns) // (columns // q.scales.shape[1]) if q.g_idx is None else q.g_idx.long()
    zeros = torch.full(q.scales.shape, q.scheme.zero) if q.zeros is None else q.zeros
    return q.scales.double()[:, group] * (q.codes.double() - zeros.double()[:, group])


def assert_close(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-6) -> None:
    assert found.shape == expected.shape
    assert float((found.double() - expected).norm() / expected.norm()) < tolerance


X = torch.randn(2, 7, COLUMNS, generator=torch.Generator().manual_seed(1))
BIAS = torch.randn(ROWS, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize(
    "scheme",
    [
        *(QuantScheme(bits, size, sym) for bits in (2, 3, 4, 8) for size in (32, -1) for sym in (True, False)),
        *(replace(NF4, dtype=dtype, group_size=size) for dtype in ("nf4", "fp4") for size in (32, 64, 4096)),
    ],
    ids=str,
)
def test_weight_only(scheme: QuantScheme, biased: bool) -> None:
    q, bias = random_tensor(scheme), BIAS if biased else None
    expected = X.double() @ by_hand(q).T + (0 if bias is None else bias.double())
    assert_close(linear(q, bias)(X), expected)


@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_columns_in_activation_order(bits: int, sym: bool) -> None:
    """Groups of scattered columns lie together in memory; `perm` brings x into that order."""
    g_idx = (torch.randperm(COLUMNS, generator=torch.Generator().manual_seed(3)) // 32).to(torch.int32)
    q = random_tensor(QuantScheme(bits, 32, sym), g_idx=g_idx)
    module = linear(q, BIAS)
    assert module.perm is not None
    assert torch.equal(g_idx[module.perm.long()], torch.arange(COLUMNS, dtype=torch.int32) // 32)
    assert_close(module(X), X.double() @ by_hand(q).T + BIAS.double())
    assert linear(random_tensor(QuantScheme(bits, 32, sym)), BIAS).perm is None


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("size", [-1, 0, 32])
def test_activations_with_a_scale_per_token(size: int, bits: int) -> None:
    q = random_tensor(replace(W8A8, bits=bits, group_size=size))
    step = X.abs().amax(-1, keepdim=True) / 127.5  # in float32: the lowest value of a token is a tie
    rounded = (X / step).round().clamp(-128, 127).double() * step.double()
    module = linear(q, BIAS)
    assert module.qweight.dtype == torch.int8
    assert_close(module(X), rounded @ by_hand(q).T + BIAS.double())


def test_activations_with_a_scale_and_a_zero_point_per_token() -> None:
    q, x = random_tensor(replace(W8A8, act_sym=False)), X.abs() + 0.5
    step = x.double().amax(-1, keepdim=True) / 255
    rounded = ((x.double() / step - 128).round().clamp(-128, 127) + 128) * step
    assert_close(linear(q, BIAS)(x), rounded @ by_hand(q).T + BIAS.double())
    assert float((linear(replace(q, scheme=W8A8), BIAS)(x) - linear(q, BIAS)(x)).abs().max()) > 1e-3


@pytest.mark.parametrize("zero", [None, -128, 5, 127])
def test_activations_with_a_stored_scale(zero: int | None) -> None:
    scheme = replace(W8A8, act_dynamic=False, act_sym=zero is None)
    stored = None if zero is None else torch.tensor([zero], dtype=torch.int8)
    q = random_tensor(scheme, input_scale=torch.tensor([0.02]), input_zero=stored)
    step, shift = float(torch.tensor(0.02)), zero or 0
    rounded = ((X.double() / step + shift).round().clamp(-128, 127) - shift) * step
    module = linear(q, BIAS)
    assert (module.input_zero is None) == (zero is None)
    assert_close(module(X), rounded @ by_hand(q).T + BIAS.double())


def test_outliers_in_float() -> None:
    q, x = random_tensor(INT8), X.clone()
    x[..., 11] *= 8
    outlier = (x.abs() >= 6).flatten(0, 1).any(0)
    assert outlier.nonzero().flatten().tolist() == [11]
    half = x.half().double()
    step = half.masked_fill(x.abs() >= 6, 0).abs().amax(-1, keepdim=True) / 127
    rounded = torch.where(outlier, x.double(), (half / step).round() * step)
    found, expected = linear(q, BIAS)(x), rounded @ by_hand(q).T + BIAS.double()
    assert_close(found, expected, 3e-5)
    plain = linear(random_tensor(replace(INT8, outlier_threshold=0.0)), BIAS)(x)
    exact = x.double() @ by_hand(q).T + BIAS.double()
    assert float((found - exact).norm()) < 0.5 * float((plain - exact).norm())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "q",
    [
        random_tensor(QuantScheme(4, 32, sym=False)),
        random_tensor(W8A8),
        random_tensor(replace(W8A8, act_dynamic=False), input_scale=torch.tensor([0.03])),
        random_tensor(INT8),
        random_tensor(NF4),
    ],
    ids=lambda q: str(q.scheme),
)
def test_the_output_has_the_dtype_of_the_input(q: QuantizedTensor, dtype: torch.dtype) -> None:
    y = linear(q, BIAS.to(dtype))(X.to(dtype))
    assert y.dtype == dtype
    assert_close(y, X.double() @ by_hand(q).T + BIAS.double(), 0.03)


def test_4_bits_take_4_bits() -> None:
    module = linear(random_tensor(NF4, 65, 33), None)
    assert module.qweight.nbytes == (65 * 33 + 1) // 2
    assert module.scales.nbytes == 4 * -(-65 * 33 // 64)
    assert not list(module.parameters())
    assert "NF4" in repr(module)
