r"""GPTQ: round a weight column by column, and let the columns still to come make up for the error of each.

With X the inputs of a linear and H = X^T X / tokens + damping, the least of ||(W - Q) X^T||^2 over the columns not yet
rounded, given the error of column i, is found in the Cholesky factor U of the inverse, H^-1 = U^T U (U upper):

    q_i = Q(w_i)     e = (w_i - q_i) / U[i, i]     w_j -= e U[i, j]   for every j > i

Columns are taken in blocks: inside a block one by one (kernels/gptq_ops.py, compiled where there is a compiler), after
it all later columns at once, which is the same sum in another order.

`actorder` is the order of the columns. "static": by falling diagonal of H, so that the columns that matter most are
rounded while most others can still make up for them; the grid of every group is fixed beforehand, so groups stay
contiguous in storage and no runtime needs to know. "group": the same order, but a group is of neighbours in that
order, which runtimes need `g_idx` for. "none": as stored. With the last two the grid of a group is taken from the
weights as they are when its first column is reached.

A column that is rounded is never looked at again; the sweeps of descent.py do that, over codes and over scales.

A channel that calibration never used has no part in this: its column is rounded to nearest. Where H is not positive
definite it is damped ten times more, twice; then the caller rounds to nearest instead, and says so.

Frantar et al. 2022, GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers, section 3.3.
"""

import math

import torch

from quantool.kernels.gptq_ops import gptq_columns
from quantool.methods.clip import search_grid
from quantool.methods.descent import Rounded, descend
from quantool.methods.statistics import Factor, Inputs
from quantool.quant import QuantizedTensor, RoundScales
from quantool.scheme import PER_TENSOR, MethodOptions, QuantScheme

BLOCK = 128  # columns
DAMPING_STEPS = 3
SWEEPS = 1  # of the descent: the error falls by 4, 2 and 1 % of what it was


def quantize_weight(
    weight: torch.Tensor,
    scheme: QuantScheme,
    round_scales: RoundScales,
    *,
    inputs: Inputs,
    options: MethodOptions,
    sweeps: int | None = None,
) -> QuantizedTensor | None:
    """Codes of W float32 [N, K] given what reaches it; None when no damping makes its Hessian positive definite."""
    if sweeps is None:
        sweeps = SWEEPS if scheme.bits < 8 else 0  # of the little that 8 bits lose they win nothing that can be seen
    factor = shared_factor(inputs, damp_percent=options.damp_percent, actorder=options.actorder)
    if factor is None:
        return None
    if options.actorder != "static" and scheme.group_size != PER_TENSOR:
        return _round_updated(
            weight,
            scheme,
            round_scales,
            factor=factor,
            moment=inputs.moment,
            g_idx=options.actorder == "group",
            sweeps=sweeps,
        )
    scales, zeros = search_grid(weight, scheme, round_scales, factor.cost)
    zero = _float_zeros(scales, zeros, scheme)
    rounded = _round_fixed(weight, factor, scales.float(), zero, max_code=scheme.max_code)
    refit = None if scheme.group_size == PER_TENSOR else round_scales  # its one scale is that of all rows
    descend(weight, rounded, inputs.moment, factor.cost, sweeps=sweeps, round_scales=refit)
    return QuantizedTensor(rounded.codes, rounded.step.to(scales.dtype), zeros, scheme)


