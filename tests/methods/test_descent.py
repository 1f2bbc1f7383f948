"""The descent after GPTQ against its definition: one code, then one scale at a time in float64; no error ever rises."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from quantool.formats import FORMATS
from quantool.methods.descent import Rounded, descend
from quantool.methods.gptq import quantize_weight, round_columns
from quantool.methods.statistics import Inputs
from quantool.quant import choose_qparams, dequantize_affine, quantize_affine
from quantool.scheme import PER_CHANNEL, PER_TENSOR, MethodOptions, QuantScheme

DAMP = 0.01


def as_bfloat16(scales: torch.Tensor) -> torch.Tensor:
    return FORMATS["compressed-tensors"].round_scales(scales, torch.bfloat16)


def problem(rows: int, columns: int, seed: int = 0) -> tuple[torch.Tensor, Inputs]:
    """A weight, and the statistics of correlated inputs of very different sizes."""
    random = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=random) / columns**0.5 + torch.eye(columns)
    sizes = torch.exp(torch.randn(columns, generator=random))
    x = torch.randn(4 * columns, columns, generator=random) @ mix * sizes
    moment = x.T @ x / len(x)
    return torch.randn(rows, columns, generator=random), Inputs(moment, moment.diagonal().sqrt(), tokens=len(x))


def damped(inputs: Inputs) -> torch.Tensor:
    """The diagonal of H."""
    diagonal = inputs.moment.diagonal()
    return diagonal + DAMP * diagonal.mean()


def hessian(inputs: Inputs) -> np.ndarray:
    H = inputs.moment.double().numpy().copy()
    np.fill_diagonal(H, damped(inputs).double().numpy())
    return H


def nearest(weight: torch.Tensor, scheme: QuantScheme) -> Rounded:
    """Where a descent can begin: W rounded to nearest."""
    scales, zeros = choose_qparams(weight, scheme, as_bfloat16, clip=0.8)
    codes = quantize_affine(weight, scales, zeros, scheme)
    zero = torch.full_like(scales, scheme.zero) if zeros is None else zeros
    return Rounded(codes, scales.float(), zero.float(), scheme.max_code)


def copied(rounded: Rounded) -> Rounded:
    return replace(rounded, codes=rounded.codes.clone(), step=rounded.step.clone())


def values(rounded: Rounded) -> np.ndarray:
    step, zero = (t.double().repeat_interleave(rounded.width, 1).numpy() for t in (rounded.step, rounded.zero))
    return step * (rounded.codes.double().numpy() - zero)


def errors(weight: torch.Tensor, rounded: Rounded, inputs: Inputs) -> np.ndarray:
    """Of each row."""
    E = weight.double().numpy() - values(rounded)
    return ((E @ hessian(inputs)) * E).sum(1)


def literal(weight: torch.Tensor, rounded: Rounded, inputs: Inputs, *, sweeps: int, steps: bool) -> Rounded:
    """128 columns at a time: every code, then the step of every group, each with a fresh gradient in float64."""
    W, H, width = weight.double().numpy(), hessian(inputs), rounded.width
    out = copied(rounded)
    for start in [*range(0, W.shape[1], 128)] * sweeps:
        end = min(start + 128, W.shape[1])
        for j in range(start, end):
            wanted = ((W - values(out)) @ H[:, j]) / H[j, j] / out.step[:, j // width].double().numpy()
            code = np.clip(np.round(out.codes[:, j].double().numpy() + wanted), 0, out.max_code)
            out.codes[:, j] = torch.from_numpy(code)
        for g in range(start // width, end // width) if steps else ():
            here = slice(g * width, (g + 1) * width)
            c = out.codes[:, here].double().numpy() - out.zero[:, g, None].double().numpy()
            old = out.step[:, g].clone()
            gain = (((W - values(out)) @ H[:, here]) * c).sum(1) / ((c @ H[here, here]) * c).sum(1)
            before = errors(weight, out, inputs)
            new = as_bfloat16((old.double() + torch.from_numpy(gain)).float()).float()
            out.step[:, g] = new
            out.step[:, g] = torch.where(torch.from_numpy(errors(weight, out, inputs) < before), new, old)
    return out


@pytest.mark.parametrize("steps", [True, False])
@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize(("rows", "columns", "group_size"), [(16, 64, 16), (40, 256, 64)])
def test_it_is_the_literal_descent(rows: int, columns: int, group_size: int, sym: bool, steps: bool) -> None:
    weight, inputs = problem(rows, columns)
    start = nearest(weight, QuantScheme(4, group_size, sym=sym))
    found, expected = copied(start), literal(weight, start, inputs, sweeps=2, steps=steps)
    refit = as_bfloat16 if steps else None
    descend(weight, found, inputs.moment, damped(inputs), sweeps=2, round_scales=refit)
    assert torch.equal(found.codes, expected.codes)
    assert torch.equal(found.step, expected.step)
    assert not torch.equal(found.codes, start.codes)
    assert torch.equal(found.step, start.step) is not steps


@pytest.mark.parametrize("steps", [True, False])
@pytest.mark.parametrize(
    ("bits", "group_size", "columns"),
    [(2, 32, 256), (3, 48, 240), (4, 128, 384), (4, 192, 384), (8, PER_CHANNEL, 300), (4, PER_CHANNEL, 300)],
)
def test_no_error_rises(bits: int, group_size: int, columns: int, steps: bool) -> None:
    weight, inputs = problem(70, columns, seed=1)
    rounded = nearest(weight, QuantScheme(bits, group_size, sym=False))
    before = first = errors(weight, rounded, inputs)
    for _ in range(4):
        descend(weight, rounded, inputs.moment, damped(inputs), sweeps=1, round_scales=as_bfloat16 if steps else None)
        after = errors(weight, rounded, inputs)
        assert (after <= before * (1 + 1e-5)).all()
        before = after
    assert before.sum() < 0.7 * first.sum()


def test_in_the_end_no_single_code_can_be_better() -> None:
    weight, inputs = problem(20, 128, seed=2)
    rounded = nearest(weight, QuantScheme(3, 32, sym=False))
    descend(weight, rounded, inputs.moment, damped(inputs), sweeps=30)
    E, H = weight.double().numpy() - values(rounded), hessian(inputs)
    step = rounded.step.double().repeat_interleave(32, 1).numpy()
    codes = rounded.codes.numpy()
    for by in (-1, 1):
        rise = (by * step) ** 2 * np.diag(H) - 2 * by * step * (E @ H)
        possible = (codes > 0) if by < 0 else (codes < rounded.max_code)
        assert rise[possible].min() > -1e-5 * np.abs(E @ H).max()


def test_no_sweeps_and_a_perfect_weight_change_nothing() -> None:
    weight, inputs = problem(20, 128, seed=3)
    start = nearest(weight, QuantScheme(4, 32, sym=False))
    rounded = copied(start)
    descend(weight, rounded, inputs.moment, damped(inputs), sweeps=0, round_scales=as_bfloat16)
    exact = torch.from_numpy(values(start)).float()
    descend(exact, rounded, inputs.moment, damped(inputs), sweeps=3, round_scales=as_bfloat16)
    assert torch.equal(rounded.codes, start.codes)
    assert torch.equal(rounded.step, start.step)


@pytest.mark.parametrize("kind", ["zeros", "unused"])
def test_a_weight_or_input_of_zeros(kind: str) -> None:
    weight, inputs = problem(16, 64, seed=4)
    if kind == "zeros":
        weight.zero_()
    else:
        inputs.moment.zero_()
    rounded = nearest(weight, QuantScheme(4, 16))
    before = rounded.codes.clone()
    descend(weight, rounded, inputs.moment, damped(inputs), sweeps=2, round_scales=as_bfloat16)
    assert torch.equal(rounded.codes, before)
    assert bool(torch.isfinite(rounded.step).all())


@pytest.mark.parametrize("actorder", ["static", "group", "none"])
@pytest.mark.parametrize("group_size", [32, PER_CHANNEL])
def test_gptq_is_better_for_it_in_every_order(actorder: str, group_size: int) -> None:
    weight, inputs = problem(64, 256, seed=5)
    H, found = hessian(inputs), []
    for sweeps in (0, 1, 3):
        q = quantize_weight(
            weight,
            QuantScheme(4, group_size, sym=False),
            as_bfloat16,
            inputs=inputs,
            options=MethodOptions(damp_percent=DAMP, actorder=actorder),
            sweeps=sweeps,
        )
        assert q is not None
        assert q.scales.dtype == torch.bfloat16
        E = weight.double().numpy() - dequantize_affine(q).double().numpy()
        found.append(((E @ H) * E).sum())
    assert found[1] < 0.99 * found[0]
    assert found[2] < found[1]


@pytest.mark.parametrize("bits", [7, 8])
def test_it_is_for_less_than_8_bits(bits: int) -> None:
    weight, inputs = problem(32, 128, seed=9)
    plain, usual = (
        quantize_weight(
            weight,
            QuantScheme(bits, PER_CHANNEL),
            as_bfloat16,
            inputs=inputs,
            options=MethodOptions(damp_percent=DAMP),
            sweeps=sweeps,
        )
        for sweeps in (0, None)
    )
    assert plain is not None
    assert usual is not None
    assert torch.equal(plain.codes, usual.codes) is (bits == 8)


def test_one_scale_for_all_rows_stays_one() -> None:
    weight, inputs = problem(16, 64, seed=6)
    options = MethodOptions(damp_percent=DAMP)
    q = quantize_weight(weight, QuantScheme(4, PER_TENSOR), as_bfloat16, inputs=inputs, options=options)
    assert q is not None
    assert len(q.scales.unique()) == 1


def test_a_fixed_grid_keeps_its_steps_and_comes_closer() -> None:
    weight, inputs = problem(32, 128, seed=7)
    random = torch.Generator().manual_seed(7)
    step = (0.2 + torch.rand(32, 8, generator=random) / 10) * torch.randn(32, 8, generator=random).sign()
    step[::5, 3] = 0
    offset = torch.rand(32, 8, generator=random) / 2
    found, steps_before = [], step.clone()
    for sweeps in (0, 3):
        codes = round_columns(weight, inputs, step, offset, zero=7, max_code=15, damp_percent=DAMP, sweeps=sweeps)
        assert codes is not None
        assert bool((codes.view(32, 8, 16)[step == 0] == 7).all())
        grid = Rounded(codes, step, torch.full_like(step, 7), 15)
        found.append(errors(weight + offset.repeat_interleave(16, 1), grid, inputs))
    assert (found[1] <= found[0] * (1 + 1e-5)).all()
    assert found[1].sum() < 0.97 * found[0].sum()
    assert torch.equal(step, steps_before)


@pytest.mark.parametrize("factor", [2, -1, math.inf, math.nan])
def test_a_step_that_is_stored_worse_than_before_is_not_taken(factor: float) -> None:
    weight, inputs = problem(20, 128, seed=8)
    start = nearest(weight, QuantScheme(4, 32, sym=False))
    with_steps, without = copied(start), copied(start)
    descend(weight, with_steps, inputs.moment, damped(inputs), sweeps=2, round_scales=lambda scales: scales * factor)
    descend(weight, without, inputs.moment, damped(inputs), sweeps=2)
    assert torch.equal(with_steps.step, start.step)
    assert torch.equal(with_steps.codes, without.codes)
