"""The two passes of rounding to nearest: in the emulator torch's to the bit, and `quantool.quant` is made of them."""

import math
from dataclasses import dataclass

import pytest
import torch
from emulated import Emulated
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from quantool import quant
from quantool.formats import FORMATS
from quantool.kernels import rtn
from quantool.scheme import QuantScheme

LIMIT = settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
DTYPES = st.sampled_from([torch.bfloat16, torch.float16, torch.float32])
VALUES = ("normal", "zeros", "constant", "negative", "denormal", "large", "ties", "inf", "nan")


@dataclass(frozen=True)
class Case:
    values: str
    rows: int = 6
    groups: int = 2
    width: int = 128
    dtype: torch.dtype = torch.bfloat16
    seed: int = 0

    def weight(self) -> torch.Tensor:
        random = torch.Generator().manual_seed(self.seed)
        weight = torch.randn(self.rows, self.groups, self.width, generator=random)
        if self.values == "zeros":
            weight[:, ::2] = 0
            weight[:, 1::2, ::3] = -0.0
        elif self.values == "constant":
            weight[:] = weight[:, :, :1]
        elif self.values == "negative":
            weight.abs_().neg_()
        elif self.values == "denormal":
            weight *= torch.finfo(self.dtype).tiny / 4
        elif self.values == "large":
            weight *= torch.finfo(self.dtype).max / 8
        elif self.values == "ties":  # half way between two codes, for the scale 1 / 16
            weight = (weight * 16).round() / 32
        elif self.values in {"inf", "nan"}:
            weight[torch.rand(weight.shape, generator=random) < 0.02] = float(self.values)
            weight[torch.rand(weight.shape, generator=random) < 0.02] = -float(self.values)
        return weight.view(self.rows, -1).to(self.dtype)


CASES = st.builds(
    Case,
    values=st.sampled_from(VALUES),
    rows=st.integers(1, 9),
    groups=st.integers(1, 5),
    width=st.integers(1, 80).map(lambda n: 8 * n),
    dtype=DTYPES,
    seed=st.integers(0, 99),
)


