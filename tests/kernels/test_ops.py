"""Packing against golden words and Python integers; the ops against float64 and torch's own checks of an op."""

import re

import bitsandbytes
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


def test_arguments_that_do_not_fit_are_refused_with_their_numbers() -> None:
    x, codes, scales, zeros, bias = packed_linear(4, sym=False)
    good = {"x": x, "qweight": ops.pack_bits(codes, 4), "scales": scales, "zeros": zeros, "bias": bias, "bits": 4}
    for found, wrong in {
        "float32 [2, 5, 88] on cpu, int32 [24, 12] on cpu": {"x": x[..., :88]},
        "x, 8-bit qweight": {"bits": 8},
        "int64 [24, 12]": {"qweight": ops.pack_bits(codes, 4).long()},
        "bias do not fit each other: float32 [2, 5, 96] on cpu, int32 [24, 12] on cpu, float32 [23, 3]": {
            "scales": scales[1:]
        },
        "uint8 [24, 1]": {"zeros": zeros[:, :1]},
        "float32 [24, 3] on cpu, float32 [24, 3] on cpu": {"zeros": zeros.float()},
        "float32 [1] on cpu": {"bias": bias[:1]},
        "96 columns cannot be in 5 groups": {"scales": torch.ones(24, 5), "zeros": None},
        "96 columns cannot be in 0 groups": {"scales": torch.ones(24, 0), "zeros": None},
    }.items():
        for linear in (ops.linear_wna16_reference, ops.linear_wna16):
            with pytest.raises(ValueError, match=re.escape(found)):
                linear(**{**good, **wrong})
    with pytest.raises(ValueError, match=re.escape("float32 [24] on meta")):
        ops.linear_wna16_reference(**{**good, "bias": bias.to("meta")})


def rounded_input(x: torch.Tensor, scale: float | None, zero: int | None, sym: bool) -> torch.Tensor:
    """Token by token in float64: the step and zero point given, or those of the token's range."""
    rows = []
    for row in x.double().view(-1, x.shape[-1]):
        low, high = min(float(row.min()), 0.0), max(float(row.max()), 0.0)
        step, shift = scale, zero or 0
        if step is None:
            step = max(-low, high) / 127.5 if sym else (high - low) / 255
            shift = 0 if sym or not step else round(-128 - low / step)
        rows.append(row if not step else ((row / step + shift).round().clamp(-128, 127) - shift) * step)
    return torch.stack(rows).view(x.shape)


def int8_linear(groups: int = 1) -> tuple[torch.Tensor, ...]:
    random = torch.Generator().manual_seed(0)
    x = torch.randn(2, 5, 96, generator=random)
    x[0, 1], x[0, 2], x[0, 3] = 0, x[0, 2].abs(), 5 - x[0, 3].abs()
    weight = torch.randint(-128, 128, (24, 96), generator=random, dtype=torch.int8)
    return x, weight, torch.rand(24, groups, generator=random), torch.randn(24, generator=random)


