r"""NF4 and FP4: every weight becomes the nearest of 16 levels times the largest magnitude of its block.

With W flattened row by row and cut into blocks of `group_size` (they may cross rows, the last may be shorter):

    absmax[b] = max |W| over block b        codes[i] = nearest(W[i] / absmax[b])        W[i] ~ absmax[b] * level[code]

An exact midpoint between two levels goes to the lower one. Double quantization then stores the absmax in 8 bits:

    offset = mean(absmax)       d = absmax - offset, in blocks of 256       top[j] = max |d| over block j
    scales = quant_map[nearest(d / top[j])] * top[j] + offset

where quant_map is the dynamic map: for e = 0, ..., 6 the midpoints of 2^e equal parts of [0.1, 1] times 10^(e - 6),
with both signs, and 0 and 1.

Everything is float32 and bit for bit what bitsandbytes 0.50 computes on a CPU, whose arithmetic shows in ties and in
the last bit: a whole block is multiplied by the reciprocal of its absmax, of which 1e-38 is the least, and a shorter
last block is divided by it. d is multiplied by the reciprocal of top without such a bound (a block of zeros gets
code 0), and its nearest code is looked up at one of 65536 positions of [-1, 1] instead of at the value itself (by
its compiled library; without it, bitsandbytes takes the nearest). The mean is torch's, whose last bit depends on the
number of threads.

Sources: QLoRA, Dettmers et al. 2023; bitsandbytes, backends/default/ops.py (quantize_4bit), functional.py
(create_dynamic_map), csrc/cpu_ops.cpp (quantize_cpu).
"""

import torch

from quantool.errors import QuantoolError
from quantool.kernels.ops import ABSMAX_BLOCK, dequantize_absmax, levels
from quantool.methods.rtn import PIECE
from quantool.quant import DoubleQuant, QuantizedTensor, RoundScales
from quantool.scheme import MethodOptions, QuantScheme

LEAST_ABSMAX = 1e-38
POSITIONS = 65536


def quantize_weight(
    weight: torch.Tensor, scheme: QuantScheme, round_scales: RoundScales, *, options: MethodOptions
) -> QuantizedTensor:
    """W float [N, K] in any dtype -> its codes, and scales float32 [B]; a piece at a time is in float32.

    Raises QuantoolError when double quantization meets scales whose mean float32 does not hold.
    """
    flat, size = weight.reshape(-1), scheme.group_size
    table, order = levels(scheme.dtype).sort(stable=True)
    bounds, order = ((table[:-1] + table[1:]) / 2).tolist(), order.to(torch.uint8)
    codes = torch.empty(flat.numel(), dtype=torch.uint8)
    absmax = torch.empty(-(-flat.numel() // size), dtype=torch.float32)
    whole, step = flat.numel() - flat.numel() % size, max(1, PIECE // size) * size
    for start in range(0, whole, step):
        end = min(start + step, whole)
        piece = flat[start:end].to(torch.float32).view(-1, size)
        top = piece.abs().amax(1)
        absmax[start // size : end // size] = top
        scaled = (piece * (1 / top.clamp(min=LEAST_ABSMAX)).unsqueeze(1)).clamp_(-1, 1)
        codes[start:end] = order.index_select(0, _nearest(scaled.view(-1), bounds))
    if whole < flat.numel():
        rest = flat[whole:].to(torch.float32)
        absmax[-1] = rest.abs().max().clamp(min=LEAST_ABSMAX)
        codes[whole:] = order.index_select(0, _nearest((rest / absmax[-1]).clamp_(-1, 1), bounds))
    double = _double_quantize(absmax) if scheme.double_quant else None
    if double is not None:
        absmax = dequantize_absmax(double.codes, double.quant_map, double.absmax, double.offset)
    return QuantizedTensor(codes.view(weight.shape), absmax, None, scheme, double=double, weight_dtype=weight.dtype)


def _nearest(values: torch.Tensor, bounds: list[float]) -> torch.Tensor:
    """How many of the ascending `bounds` are below each value: int32 [n]. Faster than torch.bucketize."""
    count = torch.zeros(values.shape, dtype=torch.uint8)
    above = torch.empty(values.shape, dtype=torch.bool)
    for bound in bounds:
        count += torch.gt(values, bound, out=above)
    return count.to(torch.int32)


def _double_quantize(absmax: torch.Tensor) -> DoubleQuant:
    """Absmax float32 [B] in 8 bits."""
    quant_map, offset = dynamic_map(), absmax.mean()
    if not bool(torch.isfinite(offset)):
        raise QuantoolError(
            f"the largest weights of {absmax.numel()} blocks have no mean in float32, up to {float(absmax.max()):g}",
            hint="leave this linear in float: --ignore NAME",
        )
    codes, top = quantize_dynamic(absmax - offset, quant_map)
    return DoubleQuant(codes, quant_map, top, offset)


def quantize_dynamic(values: torch.Tensor, quant_map: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes uint8 [B] of float32 values in blocks of 256, and the largest magnitude of each block."""
    blocks = torch.nn.functional.pad(values, (0, -values.numel() % ABSMAX_BLOCK)).view(-1, ABSMAX_BLOCK)
    top = blocks.abs().amax(1)
    scaled = (blocks * (1 / top).unsqueeze(1)).clamp_(-1, 1).nan_to_num_(nan=-1)  # 0 / 0: a block of zeros
    positions = (scaled + 1).mul_((POSITIONS - 1) / 2).add_(0.5).to(torch.int32)
    centers = (torch.arange(POSITIONS, dtype=torch.float64) / ((POSITIONS - 1) / 2) - 1).to(torch.float32)
    nearest = torch.bucketize(centers, (quant_map[:-1] + quant_map[1:]) / 2).to(torch.uint8)
    return nearest[positions].view(-1)[: values.numel()], top


def dynamic_map() -> torch.Tensor:
    """The 256 values of bitsandbytes' signed dynamic data type, ascending: float32."""
    values = [torch.tensor([0.0, 1.0])]
    for exponent in range(7):
        edges = torch.linspace(0.1, 1, 2**exponent + 1, dtype=torch.float32)
        middles = (edges[:-1] + edges[1:]) / 2 * 10.0 ** (exponent - 6)
        values += [middles, -middles]
    return torch.cat(values).sort().values
