"""The operators of the runtime: schema, shape function for meta tensors, and the torch reference of each.

Packed weights are `bits`-wide unsigned codes in one dense little-endian bit stream per row, in int32 words:
code k of a row starts at bit k * bits, and a code may straddle two words (3, 5, 6 and 7 bits). This is the
row layout of compressed-tensors 0.20, so 0xFE983210 holds the codes 0, 1, 2, 3, 8, 9, 14, 15.

Four-bit codes of bitsandbytes (nf4, fp4) run over the flattened weight instead, two to a byte, the first in the high
half: 12, 4, 7, 15 are 0xC4 0x7F. Each stands for one of 16 levels, and `block_size` weights in a row share a scale.

CUDA kernels register under the same schemas; a caller never asks which device it is on.
"""

from collections.abc import Callable
from typing import Any

import torch

from quantool.kernels import compiled
from quantool.kernels.rows import fits, linear_rows

WORD_BITS = 32
# NF4: quantiles of the normal distribution (QLoRA, Dettmers et al. 2023, appendix E). FP4: sign, two bits of exponent
# and one of mantissa, relative to the largest. Both in the order of their codes, as bitsandbytes stores them.
LEVELS: dict[str, tuple[float, ...]] = {
    "nf4": (
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ),
    "fp4": tuple(sign * level / 12 for sign in (1, -1) for level in (0, 0.0625, 8, 12, 4, 6, 2, 3)),
}
ABSMAX_BLOCK = 256  # scales that share a second scale, in double quantization
LLM_INT8_STEP = 6.200124e-05  # in bitsandbytes 0.50, functional on a CPU; 1 / 127^2 is 6.200012e-05

Compute = Callable[..., Any]
LIBRARY = torch.library.Library("quantool", "FRAGMENT")


def operator(
    name: str, reference: Compute, fake: Compute, *, cpu: Compute | None = None, cuda: Compute | None = None
) -> torch._ops.OpOverload:
    """quantool::NAME: REFERENCE computes it where there is no kernel, FAKE gives the shape of the result.

    What torch.library.custom_op does, without its part in autograd, 13 us a call that a token pays for every linear,
    and without importing torch._dynamo at the first, which takes a second.
    """
    LIBRARY.define(name + torch.library.infer_schema(reference, mutates_args=()))
    LIBRARY.impl(name, reference, "CompositeExplicitAutograd")
    torch.library.register_fake(f"quantool::{name}", fake, lib=LIBRARY)
    for key, kernel in (("CPU", cpu), ("CUDA", cuda)):
        if kernel is not None:
            LIBRARY.impl(name, kernel, key)
    made: torch._ops.OpOverload = getattr(torch.ops.quantool, name).default
    return made


def _of_rows(x: torch.Tensor, qweight: torch.Tensor, *_: object) -> torch.Tensor:
    """What a linear gives whose qweight has a row for each output."""
    return x.new_empty(*x.shape[:-1], qweight.shape[0])


