r"""GPTQ: round a weight column by column, and let the columns still to come make up for the error of each.

With X the inputs of a linear and H = X^T X / tokens + damping, the least of ||(W - Q) X^T||^2 over the columns not yet
rounded, given the error of column i, is found in the Cholesky factor U of the inverse, H^-1 = U^T U (U upper):

    q_i = Q(w_i)     e = (w_i - q_i) / U[i, i]     w_j -= e U[i, j]   for every j > i

Columns are taken in blocks: inside a block one by one (kernels/ops.py, compiled where there is a compiler), after it
all later columns at once, which is the same sum in another order.

`actorder` is the order of the columns. "static": by falling diagonal of H, so that the columns that matter most are
rounded while most others can still make up for them; the grid of every group is fixed beforehand, so groups stay
contiguous in storage and no runtime needs to know. "group": the same order, but a group is of neighbours in that
order, which runtimes need `g_idx` for. "none": as stored. With the last two the grid of a group is taken from the
weights as they are when its first column is reached.

A channel that calibration never used has no part in this: its column is rounded to nearest. Where H is not positive
definite it is damped ten times more, twice; then the caller rounds to nearest instead, and says so.

Frantar et al. 2022, GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers, section 3.3.
"""

import math

import torch

from quantool.kernels.ops import gptq_columns
from quantool.methods.clip import search_grid
from quantool.methods.statistics import Factor, Inputs
from quantool.quant import QuantizedTensor, RoundScales
from quantool.scheme import PER_TENSOR, MethodOptions, QuantScheme

BLOCK = 128  # columns
DAMPING_STEPS = 3


def quantize_weight(
    weight: torch.Tensor, scheme: QuantScheme, round_scales: RoundScales, *, inputs: Inputs, options: MethodOptions
) -> QuantizedTensor | None:
    """Codes of W float32 [N, K] given what reaches it; None when no damping makes its Hessian positive definite."""
    if inputs.factor is None:  # linears that share their input share this
        inputs.factor = factorise(inputs.moment, damp_percent=options.damp_percent, actorder=options.actorder)
    if inputs.factor is None:
        return None
    return round_columns(weight, scheme, round_scales, inputs.factor, actorder=options.actorder)


def factorise(moment: torch.Tensor, *, damp_percent: float, actorder: str) -> Factor | None:
    """What GPTQ needs of the second moment [K, K]; None when no damping makes it positive definite."""
    order = torch.arange(len(moment), device=moment.device)
    if actorder != "none":
        order = moment.diagonal().argsort(descending=True, stable=True)
    U = inverse_factor(moment[order][:, order], damp_percent)
    diagonal = moment.diagonal()
    return None if U is None else Factor(order, U, diagonal + damp_percent * diagonal.mean())


def round_columns(
    weight: torch.Tensor,
    scheme: QuantScheme,
    round_scales: RoundScales,
    factor: Factor,
    *,
    actorder: str,
    block_size: int = BLOCK,
) -> QuantizedTensor:
    """GPTQ of W float32 [N, K]: the codes of its columns in the order of `factor`."""
    order, U, cost = factor
    columns, width = weight.shape[1], scheme.width(weight.shape[1])
    W = weight[:, order].contiguous()
    fixed = actorder == "static" or scheme.group_size == PER_TENSOR
    if fixed:
        groups = order // width
        scales, zeros = search_grid(weight, scheme, round_scales, cost)
    else:
        groups = torch.arange(columns, device=weight.device) // width
        cost = cost[order]
        scales, zeros = search_grid(W, scheme, round_scales, cost)
        block_size = math.gcd(block_size, width)
    codes = torch.empty_like(W, dtype=torch.uint8)
    for start in range(0, columns, block_size):
        end = min(start + block_size, columns)
        if not fixed and start % width == 0:
            here = slice(start, start + width)
            new_scales, new_zeros = search_grid(W[:, here].contiguous(), scheme, round_scales, cost[here])
            scales[:, start // width] = new_scales[:, 0]
            if zeros is not None and new_zeros is not None:
                zeros[:, start // width] = new_zeros[:, 0]
        shift = torch.full_like(scales, scheme.zero) if zeros is None else zeros
        codes[:, start:end], errors = gptq_columns(
            W[:, start:end],
            U[start:end, start:end],
            scales.float(),
            shift.float(),
            groups[start:end].to(torch.int32),
            scheme.max_code,
        )
        W[:, end:].addmm_(errors, U[start:end, end:], alpha=-1)
    stored = torch.empty_like(codes).index_copy_(1, order, codes)
    g_idx = None
    if not fixed and actorder == "group" and scheme.group_size > 0:
        g_idx = torch.empty_like(groups).index_copy_(0, order, groups).to(torch.int32)
    return QuantizedTensor(stored, scales, zeros, scheme, g_idx=g_idx)


def inverse_factor(moment: torch.Tensor, damp_percent: float) -> torch.Tensor | None:
    """U float32 [K, K], upper triangular with U^T U = (H + damping)^-1; None when no damping makes H positive definite.

    With rows and columns reversed, H = R R^T where R is upper triangular, and U is its inverse: one factorisation and
    one triangular inverse in float64, where the textbook's way needs two factorisations and a full inverse.
    """
    H = moment.double()
    mean = H.diagonal().mean()
    unused = H.diagonal() <= 0
    for step in range(DAMPING_STEPS):
        damped = H.flip(0, 1)  # a copy
        damped.diagonal().add_(damp_percent * 10**step * mean)
        damped.diagonal()[unused.flip(0)] = mean if mean > 0 else 1.0
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            return _inverse(lower.flip(0, 1)).float()
    return None


def _inverse(R: torch.Tensor) -> torch.Tensor:
    """Inverse of an upper triangular matrix by halves, whose work is in products: torch has no routine of its own."""
    size = len(R)
    if size <= 64:
        small: torch.Tensor = torch.linalg.solve_triangular(R, torch.eye(size).to(R), upper=True)
        return small
    half = size // 2
    out = torch.zeros_like(R)
    out[:half, :half], out[half:, half:] = _inverse(R[:half, :half]), _inverse(R[half:, half:])
    out[:half, half:] = -out[:half, :half] @ R[:half, half:] @ out[half:, half:]
    return out
