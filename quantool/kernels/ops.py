"""The operators of the runtime: schema, shape function for meta tensors, and the torch reference of each.

Packed weights are `bits`-wide unsigned codes in one dense little-endian bit stream per row, in int32 words:
code k of a row starts at bit k * bits, and a code may straddle two words (3, 5, 6 and 7 bits). This is the
row layout of compressed-tensors 0.20, so 0xFE983210 holds the codes 0, 1, 2, 3, 8, 9, 14, 15.

CUDA kernels register under the same schemas; a caller never asks which device it is on.
"""

import torch

WORD_BITS = 32


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


@torch.library.custom_op("quantool::linear_wna16", mutates_args=())
def linear_wna16(
    x: torch.Tensor,
    qweight: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    bias: torch.Tensor | None,
    bits: int,
) -> torch.Tensor:
    """y = x W^T + bias with packed W: x [..., K], qweight int32 [N, words], scales [N, G], zeros uint8 [N, G]."""
    weight = dequantize(unpack_bits(qweight, bits, x.shape[-1]), scales, zeros, bits)
    return torch.nn.functional.linear(x, weight.to(x.dtype), bias)


@linear_wna16.register_fake
def _(
    x: torch.Tensor,
    qweight: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    bias: torch.Tensor | None,
    bits: int,
) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], qweight.shape[0])


@torch.library.custom_op("quantool::linear_w8a8", mutates_args=())
def linear_w8a8(
    x: torch.Tensor,
    qweight: torch.Tensor,
    scales: torch.Tensor,
    input_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """y = q(x) W^T + bias with int8 W [N, K] and scales [N, 1]; x is rounded to int8 per token, or by `input_scale`."""
    wide = x.to(torch.float32)
    if input_scale is None:
        # compressed-tensors' symmetric range: 255 steps over [-amax, amax].
        input_scale = wide.abs().amax(-1, keepdim=True).div(127.5)
        input_scale = input_scale.masked_fill(input_scale == 0, 1)  # a token of zeros stays zeros
    step = input_scale.to(torch.float32)
    rounded = (wide / step).round().clamp(-128, 127) * step
    weight = qweight.to(torch.float32) * scales.to(torch.float32)
    return torch.nn.functional.linear(rounded.to(x.dtype), weight.to(x.dtype), bias)


@linear_w8a8.register_fake
def _(
    x: torch.Tensor,
    qweight: torch.Tensor,
    scales: torch.Tensor,
    input_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], qweight.shape[0])
