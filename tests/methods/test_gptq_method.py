"""GPTQ against the algorithm as the paper states it: one column at a time in float64, no Cholesky, no blocks."""

import numpy as np
import pytest
import torch

from quantool.formats import FORMATS
from quantool.methods import gptq
from quantool.methods.clip import search_grid
from quantool.methods.gptq import inverse_factor, quantize_weight, round_columns
from quantool.methods.statistics import Inputs
from quantool.quant import QuantizedTensor, dequantize_affine, round_affine
from quantool.scheme import PER_CHANNEL, PER_TENSOR, MethodOptions, QuantScheme

DAMP = 0.01
SHAPES = [(16, 64, 16), (64, 256, 64)]


def as_bfloat16(scales: torch.Tensor) -> torch.Tensor:
    return FORMATS["compressed-tensors"].round_scales(scales, torch.bfloat16)


def problem(rows: int, columns: int, seed: int = 0, tokens: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight, and the second moment of correlated inputs of very different sizes."""
    random = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=random) / columns**0.5 + torch.eye(columns)
    sizes = torch.exp(torch.randn(columns, generator=random))
    x = torch.randn(tokens or 4 * columns, columns, generator=random) @ mix * sizes
    return torch.randn(rows, columns, generator=random), x.T @ x / len(x)


def literal(weight: torch.Tensor, moment: torch.Tensor, q: QuantizedTensor, order: np.ndarray) -> np.ndarray:
    """Codes [N, K] on the grid of `q`: Frantar et al. 2022, equations 2 and 3, the inverse updated by elimination."""
    W = weight.double().numpy().copy()
    H = moment.double().numpy()
    dead = np.diag(H) == 0
    H = H + np.eye(len(H)) * DAMP * np.diag(H).mean()
    H[dead, dead] = np.diag(moment.double().numpy()).mean()
    inverse = np.linalg.inv(H)
    step = q.scales.double().numpy()
    zero = np.full(step.shape, 2.0 ** (q.scheme.bits - 1)) if q.zeros is None else q.zeros.double().numpy()
    width = q.scheme.width(W.shape[1])
    codes = np.zeros(W.shape, dtype=np.uint8)
    for i in order:
        g = i // width
        code = np.clip(np.round(W[:, i] / step[:, g]) + zero[:, g], 0, q.scheme.max_code)
        error = (W[:, i] - (code - zero[:, g]) * step[:, g]) / inverse[i, i]
        W -= np.outer(error, inverse[i])
        inverse -= np.outer(inverse[:, i], inverse[i]) / inverse[i, i]
        codes[:, i] = code
    return codes


def falling(moment: torch.Tensor) -> np.ndarray:
    return moment.diagonal().argsort(descending=True, stable=True).numpy()


def output_error(weight: torch.Tensor, moment: torch.Tensor, rounded: torch.Tensor) -> float:
    difference = (rounded - weight).double()
    return float(((difference @ moment.double()) * difference).sum())


def quantized(
    weight: torch.Tensor, scheme: QuantScheme, moment: torch.Tensor, *, actorder: str = "static", sweeps: int = 0
) -> QuantizedTensor:
    """What GPTQ makes of it, without the descent."""
    inputs = Inputs(moment, moment.diagonal().sqrt(), tokens=100)
    options = MethodOptions(damp_percent=DAMP, actorder=actorder)
    q = quantize_weight(weight, scheme, as_bfloat16, inputs=inputs, options=options, sweeps=sweeps)
    assert q is not None
    return q


@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize(("rows", "columns", "group_size"), SHAPES)
def test_codes_are_those_of_the_literal_algorithm(rows: int, columns: int, group_size: int, sym: bool) -> None:
    weight, moment = problem(rows, columns)
    q = quantized(weight, QuantScheme(4, group_size, sym=sym), moment)
    assert q.g_idx is None
    assert np.array_equal(q.codes.numpy(), literal(weight, moment, q, falling(moment)))


@pytest.mark.parametrize(("bits", "group_size"), [(2, 32), (3, 16), (8, PER_CHANNEL), (4, PER_TENSOR)])
def test_every_width_and_grouping(bits: int, group_size: int) -> None:
    weight, moment = problem(16, 64, seed=1)
    q = quantized(weight, QuantScheme(bits, group_size, sym=True), moment)
    assert np.array_equal(q.codes.numpy(), literal(weight, moment, q, falling(moment)))


@pytest.mark.parametrize("actorder", ["static", "group", "none"])
@pytest.mark.parametrize("sym", [True, False])
def test_blocks_change_nothing(actorder: str, sym: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, moment = problem(24, 256, seed=2)
    scheme = QuantScheme(4, 64, sym=sym)
    monkeypatch.setattr(gptq, "BLOCK", 256)
    whole = quantized(weight, scheme, moment, actorder=actorder)
    for block_size in (8, 32, 128):
        monkeypatch.setattr(gptq, "BLOCK", block_size)
        blocked = quantized(weight, scheme, moment, actorder=actorder)
        assert torch.equal(blocked.codes, whole.codes)
        assert torch.equal(blocked.scales, whole.scales)


@pytest.mark.parametrize(("rows", "columns", "group_size"), SHAPES)
def test_as_stored_the_grid_is_that_of_the_updated_weights(rows: int, columns: int, group_size: int) -> None:
    weight, moment = problem(rows, columns, seed=3)
    scheme = QuantScheme(4, group_size, sym=False)
    q = quantized(weight, scheme, moment, actorder="none")
    assert np.array_equal(q.codes.numpy(), literal(weight, moment, q, np.arange(columns)))
    # the second group's grid is fitted to what the first group's errors made of the weights, not to the weights
    cost = moment.diagonal() + DAMP * moment.diagonal().mean()
    fresh, _ = search_grid(weight, scheme, as_bfloat16, cost)
    assert torch.equal(q.scales[:, 0], fresh[:, 0])
    assert not torch.equal(q.scales[:, 1], fresh[:, 1])


def test_groups_in_the_order_of_the_hessian_are_told_by_g_idx() -> None:
    weight, moment = problem(16, 64, seed=4)
    q = quantized(weight, QuantScheme(4, 16, sym=False), moment, actorder="group")
    order = falling(moment)
    assert q.g_idx is not None
    assert np.array_equal(q.g_idx.numpy()[order], np.arange(64) // 16)
    # the same thing on columns already in that order, where nothing needs to be told
    sorted_q = quantized(weight[:, order], QuantScheme(4, 16, sym=False), moment[order][:, order], actorder="none")
    assert torch.equal(dequantize_affine(q)[:, order], dequantize_affine(sorted_q))


def test_it_halves_the_error_of_rounding_to_nearest() -> None:
    weight, moment = problem(64, 256, seed=5)
    scheme = QuantScheme(4, 64, sym=True)
    nearest = output_error(weight, moment, round_affine(weight, scheme, as_bfloat16))
    errors = {
        order: output_error(weight, moment, dequantize_affine(quantized(weight, scheme, moment, actorder=order)))
        for order in ("static", "group", "none")
    }
    assert max(errors.values()) < 0.5 * nearest
    assert errors["static"] < errors["none"]


def test_a_channel_without_input_is_rounded_to_nearest_and_disturbs_nothing() -> None:
    weight, moment = problem(16, 64, seed=6)
    moment[[5, 40]] = 0
    moment[:, [5, 40]] = 0
    q = quantized(weight, QuantScheme(4, 16, sym=False), moment)
    assert np.array_equal(q.codes.numpy(), literal(weight, moment, q, falling(moment)))
    step, zero = q.scales.float().repeat_interleave(16, 1), q.zeros.float().repeat_interleave(16, 1)
    nearest = (weight / step).round().add(zero).clamp(0, 15)
    assert torch.equal(q.codes[:, [5, 40]].float(), nearest[:, [5, 40]])


@pytest.mark.parametrize("kind", ["zeros", "constant"])
def test_weights_without_a_range(kind: str) -> None:
    weight, moment = problem(16, 64, seed=7)
    weight = torch.zeros_like(weight) if kind == "zeros" else torch.full_like(weight, 0.37)
    for sym in (True, False):
        rounded = dequantize_affine(quantized(weight, QuantScheme(4, 16, sym=sym), moment))
        assert (rounded - weight).abs().max() <= 0.37 / 7.5


def test_one_token_of_calibration_is_enough_to_be_finite() -> None:
    weight, moment = problem(16, 64, seed=8, tokens=1)
    q = quantized(weight, QuantScheme(4, 16, sym=True), moment)
    assert output_error(weight, moment, dequantize_affine(q)) < output_error(
        weight, moment, round_affine(weight, QuantScheme(4, 16, sym=True), as_bfloat16)
    )


def bent(least: float) -> torch.Tensor:
    """A symmetric matrix whose least eigenvalue is `least` times its mean diagonal, which is positive everywhere."""
    vectors, _ = torch.linalg.qr(torch.randn(32, 32, generator=torch.Generator().manual_seed(9), dtype=torch.float64))
    values = torch.linspace(1, 2, 32, dtype=torch.float64)
    values[0] = least * values.mean()
    return (vectors * values @ vectors.T).float()


def test_the_damping_climbs_until_the_hessian_is_positive_definite() -> None:
    H = bent(-0.05)  # what float32 sums of many tokens can leave, much enlarged
    found = inverse_factor(H, DAMP)
    assert found is not None
    U, damping = found
    assert torch.equal(U, U.triu())
    assert damping == pytest.approx(10 * DAMP * float(H.diagonal().double().mean()))
    damped = H.double() + torch.eye(32) * damping
    assert torch.allclose(U.double().T @ U.double(), torch.linalg.inv(damped), rtol=1e-4, atol=1e-5)


def test_after_the_last_damping_there_are_no_codes() -> None:
    H = bent(-1.5)
    assert inverse_factor(H, DAMP) is None
    inputs = Inputs(H, H.diagonal().sqrt(), tokens=100)
    assert (
        quantize_weight(torch.ones(4, 32), QuantScheme(4), as_bfloat16, inputs=inputs, options=MethodOptions()) is None
    )


def test_linears_that_share_their_input_share_its_factor() -> None:
    weight, moment = problem(16, 64, seed=10)
    inputs = Inputs(moment, moment.diagonal().sqrt(), tokens=100)
    first = quantize_weight(weight, QuantScheme(4, 16), as_bfloat16, inputs=inputs, options=MethodOptions())
    factor = inputs.factor
    second = quantize_weight(weight * 3, QuantScheme(3, 32), as_bfloat16, inputs=inputs, options=MethodOptions())
    assert inputs.factor is factor
    assert first is not None
    assert second is not None
    assert torch.equal(second.codes, quantized(weight * 3, QuantScheme(3, 32), moment, sweeps=gptq.SWEEPS).codes)


@pytest.mark.parametrize("with_offset", [True, False])
def test_a_fixed_grid_may_be_any(with_offset: bool) -> None:
    """Steps of either sign or zero, and offsets, as GGUF's K-quants have them."""
    weight, moment = problem(32, 128, seed=11)
    random = torch.Generator().manual_seed(11)
    step = torch.randn(32, 8, generator=random) / 4
    step[::5, 3] = 0
    offset = torch.rand(32, 8, generator=random) - 0.5 if with_offset else None
    inputs = Inputs(moment, moment.diagonal().sqrt(), tokens=100)
    codes = round_columns(weight, inputs, step, offset, zero=3, max_code=15, damp_percent=DAMP, sweeps=0)
    assert codes is not None
    shifted = weight if offset is None else weight + offset.repeat_interleave(16, 1)
    never = step.masked_fill(step == 0, 1e30)  # the literal algorithm divides
    grid = QuantizedTensor(codes, never, torch.full_like(step, 3), QuantScheme(4, 16, sym=False))
    assert np.array_equal(codes.numpy(), literal(shifted, moment, grid, falling(moment)))
    assert bool((codes.view(32, 8, 16)[step == 0] == 3).all())
    assert len(codes.unique()) == 16


def test_a_fixed_grid_without_a_positive_definite_hessian_has_no_codes() -> None:
    H = bent(-1.5)
    inputs, step = Inputs(H, H.diagonal().sqrt(), tokens=100), torch.ones(4, 2)
    assert round_columns(torch.ones(4, 32), inputs, step, None, zero=0, max_code=15, damp_percent=DAMP) is None
