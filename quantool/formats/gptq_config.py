"""The "quantization_config" of GPTQ checkpoints: AutoGPTQ's, GPTQModel's, and auto-round's in the same layout.

One scheme is bits, group_size and sym of the config itself. Modules that differ, or stay in float, are patterns in
`dynamic`, which GPTQModel and vLLM read. `checkpoint_format` says what qzeros hold: "gptq" (v1, also when there is no
such key) zeros minus one, "gptq_v2" zeros as they are.
Source: GPTQModel, quantization/config.py; vLLM, quantization/utils/gptq_utils.py; auto-round, inference/backend.py.
"""

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from quantool import __version__
from quantool.errors import QuantoolError
from quantool.formats.config_keys import (
    AUTO_ROUND,
    EXCLUDED,
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
    INDICES,
    REGEX,
    expect,
    expect_matrix,
    module_patterns,
)
from quantool.io import TensorInfo
from quantool.kernels.ops import WORD_BITS, packed_words
from quantool.scheme import PER_CHANNEL, QuantScheme

NAME = "gptq"
BITS = (2, 3, 4, 8)
HEAD = "lm_head"
V1, V2 = "gptq", "gptq_v2"
# auto-round's words for the same two: the first is made for AutoGPTQ's kernels, the others for its own.
AUTO_ROUND_PACKING = {"auto_round:auto_gptq": V1, "auto_round:gptq": V1, "auto_round": V2, "auto_round:gptqmodel": V2}
KEYS = HOW_QUANTIZED | PER_MODULE | WHOLE


def written_version(scheme: QuantScheme) -> str:
    """v1 where every reader agrees on it: symmetric, and not 3 bits (see gptq.py)."""
    return V1 if scheme.sym and scheme.bits != 3 else V2


def quantization_config(
    schemes: Mapping[str, QuantScheme], kept: Sequence[str], *, act_order: bool = False
) -> dict[str, Any]:
    """GPTQModel's keys. The most common scheme is that of the config; `dynamic` names the modules of the others.

    Raises QuantoolError when some schemes need v1 and others v2, which one file cannot be both.
    """
    values = {name: _values(scheme) for name, scheme in schemes.items()}
    modules: dict[str, list[str]] = {}
    for name, own in values.items():
        modules.setdefault(str(own), []).append(name)
    common, *others = sorted(modules.values(), key=len, reverse=True)
    versions = Counter(written_version(scheme) for scheme in schemes.values())
    if len(versions) > 1:
        raise QuantoolError(
            "format gptq stores symmetric weights as v1 and asymmetric or 3-bit ones as v2, not both in one checkpoint",
            hint="use --format compressed-tensors",
        )
    floats = _patterns([name for name in kept if name != HEAD])
    dynamic: dict[str, dict[str, Any]] = {f"{EXCLUDED}{pattern}": {} for pattern in floats}
    dynamic |= {f"+:{pattern}": values[names[0]] for names in others for pattern in _patterns(names)}
    return {
        "quant_method": NAME,
        **values[common[0]],
        "desc_act": act_order,
        "lm_head": HEAD in schemes,
        "checkpoint_format": next(iter(versions)),
        "pack_dtype": "int32",
        **({"dynamic": dynamic} if dynamic else {}),
        "meta": {"quantizer": [f"quantool:{__version__}"]},
    }


def _values(scheme: QuantScheme) -> dict[str, Any]:
    """Per tensor is stored as equal scales per channel."""
    group_size = scheme.group_size if scheme.group_size > 0 else PER_CHANNEL
    return {"bits": scheme.bits, "group_size": group_size, "sym": scheme.sym}


def _patterns(names: Sequence[str]) -> list[str]:
    """Regexes that match exactly `names`, from the beginning."""
    return [
        pattern.removeprefix(REGEX) if pattern.startswith(REGEX) else re.escape(pattern) + "$"
        for pattern in module_patterns(names)
    ]


def stored_version(config: Mapping[str, Any]) -> str:
    """V1 or V2; raises QuantoolError when the config names another layout."""
    if config.get("quant_method") == AUTO_ROUND:
        word = config.get("packing_format")
        found = AUTO_ROUND_PACKING.get(word) if isinstance(word, str) else None
        described, expected = f"packing_format {word!r:.80}", " or ".join(map(repr, AUTO_ROUND_PACKING))
    else:
        word = config.get("checkpoint_format") or config.get("format") or V1
        found = {V1: V1, V2: V2}.get(word) if isinstance(word, str) else None
        described, expected = f"checkpoint_format {word!r:.80}", f"{V1!r} or {V2!r}"
    if found is None:
        raise QuantoolError(
            f"quantization_config: gptq with {described} cannot be read, expected {expected}", hint=FLOAT_CHECKPOINT
        )
    return found


def module_schemes(config: Mapping[str, Any], infos: Mapping[str, TensorInfo]) -> dict[str, QuantScheme]:
    """Module -> scheme for exactly the modules with a qweight.

    Raises QuantoolError on another layout or width, on keys that may change the meaning, and when config and tensor
    shapes disagree.
    """
    version = stored_version(config)
    refuse_unknown(config, KEYS)
    _read_scheme(config, version)  # refused also when no module has it
    find = module_configs(config, infos)
    schemes = {}
    for name, info in infos.items():
        module, _, suffix = name.rpartition(".")
        if suffix == "qweight":
            own = own_config(find, module, info)
            schemes[module] = _read_scheme(own, version)
            _check_tensors(module, schemes[module], infos, act_order=bool(own.get("desc_act")))
    return schemes


def _read_scheme(config: Mapping[str, Any], version: str) -> QuantScheme:
    require_int_weights(config)
    bits, sym = config.get("bits"), config.get("sym", True)
    if type(bits) is not int or bits not in BITS or not isinstance(sym, bool):
        raise QuantoolError(
            f"quantization_config: gptq with bits {bits!r:.80} and sym {sym!r:.80} cannot be read, "
            f"expected {', '.join(map(str, BITS))} and true or false",
            hint=FLOAT_CHECKPOINT,
        )
    if version == V1 and bits == 3 and not sym:
        raise QuantoolError(
            "quantization_config: releases of AutoGPTQ and GPTQModel read different zeros from asymmetric 3-bit "
            f"weights of checkpoint_format {V1!r}, expected {V2!r}",
            hint=FLOAT_CHECKPOINT,
        )
    return QuantScheme(bits=bits, group_size=read_group_size(config), sym=sym)


def _check_tensors(module: str, scheme: QuantScheme, infos: Mapping[str, TensorInfo], *, act_order: bool) -> None:
    """Raise QuantoolError where the tensors of a module are not those of its scheme."""
    weight, order = infos[f"{module}.qweight"], infos.get(f"{module}.g_idx")
    words, rows = expect_matrix(weight, "I32")
    columns = math.prod(order.shape) if order is not None else words * WORD_BITS // scheme.bits
    if packed_words(columns, scheme.bits) != words or not scheme.divides(columns):
        raise QuantoolError(
            f"{weight.path.name}: tensor '{weight.name}': expected the words of {scheme.bits}-bit weights for "
            f"{columns} input channels in groups of {scheme.width(columns)}, found {list(weight.shape)} {weight.dtype}",
            hint=EXPORT_AGAIN,
        )
    groups = scheme.groups(columns)
    expect(infos, f"{module}.scales", FLOATS, (groups, rows))
    expect(infos, f"{module}.qzeros", ("I32",), (groups, packed_words(rows, scheme.bits)))
    if order is not None or (act_order and groups > 1):
        expect(infos, f"{module}.g_idx", INDICES, (columns,))
