"""GPTQ's column loops in the emulator: torch's to the bit, the algorithm in float64, and a linear rounded with them."""

import math

import numpy as np
import pytest
import torch
from emulated import Emulated
from gptq_blocks import MISFITS, MISFITS_OF_DESCENT, Case, cases, one_column_at_a_time, require_same
from hypothesis import HealthCheck, example, given, settings

from quantool.kernels import cuda, gptq_ops
from quantool.methods import descent, gptq
from quantool.methods.statistics import Factor, Inputs
from quantool.scheme import PER_TENSOR, MethodOptions, QuantScheme

LIMIT = settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])


@LIMIT
@given(case=cases(70, 128))
@example(case=Case(70, 128, 3, 4, sym=False, strided=True))
@example(case=Case(32, 128, 1, 4))
@example(case=Case(33, 121, 9, 8, scattered=True))
@example(case=Case(1, 1, 1, 2))
@example(case=Case(40, 40, 1, 8, values="large"))
@example(case=Case(40, 40, 1, 2, values="ties"))
@example(case=Case(40, 100, 2, 4, values="small", sym=False))
@example(case=Case(40, 100, 2, 4, values="nan"))
def test_columns_are_torchs_to_the_bit(emulated: Emulated, case: Case) -> None:
    emulated.seed(case.seed)
    arguments = case.arguments()
    before = arguments[0].clone()
    require_same(gptq_ops.gptq_columns_cuda(*arguments), gptq_ops.gptq_columns_reference(*arguments))
    assert torch.equal(arguments[0].view(torch.int32), before.view(torch.int32))


@LIMIT
@given(case=cases(70, 128))
@example(case=Case(70, 128, 3, 4, strided=True))
@example(case=Case(33, 121, 9, 8, scattered=True, seed=1))
@example(case=Case(1, 1, 1, 2))
@example(case=Case(40, 40, 1, 8, values="large"))
@example(case=Case(40, 100, 2, 4, values="nan"))
def test_the_descent_is_torchs_to_the_bit(emulated: Emulated, case: Case) -> None:
    emulated.seed(case.seed)
    arguments = case.descent()
    before = arguments[4].clone()
    require_same(gptq_ops.descend_columns_cuda(*arguments), gptq_ops.descend_columns_reference(*arguments))
    assert torch.equal(arguments[4], before)


def test_results_do_not_depend_on_the_order_of_threads(emulated: Emulated) -> None:
    case, results = Case(70, 100, 3, 4, sym=False), []
    for seed in (1, 2):
        emulated.seed(seed)
        results.append(gptq_ops.gptq_columns_cuda(*case.arguments()))
        results.append(gptq_ops.descend_columns_cuda(*case.descent()))
    require_same(results[0], results[2])
    require_same(results[1], results[3])


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize(
    "case", [Case(128, 64, 4, 4, sym=False), Case(96, 128, 1, 3), Case(96, 48, 3, 8, scattered=True)]
)
def test_it_is_the_algorithm(case: Case) -> None:
    codes, errors = gptq_ops.gptq_columns_cuda(*case.arguments())
    expected_codes, expected_errors, gaps = one_column_at_a_time(case.arguments())
    clear = gaps.min(1) > 1e-4  # beside a tie float32 may fall to the other side, and its row goes another way
    assert clear.mean() > 0.9
    assert np.array_equal(codes.numpy()[clear], expected_codes[clear])
    np.testing.assert_allclose(errors.numpy()[clear], expected_errors[clear], rtol=1e-3, atol=1e-4)


