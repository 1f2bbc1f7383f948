"""Round to nearest: each group's range is divided evenly and every weight takes the closest code.

    scale = (max - min) / (2**bits - 1)      asymmetric, zero always on the grid
    scale = max|w| / ((2**bits - 1) / 2)     symmetric

With `mse` the range is shrunk where that lowers the squared error of the weights. Rows are taken in pieces that
stay in the processor's cache between the passes: the whole matrix never exists in float32.
"""

import torch

from quantool.methods.clip import quantize_clipped
from quantool.quant import QuantizedTensor, RoundScales, choose_qparams, quantize_affine, row_pieces
from quantool.scheme import PER_TENSOR, QuantScheme


def quantize_weight(
    weight: torch.Tensor, scheme: QuantScheme, round_scales: RoundScales, *, mse: bool
) -> QuantizedTensor:
    """W float [N, K] in any dtype -> its codes."""
    if mse or scheme.group_size == PER_TENSOR:
        return _quantize_piece(weight.to(torch.float32), scheme, round_scales, mse)
    pieces = [_quantize_piece(piece.to(torch.float32), scheme, round_scales, mse) for piece in row_pieces(weight)]
    zeros = [piece.zeros for piece in pieces if piece.zeros is not None]
    return QuantizedTensor(
        torch.cat([piece.codes for piece in pieces]),
        torch.cat([piece.scales for piece in pieces]),
        torch.cat(zeros) if zeros else None,
        scheme,
    )


def _quantize_piece(weight: torch.Tensor, scheme: QuantScheme, round_scales: RoundScales, mse: bool) -> QuantizedTensor:
    if mse:
        return quantize_clipped(weight, scheme, round_scales)
    scales, zeros = choose_qparams(weight, scheme, round_scales)
    return QuantizedTensor(quantize_affine(weight, scales, zeros, scheme), scales, zeros, scheme)
