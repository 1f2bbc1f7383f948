"""Grids and codes: what must hold for every row of weights, and the numbers of compressed-tensors' observers."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantool.errors import QuantoolError
from quantool.quant import (
    QuantizedTensor,
    RoundScales,
    choose_qparams,
    dequantize_affine,
    quantize_affine,
    require_finite,
)
from quantool.scheme import QuantScheme

LIMIT = settings(deadline=None, max_examples=150)
TINY = 2.0**-126

schemes = st.builds(QuantScheme, st.integers(2, 8), st.sampled_from([-1, 0, 8, 16]), st.booleans())
rows = st.sampled_from(["normal", "shifted", "zeros", "constant", "negative", "outlier", "denormal", "huge", "wide"])


def bfloat16_scales(scales: torch.Tensor) -> torch.Tensor:
    return scales.clamp(TINY, 3e38).to(torch.bfloat16)


def exact_scales(scales: torch.Tensor) -> torch.Tensor:
    return scales.clamp(TINY, 3e38)


def make_rows(kinds: list[str], seed: int) -> torch.Tensor:
    random = torch.Generator().manual_seed(seed)
    weight = torch.randn(len(kinds), 48, generator=random)
    for row, kind in zip(weight, kinds, strict=True):
        if kind in {"zeros", "constant", "negative"}:
            row[:] = {"zeros": 0.0, "constant": 0.3, "negative": -0.3}[kind]
        elif kind == "shifted":
            row.add_(10)
        elif kind == "outlier":
            row[17] = 1e4
        elif kind == "denormal":
            row.mul_(1e-42)
        elif kind == "huge":
            row[:] = row.sign() * 3.3e38
        elif kind == "wide":
            row.mul_(torch.logspace(-20, 20, 48))
    return weight


def quantize(weight: torch.Tensor, scheme: QuantScheme, round_scales: RoundScales) -> QuantizedTensor:
    scales, zeros = choose_qparams(weight, scheme, round_scales)
    codes = quantize_affine(weight, scales, zeros, scheme)
    return QuantizedTensor(codes, scales, zeros, scheme)


@LIMIT
@given(schemes, st.lists(rows, min_size=1, max_size=4), st.sampled_from([bfloat16_scales, exact_scales]), st.integers())
def test_any_finite_weight_gives_a_usable_grid(
    scheme: QuantScheme, kinds: list[str], round_scales: RoundScales, seed: int
) -> None:
    weight = make_rows(kinds, seed % 2**32)
    q = quantize(weight, scheme, round_scales)
    groups = scheme.groups(48)
    assert q.codes.dtype == torch.uint8
    assert q.codes.shape == weight.shape
    assert q.scales.shape == (len(kinds), groups)
    assert torch.isfinite(q.scales).all()
    assert (q.scales > 0).all()
    assert q.codes.max() <= scheme.max_code
    if scheme.sym:
        assert q.zeros is None
    else:
        assert q.zeros.dtype == torch.uint8
        assert q.zeros.shape == q.scales.shape
        assert q.zeros.max() <= scheme.max_code
    if "huge" not in kinds:
        assert torch.isfinite(dequantize_affine(q)).all()


@LIMIT
@given(schemes, st.lists(rows, min_size=1, max_size=4), st.sampled_from([bfloat16_scales, exact_scales]), st.integers())
def test_codes_are_the_nearest_inside_the_range(
    scheme: QuantScheme, kinds: list[str], round_scales: RoundScales, seed: int
) -> None:
    weight = make_rows([kind for kind in kinds if kind != "huge"] or ["normal"], seed % 2**32)
    q = quantize(weight, scheme, round_scales)
    scales = q.scales.double().repeat_interleave(48 // q.scales.shape[1], dim=1)
    zeros = q.scheme.zero if q.zeros is None else q.zeros.double().repeat_interleave(48 // q.scales.shape[1], dim=1)
    error = (scales * (q.codes.double() - zeros) - weight.double()).abs()
    inside = (weight.double() >= -scales * zeros) & (weight.double() <= scales * (scheme.max_code - zeros))
    # 2**-22: the quotient w / s is a float32
    half = scales * 0.5 + weight.double().abs() * 2**-22
    assert (error <= half)[inside].all()
    # and the range holds the group but for what rounding the scale and the zero point cost
    assert (error <= half * (2 + 2 ** (scheme.bits - 7))).all()


@LIMIT
@given(schemes, st.integers(0, 2**32))
def test_zero_is_exact(scheme: QuantScheme, seed: int) -> None:
    weight = make_rows(["normal", "shifted", "outlier"], seed)
    weight[:, ::5] = 0
    restored = dequantize_affine(quantize(weight, scheme, bfloat16_scales))
    assert (restored[:, ::5] == 0).all()


@pytest.mark.parametrize("bits", range(2, 9))
def test_symmetric_scale_is_amax_by_half_the_steps(bits: int) -> None:
    weight = torch.tensor([[0.5, -1.5, 0.25, 0.0]])
    scales, _ = choose_qparams(weight, QuantScheme(bits, -1), exact_scales)
    assert scales.item() == pytest.approx(1.5 / ((2**bits - 1) / 2))


def test_asymmetric_grid_spans_the_range_and_zero() -> None:
    weight = torch.tensor([[-1.0, 2.0, 0.5, 0.0], [1.0, 2.0, 3.0, 1.5], [-1.0, -2.0, -3.0, -1.5]])
    scales, zeros = choose_qparams(weight, QuantScheme(4, -1, sym=False), exact_scales)
    assert torch.allclose(scales.flatten(), torch.tensor([3 / 15, 3 / 15, 3 / 15]))
    assert zeros.flatten().tolist() == [5, 0, 15]
    codes = quantize_affine(weight, scales, zeros, QuantScheme(4, -1, sym=False))
    assert codes.tolist() == [[0, 15, 7, 5], [5, 10, 15, 8], [10, 5, 0, 7]]


def test_rounding_is_half_to_even() -> None:
    weight = torch.tensor([[0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 3.5, -3.5]])
    codes = quantize_affine(weight, torch.ones(1, 1), None, QuantScheme(4, -1))
    assert (codes.int() - 8).tolist() == [[0, 2, 2, 0, -2, -2, 4, -4]]


@pytest.mark.parametrize("sym", [True, False])
def test_per_tensor_scales_are_equal_and_those_of_the_extremes(sym: bool) -> None:
    weight = make_rows(["normal"] * 4, 0)
    weight[2, 7] = 40
    scheme = QuantScheme(8, 0, sym=sym)
    scales, zeros = choose_qparams(weight, scheme, exact_scales)
    assert scales.shape == (4, 1)
    assert len(scales.unique()) == 1
    assert zeros is None or len(zeros.unique()) == 1
    alone, _ = choose_qparams(weight.view(1, -1), QuantScheme(8, -1, sym=sym), exact_scales)
    assert torch.equal(scales[0], alone[0])


def test_clip_shrinks_the_range_per_group() -> None:
    weight = make_rows(["normal"] * 2, 0)
    scheme = QuantScheme(4, 16)
    full, _ = choose_qparams(weight, scheme, exact_scales)
    factors = torch.tensor([[1.0, 0.5, 0.25], [0.75, 1.0, 0.5]])
    clipped, _ = choose_qparams(weight, scheme, exact_scales, clip=factors)
    assert torch.allclose(clipped, full * factors)
    assert torch.allclose(choose_qparams(weight, scheme, exact_scales, clip=0.5)[0], full * 0.5)


def test_grids_are_those_of_compressed_tensors() -> None:
    args = pytest.importorskip("compressed_tensors.quantization").QuantizationArgs
    helpers = pytest.importorskip("compressed_tensors.quantization.utils.helpers")
    weight = make_rows(["normal", "shifted", "outlier", "constant"], 3)
    for bits in range(2, 9):
        for sym in (True, False):
            ours, zeros = choose_qparams(weight, QuantScheme(bits, -1, sym=sym), exact_scales)
            low, high = weight.amin(1), weight.amax(1)
            theirs, zero_points = helpers.calculate_qparams(low, high, args(num_bits=bits, symmetric=sym))
            torch.testing.assert_close(ours.flatten(), theirs)
            if zeros is not None:
                assert (zeros.flatten().int() - 2 ** (bits - 1)).tolist() == zero_points.int().tolist()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_nan_and_inf_are_named(bad: float, dtype: torch.dtype) -> None:
    weight = torch.ones(64, 64, dtype=dtype)
    require_finite("w", weight)
    require_finite("w", torch.full((64, 64), torch.finfo(dtype).max, dtype=dtype))
    weight[3, 5] = bad
    weight[7, 5] = -bad
    with pytest.raises(QuantoolError, match="tensor 'w': 2 of 4096 values are NaN or Inf"):
        require_finite("w", weight)
