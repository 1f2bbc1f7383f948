"""GPTQ v1 of asymmetric weights, to be read only: qzeros hold zeros - 1, subtracted from whole words (see gptq.py)."""

from collections.abc import Mapping
from typing import Any

import torch

from quantool.formats import gptq
from quantool.formats.gptq import (
    NAME,
    SUFFIXES,
    layout,
    module_schemes,
    pack,
    quantization_config,
    rejects,
    round_scales,
    weight_shape,
)
from quantool.formats.gptq_config import V1, stored_version
from quantool.kernels.ops import WORD_BITS
from quantool.quant import QuantizedTensor
from quantool.scheme import QuantScheme

__all__ = [
    "NAME",
    "SUFFIXES",
    "layout",
    "module_schemes",
    "pack",
    "quantization_config",
    "reads",
    "rejects",
    "round_scales",
    "unpack",
    "weight_shape",
]


def reads(config: Mapping[str, Any]) -> bool:
    """Whether a "quantization_config" of this layout is v1 with asymmetric weights.

    Raises QuantoolError when it names a version that is not read.
    """
    sections = [config.get(key) for key in ("dynamic", "extra_config")]
    overrides = [values for section in sections if isinstance(section, Mapping) for values in section.values()]
    own = [config, *(values for values in overrides if isinstance(values, Mapping))]
    return any(values.get("sym") is False for values in own) and stored_version(config) == V1


def unpack(tensors: Mapping[str, torch.Tensor], scheme: QuantScheme) -> QuantizedTensor:
    """As gptq.unpack, with one added to every zero of an asymmetric weight, carries included."""
    if scheme.sym:
        return gptq.unpack(tensors, scheme)
    ones = sum(1 << start for start in range(0, WORD_BITS, scheme.bits))
    return gptq.unpack({**tensors, "qzeros": tensors["qzeros"] + ones}, scheme)
