"""The "quantization_config" of compressed-tensors: config groups -> schemes, and back.

A config group gives the scheme of the modules that its `targets` match: names, regexes ("re:...", from the
beginning of the name) or the class "Linear". Its keys are the library's: it refuses any other.
Source: compressed-tensors 0.20, quantization/quant_scheme.py and utils/match.py.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from quantool.errors import QuantoolError
from quantool.formats.config_keys import refuse_unknown
from quantool.formats.shared import (
    EXPERT,
    EXPORT_AGAIN,
    FLOAT_CHECKPOINT,
    FLOATS,
    INDICES,
    REGEX,
    compile_pattern,
    expect,
    expect_matrix,
    module_patterns,
)
from quantool.io import TensorInfo
from quantool.kernels.ops import WORD_BITS, packed_words
from quantool.scheme import PER_CHANNEL, PER_TENSOR, QuantScheme

NAME = "compressed-tensors"
VERSION = "0.20.0"  # the first that reads 3, 5, 6 and 7 bits as they are packed here
PACKED, INT8, MIXED = "pack-quantized", "int-quantized", "mixed-precision"
EXPERTS = r"re:.*\.experts\.[0-9]+\..*"
READABLE = (PACKED, INT8, "naive-quantized")
# The keys of 0.20, of the config, of a config group and of its weights or activations. The library too refuses
# others in the last two. A version is that of the package that wrote, not of the layout, so a newer one is read:
# what it would change is in a key, in a format's name or in the shapes.
TOP_KEYS = frozenset(
    {
        "config_groups",
        "dequantize",
        "format",
        "global_compression_ratio",
        "ignore",
        "kv_cache_scheme",
        "quant_method",
        "quantization_status",
        "run_compressed",
        "sparsity_config",
        "transform_config",
        "use_optimized_inference",
        "version",
    }
)
ONE_VALUE: tuple[tuple[int, ...], ...] = ((), (1,), (1, 1))
GROUP_KEYS = frozenset({"targets", "format", "weights", "input_activations", "output_activations"})
ARGS_KEYS = frozenset(
    {
        "actorder",
        "block_structure",
        "dynamic",
        "group_size",
        "num_bits",
        "observer",
        "observer_kwargs",
        "scale_dtype",
        "strategy",
        "symmetric",
        "type",
        "zp_dtype",
    }
)
ACT_ORDER = ("group", "dynamic", True)  # of actorder, before 0.20: groups are not contiguous, g_idx says which they are


def quantization_config(
    schemes: Mapping[str, QuantScheme], kept: Sequence[str], *, act_order: bool = False
) -> dict[str, Any]:
    """One config group per scheme, the most common first; `kept` linears are `ignore`.

    A single scheme targets "Linear". Several name their modules, all of them: vLLM would find the class of a
    fused q/k/v projection before the names of its parts.
    """
    group_of = {name: _group(scheme) for name, scheme in schemes.items()}
    modules: dict[str, list[str]] = {}
    for name, group in group_of.items():
        modules.setdefault(str(group), []).append(name)
    ordered = sorted(modules.values(), key=len, reverse=True)
    groups = [group_of[names[0]] for names in ordered]
    formats = {group["format"] for group in groups}
    # transformers 5.23 expects unpacked zero points on its default path and refuses packed ones, llm-compressor's too.
    # Told to dequantize while loading, it reads them; it then takes every module for one of the first group.
    dequantize = {"dequantize": True} if len(groups) == 1 and not groups[0]["weights"]["symmetric"] else {}
    return {
        "quant_method": NAME,
        "version": VERSION,
        "format": formats.pop() if len(formats) == 1 else MIXED,
        "quantization_status": "compressed",
        "config_groups": {
            f"group_{i}": {"targets": ["Linear"] if len(ordered) == 1 else _targets(names, ordered), **group}
            for i, (names, group) in enumerate(zip(ordered, groups, strict=True))
        },
        "ignore": list(kept),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
        "sparsity_config": {},
        "transform_config": {},
        **dequantize,
    }


def _targets(names: Sequence[str], groups: Sequence[Sequence[str]]) -> list[str]:
    """Patterns of one config group of several. Experts that are all in it are one regex that says so.

    transformers 5.23 looks for such a regex to find the scheme of merged experts, and takes another group's without
    one; vLLM asks for experts by names of its own.
    """
    if sum(any(EXPERT.search(name) for name in others) for others in groups) > 1:
        return module_patterns(names)
    rest = [name for name in names if not EXPERT.search(name)]
    return module_patterns(rest) + ([EXPERTS] if len(rest) < len(names) else [])


def _group(scheme: QuantScheme) -> dict[str, Any]:
    """A config group without its targets."""
    if scheme.act_bits == 16:
        # vLLM has no weight-only per-tensor strategy: equal scales per channel are the same weights.
        strategy, activations = "group" if scheme.group_size > 0 else "channel", None
    else:
        strategy = "tensor" if scheme.group_size == PER_TENSOR else "channel"
        activations = _args(8, "token" if scheme.act_dynamic else "tensor", sym=scheme.act_sym)
        activations["dynamic"] = scheme.act_dynamic
    weights = _args(scheme.bits, strategy, sym=scheme.sym)
    if strategy == "group":
        weights["group_size"] = scheme.group_size
    return {
        "format": PACKED if activations is None else INT8,
        "weights": weights,
        "input_activations": activations,
        "output_activations": None,
    }


def _args(bits: int, strategy: str, *, sym: bool) -> dict[str, Any]:
    return {
        "num_bits": bits,
        "type": "int",
        "symmetric": sym,
        "strategy": strategy,
        "group_size": None,
        "dynamic": False,
    }


@dataclass(frozen=True, slots=True)
class _Group:
    """What a config group says of its modules."""

    scheme: QuantScheme
    act_order: bool


@dataclass(frozen=True, slots=True)
class _Matcher:
    """Patterns of config.json -> config groups.

    As in the library, names come before regexes and these before classes, regexes are tried in alphabetical
    order, and `ignore` beats everything.
    """

    exact: Mapping[str, _Group]
    regexes: Sequence[tuple[re.Pattern[str], _Group]]
    ignore: frozenset[str]
    ignore_regexes: Sequence[re.Pattern[str]]

    def find(self, name: str) -> _Group | None:
        if name in self.ignore or any(regex.match(name) for regex in self.ignore_regexes):
            return None
        by_regex = (group for regex, group in self.regexes if regex.match(name))
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
        group = matcher.find(module)
        if group is None:
            raise QuantoolError(
                f"{info.path.name}: module '{module}' has quantized weights, "
                "but no config group of config.json targets it",
                hint=EXPORT_AGAIN,
            )
        _check_tensors(module, info, group, infos)
        schemes[module] = group.scheme
    return schemes


def _read_config(config: Mapping[str, Any]) -> _Matcher:
    sparsity = _object(config.get("sparsity_config") or {}, "sparsity_config").get("format", "dense")
    if sparsity != "dense":
        raise _unsupported(f"sparsity format '{sparsity}'")
    if config.get("kv_cache_scheme"):
        raise _unsupported("a quantized kv cache (kv_cache_scheme)")
    if _object(config.get("transform_config") or {}, "transform_config").get("config_groups"):
        raise _unsupported("rotations (transform_config)")
    writer = f" ({NAME} {config.get('version')!r:.40})"
    refuse_unknown(config, TOP_KEYS, writer)
    patterns: dict[str, _Group] = {}
    for name, value in _object(config.get("config_groups"), "config_groups").items():
        section = _object(value, f"{name!r:.80}")
        weights = _object(section.get("weights"), "weights")
        refuse_unknown(section, GROUP_KEYS, f" of {name!r:.80}{writer}")
        for key in ("weights", "input_activations"):
            refuse_unknown(_object(section.get(key) or {}, key), ARGS_KEYS, f" of {key}{writer}")
        group = _Group(
            _read_scheme(section, section.get("format") or config.get("format")),
            act_order=weights.get("actorder") in ACT_ORDER,
        )
        patterns |= dict.fromkeys(_names(section.get("targets"), "targets"), group)
    ignore = _names(config.get("ignore") or [], "ignore")
    return _Matcher(
        exact={name: scheme for name, scheme in patterns.items() if not name.startswith(REGEX)},
        regexes=[(compile_pattern(name), patterns[name]) for name in sorted(patterns) if name.startswith(REGEX)],
        ignore=frozenset(name for name in ignore if not name.startswith(REGEX)),
        ignore_regexes=[compile_pattern(name) for name in ignore if name.startswith(REGEX)],
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
            f"quantization_config: group_size is {group_size!r:.80}, expected a positive number", hint=EXPORT_AGAIN
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
    dynamic, act_sym = _read_activations(activations)
    return QuantScheme(bits, size, sym, act_bits=8, act_dynamic=dynamic, act_sym=act_sym)


def _read_activations(section: Any) -> tuple[bool, bool]:
    """Whether int8 activations get a scale per token at run time (or have one stored), and whether no zero point."""
    args = _object(section, "input_activations")
    kind = (args.get("type", "int"), args.get("num_bits", 8), args.get("strategy"), bool(args.get("dynamic")))
    sym = bool(args.get("symmetric", True))
    if kind not in (("int", 8, "token", True), ("int", 8, "tensor", False)) or args.get("dynamic") == "local":
        words = "dynamic" if kind[3] else "static", kind[2], "symmetric" if sym else "asymmetric"
        raise _unsupported(f"activations that are {' '.join(map(str, words))} {kind[0]}{kind[1]}")
    return kind[3], sym


def _names(value: Any, key: str) -> list[str]:
    if isinstance(value, list) and all(isinstance(name, str) for name in value):
        return value
    raise QuantoolError(f"quantization_config: {key} is not a list of names", hint=EXPORT_AGAIN)


def _object(value: Any, key: str) -> Mapping[str, Any]:
    if isinstance(value, Mapping):
        return value
    raise QuantoolError(f"quantization_config: {key} is not an object", hint=EXPORT_AGAIN)


def _unsupported(what: str) -> QuantoolError:
    return QuantoolError(
        f"quantization_config: compressed-tensors with {' '.join(what.split()):.120} cannot be read",
        hint=FLOAT_CHECKPOINT,
    )


def _check_tensors(module: str, weight: TensorInfo, group: _Group, infos: Mapping[str, TensorInfo]) -> None:
    """Raise QuantoolError where the tensors of a module are not those of its scheme."""
    scheme = group.scheme
    packed = weight.name.endswith("_packed")
    rows, columns = expect_matrix(weight, "I32" if packed else "I8")
    per_tensor = ONE_VALUE if scheme.group_size == PER_TENSOR else ()
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
    if group.act_order or f"{module}.weight_g_idx" in infos:
        expect(infos, f"{module}.weight_g_idx", INDICES)
    if scheme.act_bits == 8 and not scheme.act_dynamic:
        expect(infos, f"{module}.input_scale", FLOATS, *ONE_VALUE)
        if not scheme.act_sym:
            expect(infos, f"{module}.input_zero_point", ("I8",), *ONE_VALUE)


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