@pytest.mark.usefixtures("emulated")
def test_a_scale_of_zero_or_nan_is_seen_in_the_errors_only() -> None:
    arguments = Case(70, 20, 1, 4).arguments()
    arguments[2][3], arguments[2][66] = 0, math.nan
    arguments[0][3, 0] = 0  # 0 / 0
    codes, errors = gptq_ops.gptq_columns_cuda(*arguments)
    require_same((codes, errors), gptq_ops.gptq_columns_reference(*arguments))
    assert not codes[66].any()
    assert bool(errors[66].isnan().all())


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("group", [-1, 2, 2**31 - 1, -(2**31)])
def test_a_group_that_is_not_there_has_the_scale_nan(group: int) -> None:
    """Nobody reads the groups before the launch: that would wait for the GPU."""
    arguments = Case(40, 20, 2, 4).arguments()
    arguments[4][-1] = group  # the last column, so that no other takes its errors
    codes, errors = gptq_ops.gptq_columns_cuda(*arguments)
    assert not codes[:, -1].any()
    assert bool(errors[:, -1].isnan().all())
    arguments[4][-1] = 0
    expected_codes, expected_errors = gptq_ops.gptq_columns_reference(*arguments)
    assert torch.equal(codes[:, :-1], expected_codes[:, :-1])
    assert torch.equal(errors[:, :-1], expected_errors[:, :-1])


@pytest.mark.usefixtures("emulated")
def test_any_memory_layout_gives_the_same() -> None:
    arguments = Case(40, 24, 3, 4, sym=False).arguments()
    expected = gptq_ops.gptq_columns_cuda(*arguments)
    *tensors, max_code = arguments
    turned = [tensor.T.contiguous().T if tensor.dim() == 2 else tensor for tensor in tensors]
    shifted = [torch.cat([tensor.flatten()[:1], tensor.flatten()])[1:].view(tensor.shape) for tensor in tensors]
    assert all(tensor.data_ptr() % cuda.ALIGNMENT for tensor in shifted)
    require_same(gptq_ops.gptq_columns_cuda(*turned, max_code), expected)
    require_same(gptq_ops.gptq_columns_cuda(*shifted, max_code), expected)


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize(("rows", "columns"), [(0, 5), (5, 0)])
def test_there_may_be_no_rows_or_no_columns(rows: int, columns: int) -> None:
    weight, factor, scales = torch.ones(rows, columns), torch.eye(columns), torch.ones(rows, 1)
    groups, codes = torch.zeros(columns, dtype=torch.int32), torch.zeros(rows, columns, dtype=torch.uint8)
    arguments, moving = (weight, factor, scales, scales, groups, 15), (weight, factor, scales, groups, codes, 15)
    require_same(gptq_ops.gptq_columns_cuda(*arguments), gptq_ops.gptq_columns_reference(*arguments))
    require_same(gptq_ops.descend_columns_cuda(*moving), gptq_ops.descend_columns_reference(*moving))


@pytest.mark.usefixtures("emulated")
def test_torch_computes_what_the_kernel_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "call", lambda *_: pytest.fail("launched"))
    wide, usual = Case(5, gptq_ops.WIDEST + 1, 2, 4), Case(5, 20, 2, 4)
    for case in (wide, usual):
        require_same(gptq_ops.gptq_columns_cuda(*case.arguments()), gptq_ops.gptq_columns_reference(*case.arguments()))
        require_same(
            gptq_ops.descend_columns_cuda(*case.descent()), gptq_ops.descend_columns_reference(*case.descent())
        )
        monkeypatch.setattr(cuda, "library", lambda: None)


