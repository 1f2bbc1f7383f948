"""The searches of ggml's K-quants in torch: which scale (and minimum) of a group of weights loses least.

    search_affine    x ~ scale * code - min, codes 0..max_code     make_qkx2_quants, make_qkx3_quants
    search_positive  x ~ scale * code, x >= 0, codes 0..max_code   make_qp_quants: scales of scales
    search_signed    x ~ scale * code, codes -half..half-1         make_qx_quants
    descend_signed   the same by coordinate descent                make_q3_quants

x and the weights w of its errors are [..., count, B]: `count` weights of a group along the last dimension but one, as
many groups as you like in the others. Sums over a group add one weight after the other, in float32, and no expression
is regrouped: the bytes in the end are ggml's, which the compiled kernels (kernels/csrc/kquants_search.h) give as well.

Source: ggml-quants.c of https://github.com/ggml-org/ggml
"""

from dataclasses import dataclass

import torch
from torch import Tensor

EPSILON = 1e-15  # ggml's GROUP_MAX_EPS: a group below it is zero
SWEEPS = 5  # of coordinate descent
MAGIC = 12582912.0  # 1.5 * 2^23: adding it leaves the nearest integer, ties to even, in the last bits


@dataclass(frozen=True, slots=True)
class Steps:
    """Candidates for the number of steps from the least to the largest value: max_code + first + delta * (0..count)."""

    first: float
    delta: float
    count: int


@dataclass(frozen=True, slots=True)
class Affine:
    """x ~ scale * code - min, where the search had code = round(inverse * (x - base)). Each [..., B]."""

    scale: Tensor
    min: Tensor
    inverse: Tensor
    base: Tensor


def scalar(value: float) -> Tensor:
    """A float32 number, so that what is computed with it is rounded as in C."""
    return torch.tensor(value, dtype=torch.float32)


def over(value: Tensor | float, divisor: Tensor) -> Tensor:
    """value / divisor in one rounding; torch takes a number times the reciprocal."""
    return (value if isinstance(value, Tensor) else scalar(value)) / divisor


def square_root(value: Tensor) -> Tensor:
    """Rounded correctly; torch's own float32 may be off by one bit."""
    return value.double().sqrt().float()


def total(terms: Tensor) -> Tensor:
    """The sum over the last dimension but one, in order."""
    result = torch.zeros_like(terms[..., 0, :])
    for term in terms.unbind(-2):
        result += term
    return result


def group(value: Tensor) -> Tensor:
    """One number per group, to go with each of its weights."""
    return value.unsqueeze(-2)


def clamp(value: Tensor, low: float, high: float) -> Tensor:
    """NaN becomes `low`, as in a comparison."""
    return torch.fmin(torch.fmax(value, scalar(low)), scalar(high))


def nearest(value: Tensor) -> Tensor:
    """The nearest integer, ties to even, int32; from 2^22 on whatever ggml's nearest_int makes of the bits."""
    return ((value + MAGIC).view(torch.int32) & 0x7FFFFF) - 0x400000


def _usable(inverse: Tensor) -> Tensor:
    """Infinite where the range is next to nothing: ggml's rounding then gives code 0."""
    return torch.where(inverse == torch.inf, 0, inverse)


def affine_codes(x: Tensor, inverse: Tensor, base: Tensor, max_code: int) -> Tensor:
    """The codes that a search meant, whole numbers in float32."""
    return clamp(torch.round(group(inverse) * (x - group(base))), 0, max_code)


def _penalty(error: Tensor, absolute: bool) -> Tensor:
    return error.abs() if absolute else error * error


