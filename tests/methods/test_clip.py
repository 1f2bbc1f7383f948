"""The clip search against explicit loops over rows, groups and ratios in float64."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantool.methods.clip import RATIOS, best_ratios, quantize_clipped
from quantool.quant import QuantizedTensor, dequantize_affine, round_affine
from quantool.scheme import PER_CHANNEL, PER_TENSOR, QuantScheme

LIMIT = settings(deadline=None, max_examples=40)
N, K = 5, 32


def as_bfloat16(scales: torch.Tensor) -> torch.Tensor:
    return scales.clamp(min=2.0**-126).to(torch.bfloat16)


def make_weight(seed: int) -> torch.Tensor:
    random = torch.Generator().manual_seed(seed)
    weight = torch.randn(N, K, generator=random)
    weight[:, 3] *= 4
    weight[2] += 0.5
    weight[4, :16] = 0
    return weight


def make_moment(seed: int) -> torch.Tensor:
    """Mean of x x^T of inputs whose channels differ in size and depend on each other."""
    random = torch.Generator().manual_seed(seed + 1000)
    x = torch.randn(200, K, generator=random) * torch.logspace(-1, 1, K)
    x = x + 0.5 * x.roll(1, dims=1)
    return x.T @ x / 200


def candidate(values: np.ndarray, scheme: QuantScheme, ratio: float) -> tuple[float, float, np.ndarray]:
    """Scale, zero and codes of values that share one scale, their range shrunk by `ratio`."""
    top = 2**scheme.bits - 1
    low = np.float32(min(0, values.min())) * np.float32(ratio)
    high = np.float32(max(0, values.max())) * np.float32(ratio)
    wide = max(high, -low) / np.float32(top / 2) if scheme.sym else (high - low) / np.float32(top)
    scale = as_bfloat16(torch.tensor([wide])).float().numpy()[0]
    zero = 2 ** (scheme.bits - 1) if scheme.sym else int(np.clip(np.round(-low / scale), 0, top))
    return float(scale), zero, np.clip(np.round(values / scale) + zero, 0, top)


def brute_force(
    weight: torch.Tensor, scheme: QuantScheme, moment: torch.Tensor | None
) -> dict[tuple[int, int], list[tuple[float, float, np.ndarray]]]:
    """For every group all candidates as (error, scale, codes), in the order of RATIOS."""
    width = scheme.group_size if scheme.group_size > 0 else K
    out = {}
    for n in range(N):
        for g in range(K // width):
            here = slice(g * width, (g + 1) * width)
            values = weight[n, here].numpy()
            gram = np.eye(width) if moment is None else moment[here, here].double().numpy()
            found = []
            for ratio in RATIOS:
                scale, zero, codes = candidate(values, scheme, ratio)
                e = scale * (codes - zero) - values.astype(np.float64)
                found.append((float(e @ gram @ e), scale, codes))
            out[n, g] = found
    return out


def group_errors(weight: torch.Tensor, q: QuantizedTensor, moment: torch.Tensor | None) -> np.ndarray:
    """e H_g e^T of every group, float64 [N, G]."""
    groups = q.scales.shape[1]
    width = K // groups
    e = (dequantize_affine(q).double() - weight.double()).numpy()
    h = np.eye(K) if moment is None else moment.double().numpy()
    out = np.zeros((N, groups))
    for n in range(N):
        for g in range(groups):
            here = slice(g * width, (g + 1) * width)
            out[n, g] = e[n, here] @ h[here, here] @ e[n, here]
    return out


def grams_of(moment: torch.Tensor | None, width: int) -> torch.Tensor | None:
    return None if moment is None else torch.stack([moment[i : i + width, i : i + width] for i in range(0, K, width)])


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("group_size", [8, 16, PER_CHANNEL])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_every_group_takes_the_best_of_all_ratios(bits: int, group_size: int, sym: bool, weighted: bool) -> None:
    scheme = QuantScheme(bits, group_size, sym)
    width = scheme.width(K)
    for seed in range(3):
        weight = make_weight(seed)
        moment = make_moment(seed) if weighted else None
        ratios = best_ratios(weight, scheme, as_bfloat16, grams_of(moment, width))
        for (n, g), candidates in brute_force(weight, scheme, moment).items():
            taken = min(range(len(RATIOS)), key=lambda i: abs(RATIOS[i] - float(ratios[n, g])))
            # float32 may order candidates that are equal to its precision in another way
            assert candidates[taken][0] <= min(error for error, _, _ in candidates) * (1 + 1e-4) + 1e-12, (n, g)


def fitted_error(values: np.ndarray, gram: np.ndarray, scheme: QuantScheme, ratio: float) -> float:
    """The group's error after two literal rounds of fitting the scale to the codes it gives."""
    scale, zero, codes = candidate(values, scheme, ratio)
    top, wide = 2**scheme.bits - 1, values.astype(np.float64)

    def error(s: float, q: np.ndarray) -> float:
        e = s * (q - zero) - wide
        return float(e @ gram @ e)

    for _ in range(2):
        q = codes - zero
        if q @ gram @ q <= 0 or q @ gram @ wide <= 0:
            break
        other = float(as_bfloat16(torch.tensor([(q @ gram @ wide) / (q @ gram @ q)])).float())
        other_codes = np.clip(np.round(values / np.float32(other)) + zero, 0, top)
        if error(other, other_codes) < error(scale, codes):
            scale, codes = other, other_codes
    return error(scale, codes)


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("group_size", [8, 16, PER_CHANNEL])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_scales_are_fitted_to_their_codes(bits: int, group_size: int, sym: bool, weighted: bool) -> None:
    scheme = QuantScheme(bits, group_size, sym)
    width = scheme.width(K)
    weight, moment = make_weight(0), make_moment(0) if weighted else None
    ratios = best_ratios(weight, scheme, as_bfloat16, grams_of(moment, width))
    errors = group_errors(weight, quantize_clipped(weight, scheme, as_bfloat16, moment), moment)
    unfitted = 0.0
    for (n, g), candidates in brute_force(weight, scheme, moment).items():
        here = slice(g * width, (g + 1) * width)
        gram = np.eye(width) if moment is None else moment[here, here].double().numpy()
        wanted = fitted_error(weight[n, here].numpy(), gram, scheme, float(ratios[n, g]))
        # A fit that rounds to the other of two bfloat16 neighbours differs by this much at most.
        assert errors[n, g] <= wanted * 1.02 + 1e-12, (n, g)
        unfitted += min(error for error, _, _ in candidates)
    assert errors.sum() <= unfitted * (1 + 1e-3)