def packed_words(count: int, bits: int) -> int:
    """Number of int32 words that hold `count` codes of `bits` bits."""
    return -(-count * bits // WORD_BITS)


def pack_bits(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes uint8 [..., K] below 2**bits -> int32 [..., ceil(K * bits / 32)], dense and little-endian.

    Eight codes at a time sit in the eight byte lanes of an int64. Each step joins neighbouring lanes, so that
    lanes of 16, 32, 64 bits hold 2, 4, 8 codes, until the codes of a lane fill whole bytes; the rest is dropped.
    """
    *lead, count = codes.shape
    if count % WORD_BITS:
        codes = torch.nn.functional.pad(codes, (0, -count % WORD_BITS))
    flat = codes.reshape(-1)
    if flat.storage_offset() % 8:  # an int64 view needs alignment
        flat = flat.clone()
    lanes, lane, width = flat.view(torch.int64), 8, bits
    while width % 8:
        low = _every(2 * lane, width)
        upper = lanes >> (lane - width)
        lanes = upper.bitwise_and_(low << width).bitwise_or_(lanes & low)
        lane, width = 2 * lane, 2 * width
    octets = lanes.view(torch.uint8).view(-1, lane // 8)[:, : width // 8]
    words: torch.Tensor = octets.reshape(-1).contiguous().view(torch.int32).view(*lead, -1)
    # clone: contiguous() keeps odd strides of dimensions of length 1, which stop a writer's view as bytes
    return words[..., : packed_words(count, bits)].clone(memory_format=torch.contiguous_format)


def unpack_bits(words: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """Inverse of `pack_bits`: int32 [..., W] -> uint8 [..., count]."""
    lane, width = 8, bits
    while width % 8:
        lane, width = 2 * lane, 2 * width
    lead = words.shape[:-1]
    if words.shape[-1] % bits:  # up to a whole number of 32 codes
        words = torch.nn.functional.pad(words, (0, -words.shape[-1] % bits))
    octets = words.reshape(-1).view(torch.uint8).view(-1, width // 8)
    octets = torch.nn.functional.pad(octets, (0, (lane - width) // 8)).view(-1)
    while lane > 8:
        lanes, lane, width = octets.view(torch.int64), lane // 2, width // 2
        low = _every(2 * lane, width)
        upper = (lanes & (low << width)) << (lane - width)
        octets = upper.bitwise_or_(lanes & low).view(torch.uint8)
    return octets.view(*lead, -1)[..., :count]


def _every(period: int, width: int) -> int:
    """64 bits of which the lowest `width` of every `period` are set."""
    return sum(((1 << width) - 1) << start for start in range(0, 64, period))


def dequantize(codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None, bits: int) -> torch.Tensor:
    """W = scales * (codes - zeros): codes uint8 [N, K], scales [N, G], zeros uint8 [N, G] or None -> float32 [N, K]."""
    rows, columns = codes.shape
    grouped = codes.view(rows, scales.shape[1], -1).to(torch.float32)
    grouped -= (1 << (bits - 1)) if zeros is None else zeros.unsqueeze(-1).to(torch.float32)
    return grouped.mul_(scales.unsqueeze(-1).to(torch.float32)).view(rows, columns)


def pack_nibbles(codes: torch.Tensor, fill: int = 0) -> torch.Tensor:
    """Codes below 16, uint8 of any shape -> uint8 [ceil(n / 2)], the first of two in the high half.

    `fill` is beside the last of an odd number.
    """
    flat = codes.reshape(-1)
    if flat.numel() % 2:
        flat = torch.nn.functional.pad(flat, (0, 1), value=fill)
    return (flat[::2] << 4).bitwise_or_(flat[1::2])


def unpack_nibbles(packed: torch.Tensor, count: int) -> torch.Tensor:
    """Inverse of `pack_nibbles`: uint8 [ceil(count / 2)] -> uint8 [count]."""
    return torch.stack((packed >> 4, packed & 0xF), dim=-1).view(-1)[:count]


def levels(dtype: str) -> torch.Tensor:
    """What the codes of "nf4" or "fp4" stand for: float32 [16], relative to the largest weight of a block."""
    return torch.tensor(LEVELS[dtype], dtype=torch.float64).to(torch.float32)


def dequantize_levels(
    qweight: torch.Tensor, absmax: torch.Tensor, table: torch.Tensor, shape: tuple[int, int], block_size: int
) -> torch.Tensor:
    """W.flatten()[i] = absmax[i // block_size] * table[code i]: qweight uint8 [ceil(NK / 2)] -> float32 [N, K]."""
    pairs = torch.cartesian_prod(table, table)  # what each byte stands for
    flat = pairs.index_select(0, qweight.to(torch.int32)).view(-1)[: shape[0] * shape[1]]
    whole = flat.numel() // block_size
    flat[: whole * block_size].view(whole, block_size).mul_(absmax[:whole].unsqueeze(-1))
    flat[whole * block_size :].mul_(absmax[whole:])  # of one last block, or of none
    return flat.view(shape)


def dequantize_absmax(
    codes: torch.Tensor, quant_map: torch.Tensor, absmax: torch.Tensor, offset: torch.Tensor
) -> torch.Tensor:
    """Scales that are quantized themselves: quant_map[codes[i]] * absmax[i // 256] + offset, float32 [B]."""
    steps = absmax.repeat_interleave(ABSMAX_BLOCK)[: codes.numel()]
    return quant_map.index_select(0, codes.to(torch.int32)).mul_(steps).add_(offset)


def linear_wna16_reference(
    x: torch.Tensor,
    qweight: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    bias: torch.Tensor | None,
    bits: int,
) -> torch.Tensor:
    """y = x W^T + bias with packed W: x [..., K], qweight int32 [N, words], scales [N, G], zeros uint8 [N, G].

    This is the oracle of the compiled kernels (csrc/wna16.cpp), and what computes where there are none.
    """
    _require_packed(x, qweight, scales, zeros, bias, bits)
    weight = dequantize(unpack_bits(qweight, bits, x.shape[-1]), scales, zeros, bits)
    return torch.nn.functional.linear(x, weight.to(x.dtype), bias)


def _linear_wna16_cpu(
    x: torch.Tensor,
    qweight: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    bias: torch.Tensor | None,
    bits: int,
) -> torch.Tensor:
    _require_packed(x, qweight, scales, zeros, bias, bits)
    packed, library = (qweight, scales, zeros, bits), compiled()
    if library is None or not fits(x, packed):
        return linear_wna16_reference(x, qweight, scales, zeros, bias, bits)
    return linear_rows(library, x, packed, bias)


linear_wna16 = operator("linear_wna16", linear_wna16_reference, _of_rows, cpu=_linear_wna16_cpu)


def _require_packed(
    x: torch.Tensor,
    qweight: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    bias: torch.Tensor | None,
    bits: int,
) -> None:
    """Raise ValueError when the arguments of `linear_wna16` do not fit: compiled code would read past their ends."""
    count, columns = len(qweight), x.shape[-1]
    tensors = [tensor for tensor in (x, qweight, scales, zeros, bias) if tensor is not None]
    if (
        qweight.shape != (count, packed_words(columns, bits))
        or qweight.dtype != torch.int32
        or scales.dim() != 2
        or scales.shape[0] != count
        or (zeros is not None and (zeros.shape != scales.shape or zeros.dtype != torch.uint8))
        or (bias is not None and bias.shape != (count,))
        or any(tensor.device != x.device for tensor in tensors)
    ):
        found = ", ".join(f"{str(t.dtype).removeprefix('torch.')} {list(t.shape)} on {t.device}" for t in tensors)
        raise ValueError(f"x, {bits}-bit qweight, scales, zeros, bias do not fit each other: {found}")
    if not scales.shape[1] or columns % scales.shape[1]:
        raise ValueError(f"{columns} columns cannot be in {scales.shape[1]} groups of the same size")


def linear_w8a8_reference(
    x: torch.Tensor,
    qweight: torch.Tensor,
    scales: torch.Tensor,
    input_scale: torch.Tensor | None,
    input_zero: torch.Tensor | None,
    bias: torch.Tensor | None,
    act_sym: bool,
) -> torch.Tensor:
    """y = q(x) W^T + bias with int8 W [N, K] and scales [N, G].

    x is rounded to int8 by `input_scale` [1] and `input_zero` int8 [1], or without a scale by the range of each token,
    with a zero point unless `act_sym`.
    """
    wide, grouped = x.to(torch.float32), qweight.view(*scales.shape, -1).to(torch.float32)
    weight = grouped.mul_(scales.unsqueeze(-1).to(torch.float32)).view_as(qweight)
    return torch.nn.functional.linear(
        round_input(wide, input_scale, input_zero, act_sym).to(x.dtype), weight.to(x.dtype), bias
    )


linear_w8a8 = operator("linear_w8a8", linear_w8a8_reference, _of_rows)


def round_input(x: torch.Tensor, scale: torch.Tensor | None, zero: torch.Tensor | None, act_sym: bool) -> torch.Tensor:
    """What int8 makes of X float32 [..., K]; the ranges of a token are those of compressed-tensors."""
    shift = torch.zeros((), device=x.device) if zero is None else zero.to(torch.float32)
    if scale is not None:
        step = scale.to(torch.float32).masked_fill(scale == 0, 1)
    elif act_sym:
        step = _step(x.abs().amax(-1, keepdim=True), 127.5)  # 255 steps over [-amax, amax]
    else:
        low, high = x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True).clamp(min=0)
        step = _step(high - low, 255)
        shift = (-128 - low / step).round()
    return (x / step).add_(shift).round_().clamp_(-128, 127).sub_(shift).mul_(step)


def _step(span: torch.Tensor, steps: float) -> torch.Tensor:
    """1 for a token of zeros, which stays zeros."""
    return (span / steps).masked_fill(span == 0, 1)


def _of_levels(x: torch.Tensor, *others: Any) -> torch.Tensor:
    *_, rows, _ = others
    return x.new_empty(*x.shape[:-1], rows)


def linear_nf4_reference(
    x: torch.Tensor,
    qweight: torch.Tensor,
    absmax: torch.Tensor,
    table: torch.Tensor,
    bias: torch.Tensor | None,
    rows: int,
    block_size: int,
) -> torch.Tensor:
    """y = x W^T + bias with W [N, K] of 4-bit levels: qweight uint8 [ceil(NK / 2)], absmax [B], table [16], rows N."""
    weight = dequantize_levels(qweight, absmax, table, (rows, x.shape[-1]), block_size)
    return torch.nn.functional.linear(x, weight.to(x.dtype), bias)


linear_nf4 = operator("linear_nf4", linear_nf4_reference, _of_levels)


def linear_llm_int8_reference(
    x: torch.Tensor,
    qweight: torch.Tensor,
    scales: torch.Tensor,
    bias: torch.Tensor | None,
    threshold: float,
) -> torch.Tensor:
    """y = x W^T + bias with int8 W [N, K] and scales [N, 1], by LLM.int8() (Dettmers et al. 2022, section 3).

    Input channels in which any token of the batch has a value of at least `threshold` are multiplied in float, the
    others in int8 with one scale per token; 0 is no threshold. As in bitsandbytes on a CPU, tokens are rounded from
    float16, the scale of a token is that of all its values below the threshold, and 1 / 127^2 is LLM_INT8_STEP.
    """
    tokens = x.reshape(-1, x.shape[-1])
    half = tokens.to(torch.float16)
    columns = torch.empty(0, dtype=torch.int64, device=x.device)
    if threshold > 0:
        outliers = half.abs() >= threshold
        columns = outliers.any(0).nonzero().view(-1)
        half = half.masked_fill(outliers, 0)
    absmax = half.abs().amax(-1, keepdim=True).to(torch.float32)
    steps = (half * (127.0 / absmax)).round_().masked_fill_(absmax == 0, 0)
    steps[:, columns] = 0
    weight = qweight.to(torch.float32)
    y = torch.nn.functional.linear(steps, weight).mul_(absmax * (scales.t() * 127)).mul_(LLM_INT8_STEP)
    y = (y if bias is None else y.add_(bias)).to(x.dtype)
    if columns.numel():
        weight = weight[:, columns].mul_(scales)
        y = y.addmm(tokens[:, columns], weight.to(x.dtype).t())
    return y.view(*x.shape[:-1], -1)


linear_llm_int8 = operator("linear_llm_int8", linear_llm_int8_reference, _of_rows)