def round_columns(
    weight: torch.Tensor,
    inputs: Inputs,
    step: torch.Tensor,
    offset: torch.Tensor | None,
    *,
    zero: int | torch.Tensor,
    max_code: int,
    damp_percent: float,
    sweeps: int = SWEEPS,
) -> torch.Tensor | None:
    """Codes uint8 [N, K] of W float32 [N, K] on a fixed grid: W ~ step (code - zero) - offset, 0 <= code <= max_code.

    `step` and `offset` are float32 [N, G] for groups of K / G neighbouring columns; a step may be negative, and where
    it is 0 the code is `zero`, one number or [N, G]. None when no damping makes the Hessian positive definite.
    """
    factor = shared_factor(inputs, damp_percent=damp_percent, actorder="static")
    if factor is None:
        return None
    if offset is not None:
        weight = weight + offset.repeat_interleave(weight.shape[1] // step.shape[1], 1)
    # Nothing is further than half such a step from zero, so that its code is `zero` and its value 0.
    step = step.masked_fill(step == 0, torch.finfo(torch.float32).max)
    zero = zero.float() if isinstance(zero, torch.Tensor) else torch.full_like(step, zero)
    rounded = _round_fixed(weight, factor, step, zero, max_code=max_code)
    descend(weight, rounded, inputs.moment, factor.cost, sweeps=sweeps)
    return rounded.codes


def _round_fixed(
    weight: torch.Tensor, factor: Factor, step: torch.Tensor, zero: torch.Tensor, *, max_code: int
) -> Rounded:
    """GPTQ of W float32 [N, K] on a grid fixed beforehand, columns in the order of `factor`."""
    order, U, _ = factor
    W, groups = weight[:, order], order // (weight.shape[1] // step.shape[1])
    codes = torch.empty_like(W, dtype=torch.uint8)
    for start in range(0, len(order), BLOCK):
        block = slice(start, start + BLOCK)
        codes[:, block] = _round_block(W, U, block, step, zero, groups=groups, max_code=max_code)
    return Rounded(torch.empty_like(codes).index_copy_(1, order, codes), step, zero, max_code)


def _round_updated(
    weight: torch.Tensor,
    scheme: QuantScheme,
    round_scales: RoundScales,
    *,
    factor: Factor,
    moment: torch.Tensor,
    g_idx: bool,
    sweeps: int,
) -> QuantizedTensor:
    """The codes of W float32 [N, K] when the grid of a group is taken from the weights as its first column finds them.

    Groups are of neighbours in the order of `factor`; `g_idx` says whether the result tells which.
    """
    order, U, cost = factor
    columns, width = weight.shape[1], scheme.width(weight.shape[1])
    W, cost = weight[:, order], cost[order]
    groups = torch.arange(columns, device=weight.device) // width
    scales, zeros = search_grid(W, scheme, round_scales, cost)
    block_size = math.gcd(BLOCK, width)
    codes = torch.empty_like(W, dtype=torch.uint8)
    for start in range(0, columns, block_size):
        if start % width == 0:
            here = slice(start, start + width)
            new_scales, new_zeros = search_grid(W[:, here].contiguous(), scheme, round_scales, cost[here])
            scales[:, start // width] = new_scales[:, 0]
            if zeros is not None and new_zeros is not None:
                zeros[:, start // width] = new_zeros[:, 0]
        step, zero = scales.float(), _float_zeros(scales, zeros, scheme)
        block = slice(start, start + block_size)
        codes[:, block] = _round_block(W, U, block, step, zero, groups=groups, max_code=scheme.max_code)
    rounded = Rounded(codes, scales.float(), _float_zeros(scales, zeros, scheme), scheme.max_code)
    descend(weight[:, order], rounded, moment[order][:, order], cost, sweeps=sweeps, round_scales=round_scales)
    stored = torch.empty_like(codes).index_copy_(1, order, rounded.codes)
    told = None
    if g_idx and scheme.group_size > 0:
        told = torch.empty_like(groups).index_copy_(0, order, groups).to(torch.int32)
    return QuantizedTensor(stored, rounded.step.to(scales.dtype), zeros, scheme, g_idx=told)


def _float_zeros(scales: torch.Tensor, zeros: torch.Tensor | None, scheme: QuantScheme) -> torch.Tensor:
    return torch.full_like(scales, scheme.zero, dtype=torch.float32) if zeros is None else zeros.float()


def _round_block(
    W: torch.Tensor,
    U: torch.Tensor,
    block: slice,
    step: torch.Tensor,
    zero: torch.Tensor,
    *,
    groups: torch.Tensor,
    max_code: int,
) -> torch.Tensor:
    """Codes uint8 [N, B] of one block of columns; the columns after it make up for its errors, in place."""
    codes: torch.Tensor
    codes, errors = gptq_columns(W[:, block], U[block, block], step, zero, groups[block].to(torch.int32), max_code)
    W[:, block.stop :].addmm_(errors, U[block, block.stop :], alpha=-1)
    return codes


def shared_factor(inputs: Inputs, *, damp_percent: float, actorder: str) -> Factor | None:
    """What GPTQ makes of the second moment, made once for all linears that share these inputs, or None."""
    if inputs.factor is None:
        inputs.factor = factorise(inputs.moment, damp_percent=damp_percent, actorder=actorder)
    return inputs.factor


def factorise(moment: torch.Tensor, *, damp_percent: float, actorder: str) -> Factor | None:
    """What GPTQ needs of the second moment [K, K]; None when no damping makes it positive definite."""
    order = torch.arange(len(moment), device=moment.device)
    if actorder != "none":
        order = moment.diagonal().argsort(descending=True, stable=True)
    found = inverse_factor(moment[order][:, order], damp_percent)
    if found is None:
        return None
    U, damping = found
    return Factor(order, U, moment.diagonal() + damping)


def inverse_factor(moment: torch.Tensor, damp_percent: float) -> tuple[torch.Tensor, float] | None:
    """U float32 [K, K], upper triangular with U^T U = (H + damping)^-1, and the damping.

    None when no damping makes H positive definite.

    With rows and columns reversed, H = R R^T where R is upper triangular, and U is its inverse: one factorisation and
    one triangular inverse in float64, where the textbook's way needs two factorisations and a full inverse.
    """
    H = moment.double()
    mean = H.diagonal().mean()
    unused = H.diagonal() <= 0
    for step in range(DAMPING_STEPS):
        damped = H.flip(0, 1)  # a copy
        damping = damp_percent * 10**step * float(mean)
        damped.diagonal().add_(damping)
        damped.diagonal()[unused.flip(0)] = mean if mean > 0 else 1.0
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            return _inverse(lower.flip(0, 1)).float(), damping
    return None


def _inverse(R: torch.Tensor) -> torch.Tensor:
    """Inverse of an upper triangular matrix by halves, whose work is in products: torch has no routine of its own."""
    size = len(R)
    if size <= 64:
        identity = torch.eye(size, dtype=R.dtype, device=R.device)
        small: torch.Tensor = torch.linalg.solve_triangular(R, identity, upper=True)
        return small
    half = size // 2
    out = torch.zeros_like(R)
    out[:half, :half], out[half:, half:] = _inverse(R[:half, :half]), _inverse(R[half:, half:])
    out[:half, half:] = -out[:half, :half] @ R[:half, half:] @ out[half:, half:]
    return out