def same(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Equal, with NaN where NaN is."""
    return found.dtype == expected.dtype and torch.equal(
        found.masked_fill(found.isnan(), math.inf), expected.masked_fill(expected.isnan(), math.inf)
    )


@LIMIT
@given(case=CASES)
@example(case=Case("nan", rows=3, groups=1, width=4096))
def test_ranges_are_torchs(emulated: Emulated, case: Case) -> None:
    weight = case.weight()
    emulated.seed(case.seed)
    found, expected = rtn.group_range_cuda(weight, case.groups), rtn.group_range(weight, case.groups)
    assert same(found[0], expected[0])
    assert same(found[1], expected[1])


@LIMIT
@given(case=CASES, scale_dtype=DTYPES, bits=st.integers(2, 8), sym=st.booleans())
@example(case=Case("ties"), scale_dtype=torch.float32, bits=4, sym=True)
def test_codes_are_torchs(emulated: Emulated, case: Case, scale_dtype: torch.dtype, bits: int, sym: bool) -> None:
    weight = case.weight()
    low, high = rtn.group_range(weight, case.groups)
    scales = ((high - low) / ((1 << bits) - 1)).to(scale_dtype)  # 0 of zeros, Inf and NaN where those are
    if case.values == "ties":
        scales.fill_(0.0625)
    random = torch.Generator().manual_seed(case.seed)
    zeros = None if sym else torch.randint(0, 1 << bits, scales.shape, generator=random, dtype=torch.uint8)
    emulated.seed(case.seed)
    found = rtn.quantize_affine_cuda(weight, scales, zeros, bits)
    assert torch.equal(found, rtn.quantize_affine(weight, scales, zeros, bits))


def test_ties_go_to_even() -> None:
    weight = torch.tensor([[-1.5, -0.5, 0.5, 1.5, 2.5, 3.5, 100.0, -100.0]])
    codes = rtn.quantize_affine(weight, torch.ones(1, 1), None, 4)
    assert codes.tolist() == [[6, 8, 8, 10, 10, 12, 15, 0]]


@pytest.mark.parametrize("format_name", ["compressed-tensors", "gptq"])
@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("values", VALUES[:-2])
@pytest.mark.parametrize("group_size", [32, 128, -1, 0])
@pytest.mark.usefixtures("emulated")
def test_with_the_scales_of_a_format_they_are_round_to_nearest(
    format_name: str, sym: bool, dtype: torch.dtype, values: str, group_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def round_scales(scales: torch.Tensor) -> torch.Tensor:
        return FORMATS[format_name].round_scales(scales, dtype)

    scheme = QuantScheme(bits=4, group_size=group_size, sym=sym)
    weight = Case(values, dtype=dtype).weight()
    wide = weight.to(torch.float32)
    scales, zeros = quant.choose_qparams(wide, scheme, round_scales)
    codes = quant.quantize_affine(wide, scales, zeros, scheme)
    monkeypatch.setattr(rtn, "group_range", rtn.group_range_cuda)
    monkeypatch.setattr(rtn, "quantize_affine", rtn.quantize_affine_cuda)
    found_scales, found_zeros = quant.choose_qparams(weight, scheme, round_scales)
    assert torch.equal(found_scales, scales)
    assert (found_zeros is None and zeros is None) or torch.equal(found_zeros, zeros)
    assert torch.equal(quant.quantize_affine(weight, found_scales, found_zeros, scheme), codes)


@pytest.mark.usefixtures("emulated")
def test_any_memory_layout_gives_the_same() -> None:
    wide = torch.randn(8, 200, generator=torch.Generator().manual_seed(0))
    columns, shifted = wide[:, 7:135], wide.flatten()[1 : 1 + 8 * 128].view(8, 128)
    turned = wide[:, :128].t().contiguous().t()
    for weight in (columns, shifted, turned):
        copy = weight.clone(memory_format=torch.contiguous_format)
        for group_range in (rtn.group_range_op, rtn.group_range_cuda):
            low, high = group_range(weight, 4)
            assert torch.equal(torch.stack((low, high)), torch.stack(rtn.group_range(copy, 4)))
        scales = ((high - low) / 15)[:, :1].expand(8, 4)
        for quantize_affine in (rtn.quantize_affine_op, rtn.quantize_affine_cuda):
            codes = quantize_affine(weight, scales, None, 4)
            assert codes.is_contiguous()
            assert torch.equal(codes, rtn.quantize_affine(copy, scales.contiguous(), None, 4))


@pytest.mark.usefixtures("emulated")
def test_groups_that_the_kernels_do_not_take_are_torchs() -> None:
    weight = Case("normal", groups=3, width=12).weight()
    low, high = rtn.group_range_cuda(weight, 3)
    assert torch.equal(torch.stack((low, high)), torch.stack(rtn.group_range(weight, 3)))
    scales = (high - low) / 15
    found = rtn.quantize_affine_cuda(weight, scales, None, 4)
    assert torch.equal(found, rtn.quantize_affine(weight, scales, None, 4))


@pytest.mark.parametrize("op", [rtn.quantize_affine, rtn.quantize_affine_op, rtn.quantize_affine_cuda])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"weight": torch.zeros(4, 64, dtype=torch.int32)},
            r"int32 \[4, 64\], expected a matrix of bfloat16",
        ),
        ({"weight": torch.zeros(64)}, r"weight is float32 \[64\]"),
        ({"weight": torch.zeros(4, 63)}, "63 columns, which 2 groups"),
        ({"scales": torch.ones(3, 2)}, r"scales is float32 \[3, 2\] on cpu, expected .* \[4, 2\] on cpu"),
        ({"scales": torch.ones(4, 2, dtype=torch.float64)}, "scales is float64"),
        ({"zeros": torch.zeros(4, 2)}, r"zeros is float32 \[4, 2\] on cpu, expected uint8 \[4, 2\]"),
        ({"zeros": torch.zeros(4, 1, dtype=torch.uint8)}, r"zeros is uint8 \[4, 1\]"),
        ({"bits": 9}, "bits is 9, expected 1 to 8"),
    ],
)
@pytest.mark.usefixtures("emulated")
def test_arguments_that_do_not_fit_are_refused(op: object, change: dict[str, object], message: str) -> None:
    arguments = {"weight": torch.zeros(4, 64), "scales": torch.ones(4, 2), "zeros": None, "bits": 4}
    with pytest.raises(ValueError, match=message):
        op(*(arguments | change).values())


def test_a_tensor_on_another_device_is_refused() -> None:
    with pytest.raises(ValueError, match=r"on meta, expected .* on cpu"):
        rtn.quantize_affine_cuda(torch.zeros(4, 64), torch.ones(4, 2, device="meta"), None, 4)


@pytest.mark.parametrize("op", [rtn.group_range, rtn.group_range_op, rtn.group_range_cuda])
@pytest.mark.parametrize("groups", [0, 3, -1])
def test_groups_that_do_not_divide_a_row_are_refused(op: object, groups: int) -> None:
    with pytest.raises(ValueError, match=f"64 columns, which {groups} groups do not share"):
        op(torch.zeros(4, 64), groups)


def test_torch_finds_the_ops_consistent() -> None:
    weight = Case("normal", rows=4, width=32).weight()
    scales, zeros = torch.ones(4, 2), torch.full((4, 2), 7, dtype=torch.uint8)
    torch.library.opcheck(rtn.group_range_op, (weight, 2))
    torch.library.opcheck(rtn.quantize_affine_op, (weight, scales, zeros, 4))
    torch.library.opcheck(rtn.quantize_affine_op, (weight, scales, None, 4))


def test_nothing_to_quantize_is_no_error() -> None:
    weight = torch.zeros(0, 64)
    low, high = rtn.group_range(weight, 2)
    assert low.shape == high.shape == (0, 2)
    assert rtn.quantize_affine(weight, low, None, 4).shape == (0, 64)
