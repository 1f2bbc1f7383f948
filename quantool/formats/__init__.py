"""Codes -> the tensors and config keys that a runtime expects, and back. One module is one format.

To add a format, write a module with the names of `Format` and add its word to FORMATS.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch

from quantool.errors import QuantoolError
from quantool.formats import awq, compressed_tensors
from quantool.formats.shared import FLOAT_CHECKPOINT
from quantool.io import TensorInfo
from quantool.quant import QuantizedTensor
from quantool.scheme import QuantScheme

__all__ = ["FORMATS", "Format", "detect"]


class Format(Protocol):
    """How the quantized weight of a module is laid out in a checkpoint.

    A suffix is the part of a tensor's name after its module's: "weight_packed" of "model.layers.0.q_proj".
    """

    NAME: str
    SUFFIXES: tuple[str, ...]
    """Every suffix that may belong to a quantized module; a bias is not part of the packed weight."""

    def rejects(self, scheme: QuantScheme, shape: tuple[int, int]) -> str | None:
        """Why W [N, K] cannot be written with `scheme`, in one line; None when it can."""
        ...

    def round_scales(self, scales: torch.Tensor, model_dtype: torch.dtype) -> torch.Tensor:
        """float32 scales -> the dtype that is stored, never 0 nor Inf."""
        ...

    def layout(
        self, scheme: QuantScheme, shape: tuple[int, int], model_dtype: torch.dtype
    ) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Suffix -> (safetensors dtype, shape) of what `pack` returns for W [N, K]."""
        ...

    def pack(self, q: QuantizedTensor) -> dict[str, torch.Tensor]:
        """Suffix -> tensor."""
        ...

    def unpack(self, tensors: Mapping[str, torch.Tensor], scheme: QuantScheme) -> QuantizedTensor:
        """Inverse of `pack`, also for what other tools wrote; raises QuantoolError on values that contradict."""
        ...

    def weight_shape(self, tensors: Mapping[str, torch.Tensor]) -> tuple[int, int]:
        """[N, K] of a packed module, from its mapped tensors without unpacking them."""
        ...

    def quantization_config(self, schemes: Mapping[str, QuantScheme], kept: Sequence[str]) -> dict[str, Any]:
        """config.json's "quantization_config": modules quantized by name, and the linears left in float.

        Raises QuantoolError when the config cannot say it; needs no tensor, so call it before any work.
        """
        ...

    def module_schemes(self, config: Mapping[str, Any], infos: Mapping[str, TensorInfo]) -> dict[str, QuantScheme]:
        """Module -> scheme for exactly the modules whose packed tensors are there.

        `config` is config.json's "quantization_config". Raises QuantoolError on what cannot be read, and when
        config and tensor shapes disagree.
        """
        ...


FORMATS: dict[str, Format] = {"compressed-tensors": compressed_tensors, "awq": awq}


def detect(config: Mapping[str, Any]) -> Format | None:
    """The format that config.json (all of it) names; None for a float checkpoint.

    Raises QuantoolError naming a `quant_method` that is not read.
    """
    section = config.get("quantization_config")
    if section is None:
        return None
    method = section.get("quant_method") if isinstance(section, Mapping) else None
    if isinstance(method, str) and method in FORMATS:
        return FORMATS[method]
    raise QuantoolError(
        f"config.json: quant_method {method!r} cannot be read, expected {' or '.join(map(repr, FORMATS))}",
        hint=FLOAT_CHECKPOINT,
    )
