"""AutoAWQ's GEMM layout: 4-bit asymmetric weights, transposed, eight output channels to a word.

W [N, K] of a linear X becomes, with G = K / group_size groups:

    X.qweight  int32    [K, N / 8]      X.qzeros  int32    [G, N / 8]      X.scales  float16  [G, N]

    bits of word j   31..28 27..24 23..20 19..16 15..12 11..8  7..4   3..0
    output channel    8j+7   8j+5   8j+3   8j+1   8j+6   8j+4   8j+2   8j

so the codes 0, 1, ..., 7 are the word 0x75316420. Zeros are stored as they are: W = scales * (codes - zeros).
A symmetric weight is written with every zero at 8. Layout: AutoAWQ, awq/modules/linear/gemm.py.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from quantool.errors import QuantoolError
from quantool.formats.config_keys import (
    HOW_QUANTIZED,
    PER_MODULE,
    WHOLE,
    module_configs,
    own_config,
    read_group_size,
    refuse_unknown,
    require_int_weights,
)
from quantool.formats.shared import (
    EXPORT_AGAIN,
    FLOAT_CHECKPOINT,
    FLOATS,
    expect,
    expect_matrix,
    require_contiguous_groups,
    round_scales,
    transposed,
)
from quantool.io import TensorInfo
from quantool.kernels.tiles import pack_awq, unpack_awq
from quantool.quant import QuantizedTensor
from quantool.scheme import PER_CHANNEL, QuantScheme

__all__ = [
    "NAME",
    "SUFFIXES",
    "layout",
    "module_schemes",
    "pack",
    "quantization_config",
    "rejects",
    "round_scales",
    "unpack",
    "weight_shape",
]

NAME = "awq"
SUFFIXES: tuple[str, ...] = ("qweight", "qzeros", "scales")
BITS = 4
PER_WORD = 8
KEYS = HOW_QUANTIZED | PER_MODULE | WHOLE | {"zero_point", "version"}


def rejects(scheme: QuantScheme, shape: tuple[int, int], *, act_order: bool = False) -> str | None:
    """Why this format cannot hold W [N, K] with `scheme`, in one line; None when it can."""
    if scheme.flat or scheme.bits != BITS or scheme.act_bits != 16:
        return f"format awq holds W4A16 integer weights only, not {scheme}"
    if act_order:
        return "format awq has no place for groups in activation order"
    if shape[0] % PER_WORD:
        return f"format awq packs {PER_WORD} output channels to a word, and {shape[0]} is not a multiple of {PER_WORD}"
    return None


def layout(
    scheme: QuantScheme, shape: tuple[int, int], model_dtype: torch.dtype
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Suffix -> (safetensors dtype, shape) of what `pack` returns for W [N, K]."""
    rows, columns = shape
    groups = scheme.groups(columns)
    return {
        "qweight": ("I32", (columns, rows // PER_WORD)),
        "qzeros": ("I32", (groups, rows // PER_WORD)),
        "scales": ("F16", (groups, rows)),
    }


def pack(q: QuantizedTensor) -> dict[str, torch.Tensor]:
    """Suffix -> tensor of a weight that `rejects` accepts; raises QuantoolError when it has a g_idx."""
    require_contiguous_groups(q, NAME)
    zeros = torch.full_like(q.scales, q.scheme.zero, dtype=torch.uint8) if q.zeros is None else q.zeros
    return {
        "qweight": pack_awq(q.codes),
        "qzeros": pack_awq(zeros),
        "scales": transposed(q.scales.to(torch.float16)),
    }


def unpack(tensors: Mapping[str, torch.Tensor], scheme: QuantScheme) -> QuantizedTensor:
    """Inverse of `pack`. Raises QuantoolError when the scheme is symmetric and a stored zero is not 8."""
    zeros = unpack_awq(tensors["qzeros"]) if "qzeros" in tensors else None
    if scheme.sym and zeros is not None:
        if bool((zeros != scheme.zero).any()):
            raise QuantoolError(
                f"tensor 'qzeros': expected {scheme.zero} everywhere since zero_point is false, found other values",
                hint='set "zero_point": true in quantization_config of config.json',
            )
        zeros = None
    return QuantizedTensor(unpack_awq(tensors["qweight"]), transposed(tensors["scales"]), zeros, scheme)


def weight_shape(tensors: Mapping[str, torch.Tensor]) -> tuple[int, int]:
    """[N, K] of a packed module, from its mapped tensors without unpacking them."""
    columns, words = tensors["qweight"].shape
    return words * PER_WORD, columns


def quantization_config(
    schemes: Mapping[str, QuantScheme], kept: Sequence[str], *, act_order: bool = False
) -> dict[str, Any]:
    """The config's keys are AutoAWQ's. One group size for all, and float modules found by substring.

    Raises QuantoolError when group sizes differ, or the name of a kept linear is part of a quantized one's:
    vLLM would leave both in float.
    """
    sizes = {scheme.group_size if scheme.group_size > 0 else PER_CHANNEL for scheme in schemes.values()}
    if len(sizes) > 1:
        raise QuantoolError(
            f"format awq has one group size for all modules, found {', '.join(map(str, sorted(sizes)))}",
            hint="use --format compressed-tensors",
        )
    for name in kept:
        clash = next((module for module in schemes if name in module), None)
        if clash is not None:
            raise QuantoolError(
                f"format awq cannot keep '{name}' in float, its name is part of '{clash}'",
                hint="use --format compressed-tensors",
            )
    return {
        "quant_method": NAME,
        "bits": BITS,
        "group_size": sizes.pop() if sizes else PER_CHANNEL,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": list(kept),
    }


def module_schemes(config: Mapping[str, Any], infos: Mapping[str, TensorInfo]) -> dict[str, QuantScheme]:
    """Module -> scheme for exactly the modules with a qweight; reads AutoAWQ's and auto-round's checkpoints.

    Raises QuantoolError on another layout or width, on keys that may change the meaning, and when config and tensor
    shapes disagree.
    """
    version = next((config[key] for key in ("version", "format", "checkpoint_format") if config.get(key)), "gemm")
    if str(version).lower() != "gemm":
        raise QuantoolError(
            f"quantization_config: awq version {version!r:.80} cannot be read, expected 'gemm'", hint=FLOAT_CHECKPOINT
        )
    refuse_unknown(config, KEYS)
    _read_scheme(config)  # refused also when no module has it
    find = module_configs(config, infos)
    schemes = {}
    for name, info in infos.items():
        module, _, suffix = name.rpartition(".")
        if suffix == "qweight":
            schemes[module] = _read_scheme(own_config(find, module, info))
            _check_tensors(module, schemes[module], infos)
    return schemes


def _read_scheme(config: Mapping[str, Any]) -> QuantScheme:
    require_int_weights(config)
    bits = config.get("bits")
    if bits != BITS:
        raise QuantoolError(
            f"quantization_config: awq with bits {bits!r:.80} cannot be read, expected {BITS}", hint=FLOAT_CHECKPOINT
        )
    return QuantScheme(bits=BITS, group_size=read_group_size(config), sym=config.get("zero_point") is False)


def _check_tensors(module: str, scheme: QuantScheme, infos: Mapping[str, TensorInfo]) -> None:
    if f"{module}.g_idx" in infos:
        raise QuantoolError(
            f"module '{module}' has g_idx, expected none: groups are contiguous in this layout", hint=EXPORT_AGAIN
        )
    columns, words = expect_matrix(infos[f"{module}.qweight"], "I32")
    if not scheme.divides(columns):
        raise QuantoolError(
            f"{infos[f'{module}.qweight'].path.name}: tensor '{module}.qweight': expected rows in groups of "
            f"{scheme.group_size}, found {columns} rows",
            hint=EXPORT_AGAIN,
        )
    groups = scheme.groups(columns)
    expect(infos, f"{module}.scales", FLOATS, (groups, words * PER_WORD))
    if not scheme.sym or f"{module}.qzeros" in infos:
        expect(infos, f"{module}.qzeros", ("I32",), (groups, words))