INPUTS = [(None, None, True), (None, None, False), (0.02, None, True), (0.03, 17, False), (0.03, -128, False)]


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize(("scale", "zero", "sym"), INPUTS)
def test_linear_w8a8_is_the_formula(scale: float | None, zero: int | None, sym: bool, groups: int) -> None:
    x, weight, scales, bias = int8_linear(groups)
    input_scale = None if scale is None else torch.tensor([scale])
    input_zero = None if zero is None else torch.tensor([zero], dtype=torch.int8)
    y = ops.linear_w8a8(x, weight, scales, input_scale, input_zero, bias, sym)

    wide = weight.double() * scales.double().repeat_interleave(96 // groups, dim=1)
    expected = rounded_input(x, None if scale is None else float(input_scale), zero, sym) @ wide.T + bias.double()
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_linear_w8a8_keeps_small_activations(dtype: torch.dtype) -> None:
    x = torch.full((1, 32), 2.0**-10, dtype=dtype)
    y = ops.linear_w8a8(x, torch.full((1, 32), 64, dtype=torch.int8), torch.ones(1, 1), None, None, None, True)
    assert float(y) == pytest.approx(32 * 64 * 2.0**-10, rel=0.01)


def test_golden_nibbles() -> None:
    packed = ops.pack_nibbles(torch.tensor([[12, 4, 7], [15, 0, 8]], dtype=torch.uint8))
    assert packed.tolist() == [0xC4, 0x7F, 0x08]
    assert ops.unpack_nibbles(packed, 6).tolist() == [12, 4, 7, 15, 0, 8]
    assert ops.pack_nibbles(torch.tensor([12, 4, 9], dtype=torch.uint8), fill=7).tolist() == [0xC4, 0x97]
    assert ops.unpack_nibbles(packed, 5).tolist() == [12, 4, 7, 15, 0]


@pytest.mark.parametrize("dtype", ["nf4", "fp4"])
def test_levels_are_those_of_bitsandbytes(dtype: str) -> None:
    assert torch.equal(ops.levels(dtype), bitsandbytes.functional.get_4bit_type(dtype, device="cpu"))


def flat_linear(shape: tuple[int, int], block_size: int, dtype: str) -> tuple[torch.Tensor, ...]:
    random = torch.Generator().manual_seed(0)
    codes = random_codes(4, *shape)
    absmax = torch.rand(-(-codes.numel() // block_size), generator=random) + 0.1
    x = torch.randn(2, 5, shape[1], generator=random)
    return x, codes, absmax, ops.levels(dtype), torch.randn(shape[0], generator=random)


@pytest.mark.parametrize("dtype", ["nf4", "fp4"])
@pytest.mark.parametrize(("shape", "block_size"), [((24, 96), 64), ((7, 33), 32), ((3, 5), 64), ((4, 64), 256)])
def test_linear_nf4_is_the_formula(shape: tuple[int, int], block_size: int, dtype: str) -> None:
    """Blocks cross rows, the last one is short, and a weight may be smaller than a block or of odd size."""
    x, codes, absmax, table, bias = flat_linear(shape, block_size, dtype)
    y = ops.linear_nf4(x, ops.pack_nibbles(codes), absmax, table, bias, shape[0], block_size)
    scale = absmax.double().repeat_interleave(block_size)[: codes.numel()]
    weight = (table.double()[codes.flatten().long()] * scale).view(shape)
    expected = x.double() @ weight.T + bias.double()
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


@LIMIT
@given(st.integers(1, 700), st.integers(0, 2**32))
def test_scales_of_double_quantization_are_those_of_bitsandbytes(blocks: int, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    codes = random_codes(8, blocks, seed=seed)
    quant_map, absmax = torch.randn(256, generator=random), torch.rand(-(-blocks // 256), generator=random)
    offset = torch.rand((), generator=random)
    found = ops.dequantize_absmax(codes, quant_map, absmax, offset)
    state = bitsandbytes.functional.QuantState(absmax, code=quant_map, blocksize=256, dtype=torch.float32)
    assert torch.equal(found, bitsandbytes.functional.dequantize_blockwise(codes, state) + offset)


def outlier_input(tokens: int, columns: int = 96) -> torch.Tensor:
    """Most below 4, a channel of values around 6, one of a single value, one beyond float16."""
    x = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(tokens)).clamp(-4, 4)
    x[:, 5] *= 6
    x[0, 17], x[0, 40] = -6.0, 7e4
    if tokens > 2:
        x[1] = 0
    return x


@pytest.mark.parametrize("threshold", [6.0, 2.5, 0.0])
@pytest.mark.parametrize("tokens", [1, 2, 13])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_linear_llm_int8_is_that_of_bitsandbytes(tokens: int, threshold: float, dtype: torch.dtype) -> None:
    x = outlier_input(tokens).to(dtype)
    if not threshold or dtype == torch.float16:  # what is beyond float16 is NaN, or an output that is
        x = x.clamp(-100, 100)
    random = torch.Generator().manual_seed(1)
    weight, absmax, _ = bitsandbytes.functional.int8_vectorwise_quant(torch.randn(24, 96, generator=random).half())
    bias = torch.randn(24, generator=random).to(dtype)
    y = ops.linear_llm_int8(x, weight, absmax.view(-1, 1) / 127, bias, threshold)

    state = bitsandbytes.MatmulLtState()
    state.CB, state.SCB, state.threshold, state.has_fp16_weights, state.is_training = (
        weight,
        absmax,
        threshold,
        False,
        False,
    )
    expected = bitsandbytes.matmul(x, weight, bias=bias, state=state)
    assert y.dtype == expected.dtype == dtype
    assert bool(torch.isfinite(y).all())
    assert_close(y, expected, 1e-6 if dtype == torch.float32 else 1e-2)


def assert_close(found: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    assert float((found.double() - expected.double()).norm() / expected.double().norm()) < tolerance


def test_linear_llm_int8_is_the_formula() -> None:
    """Channel 5 is multiplied in float, the rest in steps of each token's largest value below the threshold."""
    x = outlier_input(13)
    x[0, 40], x[4, 5] = 1.0, 5.5  # a value below the threshold in a channel of outliers still sets the token's scale
    weight = torch.randint(-127, 128, (24, 96), generator=torch.Generator().manual_seed(0), dtype=torch.int8)
    scales = torch.rand(24, 1, generator=torch.Generator().manual_seed(1)) + 0.1
    y = ops.linear_llm_int8(x, weight, scales, None, 6.0)

    half = x.half().double()
    outlier = (half.abs() >= 6).any(0)
    assert outlier.nonzero().flatten().tolist() == [5, 17]
    step = torch.where(half.abs() >= 6, 0, half).abs().amax(1, keepdim=True).clamp(min=1e-300) / 127
    quantized = torch.where(outlier, x.double(), (half / step).round() * step)
    expected = quantized @ (weight.double() * scales.double()).T
    assert_close(y, expected, 3e-5)  # bitsandbytes' 6.200124e-05 is 1.8e-5 off
    whole = ops.linear_llm_int8(x.view(1, 13, 96), weight, scales, None, 6.0)
    assert torch.equal(whole[0], y)


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("sym", [True, False])
def test_torch_accepts_linear_wna16(bits: int, sym: bool) -> None:
    x, codes, scales, zeros, bias = packed_linear(bits, sym)
    args = (x, ops.pack_bits(codes, bits), scales, zeros, bias, bits)
    torch.library.opcheck(ops.linear_wna16, args)
    torch.library.opcheck(ops.linear_wna16, (*args[:4], None, bits))


@pytest.mark.parametrize(("scale", "zero", "sym"), INPUTS)
def test_torch_accepts_linear_w8a8(scale: float | None, zero: int | None, sym: bool) -> None:
    x, weight, scales, bias = int8_linear()
    input_scale = None if scale is None else torch.tensor([scale])
    input_zero = None if zero is None else torch.tensor([zero], dtype=torch.int8)
    torch.library.opcheck(ops.linear_w8a8, (x, weight, scales, input_scale, input_zero, bias, sym))
    torch.library.opcheck(ops.linear_w8a8, (x, weight, scales, input_scale, input_zero, None, sym))


@pytest.mark.parametrize("dtype", ["nf4", "fp4"])
def test_torch_accepts_linear_nf4(dtype: str) -> None:
    x, codes, absmax, table, bias = flat_linear((7, 33), 32, dtype)
    torch.library.opcheck(ops.linear_nf4, (x, ops.pack_nibbles(codes), absmax, table, bias, 7, 32))
    torch.library.opcheck(ops.linear_nf4, (x, ops.pack_nibbles(codes), absmax, table, None, 7, 32))


@pytest.mark.parametrize("threshold", [6.0, 0.0])
def test_torch_accepts_linear_llm_int8(threshold: float) -> None:
    x, weight, scales, bias = int8_linear()
    torch.library.opcheck(ops.linear_llm_int8, (10 * x, weight, scales, bias, threshold))
    torch.library.opcheck(ops.linear_llm_int8, (x[0, 0], weight, scales, None, threshold))
