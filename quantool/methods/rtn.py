"""Round to nearest: each group's range is divided evenly and every weight takes the closest code.

    scale = (max - min) / (2**bits - 1)      asymmetric, zero always on the grid
    scale = max|w| / ((2**bits - 1) / 2)     symmetric

With `mse` the range is shrunk and the scale fitted where that lowers the squared error of the weights.

On a CPU rows are taken in pieces so small that torch computes each on one core, and as many pieces at a time as torch
has threads: the passes over a piece stay in that core's cache, no pass waits for another core, and the matrix never
exists in float32.
"""

from concurrent.futures import ThreadPoolExecutor

import torch

from quantool.methods.clip import quantize_clipped
from quantool.model.memory import in_pieces
from quantool.quant import QuantizedTensor, RoundScales, choose_qparams, quantize_affine
from quantool.scheme import PER_TENSOR, MethodOptions, QuantScheme

PIECE = 32767  # weights: at::internal::GRAIN_SIZE is 32768, from which on torch splits an operation over threads
GPU_PIECE = 1 << 26  # enough to keep a GPU busy


def quantize_weight(
    weight: torch.Tensor, scheme: QuantScheme, round_scales: RoundScales, *, options: MethodOptions
) -> QuantizedTensor:
    """W float [N, K] in any dtype -> its codes."""
    mse = options.mse
    if scheme.group_size == PER_TENSOR:
        return _quantize_piece(weight, scheme, round_scales, mse)
    rows = max(1, piece_of(weight) // weight.shape[1])
    if weight.device.type != "cpu":
        parts = in_pieces(
            "rows", len(weight), rows, lambda part: _quantize_piece(weight[part], scheme, round_scales, mse)
        )
        return _joined([piece for _, piece in parts])
    threads = torch.get_num_threads()
    first = _quantize_piece(weight[:rows], scheme, round_scales, mse)
    out = _room_for(weight.shape[0], first)
    _put(out, 0, first)

    @torch.inference_mode()  # a setting of each thread
    def fill(worker: int) -> None:
        for start in range(rows * (worker + 1), weight.shape[0], rows * threads):
            _put(out, start, _quantize_piece(weight[start : start + rows], scheme, round_scales, mse))

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(fill, range(threads)))
    return out


def piece_of(weight: torch.Tensor) -> int:
    """How many weights are computed at once where `weight` is."""
    return PIECE if weight.device.type == "cpu" else GPU_PIECE


def _joined(pieces: list[QuantizedTensor]) -> QuantizedTensor:
    if len(pieces) == 1:
        return pieces[0]
    codes, scales = (torch.cat([getattr(piece, part) for piece in pieces]) for part in ("codes", "scales"))
    zeros = [piece.zeros for piece in pieces if piece.zeros is not None]
    return QuantizedTensor(codes, scales, torch.cat(zeros) if zeros else None, pieces[0].scheme)


def _room_for(rows: int, piece: QuantizedTensor) -> QuantizedTensor:
    """Tensors like those of `piece` with N = `rows`."""
    codes, scales = (t.new_empty(rows, t.shape[1]) for t in (piece.codes, piece.scales))
    zeros = None if piece.zeros is None else piece.zeros.new_empty(rows, piece.zeros.shape[1])
    return QuantizedTensor(codes, scales, zeros, piece.scheme)


def _put(out: QuantizedTensor, start: int, piece: QuantizedTensor) -> None:
    end = start + piece.codes.shape[0]
    out.codes[start:end] = piece.codes
    out.scales[start:end] = piece.scales
    if out.zeros is not None and piece.zeros is not None:
        out.zeros[start:end] = piece.zeros


def _quantize_piece(weight: torch.Tensor, scheme: QuantScheme, round_scales: RoundScales, mse: bool) -> QuantizedTensor:
    wide = weight if weight.is_cuda and not mse else weight.to(torch.float32)  # the CUDA kernels read any float
    if mse:
        return quantize_clipped(wide, scheme, round_scales)
    scales, zeros = choose_qparams(wide, scheme, round_scales)
    return QuantizedTensor(quantize_affine(wide, scales, zeros, scheme), scales, zeros, scheme)
