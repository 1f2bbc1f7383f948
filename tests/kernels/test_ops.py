"""Packing against golden words and Python integers; the ops against float64 and torch's own checks of an op."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantool.kernels import ops

LIMIT = settings(deadline=None, max_examples=100)


def words(*values: int) -> list[int]:
    """uint32 -> int32, as tensors hold them."""
    return [value - (1 << 32) if value >= 1 << 31 else value for value in values]


def random_codes(bits: int, *shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 1 << bits, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


@pytest.mark.parametrize(
    ("bits", "codes", "expected"),
    [
        (4, [0, 1, 2, 3, 8, 9, 14, 15], [0xFE983210]),
        (3, [i % 8 for i in range(32)], [0x88FAC688, 0xC688FAC6, 0xFAC688FA]),
        (8, [0, 128, 129, 255], [0xFF818000]),
        (2, [3, 0, 1], [0x13]),
        (7, [127] * 5, [0xFFFFFFFF, 0x7]),
    ],
)
def test_golden_words(bits: int, codes: list[int], expected: list[int]) -> None:
    packed = ops.pack_bits(torch.tensor(codes, dtype=torch.uint8), bits)
    assert packed.dtype == torch.int32
    assert packed.tolist() == words(*expected)
    assert ops.unpack_bits(packed, bits, len(codes)).tolist() == codes


@LIMIT
@given(st.integers(1, 8), st.integers(1, 3), st.integers(1, 131), st.integers(0, 2**32))
def test_packing_is_one_dense_bit_stream_per_row(bits: int, rows: int, count: int, seed: int) -> None:
    codes = random_codes(bits, rows, count, seed=seed)
    packed = ops.pack_bits(codes, bits)
    assert packed.shape == (rows, ops.packed_words(count, bits))
    for row, stored in zip(codes.tolist(), packed.tolist(), strict=True):
        stream = sum(code << (i * bits) for i, code in enumerate(row))
        assert stored == words(*((stream >> (32 * i)) & 0xFFFFFFFF for i in range(len(stored))))
    assert torch.equal(ops.unpack_bits(packed, bits, count), codes)


@pytest.mark.parametrize("bits", range(2, 9))
def test_any_memory_layout_packs_the_same_and_stays_as_it_was(bits: int) -> None:
    codes = random_codes(bits, 64, 96)
    before, expected = codes.clone(), ops.pack_bits(codes, bits)
    shifted = torch.cat([torch.zeros(3, dtype=torch.uint8), codes.flatten()])[3:].view(64, 96)
    assert torch.equal(ops.pack_bits(shifted, bits), expected)
    assert torch.equal(ops.pack_bits(codes.t().contiguous().t(), bits), expected)
    assert torch.equal(ops.pack_bits(codes[8:], bits), expected[8:])
    assert torch.equal(ops.pack_bits(codes.view(2, 32, 96), bits), expected.view(2, 32, -1))
    packed = expected.clone()
    assert torch.equal(ops.unpack_bits(packed.t().contiguous().t(), bits, 96), codes)
    assert torch.equal(packed, expected)
    assert torch.equal(codes, before)


def packed_linear(
    bits: int,
    sym: bool,
    *,
    rows: int = 24,
    columns: int = 96,
    group_size: int = 32,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> tuple[torch.Tensor, ...]:
    random = torch.Generator().manual_seed(seed)
    codes = random_codes(bits, rows, columns, seed=seed)
    scales = (torch.rand(rows, columns // group_size, generator=random) * 0.1 + 0.01).to(dtype)
    zeros = None if sym else random_codes(bits, *scales.shape, seed=seed + 1)
    x = torch.randn(2, 5, columns, generator=random).to(dtype)
    bias = torch.randn(rows, generator=random).to(dtype)
    return x, codes, scales, zeros, bias


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("sym", [True, False])
def test_linear_wna16_is_the_formula(bits: int, sym: bool) -> None:
    x, codes, scales, zeros, bias = packed_linear(bits, sym)
    y = ops.linear_wna16(x, ops.pack_bits(codes, bits), scales, zeros, bias, bits)
    zero = 2 ** (bits - 1) if zeros is None else zeros.double().repeat_interleave(32, dim=1)
    weight = scales.double().repeat_interleave(32, dim=1) * (codes.double() - zero)
    expected = x.double() @ weight.T + bias.double()
    assert y.dtype == x.dtype
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("static", [True, False])
def test_linear_w8a8_is_the_formula(static: bool) -> None:
    random = torch.Generator().manual_seed(0)
    x = torch.randn(2, 5, 96, generator=random)
    x[0, 1] = 0
    weight = torch.randint(-128, 128, (24, 96), generator=random, dtype=torch.int8)
    scales, bias = torch.rand(24, 1, generator=random), torch.randn(24, generator=random)
    input_scale = torch.tensor([0.02]) if static else None
    y = ops.linear_w8a8(x, weight, scales, input_scale, bias)

    step = x.double().abs().amax(-1, keepdim=True).clamp(min=1e-300) / 127.5
    if static:
        step = input_scale.double()
    quantized = (x.double() / step).round().clamp(-128, 127) * step
    expected = quantized @ (weight.double() * scales.double()).T + bias.double()
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_linear_w8a8_keeps_small_activations(dtype: torch.dtype) -> None:
    x = torch.full((1, 32), 2.0**-10, dtype=dtype)
    y = ops.linear_w8a8(x, torch.full((1, 32), 64, dtype=torch.int8), torch.ones(1, 1), None, None)
    assert float(y) == pytest.approx(32 * 64 * 2.0**-10, rel=0.01)


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("sym", [True, False])
def test_torch_accepts_linear_wna16(bits: int, sym: bool) -> None:
    x, codes, scales, zeros, bias = packed_linear(bits, sym)
    args = (x, ops.pack_bits(codes, bits), scales, zeros, bias, bits)
    torch.library.opcheck(ops.linear_wna16, args)
    torch.library.opcheck(ops.linear_wna16, (*args[:4], None, bits))


@pytest.mark.parametrize("input_scale", [None, torch.tensor([0.02])])
def test_torch_accepts_linear_w8a8(input_scale: torch.Tensor | None) -> None:
    weight = torch.randint(-128, 128, (24, 96), generator=torch.Generator().manual_seed(0), dtype=torch.int8)
    torch.library.opcheck(ops.linear_w8a8, (torch.ones(2, 96), weight, torch.ones(24, 1), input_scale, None))
