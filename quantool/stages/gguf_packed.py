"""The Q4_0, Q5_0 and Q8_0 weights of a GGUF file as codes, seen as `PackedCheckpoint` shows those of other formats.

Their blocks are groups of 32 with a float16 scale and no zero point, which compressed-tensors and GPTQ hold as they
are. No other block type has codes that another format can hold: a file with one in a linear has no packed weights here.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from quantool.errors import QuantoolError
from quantool.formats.ggml.legacy import to_affine
from quantool.formats.ggml.mixes import FLOATS
from quantool.io.gguf import GgufCheckpoint
from quantool.model.names import find_linears
from quantool.quant import QuantizedTensor
from quantool.scheme import QuantScheme

if TYPE_CHECKING:
    from quantool.io import TensorInfo

SCHEMES = {f"Q{bits}_0": QuantScheme(bits=bits, group_size=32, sym=True) for bits in (4, 5, 8)}


class GgufPacked:
    """`schemes` is empty unless every quantized linear of a decoder block has a type whose codes can be taken over."""

    def __init__(self, checkpoint: GgufCheckpoint) -> None:
        self._checkpoint = checkpoint
        self.path, self.config, self.metadata = checkpoint.path, checkpoint.config, checkpoint.metadata
        self.infos: Mapping[str, TensorInfo] = checkpoint.infos
        found = {
            name: checkpoint.infos[f"{name}.weight"].dtype
            for name in find_linears(checkpoint).candidates
            if f"{name}.weight" in checkpoint.infos
        }
        inside = {name: dtype for name, dtype in found.items() if name != "lm_head" and dtype not in FLOATS}
        able = bool(inside) and all(dtype in SCHEMES for dtype in inside.values())
        self.schemes: dict[str, QuantScheme] = {n: SCHEMES[d] for n, d in inside.items()} if able else {}

    def quantized(self, module: str) -> QuantizedTensor:
        """Codes and scales of a module."""
        found = to_affine(*self._checkpoint.blocks(f"{module}.weight"))
        if found is None:
            raise QuantoolError(f"{self.path}: module '{module}': its blocks hold no affine codes")
        return found

    def weight_shape(self, module: str) -> tuple[int, int]:
        """[N, K] of a module."""
        rows, columns = self.infos[f"{module}.weight"].shape
        return rows, columns

    def packed_names(self, module: str) -> list[str]:
        """The stored tensors of a module."""
        return [f"{module}.weight"]

    def scales(self, module: str) -> tuple[str, torch.Tensor] | None:
        """Name and values of the scales of a module."""
        return f"{module}.weight", self.quantized(module).scales

    def ordered(self, module: str) -> bool:
        """Whether the columns of a group lie apart: never."""
        return False

    def place(self, module: str, shapes: Mapping[str, tuple[tuple[int, ...], torch.dtype]]) -> None:
        """The float weight of a module is presented already."""

    def read(self, name: str) -> torch.Tensor:
        return self._checkpoint.read(name)

    def drop(self, name: str) -> None:
        self._checkpoint.drop(name)

    def write_aux(self, directory: Path) -> None:
        self._checkpoint.write_aux(directory)
