"""Weights (and what reaches them) -> codes. A method never touches a file.

What a method needs decides the path of `quantize`: one that needs only weights sees one weight at a time and no
network is built; one that needs activations sees each decoder block with the hidden states that reach it.
"""

from collections.abc import Mapping
from typing import Protocol

import torch

from quantool.methods import awq, rtn
from quantool.model.blocks import Block
from quantool.quant import QuantizedTensor, RoundScales
from quantool.scheme import QuantScheme


class WeightMethod(Protocol):
    """Quantizes one weight on its own: W float [N, K] in any dtype, never changed."""

    def __call__(
        self, weight: torch.Tensor, scheme: QuantScheme, round_scales: RoundScales, *, mse: bool
    ) -> QuantizedTensor: ...


class BlockMethod(Protocol):
    """Quantizes the linears of `schemes` in a block and may fold scales into its other tensors, in place.

    `stored` is the dtype in which the block's other tensors will be stored.
    """

    def __call__(
        self,
        block: Block,
        schemes: Mapping[str, QuantScheme],
        round_scales: RoundScales,
        *,
        stored: torch.dtype,
        n_grid: int,
    ) -> dict[str, QuantizedTensor]: ...


WEIGHT_METHODS: dict[str, WeightMethod] = {"rtn": rtn.quantize_weight}
BLOCK_METHODS: dict[str, BlockMethod] = {"awq": awq.quantize_block}
