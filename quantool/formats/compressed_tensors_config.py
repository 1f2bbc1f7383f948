"""The "quantization_config" of compressed-tensors: config groups -> schemes, and back.

A config group gives the scheme of the modules that its `targets` match: names, regexes ("re:...", from the
beginning of the name) or the class "Linear". Its keys are the library's: it refuses any other.
Source: compressed-tensors 0.20, quantization/quant_scheme.py and utils/match.py.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

from quantool.errors import QuantoolError
from quantool.formats.shared import EXPORT_AGAIN, FLOAT_CHECKPOINT, FLOATS, expect, expect_matrix
from quantool.io import TensorInfo
from quantool.kernels.ops import WORD_BITS, packed_words
from quantool.scheme import PER_CHANNEL, PER_TENSOR, QuantScheme

NAME = "compressed-tensors"
VERSION = "0.20.0"  # the first that reads 3, 5, 6 and 7 bits as they are packed here
READABLE = ("pack-quantized", "int-quantized", "naive-quantized")
REGEX = "re:"


def quantization_config(schemes: Mapping[str, QuantScheme], kept: Sequence[str]) -> dict[str, Any]:
    """One config group per scheme, the most common first; `kept` linears are `ignore`.

    A single scheme targets "Linear". Several name their modules, all of them: vLLM would find the class of a
    fused q/k/v projection before the names of its parts.
    """
    weights = {name: _weights_args(scheme) for name, scheme in schemes.items()}
    modules: dict[str, list[str]] = {}
    for name, args in weights.items():
        modules.setdefault(str(args), []).append(name)
    ordered = sorted(modules.values(), key=len, reverse=True)
    # transformers 5.23 expects unpacked zero points on its default path and refuses packed ones, llm-compressor's too.
    # Told to dequantize while loading, it reads them; it then takes every module for one of the first group.
    dequantize = {"dequantize": True} if len(ordered) == 1 and not next(iter(schemes.values())).sym else {}
    return {
        "quant_method": NAME,
        "version": VERSION,
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            f"group_{i}": {
                "targets": ["Linear"] if len(ordered) == 1 else _targets(names),
                "format": "pack-quantized",
                "weights": weights[names[0]],
                "input_activations": None,
                "output_activations": None,
            }
            for i, names in enumerate(ordered)
        },
        "ignore": list(kept),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
        "sparsity_config": {},
        "transform_config": {},
        **dequantize,
    }


def _weights_args(scheme: QuantScheme) -> dict[str, Any]:
    """Per tensor is stored as equal scales per channel: vLLM has no weight-only per-tensor strategy."""
    grouped = scheme.group_size > 0
    return {
        "num_bits": scheme.bits,
        "type": "int",
        "symmetric": scheme.sym,
        "strategy": "group" if grouped else "channel",
        "group_size": scheme.group_size if grouped else None,
        "dynamic": False,
    }


def _targets(names: Sequence[str]) -> list[str]:
    """Patterns that match exactly `names`.

    Names that differ in numbers only, as those of one linear in all blocks, are one regex that lists the numbers
    of each place, if the names are every combination of these; a config of experts would be long otherwise.
    """
    places: dict[tuple[str, ...], list[tuple[str, ...]]] = {}
    for name in names:
        parts = re.split(r"(?<=\.)([0-9]{1,9})(?=\.)", name)
        places.setdefault(tuple(parts[::2]), []).append(tuple(parts[1::2]))
    targets = []
    for literals, numbers in places.items():
        choices = [sorted(set(column), key=int) for column in zip(*numbers, strict=True)]
        if len(numbers) > 1 and math.prod(map(len, choices)) == len(set(numbers)):
            fields = [f"({'|'.join(choice)})" for choice in choices]
            targets.append(REGEX + _weave(map(re.escape, literals), fields) + "$")
        else:
            targets += [_weave(literals, fields) for fields in numbers]
    return targets


def _weave(literals: Iterable[str], fields: Iterable[str]) -> str:
    """literals[0] + fields[0] + literals[1] + ... + literals[-1]."""
    return "".join(map("".join, zip_longest(literals, fields, fillvalue="")))


@dataclass(frozen=True, slots=True)
class _Matcher:
    """Patterns of config.json -> schemes.

    As in the library, names come before regexes and these before classes, regexes are tried in alphabetical
    order, and `ignore` beats everything.
    """

    exact: Mapping[str, QuantScheme]
    regexes: Sequence[tuple[re.Pattern[str], QuantScheme]]
    ignore: frozenset[str]
    ignore_regexes: Sequence[re.Pattern[str]]

    def find(self, name: str) -> QuantScheme | None:
        if name in self.ignore or any(regex.match(name) for regex in self.ignore_regexes):
            return None
        by_regex = (scheme for regex, scheme in self.regexes if regex.match(name))
        return self.exact.get(name) or next(by_regex, None) or self.exact.get("Linear")


def module_schemes(config: Mapping[str, Any], infos: Mapping[str, TensorInfo]) -> dict[str, QuantScheme]:
    """Module -> scheme for exactly the modules with a weight_packed, or an int8 weight.

    Raises QuantoolError naming what cannot be read, a module that no config group matches, and a tensor whose
    shape is not its scheme's.
    """
    matcher = _read_config(config)
    schemes = {}
    for name, info in infos.items():
        module, _, suffix = name.rpartition(".")
        if not (suffix == "weight_packed" or (suffix == "weight" and info.dtype == "I8")):
            continue
        scheme = matcher.find(module)
        if scheme is None:
            raise QuantoolError(
                f"{info.path.name}: module '{module}' has quantized weights, "
                "but no config group of config.json targets it",
                hint=EXPORT_AGAIN,
            )
        _check_tensors(module, info, scheme, infos)
        schemes[module] = scheme
    return schemes


def _read_config(config: Mapping[str, Any]) -> _Matcher:
    sparsity = _object(config.get("sparsity_config") or {}, "sparsity_config").get("format", "dense")
    if sparsity != "dense":
        raise _unsupported(f"sparsity format '{sparsity}'")
    if config.get("kv_cache_scheme"):
        raise _unsupported("a quantized kv cache (kv_cache_scheme)")
    if _object(config.get("transform_config") or {}, "transform_config").get("config_groups"):
        raise _unsupported("rotations (transform_config)")
    patterns: dict[str, QuantScheme] = {}
    for name, value in _object(config.get("config_groups"), "config_groups").items():
        group = _object(value, name)
        scheme = _read_scheme(group, group.get("format") or config.get("format"))
        patterns |= dict.fromkeys(_names(group.get("targets"), "targets"), scheme)
    ignore = _names(config.get("ignore") or [], "ignore")
    return _Matcher(
        exact={name: scheme for name, scheme in patterns.items() if not name.startswith(REGEX)},
        regexes=[(_compile(name), patterns[name]) for name in sorted(patterns) if name.startswith(REGEX)],
        ignore=frozenset(name for name in ignore if not name.startswith(REGEX)),
        ignore_regexes=[_compile(name) for name in ignore if name.startswith(REGEX)],
    )


def _read_scheme(group: Mapping[str, Any], format_name: Any) -> QuantScheme:
    """Scheme of one config group; raises QuantoolError naming what is not read."""
    if format_name not in READABLE:
        raise _unsupported(f"format '{format_name}'")
    weights = _object(group.get("weights"), "weights")
    bits, kind = weights.get("num_bits", 8), weights.get("type", "int")
    group_size: Any = weights.get("group_size")
    if kind != "int" or not isinstance(bits, int) or not 2 <= bits <= 8 or weights.get("dynamic"):
        raise _unsupported(f"{'dynamic ' if weights.get('dynamic') else ''}{kind}{bits} weights")
    inferred = "tensor" if group_size is None else "channel" if group_size == PER_CHANNEL else "group"
    strategy = weights.get("strategy") or inferred
    if strategy not in ("group", "channel", "tensor"):
        raise _unsupported(f"weight strategy '{strategy}'")
    if strategy == "group" and (not isinstance(group_size, int) or group_size < 1):
        raise QuantoolError(
            f"quantization_config: group_size is {group_size!r}, expected a positive number", hint=EXPORT_AGAIN
        )
    if group.get("output_activations"):
        raise _unsupported("quantized output activations")
    size = {"channel": PER_CHANNEL, "tensor": PER_TENSOR}.get(strategy, group_size)
    sym = bool(weights.get("symmetric", True))
    activations = group.get("input_activations")
    if not activations:
        return QuantScheme(bits=bits, group_size=size, sym=sym)
    if bits != 8 or not sym or strategy == "group":
        raise _unsupported(f"quantized activations with {QuantScheme(bits, size, sym)} weights")
    return QuantScheme(bits, size, sym, act_bits=8, act_dynamic=_dynamic(activations))


def _dynamic(activations: Any) -> bool:
    """Whether int8 activations get a scale per token at run time, or have one stored."""
    args = _object(activations, "input_activations")
    kind = (args.get("type", "int"), args.get("num_bits", 8), args.get("symmetric", True), args.get("strategy"))
    dynamic = args.get("dynamic", False)
    if kind[:3] != ("int", 8, True) or (kind[3], dynamic) not in (("token", True), ("tensor", False)):
        words = "dynamic" if dynamic else "static", kind[3], "symmetric" if kind[2] else "asymmetric"
        raise _unsupported(f"activations that are {' '.join(map(str, words))} {kind[0]}{kind[1]}")
    return bool(dynamic)


def _names(value: Any, key: str) -> list[str]:
    if isinstance(value, list) and all(isinstance(name, str) for name in value):
        return value
    raise QuantoolError(f"quantization_config: {key} is not a list of names", hint=EXPORT_AGAIN)


def _object(value: Any, key: str) -> Mapping[str, Any]:
    if isinstance(value, Mapping):
        return value
    raise QuantoolError(f"quantization_config: {key} is not an object", hint=EXPORT_AGAIN)


def _compile(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern.removeprefix(REGEX))
    except re.error as error:
        raise QuantoolError(f"quantization_config: '{pattern}' is not a regular expression: {error}") from error


def _unsupported(what: str) -> QuantoolError:
    return QuantoolError(
        f"quantization_config: compressed-tensors with {what} cannot be read",
        hint=FLOAT_CHECKPOINT,
    )


def _check_tensors(module: str, weight: TensorInfo, scheme: QuantScheme, infos: Mapping[str, TensorInfo]) -> None:
    """Raise QuantoolError where the tensors of a module are not those of its scheme."""
    if f"{module}.weight_g_idx" in infos:
        raise QuantoolError(
            f"module '{module}' has weight_g_idx: activation ordering cannot be read yet", hint=FLOAT_CHECKPOINT
        )
    packed = weight.name.endswith("_packed")
    rows, columns = expect_matrix(weight, "I32" if packed else "I8")
    per_tensor: tuple[tuple[int, ...], ...] = ((), (1,), (1, 1)) if scheme.group_size == PER_TENSOR else ()
    groups = 1
    if scheme.group_size > 0:
        groups = _groups(weight, columns, scheme, infos.get(f"{module}.weight_scale"))
    expect(infos, f"{module}.weight_scale", FLOATS, (rows, groups), *per_tensor)
    if packed:
        expect(infos, f"{module}.weight_shape", ("I64", "I32"), (2,))
    zero_point = f"{module}.weight_zero_point"
    if not scheme.sym or zero_point in infos:
        if packed and zero_point in infos and infos[zero_point].dtype == "I32":
            expect(infos, zero_point, ("I32",), *((words, groups) for words in _word_counts(rows, scheme.bits)))
        else:
            expect(infos, zero_point, ("I8",), (rows, groups), *per_tensor)
    if scheme.act_bits == 8 and not scheme.act_dynamic:
        expect(infos, f"{module}.input_scale", FLOATS, (), (1,), (1, 1))


def _groups(weight: TensorInfo, columns: int, scheme: QuantScheme, scale: TensorInfo | None) -> int:
    """Number of groups of a grouped weight; a packed one only says how many words its row has."""
    groups = scale.shape[-1] if scale is not None and scale.shape else 0
    count = groups * scheme.group_size
    fits = columns in _word_counts(count, scheme.bits) if weight.dtype == "I32" else columns == count
    if scale is None or fits:
        return groups
    raise QuantoolError(
        f"{weight.path.name}: tensor '{weight.name}': expected rows of {groups} groups of {scheme.group_size} "
        f"{scheme.bits}-bit weights, found {list(weight.shape)} {weight.dtype}",
        hint=EXPORT_AGAIN,
    )


def _word_counts(count: int, bits: int) -> tuple[int, int]:
    return packed_words(count, bits), padded_words(count, bits)


def padded_words(count: int, bits: int) -> int:
    """Words of `count` codes before compressed-tensors 0.20, when none straddled two words."""
    return -(-count // (WORD_BITS // bits))
