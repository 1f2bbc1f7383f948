"""Weights (and what reaches them) -> codes. A method never touches a file.

What a method needs decides the path of `quantize`: one that needs only weights sees one weight at a time and no
network is built; one that needs activations sees each decoder block with the hidden states that reach it.
"""

from typing import Protocol

import torch

from quantool.methods import awq, clip, gptq, llm_int8, nf4, rtn, smoothquant
from quantool.methods.block import BlockMethod, quantize_block, starved_error
from quantool.quant import QuantizedTensor, RoundScales
from quantool.scheme import MethodOptions, QuantScheme

__all__ = ["BLOCK_METHODS", "WEIGHT_METHODS", "BlockMethod", "WeightMethod", "quantize_block", "starved_error"]


class WeightMethod(Protocol):
    """Quantizes one weight on its own: W float [N, K] in any dtype, never changed."""

    def __call__(
        self, weight: torch.Tensor, scheme: QuantScheme, round_scales: RoundScales, *, options: MethodOptions
    ) -> QuantizedTensor: ...


WEIGHT_METHODS: dict[str, WeightMethod] = {
    "rtn": rtn.quantize_weight,
    "nf4": nf4.quantize_weight,
    "fp4": nf4.quantize_weight,
    "llm-int8": llm_int8.quantize_weight,
}
BLOCK_METHODS: dict[str, BlockMethod] = {
    "rtn": BlockMethod(None, None),
    "gptq": BlockMethod(None, gptq.quantize_weight),
    "awq": BlockMethod(awq.search_scale, clip.quantize_weight),
    "awq+gptq": BlockMethod(awq.search_scale, gptq.quantize_weight),
    "smoothquant": BlockMethod(smoothquant.search_scale, gptq.quantize_weight, samples=True),
}
