"""A linear layer that keeps its weight packed and computes through the operators of kernels/.

A weight lies in memory in one of two layouts, chosen when it is read: rows as ops.py describes them, or the tiles of
kernels/tiles.py where CUDA kernels will read them. Operators of both compute on every device, tiles on a CPU and rows
on a GPU slowly, so that a loaded model may be moved.
"""

import torch
from torch import nn

from quantool.kernels import cuda, tiles, wna16
from quantool.kernels.int8 import linear_llm_int8, linear_w8a8
from quantool.kernels.nf4 import linear_nf4
from quantool.kernels.ops import levels, linear_wna16, pack_nibbles, packed_words
from quantool.quant import QuantizedTensor, pack_bits
from quantool.scheme import QuantScheme

Shapes = dict[str, tuple[tuple[int, ...], torch.dtype]]
BUFFERS = ("qweight", "scales", "zeros", "perm", "levels", "input_scale", "input_zero")


class QuantLinear(nn.Module):
    """y = x W^T + bias with W [N, K] as packed codes.

    Buffers of which a scheme has some:

        qweight      int32 [N, ceil(K * bits / 32)]; int8 [N, K] when activations are 8 bits too; of nf4 and fp4
                     uint8 [ceil(N * K / 2)]
        scales       [N, G]; of nf4 and fp4 float32 [B]
        zeros        uint8 [N, G] when asymmetric
                     in tiles: qweight int32 [N / 16, K / 64, 32 * bits], scales and zeros [N / 16, G, 8, 2]
        perm         int32 [K] when groups are of scattered columns: column k of qweight is input channel perm[k]
        levels       float32 [16] of nf4 and fp4
        input_scale  float32 [1] when activations are scaled statically
        input_zero   int8 [1] when they are asymmetric too
    """

    qweight: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None
    perm: torch.Tensor | None
    levels: torch.Tensor
    input_scale: torch.Tensor | None
    input_zero: torch.Tensor | None

    def __init__(self, like: nn.Linear, scheme: QuantScheme, shapes: Shapes) -> None:
        super().__init__()
        self.in_features, self.out_features, self.scheme = like.in_features, like.out_features, scheme
        self.tiled = len(shapes["qweight"][0]) == 3
        for name in BUFFERS:
            buffer = torch.empty(shapes[name][0], dtype=shapes[name][1], device="meta") if name in shapes else None
            self.register_buffer(name, buffer)
        self.bias = like.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scheme = self.scheme
        y: torch.Tensor
        if self.perm is not None:
            x = x.index_select(-1, self.perm)
        if scheme.flat:
            y = linear_nf4(x, self.qweight, self.scales, self.levels, self.bias, self.out_features, scheme.group_size)
        elif scheme.outlier_threshold is not None:
            y = linear_llm_int8(x, self.qweight, self.scales, self.bias, scheme.outlier_threshold)
        elif scheme.act_bits == 8:
            y = linear_w8a8(x, self.qweight, self.scales, self.input_scale, self.input_zero, self.bias, scheme.act_sym)
        elif self.tiled:
            y = wna16.linear_tiles(x, self.qweight, self.scales, self.zeros, self.bias, scheme.bits)
        else:
            y = linear_wna16(x, self.qweight, self.scales, self.zeros, self.bias, scheme.bits)
        return y

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.scheme}{', tiles' if self.tiled else ''}"


def takes_tiles(
    scheme: QuantScheme,
    shape: tuple[int, int],
    scale_dtype: torch.dtype,
    compute: torch.dtype,
    device: torch.device,
) -> bool:
    """Whether W [N, K] is to be in tiles, on a device that computes in `compute`: where CUDA kernels multiply by it."""
    return (
        device.type == "cuda"
        and scheme.act_bits == 16
        and not scheme.flat
        and compute in wna16.FLOATS
        and scale_dtype in wna16.FLOATS
        and tiles.fits(*shape, scheme.bits, scheme.width(shape[1])) is None
        and cuda.is_available()
        and wna16.card(device).capability >= cuda.OLDEST
    )


def packed_shapes(
    scheme: QuantScheme,
    shape: tuple[int, int],
    scale_dtype: torch.dtype,
    *,
    ordered: bool = False,
    tiled: bool = False,
) -> Shapes:
    """Buffer name -> (shape, dtype) of a weight [N, K] in the runtime's layout.

    `ordered`: groups are not of neighbouring columns. `tiled`: in tiles.
    """
    rows, columns = shape
    if scheme.flat:
        count = rows * columns
        return {
            "qweight": ((-(-count // 2),), torch.uint8),
            "scales": ((-(-count // scheme.group_size),), torch.float32),
            "levels": ((1 << scheme.bits,), torch.float32),
        }
    grid: tuple[int, ...] = (rows, scheme.groups(columns))
    qweight: tuple[int, ...] = (rows, packed_words(columns, scheme.bits))
    if tiled:
        grid = (rows // tiles.ROWS, grid[1], 8, 2)
        qweight = (rows // tiles.ROWS, columns // tiles.COLUMNS, 32 * scheme.bits)
    out: Shapes = {"qweight": (qweight, torch.int32), "scales": (grid, scale_dtype)}
    if scheme.act_bits == 8:
        out["qweight"] = ((rows, columns), torch.int8)
        if not scheme.act_dynamic:
            out["input_scale"] = ((1,), torch.float32)
            if not scheme.act_sym:
                out["input_zero"] = ((1,), torch.int8)
    if not scheme.sym:
        out["zeros"] = (grid, torch.uint8)
    if ordered:
        out["perm"] = ((columns,), torch.int32)
    return out


def runtime_tensors(q: QuantizedTensor, *, tiled: bool = False) -> dict[str, torch.Tensor]:
    """The buffers of a QuantLinear from codes, on the device of the codes."""
    scheme, scales, zeros = q.scheme, q.scales, q.zeros
    if scheme.flat:
        return {"qweight": pack_nibbles(q.codes), "scales": scales, "levels": levels(scheme.dtype)}
    perm = None if q.g_idx is None else q.g_idx.argsort(stable=True).to(torch.int32)
    if tiled:
        qweight = tiles.pack_tiles(q.codes, "codes", scheme.bits, *q.codes.shape, perm)
        scales, zeros = tiles.tile_rows(scales), None if zeros is None else tiles.tile_rows(zeros)
    else:
        codes = q.codes if perm is None else q.codes[:, perm]
        signed = scheme.act_bits == 8
        qweight = (codes.to(torch.int16) - scheme.zero).to(torch.int8) if signed else pack_bits(codes, scheme.bits)
    tensors = {
        "qweight": qweight,
        "scales": scales,
        "zeros": zeros,
        "perm": perm,
        "input_scale": q.input_scale,
        "input_zero": q.input_zero,
    }
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}