def test_ranges_are_shrunk_where_few_values_need_them() -> None:
    """Of normal weights in large groups nearly all at 3 bits, and much; at 8 bits hardly any."""
    weight = torch.randn(16, 512, generator=torch.Generator().manual_seed(0))
    low = best_ratios(weight, QuantScheme(3, 128), as_bfloat16, None)
    high = best_ratios(weight, QuantScheme(8, 128), as_bfloat16, None)
    assert (low < 1).float().mean() > 0.9
    assert low.mean() < 0.85
    assert high.mean() > 0.95


def test_fitting_is_worth_it() -> None:
    scheme = QuantScheme(4, 64, sym=False)
    weight = torch.randn(64, 512, generator=torch.Generator().manual_seed(0))
    ratios = best_ratios(weight, scheme, as_bfloat16, None)
    clipped = round_affine(weight, scheme, as_bfloat16, clip=ratios)
    fitted = dequantize_affine(quantize_clipped(weight, scheme, as_bfloat16))
    assert (fitted - weight).square().sum() < 0.99 * (clipped - weight).square().sum()


def test_the_search_is_worth_it_and_depends_on_the_moment() -> None:
    scheme = QuantScheme(3, 16, sym=False)
    weight, moment = make_weight(0), make_moment(0)
    with_moment = quantize_clipped(weight, scheme, as_bfloat16, moment)
    without = quantize_clipped(weight, scheme, as_bfloat16)
    assert not torch.equal(with_moment.codes, without.codes)
    assert group_errors(weight, with_moment, moment).sum() < 0.95 * group_errors(weight, without, moment).sum()
    assert group_errors(weight, without, None).sum() < 0.95 * group_errors(weight, with_moment, None).sum()


@LIMIT
@given(
    st.builds(QuantScheme, st.integers(2, 8), st.sampled_from([8, 16, PER_CHANNEL, PER_TENSOR]), st.booleans()),
    st.booleans(),
    st.integers(0, 2**31),
)
def test_no_group_is_worse_than_unclipped(scheme: QuantScheme, weighted: bool, seed: int) -> None:
    weight = make_weight(seed)
    moment = make_moment(seed) if weighted else None
    q = quantize_clipped(weight, scheme, as_bfloat16, moment)
    width = K // q.scales.shape[1]
    plain = np.zeros(q.scales.shape)
    for n, g in np.ndindex(plain.shape):
        here = slice(g * width, (g + 1) * width)
        values = weight[n, here].numpy()
        if scheme.group_size == PER_TENSOR:
            scale, zero, codes = candidate(weight.numpy(), scheme, 1.0)
            codes = codes[n]
        else:
            scale, zero, codes = candidate(values, scheme, 1.0)
        e = scale * (codes - zero) - values
        plain[n, g] = e @ (np.eye(width) if moment is None else moment[here, here].double().numpy()) @ e
    errors = group_errors(weight, q, moment)
    if scheme.group_size == PER_TENSOR:
        errors, plain = errors.sum(), plain.sum()
    assert (errors <= plain * (1 + 1e-4) + 1e-9).all()


def test_one_ratio_for_the_whole_tensor() -> None:
    """Per tensor the error that counts is that of all rows together."""
    weight = make_weight(1)
    q = quantize_clipped(weight, QuantScheme(3, PER_TENSOR), as_bfloat16)
    assert q.scales.unique().numel() == 1
    totals = []
    for ratio in RATIOS:
        scale, zero, codes = candidate(weight.numpy(), QuantScheme(3, PER_TENSOR), ratio)
        totals.append((((scale * (codes - zero) - weight.double().numpy()) ** 2).sum(), scale))
    assert float(q.scales[0, 0]) == min(totals)[1]


def test_a_scaled_moment_and_scaled_weights_are_the_same_problem() -> None:
    """One factor on all weights, and one on all inputs, change no code."""
    weight, moment = make_weight(0)[:4], make_moment(0)
    scheme = QuantScheme(4, 16, sym=False)
    q = quantize_clipped(weight, scheme, as_bfloat16, moment)
    scaled = quantize_clipped(weight * 4, scheme, as_bfloat16, moment * 64)
    assert torch.equal(q.codes, scaled.codes)
    assert torch.equal(q.scales * 4, scaled.scales)
    assert q.zeros is not None
    assert scaled.zeros is not None
    assert torch.equal(q.zeros, scaled.zeros)


def test_nothing_is_changed_in_place() -> None:
    weight, moment = make_weight(0), make_moment(0)
    copies = weight.clone(), moment.clone()
    quantize_clipped(weight, QuantScheme(4, 16), as_bfloat16, moment)
    assert torch.equal(weight, copies[0])
    assert torch.equal(moment, copies[1])
