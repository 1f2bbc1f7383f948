"""A linear layer that keeps its weight packed and computes through the operators of kernels/ops.py."""

import torch
from torch import nn

from quantool.kernels.ops import linear_w8a8, linear_wna16, packed_words
from quantool.quant import QuantizedTensor, pack_bits
from quantool.scheme import QuantScheme

Shapes = dict[str, tuple[tuple[int, ...], torch.dtype]]


class QuantLinear(nn.Module):
    """y = x W^T + bias with W [N, K] as packed codes.

    Buffers: `qweight` int32 [N, ceil(K * bits / 32)], or int8 [N, K] when activations are 8 bits too; `scales`
    [N, G]; `zeros` uint8 [N, G] when asymmetric; `input_scale` float32 [1] when activations are scaled statically.
    """

    qweight: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None
    input_scale: torch.Tensor | None

    def __init__(self, like: nn.Linear, scheme: QuantScheme, shapes: Shapes) -> None:
        super().__init__()
        self.in_features, self.out_features, self.scheme = like.in_features, like.out_features, scheme
        for name in ("qweight", "scales", "zeros", "input_scale"):
            buffer = torch.empty(shapes[name][0], dtype=shapes[name][1], device="meta") if name in shapes else None
            self.register_buffer(name, buffer)
        self.bias = like.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor
        if self.scheme.act_bits == 8:
            y = linear_w8a8(x, self.qweight, self.scales, self.input_scale, self.bias)
        else:
            y = linear_wna16(x, self.qweight, self.scales, self.zeros, self.bias, self.scheme.bits)
        return y

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.scheme}"


def packed_shapes(scheme: QuantScheme, shape: tuple[int, int], scale_dtype: torch.dtype) -> Shapes:
    """Buffer name -> (shape, dtype) of a weight [N, K] in the runtime's layout."""
    rows, columns = shape
    groups = scheme.groups(columns)
    out: Shapes = {
        "qweight": ((rows, packed_words(columns, scheme.bits)), torch.int32),
        "scales": ((rows, groups), scale_dtype),
    }
    if scheme.act_bits == 8:
        out["qweight"] = ((rows, columns), torch.int8)
        if not scheme.act_dynamic:
            out["input_scale"] = ((1,), torch.float32)
    if not scheme.sym:
        out["zeros"] = ((rows, groups), torch.uint8)
    return out


def runtime_tensors(q: QuantizedTensor) -> dict[str, torch.Tensor]:
    """The buffers of a QuantLinear from codes."""
    qweight = pack_bits(q.codes, q.scheme.bits)
    if q.scheme.act_bits == 8:
        qweight = (q.codes.to(torch.int16) - q.scheme.zero).to(torch.int8)
    tensors = {"qweight": qweight, "scales": q.scales, "zeros": q.zeros, "input_scale": q.input_scale}
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}
