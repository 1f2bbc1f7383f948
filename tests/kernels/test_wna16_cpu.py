"""Compiled linears over packed rows: the weights are torch's bit for bit, the products those of float64."""

import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from quantool import kernels
from quantool.kernels import ops, rows
from quantool.kernels.rows import Packed

LIMIT = settings(deadline=None, max_examples=60)
FEW = rows.FEW_TOKENS
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
EPSILON = {torch.float32: 2e-6, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}  # of one rounding, or of float32 sums


@pytest.fixture(scope="module", autouse=True)
def _needs_kernels() -> None:
    reason = kernels.why_not()
    if reason is not None:
        pytest.skip(reason)


@dataclass(frozen=True)
class Case:
    rows: int = 7
    groups: int = 3
    group_size: int = 32
    bits: int = 4
    sym: bool = False
    scale_dtype: torch.dtype = torch.float32
    seed: int = 0

    @property
    def columns(self) -> int:
        return self.groups * self.group_size

    def packed(self) -> Packed:
        random = torch.Generator().manual_seed(self.seed)
        codes = torch.randint(0, 1 << self.bits, (self.rows, self.columns), generator=random, dtype=torch.uint8)
        scales = torch.randn(self.rows, self.groups, generator=random).to(self.scale_dtype)
        zeros = torch.randint(0, 1 << self.bits, scales.shape, generator=random, dtype=torch.uint8)
        return ops.pack_bits(codes, self.bits), scales, None if self.sym else zeros, self.bits

    def weight(self) -> torch.Tensor:
        qweight, scales, zeros, bits = self.packed()
        return ops.dequantize(ops.unpack_bits(qweight, bits, self.columns), scales, zeros, bits)

    def tokens(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        random = torch.Generator().manual_seed(self.seed + 1)
        return torch.randn(*shape, self.columns, generator=random).to(dtype)


# Groups of whole chunks, or one of any size: odd ones end within a word, and a row then begins with any word.
GROUPS = st.one_of(
    st.tuples(st.integers(1, 6), st.sampled_from([32, 64, 96, 128])), st.tuples(st.just(1), st.integers(1, 200))
)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    groups, size = draw(GROUPS)
    return Case(
        draw(st.integers(1, 9)),
        groups,
        size,
        draw(st.integers(2, 8)),
        draw(st.booleans()),
        draw(st.sampled_from(DTYPES)),
        draw(st.integers(0, 2**32)),
    )


def linear(x: torch.Tensor, packed: Packed, bias: torch.Tensor | None = None) -> torch.Tensor:
    qweight, scales, zeros, bits = packed
    assert rows.fits(x, packed)
    y: torch.Tensor = ops.linear_wna16(x, qweight, scales, zeros, bias, bits)
    return y


def assert_close(y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
    """Of the order of the terms, which may cancel."""
    assert y.dtype == x.dtype
    offset = torch.zeros(len(weight)).double() if bias is None else bias.double()
    expected = x.double() @ weight.double().T + offset
    size = x.double().abs() @ weight.double().abs().T + offset.abs()
    assert bool(((y.double() - expected).abs() <= EPSILON[y.dtype] * size).all())


@pytest.mark.parametrize("dtype", DTYPES)
@LIMIT
@given(cases())
@example(Case(1, 1, 1, 3))
@example(Case(5, 1, 33, 7, True))
@example(Case(2, 200, 32, 5))
def test_dequantized_rows_are_those_of_torch(dtype: torch.dtype, case: Case) -> None:
    library = kernels.compiled()
    assert library is not None
    wide = torch.full((case.rows + 2, case.columns), 7.0).to(dtype)
    rows.dequantize_rows(library, case.packed(), wide[1:-1])
    assert torch.equal(wide[1:-1], case.weight().to(dtype))
    assert bool((wide[[0, -1]] == 7).all())


@pytest.mark.parametrize("dtype", DTYPES)
def test_rounding_of_every_kind_of_float_is_torchs(dtype: torch.dtype) -> None:
    """Subnormal, halfway, overflowing, infinite and NaN scales."""
    special = [1e-40, 6e-8, 2.0**-25, 65520 / 127, 3e38, math.inf, math.nan, 1 + 2.0**-8, 1 + 2.0**-11, -0.0]
    scales = torch.tensor(special).unsqueeze(1)
    codes = torch.arange(256, dtype=torch.uint8).expand(len(special), 256)
    weight = torch.empty(len(special), 256, dtype=dtype)
    library = kernels.compiled()
    assert library is not None
    rows.dequantize_rows(library, (ops.pack_bits(codes, 8), scales, None, 8), weight)
    expected = ops.dequantize(codes, scales, None, 8).to(dtype)
    torch.testing.assert_close(weight, expected, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(weight.signbit() & ~weight.isnan(), expected.signbit() & ~expected.isnan())


@LIMIT
@given(cases(), st.sampled_from(DTYPES), st.integers(0, 60), st.booleans())
@example(Case(9, 1, 31, 3), torch.float32, 15, True)
@example(Case(9, 2, 64, 4), torch.bfloat16, FEW[torch.bfloat16] + 1, True)
def test_linear_is_the_formula(case: Case, dtype: torch.dtype, tokens: int, biased: bool) -> None:
    x, weight = case.tokens(tokens, dtype=dtype), case.weight()
    bias = torch.randn(case.rows, generator=torch.Generator().manual_seed(2)).to(dtype) if biased else None
    if rows._product_dtype(x) == torch.bfloat16 and tokens > FEW[torch.bfloat16]:
        weight = weight.to(dtype)  # what torch multiplies
    assert_close(linear(x, case.packed(), bias), x, weight, bias)


@pytest.mark.parametrize("capability", ["AVX512", "AVX2"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("slab", [1, 96 * 3, 96 * 11, 1 << 21])
def test_slabs_of_any_size_are_put_together(
    slab: int, dtype: torch.dtype, capability: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows, "SLAB", slab)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    case = Case(rows=11)
    x, bias = case.tokens(2, 20, dtype=dtype), torch.linspace(-9, 9, 11).to(dtype)
    weight = case.weight()
    if dtype == torch.bfloat16 and capability == "AVX512":
        weight = weight.to(dtype)
    y = linear(x, case.packed(), bias)
    assert y.shape == (2, 20, 11)
    assert_close(y, x, weight, bias)


def test_any_memory_layout_gives_the_same() -> None:
    case = Case(rows=6, groups=2, group_size=64, bits=3)
    qweight, scales, zeros, bits = case.packed()
    assert zeros is not None
    x = case.tokens(2, 3)
    expected = linear(x, (qweight, scales, zeros, bits))

    def scattered(tensor: torch.Tensor) -> torch.Tensor:
        """The same values, further apart."""
        return torch.stack((tensor, torch.zeros_like(tensor)), dim=-1)[..., 0]

    assert torch.equal(linear(scattered(x), (qweight, scales, zeros, bits)), expected)
    assert torch.equal(linear(x.transpose(0, 1), (qweight, scales, zeros, bits)), expected.transpose(0, 1))
    apart = scattered(qweight), scattered(scales), scattered(zeros), bits
    assert torch.equal(linear(x, apart), expected)
    assert torch.equal(linear(x, (qweight[1:], scales[1:], zeros[1:], bits)), expected[..., 1:])
    assert torch.equal(linear(x[0, 0], (qweight, scales, zeros, bits)), expected[0, 0])
    assert linear(x[:0], (qweight, scales, zeros, bits)).shape == (0, 3, 6)


@pytest.mark.parametrize("bits", [3, 4])
def test_few_tokens_are_the_same_whatever_the_number_of_threads(bits: int) -> None:
    case = Case(rows=1030, groups=4, group_size=128, bits=bits, scale_dtype=torch.bfloat16)
    x, packed, before = case.tokens(FEW[torch.float32]), case.packed(), torch.get_num_threads()
    outputs = []
    try:
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            outputs.append(linear(x, packed))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(y, outputs[0]) for y in outputs[1:])
    assert_close(outputs[0], x, case.weight())


@pytest.mark.parametrize("tokens", [3, FEW[torch.float32] + 1])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_stays_in_its_token(value: float, tokens: int) -> None:
    case = Case(bits=2)
    x = case.tokens(tokens)
    clean = linear(x, case.packed())
    x[1, 40] = value
    y = linear(x, case.packed())
    others = [t for t in range(tokens) if t != 1]
    assert torch.equal(y[others], clean[others])
    sign = torch.sign(case.weight()[:, 40] * value)  # NaN where the weight is 0
    expected = torch.where(sign == 0, math.nan, sign * math.inf) if math.isinf(value) else torch.full((7,), math.nan)
    torch.testing.assert_close(y[1], expected, equal_nan=True)


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        (Case(groups=4, group_size=8), torch.float32),  # of no whole chunks
        (Case(groups=3, group_size=48), torch.float32),
        (Case(bits=1), torch.float32),
        (Case(), torch.float64),
    ],
)
def test_what_no_kernel_takes_torch_computes(case: Case, dtype: torch.dtype) -> None:
    qweight, scales, zeros, bits = case.packed()
    x = case.tokens(5, dtype=dtype)
    assert not rows.fits(x, case.packed())
    y = ops.linear_wna16(x, qweight, scales, zeros, None, bits)
    torch.testing.assert_close(y, x @ case.weight().to(dtype).T)


def test_switched_off_it_is_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(rows=65, groups=5)
    (qweight, scales, zeros, bits), x = case.packed(), case.tokens(3, 4)
    arguments = x, qweight, scales, zeros, torch.ones(65), bits
    expected, compiled = ops.linear_wna16_reference(*arguments), ops.linear_wna16(*arguments)
    monkeypatch.setenv("QUANTOOL_KERNELS", "0")
    assert torch.equal(ops.linear_wna16(*arguments), expected)
    assert not torch.equal(compiled, expected)  # another order of the sums: the kernel did compute
    torch.testing.assert_close(compiled, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, FEW[torch.float32] + 1])
def test_torch_accepts_it(tokens: int, dtype: torch.dtype) -> None:
    case = Case(scale_dtype=dtype)
    qweight, scales, zeros, bits = case.packed()
    x = case.tokens(2, tokens, dtype=dtype)
    torch.library.opcheck(ops.linear_wna16, (x, qweight, scales, zeros, torch.ones(7, dtype=dtype), bits))
    torch.library.opcheck(ops.linear_wna16, (x, qweight, scales, None, None, bits))
