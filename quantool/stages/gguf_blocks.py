"""Calibrated GGUF: AWQ's scaling and GPTQ's rounding on the grids of ggml, block by block, into standard files.

llama-quantize weighs the error of a weight by the mean square of its channel and rounds each weight by itself. Here
the grid of every group is searched so too, on the weights as AWQ has scaled them, and is then fixed:

    W ~ step[n, g] * (code - zero) - offset[n, g]

GPTQ rounds the columns one by one on that grid, and lets the columns still to come make up for the error of each. What
is written is an ordinary Q4_K or Q4_0; every block sees the hidden states that come out of the rounded blocks before.
"""

from dataclasses import dataclass

import torch

from quantool.formats.ggml import GGML_TYPES, BlockType
from quantool.methods import BLOCK_METHODS, BlockMethod
from quantool.methods.gptq import round_columns
from quantool.methods.statistics import Inputs
from quantool.quant import QuantizedTensor, RoundScales
from quantool.scheme import MethodOptions, QuantScheme


def proxy_scheme(kind: BlockType) -> QuantScheme:
    """The affine scheme nearest to a block type, with which AWQ tries its scales: groups, bits, symmetry."""
    bits = kind.max_code.bit_length()
    return QuantScheme(bits=bits, group_size=kind.group_size, sym=kind.zero != 0 or kind.levels is not None)


def round_proxy(scales: torch.Tensor) -> torch.Tensor:
    """Scales of the proxy are not stored: only 0 is no divisor."""
    return scales.clamp(min=torch.finfo(torch.float32).tiny)


@dataclass(frozen=True, slots=True)
class GgufRounding:
    """The rounding step of a block method for one block type (see methods.block.Rounding)."""

    kind: BlockType
    gptq: bool

    def __call__(
        self,
        weight: torch.Tensor,
        scheme: QuantScheme,
        round_scales: RoundScales,
        *,
        inputs: Inputs,
        options: MethodOptions,
    ) -> QuantizedTensor | None:
        blocks = self.kind.quantize(weight, inputs.moment.diagonal().contiguous())
        grid, codes = self.kind.unpack(blocks)
        if self.gptq and self.kind.levels is None:
            found = round_columns(
                weight,
                inputs,
                grid.step,
                grid.offset,
                zero=self.kind.zero,
                max_code=self.kind.max_code,
                damp_percent=options.damp_percent,
            )
            if found is None:
                return None
            codes, blocks = found, self.kind.pack(grid, found)
        return QuantizedTensor(codes, grid.step, None, scheme, blocks=blocks)


def method_for(name: str, type_name: str) -> BlockMethod:
    """The block method `name` on the grid of a block type."""
    rounding = GgufRounding(GGML_TYPES[type_name], gptq="gptq" in name)
    return BlockMethod(BLOCK_METHODS[name].scale, rounding)
