"""Codes -> the tensors and config keys that a runtime expects, and back. One module is one format.

To add a format, write a module with the names of `Format` and add its word to FORMATS.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch

from quantool.errors import QuantoolError
from quantool.formats import awq, bitsandbytes, compressed_tensors, gptq, gptq_v1
from quantool.formats.config_keys import AUTO_ROUND
from quantool.formats.gptq_config import AUTO_ROUND_PACKING
from quantool.formats.shared import FLOAT_CHECKPOINT
from quantool.io import TensorInfo
from quantool.quant import QuantizedTensor
from quantool.scheme import QuantScheme

__all__ = ["FORMATS", "Format", "detect", "exact_scales"]


class Format(Protocol):
    """How the quantized weight of a module is laid out in a checkpoint.

    A suffix is the part of a tensor's name after its module's: "weight_packed" of "model.layers.0.q_proj".
    """

    NAME: str
    SUFFIXES: tuple[str, ...]
    """Every suffix that may belong to a quantized module; a bias is not part of the packed weight."""

    def rejects(self, scheme: QuantScheme, shape: tuple[int, int], *, act_order: bool = False) -> str | None:
        """Why W [N, K] cannot be written with `scheme`, in one line; None when it can.

        `act_order`: groups are in the order of activations, `g_idx` says which column is in which.
        """
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
        """Suffix -> tensor of a weight that `rejects` accepts; raises QuantoolError for a g_idx it has no place for."""
        ...

    def unpack(self, tensors: Mapping[str, torch.Tensor], scheme: QuantScheme) -> QuantizedTensor:
        """Inverse of `pack`, also for what other tools wrote; raises QuantoolError on values that contradict."""
        ...

    def weight_shape(self, tensors: Mapping[str, torch.Tensor]) -> tuple[int, int]:
        """[N, K] of a packed module, from its mapped tensors without unpacking them."""
        ...

    def quantization_config(
        self, schemes: Mapping[str, QuantScheme], kept: Sequence[str], *, act_order: bool = False
    ) -> dict[str, Any]:
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


FORMATS: dict[str, Format] = {
    "compressed-tensors": compressed_tensors,
    "gptq": gptq,
    "awq": awq,
    "bitsandbytes": bitsandbytes,
}
# auto-round's `packing_format` -> whose layout it is
PACKING_FORMATS = {
    "auto_round:auto_awq": awq.NAME,
    "auto_round:awq": awq.NAME,
    **dict.fromkeys(AUTO_ROUND_PACKING, gptq.NAME),
}


def detect(config: Mapping[str, Any]) -> Format | None:
    """The format that config.json (all of it) names; None for a float checkpoint.

    One that is read only is not in FORMATS and has the NAME of one that is. Raises QuantoolError naming a
    `quant_method` that is not read.
    """
    section = config.get("quantization_config")
    if section is None:
        return None
    method = section.get("quant_method") if isinstance(section, Mapping) else None
    key, names = "quant_method", {name: name for name in FORMATS}
    if method == AUTO_ROUND:
        key, method, names = "packing_format", section.get("packing_format"), PACKING_FORMATS
    if not isinstance(method, str) or method not in names:
        expected = " or ".join(map(repr, [*names, *([AUTO_ROUND] if key == "quant_method" else [])]))
        raise QuantoolError(
            f"config.json: {key} {method!r:.80} cannot be read, expected {expected}", hint=FLOAT_CHECKPOINT
        )
    name = names[method]
    return gptq_v1 if name == gptq.NAME and gptq_v1.reads(section) else FORMATS[name]


def exact_scales(q: QuantizedTensor, format_: Format, model_dtype: torch.dtype) -> QuantizedTensor:
    """`q` with its scales in the dtype that `format_` stores for a model of `model_dtype`, each one the same number.

    Raises QuantoolError when one would have to be rounded: the weights would no longer be those of `q`.
    """
    stored = format_.round_scales(torch.ones(1), model_dtype).dtype
    scales = q.scales.to(stored)
    changed = int((scales.to(torch.float64) != q.scales.to(torch.float64)).sum())
    if changed:
        names = [str(dtype).removeprefix("torch.") for dtype in (q.scales.dtype, stored)]
        raise QuantoolError(
            f"{changed} of {scales.numel()} scales in {names[0]} have no equal in {names[1]}, which format "
            f"{format_.NAME} stores for this model",
            hint="quantize the float checkpoint that it was made from",
        )
    return replace(q, scales=scales)
