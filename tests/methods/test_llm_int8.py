"""LLM.int8() weights bit for bit against bitsandbytes."""

import pytest
import torch
from bitsandbytes.functional import int8_vectorwise_quant
from hypothesis import given, settings
from hypothesis import strategies as st

from quantool.errors import QuantoolError
from quantool.methods import llm_int8
from quantool.quant import QuantizedTensor, dequantize_affine
from quantool.scheme import MethodOptions, QuantScheme

LIMIT = settings(deadline=None, max_examples=100)
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SCHEME = QuantScheme(8, -1, act_bits=8, outlier_threshold=6.0)


def quantize(weight: torch.Tensor) -> QuantizedTensor:
    return llm_int8.quantize_weight(weight, SCHEME, lambda scales: scales, options=MethodOptions())


def assert_bitsandbytes(weight: torch.Tensor) -> None:
    steps, absmax, _ = int8_vectorwise_quant(weight.to(torch.float16))
    q = quantize(weight)
    assert q.codes.dtype == torch.uint8
    assert torch.equal(q.codes.to(torch.int16) - 128, steps.to(torch.int16))
    assert torch.equal(q.scales, absmax.view(-1, 1) / 127)
    assert (q.zeros, q.scheme) == (None, SCHEME)


@LIMIT
@given(st.integers(1, 40), st.integers(1, 300), st.sampled_from(DTYPES), st.floats(-6, 4), st.integers(0, 2**32))
def test_codes_and_scales_are_those_of_bitsandbytes(
    rows: int, columns: int, dtype: torch.dtype, exponent: float, seed: int
) -> None:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 10**exponent
    weight[seed % rows] = 0
    assert_bitsandbytes(weight.to(dtype))


def test_more_than_a_piece() -> None:
    assert_bitsandbytes(torch.randn(515, 333, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16))


@pytest.mark.parametrize(
    "weight",
    [torch.zeros(3, 8), torch.full((3, 8), 65504.0), torch.full((2, 5), 1e-9), torch.tensor([[-1.0, 1, 0.5, -0.25]])],
    ids=["zeros", "largest", "lost-in-float16", "signs"],
)
def test_weights_at_the_ends_of_float16(weight: torch.Tensor) -> None:
    assert_bitsandbytes(weight)


def test_the_error_is_at_most_half_a_step() -> None:
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(0)).half().float()
    q = quantize(weight)
    assert bool(((dequantize_affine(q) - weight).abs() <= q.scales * 0.5001).all())
    assert q.codes.min() >= 1  # -127, ..., 127


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_weight_beyond_float16_is_an_error_that_says_where(dtype: torch.dtype) -> None:
    weight = torch.ones(600, 64).to(dtype)
    weight[517, 3] = -70000
    with pytest.raises(QuantoolError, match=r"weight \[517, 3\] is -7\d{4}, expected at most 65504") as caught:
        quantize(weight)
    assert "--method nf4" in str(caught.value.hint)


def test_the_weight_stays_as_it_was() -> None:
    weight = torch.randn(8, 32, dtype=torch.float32)
    before = weight.clone()
    quantize(weight)
    assert torch.equal(weight, before)