def _fit(w: Tensor, wx: Tensor, wl: Tensor, wll: Tensor, wxl: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Least squares for x ~ scale * code + low with low <= 0, of sums over a group; and where there is a solution."""
    determinant = w * wll - wl * wl
    scale, low = (w * wxl - wx * wl) / determinant, (wll * wx - wl * wxl) / determinant
    positive = low > 0
    return torch.where(positive, wxl / wll, scale), torch.where(positive, 0, low), determinant > 0


def search_affine(x: Tensor, w: Tensor, *, max_code: int, steps: Steps, absolute: bool) -> Affine:
    """`absolute` sums |error|, not its square. Each candidate starts from the best low so far, as ggml's does."""
    low, high = x.amin(-2).clamp(max=0), x.amax(-2)
    sum_w, sum_x = total(w), total(w * x)
    flat = high <= low
    scale, base = over(1, over(max_code, high - low)), low
    inverse = base_inverse = _usable(over(max_code, high - low))
    codes = affine_codes(x, inverse, low, max_code)
    least = total(w * _penalty(group(scale) * codes + group(low) - x, absolute))
    for i in range(steps.count + 1):
        inverse = _usable(over(scalar(steps.first) + scalar(steps.delta) * i + max_code, high - low))
        codes = affine_codes(x, inverse, low, max_code)
        product = w * codes
        fitted, minimum, valid = _fit(sum_w, sum_x, total(product), total(product * codes), total(product * x))
        error = total(w * _penalty(group(fitted) * codes + group(minimum) - x, absolute))
        better = valid & (error < least)
        least = torch.where(better, error, least)
        base_inverse = torch.where(better, inverse, base_inverse)
        base = torch.where(better, low, base)
        scale = torch.where(better, fitted, scale)
        low = torch.where(better, minimum, low)
    scale, base_inverse, base = (torch.where(flat, 0, value) for value in (scale, base_inverse, base))
    return Affine(scale, -low, base_inverse, base)


def _descend(x: Tensor, w: Tensor, codes: Tensor, sums: tuple[Tensor, Tensor], *, low: int | None, high: int) -> Tensor:
    """Gauss-Seidel: each code in turn moves to the one best for the scale of all others, if the error falls with it.

    `sums` of w x code and w code^2 are those of `codes`, which change. `low` is None for scales of scales. The result
    is the least-squares scale.
    """
    product = w * x
    wxl, wll = sums
    for _ in range(SWEEPS):
        changed = False
        for k in range(x.shape[-2]):
            xk, wk, wx, old = x[..., k, :], w[..., k, :], product[..., k, :], codes[..., k, :]
            rest_xl, rest_ll = wxl - wx * old, wll - wk * old * old
            better = rest_xl > 0
            if low is None:
                better &= rest_ll > 0
            code = nearest(xk * rest_ll / rest_xl).clamp(low, high).to(torch.float32)
            rest_xl += wx * code
            rest_ll += wk * code * code
            better &= (code != old) & (rest_ll > 0) & (rest_xl * rest_xl * wll > wxl * wxl * rest_ll)
            codes[..., k, :] = torch.where(better, _last_byte(code) if low is None else code, old)
            wxl, wll = torch.where(better, rest_xl, wxl), torch.where(better, rest_ll, wll)
            changed |= bool(better.any())
        if not changed:
            break
    return torch.where(wll > 0, wxl / wll, 0)


def _last_byte(code: Tensor) -> Tensor:
    """ggml keeps the codes of scales in bytes, also those that are negative or beyond all bounds."""
    return (code.to(torch.int32) & 255).to(torch.float32)


def search_positive(x: Tensor, w: Tensor, *, max_code: int) -> tuple[Tensor, Tensor]:
    """The scale [..., B] and the codes [..., count, B], whole numbers in float32, of x >= 0.

    A negative x, which an affine search can leave where few weights count, ends up as a large code: as in ggml.
    """
    high = x.amax(-2)
    best, least = over(max_code, high), None
    for i in (None, -4, -3, -2, -1, 1, 2, 3, 4):
        inverse = best if i is None else over(scalar(0.1) * i + max_code, high)
        codes = nearest(group(inverse) * x).clamp(max=max_code).to(torch.float32)
        difference = x - group(over(1, inverse)) * codes
        error = total(w * difference * difference)
        better = torch.ones_like(error, dtype=torch.bool) if least is None else error < least
        least = error if least is None else torch.where(better, error, least)
        best = torch.where(better, inverse, best)
    codes = nearest(group(best) * x).clamp(max=max_code).to(torch.float32)
    sums = total(w * x * codes), total(w * codes * codes)
    codes = _last_byte(codes)
    scale = _descend(x, w, codes, sums, low=None, high=max_code)
    zero = high < EPSILON
    return torch.where(zero, 0, scale), torch.where(group(zero), 0, codes.clamp(max=max_code))


def signed_max(x: Tensor) -> Tensor:
    """The first of the x of largest magnitude, with its sign. NaN, from sums that overflow, counts for nothing."""
    x = x.nan_to_num(0.0, torch.inf, -torch.inf)
    return x.gather(-2, group(x.abs().argmax(-2)))[..., 0, :]


def signed_codes(x: Tensor, inverse: Tensor, half: int) -> Tensor:
    """The codes that a search meant, whole numbers in float32."""
    return clamp(torch.round(group(inverse) * x), -half, half - 1)


def search_signed(x: Tensor, w: Tensor, *, half: int) -> tuple[Tensor, Tensor]:
    """The scale and its inverse [..., B], from which come the codes: `signed_codes`."""
    high, wx = signed_max(x), w * x
    best = over(-half, high)
    scale = gain = torch.zeros_like(best)
    for i in (None, *range(-9, 0), *range(1, 10)):
        inverse = best if i is None else over(-(half + scalar(0.1) * i), high)
        codes = signed_codes(x, inverse, half)
        wxl, wll = total(wx * codes), total(w * codes * codes)
        better = wll != 0 if i is None else (wll > 0) & (wxl * wxl > gain * wll)
        best = torch.where(better | (i is None), inverse, best)
        scale = torch.where(better, wxl / wll, scale)
        gain = torch.where(better, scale * wxl, gain)
    zero = high.abs() < EPSILON
    return torch.where(zero, 0, scale), torch.where(zero, 0, best)


def descend_signed(x: Tensor, w: Tensor, *, half: int) -> tuple[Tensor, Tensor]:
    """The scale [..., B] and the codes [..., count, B]."""
    high = signed_max(x)
    codes = signed_codes(x, over(-half, high), half)
    sums = total(w * x * codes), total(w * codes * codes)
    scale = _descend(x, w, codes, sums, low=-half, high=half - 1)
    return torch.where(high.abs() < EPSILON, 0, scale), codes
