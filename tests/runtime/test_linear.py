"""QuantLinear for every kind of scheme: its buffers, and what it computes, against the formulas in float64."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from quantool.kernels import cuda, ops, wna16
from quantool.kernels.ops import levels
from quantool.quant import QuantizedTensor
from quantool.runtime import linear as layer
from quantool.runtime.linear import BUFFERS, QuantLinear, packed_shapes, runtime_tensors, takes_tiles
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


def linear(q: QuantizedTensor, bias: torch.Tensor | None, *, tiled: bool = False) -> QuantLinear:
    """The module as `load` makes it: from shapes, then filled."""
    rows, columns = q.codes.shape
    like = nn.Linear(columns, rows, bias=bias is not None, device="meta")
    shapes = packed_shapes(q.scheme, (rows, columns), q.scales.dtype, ordered=q.g_idx is not None, tiled=tiled)
    module = QuantLinear(like, q.scheme, shapes)
    tensors = runtime_tensors(q, tiled=tiled)
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


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("size", [32, 64, -1])
@pytest.mark.parametrize("bits", [4, 8])
def test_tiles_are_the_rows_in_another_order(
    bits: int, size: int, sym: bool, ordered: bool, dtype: torch.dtype
) -> None:
    """What a GPU gets, computed here by the reference, and in the same number of bytes."""
    rows, columns = 48, 192
    scheme = QuantScheme(bits, size, sym)
    g_idx = (torch.randperm(columns, generator=torch.Generator().manual_seed(3)) // scheme.width(columns)).int()
    q = random_tensor(scheme, rows, columns, g_idx=g_idx if ordered and size > 0 else None)
    q = replace(q, scales=q.scales.to(dtype))
    x, bias = torch.randn(3, columns, generator=torch.Generator().manual_seed(1)), torch.ones(rows)
    tiled, in_rows = linear(q, bias, tiled=True), linear(q, bias)
    assert tiled.tiled
    assert not in_rows.tiled
    assert_close(tiled(x), x.double() @ by_hand(q).T + 1)
    assert_close(in_rows(x), tiled(x).double())
    held = [sum(buffer.nbytes for buffer in module.buffers()) for module in (tiled, in_rows)]
    assert held[0] == held[1]
    assert ("tiles" in repr(tiled)) > ("tiles" in repr(in_rows))


@pytest.mark.parametrize("tiled", [True, False])
def test_compiled_without_a_break(tiled: bool) -> None:
    g_idx = (torch.randperm(192, generator=torch.Generator().manual_seed(3)) // 32).int()
    q = random_tensor(QuantScheme(4, 32, sym=False), 48, 192, g_idx=g_idx)
    module = linear(replace(q, scales=q.scales.to(torch.bfloat16)), torch.ones(48), tiled=tiled)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for tokens in (1, 20):
        x = torch.randn(2, tokens, 192, generator=torch.Generator().manual_seed(1))
        assert torch.equal(compiled(x), module(x))


W4, BF16, GPU = QuantScheme(4, 32), torch.bfloat16, torch.device("cuda")


@pytest.mark.parametrize(
    ("scheme", "shape", "scales", "compute", "device", "expected"),
    [
        (W4, (48, 192), BF16, torch.float16, GPU, True),
        (QuantScheme(8, -1, sym=False), (48, 192), torch.float16, BF16, GPU, True),
        (QuantScheme(4, 0), (48, 192), BF16, BF16, GPU, True),
        (W4, (48, 192), BF16, BF16, torch.device("cpu"), False),
        (W4, (48, 192), BF16, torch.float32, GPU, False),
        (W4, (48, 192), torch.float32, BF16, GPU, False),
        (W4, (40, 192), BF16, BF16, GPU, False),
        (W4, (48, 160), BF16, BF16, GPU, False),
        (QuantScheme(4, 16), (48, 192), BF16, BF16, GPU, False),
        (QuantScheme(3, 32), (48, 192), BF16, BF16, GPU, False),
        (W8A8, (48, 192), BF16, BF16, GPU, False),
        (INT8, (48, 192), BF16, BF16, GPU, False),
        (NF4, (48, 192), torch.float32, BF16, GPU, False),
    ],
)
def test_what_becomes_tiles(
    scheme: QuantScheme,
    shape: tuple[int, int],
    scales: torch.dtype,
    compute: torch.dtype,
    device: torch.device,
    expected: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Integer weights without rounded activations that fit, where there are kernels and they compute in this dtype."""
    monkeypatch.setattr(cuda, "library", object)
    monkeypatch.setattr(wna16, "card", lambda device: wna16.Card(132, (9, 0)))
    assert takes_tiles(scheme, shape, scales, compute, device) == expected
    monkeypatch.setattr(wna16, "card", lambda device: wna16.Card(80, (7, 0)))
    assert not takes_tiles(scheme, shape, scales, compute, device)
    monkeypatch.setattr(cuda, "library", lambda: None)
    assert not takes_tiles(scheme, shape, scales, compute, device)


@pytest.mark.parametrize(
    "q",
    [
        *(random_tensor(QuantScheme(bits, 32, sym)) for bits in (2, 3, 4, 8) for sym in (True, False)),
        random_tensor(W8A8),
        random_tensor(replace(W8A8, act_sym=False)),
        random_tensor(
            replace(W8A8, act_dynamic=False, act_sym=False),
            input_scale=torch.tensor([0.02]),
            input_zero=torch.tensor([5], dtype=torch.int8),
        ),
        random_tensor(NF4),
    ],
    ids=lambda q: str(q.scheme),
)
def test_no_reference_mixes_devices(q: QuantizedTensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the meta device, as it would be on a GPU: a tensor made without a device would be on the CPU."""
    for name in ("linear_wna16", "linear_w8a8", "linear_nf4"):  # their bodies; torch would take the shape function
        monkeypatch.setattr(layer, name, getattr(ops, f"{name}_reference"))
    module = linear(q, BIAS).to("meta")
    with OneDevice():
        y = module(X.to("meta"))
    assert (y.device.type, y.shape) == ("meta", (2, 7, ROWS))
    module.bias = nn.Parameter(BIAS)
    with pytest.raises((AssertionError, ValueError), match="cpu"), OneDevice():
        module(X.to("meta"))


class OneDevice(TorchDispatchMode):
    """Every operation has its tensors on one device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        devices = {str(tensor.device) for tensor in tensors}
        assert len(devices) < 2, f"{func} of {devices}"
        return func(*args, **(kwargs or {}))


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
