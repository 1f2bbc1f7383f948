"""The int8 kernels in the emulator: codes and sums bit for bit, results against float64, in any order of threads."""

import math

import pytest
import torch
from emulated import Emulated
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from quantool.kernels import cuda, int8, ops, wna16

LIMIT = settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
DTYPES = [torch.bfloat16, torch.float16]
TOLERANCE = {torch.bfloat16: 4e-3, torch.float16: 1e-3}
TOKENS = [*range(1, 10), 15, 16, 17, 31, 33, 63, 64, 65, 127, 130]
INPUTS = [(None, None, True), (None, None, False), (0.02, None, True), (0.03, 17, False), (0.0, -128, False)]


@pytest.fixture(autouse=True)
def card(emulated: Emulated, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of four multiprocessors: K of 2048 and more columns is split for few rows."""
    monkeypatch.setattr(wna16, "card", lambda device: wna16.Card(4, (9, 0)))


def generator(*seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(hash(seed))


def activations(tokens: int, columns: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Of every kind that a rounding treats differently, in the first tokens."""
    x = torch.randn(tokens, columns, generator=generator(seed, tokens, columns)) * 3
    for token, change in enumerate((lambda r: r, lambda r: r * 0, abs, lambda r: -abs(r), lambda r: r * 1e-7)):
        if token < tokens:
            x[token] = change(x[token])
    if tokens > 5:
        x[5] = (torch.arange(columns) % 513 - 256) / 2  # ties, for some steps
    return x.to(dtype)


def weights(rows: int, columns: int, dtype: torch.dtype, *, biased: bool = True) -> tuple[torch.Tensor, ...]:
    random = generator(rows, columns)
    weight = torch.randint(-128, 128, (rows, columns), generator=random, dtype=torch.int8)
    scales = torch.rand(rows, 1, generator=random) * 0.01 + 0.001
    return weight, scales.to(dtype), torch.randn(rows, generator=random).to(dtype) if biased else None


def numbers(scale: float | None, zero: int | None) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    return (
        None if scale is None else torch.tensor([scale]),
        None if zero is None else torch.tensor([zero], dtype=torch.int8),
    )


def linear(x: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """In float64, from the numbers as they are stored."""
    y = x.double() @ (weight.double() * scales.double()).T
    return y if bias is None else y + bias.double()


def assert_close(y: torch.Tensor, expected: torch.Tensor) -> None:
    """Token by token, or errors of a small one hide behind a large one."""
    error = (y.double() - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert float(error.max()) < TOLERANCE[y.dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [16, 272, 4112])
@pytest.mark.parametrize(("scale", "zero", "sym"), INPUTS)
def test_codes_are_those_of_the_reference(
    dtype: torch.dtype, columns: int, scale: float | None, zero: int | None, sym: bool
) -> None:
    x, (static_step, static_zero) = activations(9, columns, dtype), numbers(scale, zero)
    symmetric = sym if scale is None else zero is None
    codes, steps = torch.empty(9 if symmetric else 10, columns, dtype=torch.int8), torch.empty(9)
    zeros = None if symmetric else torch.empty(9, dtype=torch.int32)
    kind = int8.FLOATS.index(dtype)
    cuda.call("quantool_w8a8_quantize", x, codes, steps, zeros, static_step, static_zero, 9, columns, kind)
    shift = 0 if zeros is None else zeros[:, None]
    expected = ops.round_input(x.float(), static_step, static_zero, sym)
    assert torch.equal((codes[:9] - shift).float() * steps[:, None], expected)
    assert codes[9:].eq(1).all()  # the token whose products are sums of rows


@LIMIT
@given(
    tokens=st.sampled_from(TOKENS),
    rows=st.integers(1, 20).map(lambda n: 8 * n),
    columns=st.integers(1, 40).map(lambda n: 16 * n),
    splits=st.integers(1, 3),
    seed=st.integers(0, 2**16),
)
def test_sums_are_those_of_int64(
    emulated: Emulated, tokens: int, rows: int, columns: int, splits: int, seed: int
) -> None:
    emulated.seed(seed)
    codes, weight = (
        torch.randint(-128, 128, (n, columns), generator=generator(seed, n), dtype=torch.int8) for n in (tokens, rows)
    )
    sums = int8._products(codes, weight, splits)
    assert sums.dtype == torch.int32
    assert torch.equal(sums.sum(0), codes.long() @ weight.long().T)


def test_sums_of_the_widest_weight_do_not_overflow() -> None:
    columns = 2**17 - 16
    assert 128 * 128 * columns < int8.SUM_LIMIT <= 128 * 128 * (columns + 16)
    codes, weight = torch.full((2, columns), -128, dtype=torch.int8), torch.full((8, columns), -128, dtype=torch.int8)
    codes[1], weight[3] = 127, 127
    assert torch.equal(int8._products(codes, weight, 1)[0].long(), codes.long() @ weight.long().T)


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_w8a8_is_the_formula(tokens: int, dtype: torch.dtype) -> None:
    x, (weight, scales, bias) = activations(tokens, 144, dtype), weights(72, 144, dtype)
    y = int8.linear_w8a8_cuda(x, weight, scales, None, None, bias, act_sym=True)
    assert y.dtype == dtype
    assert_close(y, linear(ops.round_input(x.float(), None, None, act_sym=True), weight, scales, bias))


@pytest.mark.parametrize("tokens", [1, 8, 33, 128])
@pytest.mark.parametrize(("scale", "zero", "sym"), INPUTS)
@pytest.mark.parametrize("columns", [80, 2064])
def test_zero_points_and_static_scales(
    tokens: int, scale: float | None, zero: int | None, sym: bool, columns: int
) -> None:
    x = activations(tokens, columns, torch.bfloat16).view(1, tokens, columns)
    weight, scales, _ = weights(24, columns, torch.float32)
    step, shift = numbers(scale, zero)
    y = int8.linear_w8a8_cuda(x, weight, scales, step, shift, None, sym)
    assert y.shape == (1, tokens, 24)
    expected = linear(ops.round_input(x.float(), step, shift, sym), weight, scales, None)
    rounded_to_zero = expected.norm(dim=-1) == 0
    assert not y[rounded_to_zero].any()
    assert_close(y[~rounded_to_zero], expected[~rounded_to_zero])


def test_the_sum_of_a_zero_point_may_pass_the_end_of_int32() -> None:
    columns = 65536  # code - zero is 255, so that sums end at 255 * 127 * 65536 = 2^31 - 25231360
    x, weight = torch.full((1, columns), 3.0, dtype=torch.bfloat16), torch.full((8, columns), 127, dtype=torch.int8)
    y = int8.linear_w8a8_cuda(x, weight, torch.ones(8, 1), None, None, None, act_sym=False)
    assert_close(y, torch.full((1, 8), 3.0 * 127 * columns, dtype=torch.float64))


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("sym", [True, False])
def test_a_token_that_is_not_finite_stays_alone(value: float, sym: bool) -> None:
    x, (weight, scales, bias) = activations(9, 80, torch.bfloat16), weights(24, 80, torch.bfloat16)
    clean = int8.linear_w8a8_cuda(x, weight, scales, None, None, bias, sym)
    x[4, 77] = value
    y = int8.linear_w8a8_cuda(x, weight, scales, None, None, bias, sym)
    assert y[4].isnan().all()
    y[4] = clean[4]
    assert torch.equal(y, clean)


def with_outliers(tokens: int, columns: int, count: int, dtype: torch.dtype) -> tuple[torch.Tensor, list[int]]:
    random = generator(tokens, columns, count)
    x = (torch.rand(tokens, columns, generator=random) * 11.8 - 5.9).to(dtype)
    found = sorted(torch.randperm(columns, generator=random)[:count].tolist())
    for i, column in enumerate(found):
        x[i % tokens, column] = (6, -6, 70, -900)[i % 4]  # 6 is one too
    return x, found


def llm_int8_formula(
    x: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None, threshold: float
) -> torch.Tensor:
    """The formula in float64; codes and steps in float32 from float16, as its definition has it."""
    half = x.half().float()
    outliers = half.abs() >= threshold if threshold > 0 else torch.zeros_like(half, dtype=torch.bool)
    small = half.masked_fill(outliers, 0)
    absmax = small.abs().amax(-1, keepdim=True)
    codes = (small * (127.0 / absmax)).round().nan_to_num(0) * ~outliers.any(0)
    steps = absmax.double() * 127 * ops.LLM_INT8_STEP
    return linear(codes * steps + x.double() * outliers.any(0), weight, scales, bias)


@pytest.mark.parametrize("tokens", [1, 8, 9, 33, 65, 130])
@pytest.mark.parametrize("count", [0, 1, 16, 17, 528])
@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_llm_int8_is_the_formula(tokens: int, count: int, dtype: torch.dtype) -> None:
    (x, _), (weight, scales, bias) = with_outliers(tokens, 528, count, dtype), weights(72, 528, torch.float32)
    y = int8.linear_llm_int8_cuda(x, weight, scales, bias, 6.0)
    assert_close(y, llm_int8_formula(x, weight, scales, bias, 6.0))


@pytest.mark.parametrize("count", [0, 1, 16, 1000, 1040])
@pytest.mark.parametrize("dtype", DTYPES)
def test_outlier_columns_are_found_in_order_and_are_not_rounded(count: int, dtype: torch.dtype) -> None:
    x, expected = with_outliers(37, 1040, count, dtype)
    outliers, found = torch.empty(130, dtype=torch.uint8), torch.empty(1041, dtype=torch.int32)
    codes, steps, kind = torch.empty(37, 1040, dtype=torch.int8), torch.empty(37), int8.FLOATS.index(dtype)
    cuda.call("quantool_llm_int8_outliers", x, outliers, 37, 1040, kind, 6.0)
    cuda.call("quantool_llm_int8_quantize", x, outliers, codes, steps, found, 37, 1040, kind, 6.0, 1.0)
    assert int(found[-1]) == count
    assert found[:count].tolist() == expected
    small = x.half().masked_fill(x.abs() >= 6, 0).float()
    assert torch.equal(steps, small.abs().amax(-1))
    codes_of_all = (small * (127.0 / steps[:, None])).nan_to_num(0).round()
    codes_of_all[:, expected] = 0
    assert torch.equal(codes.float(), codes_of_all)


@pytest.mark.parametrize("tokens", [3, 40, 130])
def test_thresholds_at_both_ends(tokens: int) -> None:
    (x, _), (weight, scales, bias) = with_outliers(tokens, 272, 9, torch.bfloat16), weights(40, 272, torch.float32)
    none = int8.linear_llm_int8_cuda(x, weight, scales, bias, 0.0)
    assert torch.equal(int8.linear_llm_int8_cuda(x, weight, scales, bias, math.inf), none)
    assert_close(none, llm_int8_formula(x, weight, scales, bias, 0.0))
    x[0] += x[0].eq(0)
    in_float = int8.linear_llm_int8_cuda(x, weight, scales, bias, 6e-8)  # the smallest float16 there is
    assert_close(in_float, linear(x, weight, scales, bias))


def test_what_overflows_float16_is_an_outlier() -> None:
    x, (weight, scales, bias) = activations(4, 80, torch.bfloat16), weights(24, 80, torch.bfloat16)
    x[2, 33] = 1e6
    y = int8.linear_llm_int8_cuda(x, weight, scales, bias, 6.0)
    assert_close(y, llm_int8_formula(x, weight, scales, bias, 6.0))
    assert int8.linear_llm_int8_cuda(x, weight, scales, bias, 0.0)[2].isnan().all()


@pytest.mark.parametrize("tokens", [5, 20, 50, 100])
def test_results_do_not_depend_on_the_order_of_threads(emulated: Emulated, tokens: int) -> None:
    (x, _), (weight, scales, bias) = with_outliers(tokens, 2064, 20, torch.float16), weights(40, 2064, torch.float16)
    results = []
    for seed in (1, 2):
        emulated.seed(seed)
        results.append(
            (
                int8.linear_w8a8_cuda(x, weight, scales, None, None, bias, act_sym=True),
                int8.linear_w8a8_cuda(x, weight, scales, None, None, bias, act_sym=False),
                int8.linear_llm_int8_cuda(x, weight, scales, bias, 6.0),
            )
        )
    assert all(map(torch.equal, *results))


def test_k_is_split_for_few_rows_and_never_into_too_little() -> None:
    device = torch.device("cpu")  # the card has 4 multiprocessors, for as many blocks
    assert int8._splits(32, 65536, 1, device) == 4
    assert int8._splits(32, 3072, 1, device) == 3
    assert int8._splits(64, 65536, 32, device) == 2
    assert int8._splits(32 * 5, 65536, 32, device) == 1
    assert int8._splits(128, 65536, 64, device) == 2
    assert int8._splits(128, 65536, 65, device) == 4
    assert int8._splits(32, 1024, 1, device) == 1


REFUSED = [
    ((2, 32), (24, 32), torch.float32, 1, "float32 has no kernel"),
    ((2, 24), (24, 24), torch.bfloat16, 1, "24 columns are no multiple of 16"),
    ((2, 32), (12, 32), torch.bfloat16, 1, "12 rows are no multiple of 8"),
    ((2, 32), (24, 32), torch.bfloat16, 2, "two groups"),
]


@pytest.mark.parametrize(("x_shape", "shape", "dtype", "groups"), [case[:4] for case in REFUSED], ids=lambda _: None)
def test_torch_computes_what_fits_no_kernel(
    x_shape: tuple[int, int], shape: tuple[int, int], dtype: torch.dtype, groups: int
) -> None:
    x, (weight, scales, bias) = activations(*x_shape, dtype), weights(*shape, dtype)
    scales = scales.repeat(1, groups)
    y = int8.linear_w8a8_cuda(x, weight, scales, None, None, bias, act_sym=True)
    assert torch.equal(y, ops.linear_w8a8(x, weight, scales, None, None, bias, True))
    if groups == 1:
        y = int8.linear_llm_int8_cuda(x, weight, scales, bias, 6.0)
        assert torch.equal(y, ops.linear_llm_int8(x, weight, scales, bias, 6.0))


@pytest.mark.parametrize(("sym", "columns"), [(True, 2**17), (False, 65808)])
def test_torch_computes_where_sums_could_overflow(sym: bool, columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x, (weight, scales, bias) = activations(1, columns, torch.bfloat16), weights(8, columns, torch.bfloat16)
    launched = []
    monkeypatch.setattr(cuda, "call", lambda name, *_: launched.append(name))
    y = int8.linear_w8a8_cuda(x, weight, scales, None, None, bias, sym)
    assert torch.equal(y, ops.linear_w8a8(x, weight, scales, None, None, bias, sym))
    assert not launched
    int8.linear_w8a8_cuda(x[:, :-16], weight[:, :-16].contiguous(), scales, None, None, bias, sym)
    assert launched


@pytest.mark.parametrize("older", [True, False])
def test_torch_computes_where_there_are_no_kernels(older: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if older:
        monkeypatch.setattr(wna16, "card", lambda device: wna16.Card(40, (7, 5)))
    else:
        monkeypatch.setattr(cuda, "library", lambda: None)
    x, (weight, scales, bias) = activations(3, 96, torch.float16), weights(16, 96, torch.float16)
    y = int8.linear_w8a8_cuda(x, weight, scales, None, None, bias, act_sym=False)
    assert torch.equal(y, ops.linear_w8a8(x, weight, scales, None, None, bias, False))
    y = int8.linear_llm_int8_cuda(x, weight, scales, bias, 6.0)
    assert torch.equal(y, ops.linear_llm_int8(x, weight, scales, bias, 6.0))


def test_any_memory_layout_of_x_computes_the_same() -> None:
    x, (weight, scales, bias) = activations(6, 96, torch.bfloat16), weights(16, 96, torch.bfloat16)
    expected = int8.linear_w8a8_cuda(x, weight, scales, None, None, bias, act_sym=True)
    shifted = torch.cat([torch.zeros(3, dtype=x.dtype), x.flatten()])[3:].view(6, 96)
    for other in (shifted, x.t().contiguous().t()):
        assert torch.equal(int8.linear_w8a8_cuda(other, weight, scales, None, None, bias, act_sym=True), expected)
    assert int8.linear_w8a8_cuda(x[:0], weight, scales, None, None, bias, act_sym=True).shape == (0, 16)
    assert int8.linear_llm_int8_cuda(x[0], weight, scales, bias, 6.0).shape == (16,)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.ones(2, 48, dtype=torch.bfloat16)}, r"x is bfloat16 \[2, 48\], the weight has 32 columns"),
        ({"qweight": torch.ones(16, 32)}, r"qweight is float32 \[16, 32\], expected int8"),
        ({"scales": torch.ones(8, 1)}, r"scales are float32 \[8, 1\], expected \[16, groups\]"),
        ({"bias": torch.ones(8)}, r"bias is float32 \[8\], expected \[16\]"),
        ({"input_scale": torch.ones(2)}, r"input_scale has 2 numbers, expected 1"),
    ],
)
def test_arguments_that_do_not_fit_are_refused_before_a_launch(
    change: dict[str, torch.Tensor], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda, "call", lambda *_: pytest.fail("launched"))
    arguments = {
        "x": torch.ones(2, 32, dtype=torch.bfloat16),
        "qweight": torch.ones(16, 32, dtype=torch.int8),
        "scales": torch.ones(16, 1),
        "bias": None,
    } | change
    with pytest.raises(ValueError, match=message):
        int8.linear_w8a8_cuda(**{"input_scale": None, "input_zero": None, "act_sym": True} | arguments)
    if "input_scale" not in change:
        with pytest.raises(ValueError, match=message):
            int8.linear_llm_int8_cuda(**arguments, threshold=6.0)


def test_torch_accepts_the_cuda_functions_as_operators() -> None:
    """Here they get CPU tensors, so they are registered under other names, with the shape functions of theirs."""
    x, (weight, scales, bias) = activations(5, 96, torch.bfloat16), weights(24, 96, torch.bfloat16)
    w8a8 = torch.library.custom_op("quantool_test::linear_w8a8", int8.linear_w8a8_cuda, mutates_args=())
    llm = torch.library.custom_op("quantool_test::linear_llm_int8", int8.linear_llm_int8_cuda, mutates_args=())
    w8a8.register_fake(ops.linear_w8a8)
    llm.register_fake(ops.linear_llm_int8)
    torch.library.opcheck(w8a8, (x.view(1, 5, 96), weight, scales, None, None, bias, True))
    torch.library.opcheck(w8a8, (x, weight, scales, *numbers(0.1, 3), None, False))
    torch.library.opcheck(llm, (x.view(1, 5, 96), weight, scales, bias, 6.0))
    torch.library.opcheck(llm, (x, weight, scales, None, 0.0))
    for name in ("linear_w8a8", "linear_llm_int8"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"quantool::{name}", "CUDA")
