"""The encoder of 4-bit levels in the emulator: codes and scales of torch to the bit. Those test_nf4.py asks about."""

from dataclasses import dataclass

import pytest
import torch
from emulated import Emulated
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from quantool.kernels import cuda, nf4, ops
from quantool.methods import nf4 as method
from quantool.quant import QuantizedTensor
from quantool.scheme import MethodOptions, QuantScheme

LIMIT = settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
VALUES = ("normal", "zeros", "one-each", "denormal", "large", "ties", "inf", "nan")


@dataclass(frozen=True)
class Case:
    values: str
    count: int = 1000
    block_size: int = 64
    kind: str = "nf4"
    dtype: torch.dtype = torch.bfloat16
    seed: int = 0

    def weight(self) -> torch.Tensor:
        random = torch.Generator().manual_seed(self.seed)
        weight = torch.randn(self.count, generator=random)
        some = torch.rand(self.count, generator=random)
        if self.values == "zeros":
            weight[: self.count // 2] = -0.0
            weight[-(self.count // 4) :] = 0
        elif self.values == "one-each":  # the largest of a block at any place, of either sign
            weight.clamp_(-0.1, 0.1)[some < 1 / self.block_size] *= 100
        elif self.values == "denormal":
            weight *= torch.finfo(self.dtype).tiny / 4
        elif self.values == "large":
            weight *= torch.finfo(self.dtype).max / 8
        elif self.values == "ties":  # the midpoints between levels of blocks whose largest is 1, and their neighbours
            table = ops.levels(self.kind).sort().values
            middles = (table[:-1] + table[1:]) / 2
            edges = torch.cat(
                [middles, torch.nextafter(middles, torch.tensor(9.0)), torch.nextafter(middles, -middles)]
            )
            weight = edges[torch.randint(0, len(edges), (self.count,), generator=random)]
            weight[:: self.block_size] = 1 + some[0]
            weight[1:] *= 1 + some[0]
        elif self.values in {"inf", "nan"}:
            weight[some < 0.02] = float(self.values)
            weight[some > 0.98] = -float(self.values)
        return weight.to(self.dtype)


CASES = st.builds(
    Case,
    values=st.sampled_from(VALUES),
    count=st.integers(1, 3000),
    block_size=st.sampled_from([8, 24, 32, 64, 128, 256, 264, 512, 1024, 4096]),
    kind=st.sampled_from(["nf4", "fp4"]),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    seed=st.integers(0, 99),
)


def assert_same(found: tuple[torch.Tensor, ...], expected: tuple[torch.Tensor, ...]) -> None:
    """Codes and absmax are equal, with NaN where NaN is."""
    assert torch.equal(found[0], expected[0])
    assert found[1].dtype == torch.float32
    assert torch.equal(*(absmax.masked_fill(absmax.isnan(), -1) for absmax in (found[1], expected[1])))


@LIMIT
@given(case=CASES)
@example(case=Case("ties", dtype=torch.float32))
@example(case=Case("ties", 4096 + 40, 4096, "fp4", torch.float32))
@example(case=Case("one-each", 3 * 4096, 4096))
@example(case=Case("zeros", 130, 64))
@example(case=Case("denormal", 77, 64, dtype=torch.float32))
@example(case=Case("nan", 3000, 512, dtype=torch.float32))
def test_codes_and_scales_are_torchs(emulated: Emulated, case: Case) -> None:
    weight = case.weight()
    emulated.seed(case.seed)
    found = nf4.quantize_levels_cuda(weight, case.kind, case.block_size)
    assert_same(found, nf4.quantize_levels(weight, case.kind, case.block_size))


@pytest.mark.parametrize("values", ["nan", "inf"])
@pytest.mark.usefixtures("emulated")
def test_what_is_no_number_stays_in_its_block(values: str) -> None:
    weight = torch.ones(3, 64)
    weight[1, 5] = float(values)
    for quantize in (nf4.quantize_levels, nf4.quantize_levels_cuda):
        codes, absmax = quantize(weight, "nf4", 64)
        assert [str(number) for number in absmax.tolist()] == ["1.0", values, "1.0"]
        assert codes[[0, 2]].eq(15).all()
        assert codes[1, 5] == 0  # inf / inf is no number either


def test_results_do_not_depend_on_the_order_of_threads(emulated: Emulated) -> None:
    weight, results = Case("normal", 20_000, 256).weight(), []
    for seed in (1, 2):
        emulated.seed(seed)
        results.append(nf4.quantize_levels_cuda(weight, "nf4", 256))
    assert_same(*results)


@pytest.mark.usefixtures("emulated")
def test_one_launch_reads_the_weight_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    called, call = [], cuda.call
    monkeypatch.setattr(cuda, "call", lambda *arguments: called.append(arguments) or call(*arguments))
    weight = Case("normal", 1001).weight()
    nf4.quantize_levels_cuda(weight, "nf4", 64)
    [(name, passed, *_)] = called
    assert name == "quantool_nf4_encode"
    assert passed.data_ptr() == weight.data_ptr()


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.usefixtures("emulated")
def test_the_method_gives_the_same_with_the_kernel(
    double: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = Case("normal", 120 * 333, dtype=dtype).weight().view(120, 333)
    scheme = QuantScheme(4, 64, dtype="nf4", double_quant=double)

    def quantized() -> QuantizedTensor:
        return method.quantize_weight(weight, scheme, lambda scales: scales, options=MethodOptions())

    expected = quantized()
    monkeypatch.setattr(method, "quantize_levels", nf4.quantize_levels_cuda)
    found = quantized()
    assert_same((found.codes, found.scales), (expected.codes, expected.scales))


@pytest.mark.usefixtures("emulated")
def test_any_memory_layout_gives_the_same() -> None:
    wide = torch.randn(8, 200, generator=torch.Generator().manual_seed(0))
    for weight in (wide[:, 7:135], wide.flatten()[1 : 1 + 8 * 128].view(8, 128), wide.t().contiguous().t()):
        expected = nf4.quantize_levels(weight.clone(memory_format=torch.contiguous_format), "fp4", 64)
        for quantize in (nf4.quantize_levels_op, nf4.quantize_levels_cuda):
            codes, absmax = quantize(weight, "fp4", 64)
            assert codes.is_contiguous()
            assert codes.shape == weight.shape
            assert_same((codes, absmax), expected)


@pytest.mark.parametrize("count", [0, 1])
@pytest.mark.usefixtures("emulated")
def test_hardly_any_weight(count: int) -> None:
    codes, absmax = nf4.quantize_levels_cuda(torch.full((count,), -3.0), "nf4", 64)
    assert (codes.tolist(), absmax.tolist()) == ([0] * count, [3.0] * count)


def test_torch_computes_what_fits_no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = Case("normal").weight()
    monkeypatch.setattr(cuda, "call", lambda *_: pytest.fail("launched"))
    for arguments in ((weight, "nf4", 12), (weight.double(), "nf4", 64)):
        assert_same(nf4.quantize_levels_cuda(*arguments), nf4.quantize_levels(*arguments))
    monkeypatch.setattr(cuda, "library", lambda: None)
    assert_same(nf4.quantize_levels_cuda(weight, "nf4", 64), nf4.quantize_levels(weight, "nf4", 64))


@pytest.mark.parametrize("op", [nf4.quantize_levels, nf4.quantize_levels_op, nf4.quantize_levels_cuda])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.zeros(4, 64, dtype=torch.int8)}, r"weight is int8 \[4, 64\], expected floating point"),
        ({"kind": "int4"}, "blocks of 64 int4 levels, expected at least 1 of nf4 or fp4"),
        ({"block_size": 0}, "blocks of 0 nf4 levels"),
    ],
)
def test_arguments_that_do_not_fit_are_refused_before_a_launch(
    op: object, change: dict[str, object], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda, "call", lambda *_: pytest.fail("launched"))
    with pytest.raises(ValueError, match=message):
        op(*({"weight": torch.zeros(4, 64), "kind": "nf4", "block_size": 64} | change).values())


@pytest.mark.parametrize("shape", [(6, 128), (1001,)])
@pytest.mark.usefixtures("emulated")
def test_torch_accepts_them_as_operators(shape: tuple[int, ...]) -> None:
    """The CUDA function gets CPU tensors here, so it is registered under another name."""
    arguments = (torch.randn(shape, generator=torch.Generator().manual_seed(0)), "nf4", 64)
    torch.library.opcheck(nf4.quantize_levels_op, arguments)
    op = torch.library.custom_op("quantool_test::quantize_levels", nf4.quantize_levels_cuda, mutates_args=())
    op.register_fake(lambda weight, kind, block_size: nf4._room_for(weight, block_size))
    torch.library.opcheck(op, arguments)
    assert torch._C._dispatch_has_kernel_for_dispatch_key("quantool::quantize_levels", "CUDA")
