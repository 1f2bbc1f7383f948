"""What a GGUF file is converted from: a float checkpoint, a quantized one, or another GGUF file, all seen alike.

read      the float weight that a runtime sees
repacked  codes that a block type of ggml holds as they are, so that nothing is quantized twice
stored    blocks of a GGUF file, to be copied
"""

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from quantool.formats.ggml.legacy import Repacked, from_affine, why_not_affine
from quantool.formats.ggml.mixes import FLOATS
from quantool.io import Checkpoint, TensorInfo, open_checkpoint
from quantool.io.gguf import GgufCheckpoint
from quantool.model.views import LinearsCheckpoint, as_linears
from quantool.runtime import PackedCheckpoint
from quantool.runtime.load import format_of

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

PACKED = "packed"  # stands for the dtype of codes


class Source:
    """A checkpoint in which every linear is a float matrix [N, K] of its own, however it is stored."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.path: Path = checkpoint.path
        self.linears: LinearsCheckpoint = as_linears(checkpoint)
        self.config: Mapping[str, Any] = {k: v for k, v in checkpoint.config.items() if k != "quantization_config"}
        self.gguf = checkpoint if isinstance(checkpoint, GgufCheckpoint) else None
        format_ = format_of(checkpoint)
        self.packed = None if format_ is None else PackedCheckpoint(checkpoint, format_)
        self.infos: dict[str, TensorInfo] = dict(self.linears.infos)
        if self.packed is not None:
            self._present_floats(self.packed)

    def _present_floats(self, packed: PackedCheckpoint) -> None:
        for module in packed.schemes:
            for name in packed.packed_names(module):
                del self.infos[name]
            shape, name = packed.weight_shape(module), f"{module}.weight"
            self.infos[name] = TensorInfo(name, shape, PACKED, packed.packed_bytes(module), self.path)

    def is_packed(self, name: str) -> bool:
        """Whether a weight is stored as codes of a quantized checkpoint."""
        return self.packed is not None and name.removesuffix(".weight") in self.packed.schemes

    def read(self, name: str) -> torch.Tensor:
        """A tensor in float; a view of the mapping where it is stored so."""
        if self.packed is not None and self.is_packed(name):
            return self.packed.dequantized(name.removesuffix(".weight"))
        return self.linears.read(name)

    def stored_type(self, target: str) -> str | None:
        """The type of a tensor of a GGUF file, under its own name."""
        tensor = None if self.gguf is None else self.gguf.file.tensors.get(target)
        return None if tensor is None else tensor.dtype

    def stored(self, target: str) -> torch.Tensor:
        """The bytes uint8 [N, bytes] of a tensor of a GGUF file."""
        assert self.gguf is not None  # noqa: S101 - `stored_type` has said that it is there
        tensor = self.gguf.file.tensors[target]
        return torch.from_numpy(self.gguf.file.rows(tensor)).reshape(math.prod(tensor.shape[:-1]), -1)

    def repacked(self, name: str) -> Repacked | str:
        """A block type that holds the codes of a packed weight as they are, and its blocks; or why there is none."""
        q = self._packed().quantized(name.removesuffix(".weight"))
        if not q.scheme.sym and q.zeros is not None and not bool((q.zeros != q.scheme.zero).any()):
            # AWQ's layout has zero points for symmetric weights too.
            q = replace(q, zeros=None, scheme=replace(q.scheme, sym=True))
        return from_affine(q) or why_not_affine(q) or "its codes are of no block type"

    def _packed(self) -> PackedCheckpoint:
        assert self.packed is not None  # noqa: S101 - `is_packed` has said that it is there
        return self.packed

    def is_quantized(self, target: str, dtype: str) -> bool:
        """Whether what a GGUF tensor is made of, stored as `dtype`, has been rounded by someone."""
        return dtype == PACKED if self.gguf is None else self.stored_type(target) not in FLOATS

    def described(self, target: str, dtype: str) -> str:
        """How a quantized tensor is stored, for a message."""
        if self.gguf is not None:
            return str(self.stored_type(target))
        return str(self.checkpoint.config["quantization_config"].get("quant_method", dtype))

    def drop(self, name: str) -> None:
        """Forget the pages of a tensor that has been read."""
        if self.packed is not None and self.is_packed(name):
            for stored in self.packed.packed_names(name.removesuffix(".weight")):
                self.packed.drop(stored)
        else:
            self.linears.drop(name)


def open_source(model: str) -> Source:
    """Open MODEL for conversion; raises QuantoolError when it cannot be read."""
    return Source(open_checkpoint(model))
