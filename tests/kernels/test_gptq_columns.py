"""GPTQ's column loops: the compiled ones are torch's bit for bit, and all are the algorithms spelled out in float64."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from gptq_blocks import MISFITS, MISFITS_OF_DESCENT, Case, cases, one_column_at_a_time, require_same
from hypothesis import example, given, settings

from quantool import kernels
from quantool.kernels import gptq_ops


@pytest.fixture
def needs_kernels() -> None:
    reason = kernels.why_not()
    if reason is not None:
        pytest.skip(reason)


@pytest.mark.usefixtures("needs_kernels")
@settings(deadline=None, max_examples=100)
@given(case=cases(200, 200))
@example(case=Case(200, 130, 3, 4, sym=False))
@example(case=Case(64, 128, 2, 4, strided=True))
@example(case=Case(1, 1, 1, 2))
@example(case=Case(65, 40, 1, 8, values="large"))
@example(case=Case(65, 40, 1, 2, values="ties"))
def test_compiled_is_torch_to_the_bit(case: Case) -> None:
    arguments = case.arguments()
    before = arguments[0].clone()
    require_same(gptq_ops.gptq_columns(*arguments), gptq_ops.gptq_columns_reference(*arguments))
    assert torch.equal(arguments[0].view(torch.int32), before.view(torch.int32))


@pytest.mark.usefixtures("needs_kernels")
@settings(deadline=None, max_examples=100)
@given(case=cases(200, 200))
@example(case=Case(200, 130, 3, 4))
@example(case=Case(64, 128, 2, 4, strided=True))
@example(case=Case(1, 1, 1, 2))
@example(case=Case(65, 40, 1, 8, values="large"))
def test_compiled_descent_is_torch_to_the_bit(case: Case) -> None:
    arguments = case.descent()
    before = [arguments[0].clone(), arguments[4].clone()]
    require_same(gptq_ops.descend_columns(*arguments), gptq_ops.descend_columns_reference(*arguments))
    assert torch.equal(arguments[0].view(torch.int32), before[0].view(torch.int32))
    assert torch.equal(arguments[4], before[1])


@pytest.mark.usefixtures("needs_kernels")
@pytest.mark.parametrize(("rows", "columns"), [(0, 5), (5, 0)])
def test_compiled_has_no_rows_or_no_columns(rows: int, columns: int) -> None:
    arguments = (
        torch.ones(rows, columns),
        torch.eye(columns),
        torch.ones(rows, 1),
        torch.ones(rows, 1),
        torch.zeros(columns, dtype=torch.int32),
        15,
    )
    require_same(gptq_ops.gptq_columns(*arguments), gptq_ops.gptq_columns_reference(*arguments))
    descent = (*arguments[:3], arguments[4], torch.zeros(rows, columns, dtype=torch.uint8), 15)
    require_same(gptq_ops.descend_columns(*descent), gptq_ops.descend_columns_reference(*descent))


@pytest.mark.usefixtures("needs_kernels")
def test_a_scale_of_zero_or_nan_is_seen_in_the_errors_only() -> None:
    arguments = Case(70, 20, 1, 4).arguments()
    arguments[2][3], arguments[2][66] = 0, math.nan
    arguments[0][3, 0] = 0  # 0 / 0
    codes, errors = gptq_ops.gptq_columns(*arguments)
    require_same((codes, errors), gptq_ops.gptq_columns_reference(*arguments))
    assert codes[3, 0] == 0
    assert not codes[66].any()
    assert bool(errors[66].isnan().all())
    assert not errors[[*range(3), *range(4, 66), *range(67, 70)]].isnan().any()


def test_a_code_of_no_use_stays() -> None:
    """A gradient that is NaN, a diagonal element that is not positive, a scale beyond which there is nothing."""
    gradient, hessian, scales, groups, codes, max_code = Case(70, 20, 1, 4, seed=1).descent()
    gradient[3], scales[5] = math.nan, torch.finfo(torch.float32).max
    hessian[0, 0] = 0
    for function in (gptq_ops.descend_columns, gptq_ops.descend_columns_reference):
        new, moves = function(gradient, hessian, scales, groups, codes, max_code)
        assert torch.equal(new[[3, 5]], codes[[3, 5]])
        assert torch.equal(new[:, 0], codes[:, 0])
        assert not moves[[3, 5]].any()
        assert not moves[:, 0].any()
        assert not torch.equal(new, codes)


@pytest.mark.usefixtures("needs_kernels")
@pytest.mark.parametrize("name", ["gptq_columns", "descend_columns"])
def test_the_compiled_loop_is_what_runs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case, function = Case(10, 10, 1, 4), getattr(gptq_ops, name)
    arguments = case.arguments() if name == "gptq_columns" else case.descent()
    monkeypatch.delattr(gptq_ops, f"{name}_reference")
    function(*arguments)
    monkeypatch.setenv("QUANTOOL_KERNELS", "0")
    with pytest.raises(NameError, match=f"{name}_reference"):
        function(*arguments)


@pytest.mark.usefixtures("needs_kernels")
def test_any_number_of_threads_gives_the_same() -> None:
    arguments = Case(200, 130, 2, 4).arguments()
    expected = gptq_ops.gptq_columns_reference(*arguments)
    descent = Case(200, 130, 2, 4).descent()
    expected_descent = gptq_ops.descend_columns_reference(*descent)
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            require_same(gptq_ops.gptq_columns(*arguments), expected)
            require_same(gptq_ops.descend_columns(*descent), expected_descent)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(
    "case", [Case(128, 64, 4, 4, sym=False), Case(96, 64, 1, 3), Case(96, 48, 3, 8, scattered=True)]
)
def test_both_are_the_algorithm(case: Case, compiled: bool, request: pytest.FixtureRequest) -> None:
    if compiled:
        request.getfixturevalue("needs_kernels")
    function = gptq_ops.gptq_columns if compiled else gptq_ops.gptq_columns_reference
    codes, errors = function(*case.arguments())
    expected_codes, expected_errors, gaps = one_column_at_a_time(case.arguments())
    clear = gaps.min(1) > 1e-4  # beside a tie float32 may fall to the other side, and its row goes another way
    assert clear.mean() > 0.9
    assert np.array_equal(codes.numpy()[clear], expected_codes[clear])
    np.testing.assert_allclose(errors.numpy()[clear], expected_errors[clear], rtol=1e-3, atol=1e-4)


def test_torch_accepts_it() -> None:
    torch.library.opcheck(gptq_ops.gptq_columns, Case(20, 12, 3, 4).arguments())
    torch.library.opcheck(gptq_ops.gptq_columns, Case(20, 12, 3, 4, strided=True).arguments())
    torch.library.opcheck(gptq_ops.descend_columns, Case(20, 12, 3, 4).descent())
    torch.library.opcheck(gptq_ops.descend_columns, Case(20, 12, 3, 4, strided=True).descent())


@pytest.mark.parametrize("misfit", MISFITS)
@pytest.mark.parametrize("function", [gptq_ops.gptq_columns, gptq_ops.gptq_columns_reference], ids=["op", "reference"])
def test_arguments_that_do_not_fit_are_refused(function: Callable[..., object], misfit: str) -> None:
    with pytest.raises(ValueError, match=r"do not fit|groups are|max_code is"):
        function(*MISFITS[misfit](Case(20, 12, 3, 4).arguments()))


@pytest.mark.parametrize("misfit", MISFITS_OF_DESCENT)
@pytest.mark.parametrize(
    "function", [gptq_ops.descend_columns, gptq_ops.descend_columns_reference], ids=["op", "reference"]
)
def test_arguments_of_the_descent_that_do_not_fit_are_refused(function: Callable[..., object], misfit: str) -> None:
    with pytest.raises(ValueError, match=r"do not fit|groups are|max_code is"):
        function(*MISFITS_OF_DESCENT[misfit](Case(20, 12, 3, 4).descent()))
