"""Round to nearest against the same thing written out group by group in numpy."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantool.formats import FORMATS
from quantool.methods.rtn import quantize_weight
from quantool.quant import PIECE, QuantizedTensor, dequantize_affine
from quantool.scheme import PER_CHANNEL, PER_TENSOR, MethodOptions, QuantScheme

LIMIT = settings(deadline=None, max_examples=60)
F32 = np.float32

schemes = st.builds(QuantScheme, st.integers(2, 8), st.sampled_from([PER_CHANNEL, PER_TENSOR, 8, 16]), st.booleans())
kinds = st.sampled_from(["normal", "skewed", "positive", "zeros", "outlier", "steps"])


def as_float32(scales: torch.Tensor) -> torch.Tensor:
    return scales.clamp(min=2.0**-126)


def as_bfloat16(scales: torch.Tensor) -> torch.Tensor:
    return FORMATS["compressed-tensors"].round_scales(scales, torch.bfloat16)


def as_float16(scales: torch.Tensor) -> torch.Tensor:
    return FORMATS["awq"].round_scales(scales, torch.bfloat16)


ROUNDINGS = {torch.float32: as_float32, torch.bfloat16: as_bfloat16, torch.float16: as_float16}


def make(kind: str, rows: int = 6, columns: int = 48, seed: int = 0) -> torch.Tensor:
    random = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=random)
    if kind == "skewed":
        weight.add_(0.7)
    elif kind == "positive":
        weight.abs_().add_(1)
    elif kind == "zeros":
        weight[1:4] = 0
    elif kind == "outlier":
        weight[:, 5] *= 60
    elif kind == "steps":  # ties: values in the middle between two codes
        weight = torch.randint(-8, 8, (rows, columns), generator=random) / 2.0
    return weight


def by_hand(weight: torch.Tensor, scheme: QuantScheme, dtype: torch.dtype) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes [N, K], scales and zeros [N, G], every group on its own."""
    array = weight.numpy()
    width = {PER_CHANNEL: array.shape[1], PER_TENSOR: array.shape[1]}.get(scheme.group_size, scheme.group_size)
    codes = np.zeros(array.shape, np.uint8)
    scales = np.zeros((array.shape[0], array.shape[1] // width), F32)
    zeros = np.full(scales.shape, 2 ** (scheme.bits - 1), np.uint8)
    top = 2**scheme.bits - 1
    for row in range(array.shape[0]):
        for group in range(scales.shape[1]):
            here = slice(group * width, (group + 1) * width)
            values = array if scheme.group_size == PER_TENSOR else array[row, here]
            low, high = min(F32(0), values.min()), max(F32(0), values.max())
            scale = max(high, -low) / F32(top / 2) if scheme.sym else F32(high - low) / F32(top)
            scale = F32(ROUNDINGS[dtype](torch.tensor([scale])).float().item())
            if not scheme.sym:
                zeros[row, group] = np.clip(np.round(-low / scale), 0, top)
            scales[row, group] = scale
            steps = np.array([np.round(value / scale) for value in array[row, here]])
            codes[row, here] = np.clip(steps + zeros[row, group], 0, top)
    return codes, scales, zeros


def squared_errors(weight: torch.Tensor, q: QuantizedTensor) -> torch.Tensor:
    """Per group, float64 [N, G]."""
    difference = (dequantize_affine(q).double() - weight.double()).square()
    return difference.view(weight.shape[0], q.scales.shape[1], -1).sum(-1)


@pytest.mark.parametrize("dtype", ROUNDINGS)
@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("group_size", [16, 48, PER_CHANNEL, PER_TENSOR])
@pytest.mark.parametrize("bits", range(2, 9))
def test_codes_scales_and_zeros_are_those_of_numpy(bits: int, group_size: int, sym: bool, dtype: torch.dtype) -> None:
    scheme = QuantScheme(bits, group_size, sym)
    for kind in ("skewed", "zeros", "outlier"):
        weight = make(kind, seed=bits)
        q = quantize_weight(weight, scheme, ROUNDINGS[dtype], options=MethodOptions(mse=False))
        codes, scales, zeros = by_hand(weight, scheme, dtype)
        assert q.scheme == scheme
        assert q.scales.dtype == dtype
        assert np.array_equal(q.scales.float().numpy(), scales)
        assert np.array_equal(q.codes.numpy(), codes)
        assert q.codes.dtype == torch.uint8
        if sym:
            assert q.zeros is None
        else:
            assert q.zeros is not None
            assert np.array_equal(q.zeros.numpy(), zeros)
        assert np.array_equal(dequantize_affine(q).numpy(), _dequantized(codes, scales, zeros))


def _dequantized(codes: np.ndarray, scales: np.ndarray, zeros: np.ndarray) -> np.ndarray:
    repeat = codes.shape[1] // scales.shape[1]
    steps = codes.astype(F32) - zeros.repeat(repeat, 1).astype(F32)
    return steps * scales.repeat(repeat, 1)


@LIMIT
@given(schemes, kinds, st.sampled_from(list(ROUNDINGS)), st.integers(0, 2**31))
def test_any_weight_gives_the_codes_of_numpy(scheme: QuantScheme, kind: str, dtype: torch.dtype, seed: int) -> None:
    weight = make(kind, 4, 16, seed)
    q = quantize_weight(weight, scheme, ROUNDINGS[dtype], options=MethodOptions(mse=False))
    codes, scales, _ = by_hand(weight, scheme, dtype)
    assert np.array_equal(q.codes.numpy(), codes)
    assert np.array_equal(q.scales.float().numpy(), scales)


@pytest.mark.parametrize("mse", [False, True])
@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("group_size", [128, PER_CHANNEL, PER_TENSOR])
def test_no_row_depends_on_how_rows_are_cut_into_pieces(group_size: int, sym: bool, mse: bool) -> None:
    columns = 2048
    rows = 2 * (PIECE // columns) + 37  # two whole pieces and some
    weight = make("skewed", rows, columns)
    if group_size == PER_TENSOR:
        weight[-1, -1] = 20  # the range comes from the last piece
    q = quantize_weight(weight, QuantScheme(4, group_size, sym), as_bfloat16, options=MethodOptions(mse=mse))
    assert q.codes.shape == weight.shape
    if group_size == PER_TENSOR:
        assert q.scales.unique().numel() == 1
        assert q.zeros is None or q.zeros.unique().numel() == 1
        return
    for chosen in ([0], [PIECE // columns - 1], [PIECE // columns], [rows - 1], [3, rows - 1, 200]):
        part = quantize_weight(
            weight[chosen], QuantScheme(4, group_size, sym), as_bfloat16, options=MethodOptions(mse=mse)
        )
        assert torch.equal(part.codes, q.codes[chosen])
        assert torch.equal(part.scales, q.scales[chosen])
        assert (part.zeros is None) == (q.zeros is None) == sym
        assert part.zeros is None or torch.equal(part.zeros, q.zeros[chosen])


def test_one_row_wider_than_a_piece() -> None:
    weight = make("skewed", 2, PIECE + 64)
    q = quantize_weight(weight, QuantScheme(4, 64, sym=False), as_bfloat16, options=MethodOptions(mse=False))
    codes, _, _ = by_hand(weight[:, -640:].contiguous(), QuantScheme(4, 64, sym=False), torch.bfloat16)
    assert np.array_equal(q.codes[:, -640:].numpy(), codes)


@pytest.mark.parametrize("group_size", [16, PER_CHANNEL, PER_TENSOR])
@pytest.mark.parametrize("mse", [False, True])
def test_the_stored_dtype_of_the_weight_does_not_matter_and_it_is_not_changed(group_size: int, mse: bool) -> None:
    scheme = QuantScheme(4, group_size, sym=False)
    half = make("outlier").to(torch.bfloat16)
    before = half.clone()
    q = quantize_weight(half, scheme, as_bfloat16, options=MethodOptions(mse=mse))
    wide = half.float()
    wanted = quantize_weight(wide, scheme, as_bfloat16, options=MethodOptions(mse=mse))
    assert torch.equal(half, before)
    assert torch.equal(wide, before.float())
    assert torch.equal(q.codes, wanted.codes)
    assert torch.equal(q.scales, wanted.scales)


@LIMIT
@given(schemes, kinds, st.sampled_from(list(ROUNDINGS)), st.integers(0, 2**31))
def test_mse_never_has_a_larger_squared_error(scheme: QuantScheme, kind: str, dtype: torch.dtype, seed: int) -> None:
    weight = make(kind, seed=seed)
    plain = squared_errors(weight, quantize_weight(weight, scheme, ROUNDINGS[dtype], options=MethodOptions(mse=False)))
    clipped = squared_errors(weight, quantize_weight(weight, scheme, ROUNDINGS[dtype], options=MethodOptions(mse=True)))
    if scheme.group_size == PER_TENSOR:
        plain, clipped = plain.sum(), clipped.sum()
    assert (clipped <= plain * (1 + 1e-5) + 1e-12).all()


@pytest.mark.parametrize("group_size", [16, PER_CHANNEL, PER_TENSOR])
def test_mse_is_much_better_where_a_few_values_stick_out(group_size: int) -> None:
    weight = make("normal", 32, 256)
    scheme = QuantScheme(3, group_size)
    plain = squared_errors(weight, quantize_weight(weight, scheme, as_bfloat16, options=MethodOptions(mse=False))).sum()
    clipped = squared_errors(
        weight, quantize_weight(weight, scheme, as_bfloat16, options=MethodOptions(mse=True))
    ).sum()
    assert clipped < 0.9 * plain


@pytest.mark.parametrize("mse", [False, True])
@pytest.mark.parametrize("bits", range(2, 9))
def test_weights_on_a_grid_come_back_exactly(bits: int, mse: bool) -> None:
    """Every code is used and the scale is a power of two, so there is nothing to lose."""
    codes = torch.arange(2**bits).repeat(3, 2)
    weight = (codes - 2 ** (bits - 2)) * 0.25
    q = quantize_weight(weight, QuantScheme(bits, 2**bits, sym=False), as_bfloat16, options=MethodOptions(mse=mse))
    assert torch.equal(q.codes, codes.to(torch.uint8))
    assert torch.equal(dequantize_affine(q), weight)


def test_float16_scales_of_the_awq_format_are_what_codes_are_made_for() -> None:
    weight = make("skewed") * 1e-6  # scales that are denormal in float16
    q = quantize_weight(weight, QuantScheme(4, 16, sym=False), as_float16, options=MethodOptions(mse=False))
    codes, scales, _ = by_hand(weight, QuantScheme(4, 16, sym=False), torch.float16)
    assert np.array_equal(q.scales.float().numpy(), scales)
    assert np.array_equal(q.codes.numpy(), codes)
