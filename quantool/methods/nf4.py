r"""NF4 and FP4: every weight becomes the nearest of 16 levels times the largest magnitude of its block.

Codes and the absmax of every block are made in kernels/nf4.py. Double quantization then stores the absmax in 8 bits:

    offset = mean(absmax)       d = absmax - offset, in blocks of 256       top[j] = max |d| over block j
    scales = quant_map[nearest(d / top[j])] * top[j] + offset

where quant_map is the dynamic map: for e = 0, ..., 6 the midpoints of 2^e equal parts of [0.1, 1] times 10^(e - 6),
with both signs, and 0 and 1.

Everything is float32 and bit for bit what bitsandbytes 0.50 computes on a CPU, whose arithmetic shows in ties and in
the last bit: d is multiplied by the reciprocal of top (0 / 0 is code 0), and its nearest code is looked up at one of
65536 positions of [-1, 1] instead of at the value itself (by its compiled library; without it, bitsandbytes takes the
nearest). The mean is torch's, whose last bit depends on the number of threads.

Sources: QLoRA, Dettmers et al. 2023; bitsandbytes, functional.py (create_dynamic_map), csrc/cpu_ops.cpp (quantize_cpu).
"""

import torch

from quantool.errors import QuantoolError
from quantool.kernels.nf4 import quantize_levels
from quantool.kernels.ops import ABSMAX_BLOCK, dequantize_absmax
from quantool.methods.rtn import piece_of
from quantool.model.memory import in_pieces
from quantool.quant import DoubleQuant, QuantizedTensor, RoundScales
from quantool.scheme import MethodOptions, QuantScheme

POSITIONS = 65536


def quantize_weight(
    weight: torch.Tensor, scheme: QuantScheme, round_scales: RoundScales, *, options: MethodOptions
) -> QuantizedTensor:
    """W float [N, K] in any dtype -> its codes, and scales float32 [B]; a piece at a time is in float32.

    Raises QuantoolError when double quantization meets scales whose mean float32 does not hold.
    """
    flat, size = weight.reshape(-1), scheme.group_size
    codes = torch.empty(flat.numel(), dtype=torch.uint8, device=flat.device)
    absmax = torch.empty(-(-flat.numel() // size), dtype=torch.float32, device=flat.device)

    def fill(blocks: slice) -> None:
        weights = slice(blocks.start * size, blocks.stop * size)
        codes[weights], absmax[blocks] = quantize_levels(flat[weights], scheme.dtype, size)

    for _ in in_pieces("blocks", absmax.numel(), max(1, piece_of(weight) // size), fill):
        pass
    double = _double_quantize(absmax.cpu()) if scheme.double_quant else None  # few, and the mean is that of a CPU
    if double is not None:
        absmax = dequantize_absmax(double.codes, double.quant_map, double.absmax, double.offset).to(flat.device)
    return QuantizedTensor(codes.view(weight.shape), absmax, None, scheme, double=double, weight_dtype=weight.dtype)


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