WRONG_GROUPS = {"group 3 of 3", "group -1"}  # the kernel finds these


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("misfit", sorted(MISFITS.keys() - WRONG_GROUPS))
def test_arguments_that_do_not_fit_are_refused_before_a_launch(misfit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "call", lambda *_: pytest.fail("launched"))
    with pytest.raises(ValueError, match=r"do not fit|max_code is"):
        gptq_ops.gptq_columns_cuda(*MISFITS[misfit](Case(20, 12, 3, 4).arguments()))


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("misfit", sorted(MISFITS_OF_DESCENT.keys() - WRONG_GROUPS))
def test_those_of_the_descent_too(misfit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "call", lambda *_: pytest.fail("launched"))
    with pytest.raises(ValueError, match=r"do not fit|max_code is"):
        gptq_ops.descend_columns_cuda(*MISFITS_OF_DESCENT[misfit](Case(20, 12, 3, 4).descent()))


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("name", ["gptq_columns", "descend_columns"])
def test_torch_accepts_the_cuda_function_as_operator(name: str) -> None:
    """Here it gets CPU tensors, so it is registered under another name, with the shape function of the real one."""
    op = torch.library.custom_op(f"quantool_test::{name}", getattr(gptq_ops, f"{name}_cuda"), mutates_args=())
    op.register_fake(getattr(gptq_ops, name))
    for case in (Case(20, 12, 3, 4), Case(20, 12, 3, 4, strided=True)):
        torch.library.opcheck(op, case.arguments() if name == "gptq_columns" else case.descent())
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"quantool::{name}", "CUDA")


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("actorder", ["static", "group", "none"])
@pytest.mark.parametrize(("bits", "group_size", "sym"), [(4, 32, False), (3, 64, True), (2, PER_TENSOR, True)])
def test_a_linear_has_the_codes_of_the_cpu(
    actorder: str, bits: int, group_size: int, sym: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    random = torch.Generator().manual_seed(bits)
    weight, x = (torch.randn(shape, generator=random) for shape in ((40, 192), (800, 192)))
    moment = x.T @ (x * torch.exp(torch.randn(192, generator=random))) / 800
    inputs = Inputs((moment + moment.T) / 2, x.abs().amax(0), tokens=800)
    launched, call = [], cuda.call
    monkeypatch.setattr(cuda, "call", lambda name, *arguments: launched.append(name) or call(name, *arguments))

    def quantized() -> list[torch.Tensor | None]:
        q = gptq.quantize_weight(
            weight,
            QuantScheme(bits, group_size, sym=sym),
            lambda scales: scales.to(torch.bfloat16),
            inputs=Inputs(inputs.moment, inputs.amax, inputs.tokens),
            options=MethodOptions(actorder=actorder),
            sweeps=2,
        )
        assert q is not None
        return [q.codes, q.scales, q.zeros, q.g_idx]

    on_cpu = quantized()
    assert not launched
    monkeypatch.setattr(gptq, "gptq_columns", gptq_ops.gptq_columns_cuda)
    monkeypatch.setattr(descent, "descend_columns", gptq_ops.descend_columns_cuda)
    for found, expected in zip(quantized(), on_cpu, strict=True):
        assert (found is expected is None) or torch.equal(found, expected)
    assert set(launched) == {"quantool_gptq_columns_cuda", "quantool_descend_columns_cuda"}


@pytest.mark.parametrize("actorder", ["static", "group", "none"])
@pytest.mark.parametrize(("group_size", "sym"), [(32, False), (64, True), (PER_TENSOR, True)])
def test_no_tensor_leaves_the_device_of_the_weight(actorder: str, group_size: int, sym: bool) -> None:
    """The device "meta" is no CPU either: an operation on a tensor of each is an error."""
    with torch.device("meta"):
        inputs = Inputs(torch.empty(192, 192), torch.empty(192), tokens=800)
        inputs.factor = Factor(torch.arange(192), torch.empty(192, 192), torch.empty(192))
        weight, grid = torch.empty(40, 192), torch.empty(40, 12)
    scheme, options = QuantScheme(4, group_size, sym=sym), MethodOptions(actorder=actorder)
    q = gptq.quantize_weight(
        weight, scheme, lambda scales: scales.to(torch.bfloat16), inputs=inputs, options=options, sweeps=2
    )
    codes = gptq.round_columns(weight, inputs, grid, grid, zero=3, max_code=15, damp_percent=0.01)
    assert q is not None
    assert codes is not None
    assert q.codes.is_meta
    assert q.scales.is_meta
    assert codes.is_meta
