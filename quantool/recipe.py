r"""What one quantization does, in the words of the command line; and the YAML file that can say it.

A recipe file has one section per command. Its keys are the command's options with underscores, and `quantize` adds
`overrides`, settings for some modules only, of which the first that matches wins:

    quantize:
      method: rtn
      bits: 4
      group_size: 128
      overrides:
        - match: mlp.down_proj
          bits: 8

A module is named by its full name, by the last dotted parts of it (`lm_head`, `mlp.down_proj`), or by `re:REGEX`,
which has to match from the beginning of the full name (`re.match`): `re:.*layers\.[0-3]\.` is the first four blocks.
"""

import difflib
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantool.errors import UsageError
from quantool.scheme import FORMAT_NAMES, METHOD_NAMES, PER_CHANNEL, PRESETS, MethodOptions, QuantScheme

if TYPE_CHECKING:
    from yaml import Node

SECTIONS = ("calibrate", "quantize", "convert-gguf")
_INTEGER = {"bits": 4, "sym": True, "format": "compressed-tensors"}
_FLAT = {"bits": 4, "group_size": 64, "double_quant": True, "format": "bitsandbytes"}
METHOD_DEFAULTS: dict[str, dict[str, Any]] = {
    "rtn": _INTEGER,
    "gptq": _INTEGER,
    "awq": {**_INTEGER, "sym": False},
    "awq+gptq": {**_INTEGER, "sym": False},
    "smoothquant": {**_INTEGER, "bits": 8, "group_size": PER_CHANNEL, "act_bits": 8},
    "nf4": {**_FLAT, "dtype": "nf4"},
    "fp4": {**_FLAT, "dtype": "fp4"},
    "llm-int8": {
        "bits": 8,
        "group_size": PER_CHANNEL,
        "act_bits": 8,
        "outlier_threshold": 6.0,
        "format": "bitsandbytes",
    },
}
INTEGER_METHODS = ("rtn", "gptq", "awq", "awq+gptq", "smoothquant")
"""Those that have a choice of bits, groups and symmetry, and whose modules may stand in one artifact."""
SCHEME_OPTIONS = ("bits", "group_size", "sym", "act_bits", "act_dynamic", "act_sym")
REGEX = "re:"
MAX_FILE_BYTES = 1 << 20

# What a recipe key may hold, in the words of the error message. bool is an int in Python, not in a recipe.
KINDS: dict[str, Callable[[Any], bool]] = {
    "true or false": lambda value: isinstance(value, bool),
    "an integer": lambda value: isinstance(value, int) and not isinstance(value, bool),
    "a number": lambda value: isinstance(value, int | float) and not isinstance(value, bool),
    "text": lambda value: isinstance(value, str),
    "an integer or text": lambda value: isinstance(value, int | str) and not isinstance(value, bool),
    "a list of text": lambda value: isinstance(value, list) and all(isinstance(item, str) for item in value),
    "a list": lambda value: isinstance(value, list),
}
OVERRIDE_KEYS = {
    "match": "text",
    "bits": "an integer",
    "group_size": "an integer",
    "sym": "true or false",
    "method": "text",
    "ignore": "true or false",
}


@dataclass(frozen=True, slots=True)
class Override:
    """Other settings for the modules that `match`; None keeps what the recipe says, `ignore` leaves them in float.

    Raises UsageError for a pattern that does not compile, a value out of range, or an override that changes nothing.
    """

    match: str
    bits: int | None = None
    group_size: int | None = None
    sym: bool | None = None
    method: str | None = None
    ignore: bool = False

    def __post_init__(self) -> None:
        check_pattern(self.match)
        changes = [value for value in (self.bits, self.group_size, self.sym, self.method) if value is not None]
        if bool(changes) == self.ignore:
            what = "both 'ignore' and other settings" if self.ignore else "nothing to change"
            raise UsageError(
                f"override of '{self.match}' has {what}",
                hint="give it bits, group_size, sym or method, or ignore: true",
            )
        _check_ranges(self.bits, self.group_size)
        if self.method is not None:
            _check_word(self.method, METHOD_NAMES, f"override of '{self.match}': unknown method")


@dataclass(frozen=True, slots=True)
class Recipe:
    """Which modules become what. `group_size` None is auto; the fields up to `outlier_threshold` are QuantScheme's.

    Raises UsageError for an unknown method or format, a value out of range, a scheme that the method cannot express,
    and a pattern that does not compile.
    """

    method: str = "rtn"
    format: str = "compressed-tensors"
    bits: int = 4
    group_size: int | None = None
    sym: bool = True
    act_bits: int = 16
    act_dynamic: bool = True
    act_sym: bool = True
    dtype: str = "int"
    double_quant: bool = False
    outlier_threshold: float | None = None
    ignore: tuple[str, ...] = ("lm_head",)
    overrides: tuple[Override, ...] = ()
    options: MethodOptions = field(default_factory=MethodOptions)

    def __post_init__(self) -> None:
        _check_word(self.method, METHOD_NAMES, "unknown method")
        _check_word(self.format, FORMAT_NAMES, "unknown format")
        _check_ranges(self.bits, self.group_size, act_bits=self.act_bits, outlier_threshold=self.outlier_threshold)
        for pattern in self.ignore:
            check_pattern(pattern)
        _check_expressible(self)

    @property
    def methods(self) -> tuple[str, ...]:
        """Every method that some module may be quantized by, the recipe's own first."""
        return (self.method, *dict.fromkeys(o.method for o in self.overrides if o.method not in {None, self.method}))

    def scheme_for(self, name: str, group_size: int) -> QuantScheme | None:
        """The scheme of module `name`, None when it is left in float. `group_size` is what auto resolved to."""
        override = self._override_for(name)
        if any(matches(pattern, name) for pattern in self.ignore) or (override is not None and override.ignore):
            return None
        default = QuantScheme(
            bits=self.bits,
            group_size=group_size if self.group_size is None else self.group_size,
            sym=self.sym,
            act_bits=self.act_bits,
            act_dynamic=self.act_dynamic,
            act_sym=self.act_sym,
            dtype=self.dtype,
            double_quant=self.double_quant,
            outlier_threshold=self.outlier_threshold,
        )
        return default if override is None else _overridden(default, override)

    def method_for(self, name: str) -> str:
        """The method of module `name`."""
        override = self._override_for(name)
        return self.method if override is None or override.method is None else override.method

    def _override_for(self, name: str) -> Override | None:
        return next((override for override in self.overrides if matches(override.match, name)), None)


def _check_expressible(recipe: Recipe) -> None:
    """Raise UsageError for a scheme that the method cannot express."""
    dtype = METHOD_DEFAULTS[recipe.method].get("dtype", "int")
    if recipe.dtype != dtype:
        raise UsageError(f"dtype is {recipe.dtype}, method {recipe.method} has {dtype}", hint=f'use dtype="{dtype}"')
    if recipe.method not in INTEGER_METHODS:
        _check_fixed(recipe)
        return
    _check_activations(recipe)
    foreign = next((name for name in recipe.methods if name not in INTEGER_METHODS), None)
    if foreign is not None:
        raise UsageError(
            f"an override asks for method {foreign}, whose weights cannot stand beside those of {recipe.method}",
            hint=f"use --method {foreign} for all, or {', '.join(INTEGER_METHODS[:-1])} or {INTEGER_METHODS[-1]} in it",
        )


def _check_fixed(recipe: Recipe) -> None:
    """The methods of bitsandbytes have one scheme, of which a choice of groups is all that some leave."""
    method, own = recipe.method, METHOD_DEFAULTS[recipe.method]
    flags = {"bits": f"--bits {recipe.bits}", "sym": "--asym", "group_size": f"--group-size {recipe.group_size}"}
    fixed = {"bits": own["bits"], "sym": True}
    if recipe.dtype == "int":
        fixed["group_size"] = own["group_size"]
    for name, value in fixed.items():
        if getattr(recipe, name) != value:
            raise UsageError(
                f"method {method} has no {flags[name]}", hint=f"use --method rtn {flags[name]}, or leave it out"
            )
    odd = next((override for override in recipe.overrides if not override.ignore), None)
    if odd is not None:
        raise UsageError(
            f"method {method} has one scheme for all modules, the override of '{odd.match}' asks for another",
            hint=f"use ignore: true in it, or one of the methods {', '.join(INTEGER_METHODS)}",
        )


def _check_activations(recipe: Recipe) -> None:
    if "smoothquant" in recipe.methods and recipe.act_bits != 8:
        raise UsageError(
            f"method smoothquant is for 8-bit activations, found --act-bits {recipe.act_bits}",
            hint="use --method awq, or --act-bits 8",
        )
    if recipe.method == "rtn" and not recipe.act_dynamic:
        raise UsageError(
            "a stored activation scale needs calibration, and method rtn looks at none",
            hint="use --method smoothquant, or --act-dynamic",
        )
    if recipe.act_bits != 8 and not (recipe.act_dynamic and recipe.act_sym):
        raise UsageError(
            f"{'--act-asym' if recipe.act_dynamic else '--act-static'} has no effect on float activations",
            hint="use --method smoothquant, or leave it out",
        )


def _overridden(default: QuantScheme, override: Override) -> QuantScheme:
    changes = {name: getattr(override, name) for name in ("bits", "group_size", "sym")}
    return replace(default, **{name: value for name, value in changes.items() if value is not None})


def build_recipe(options: Mapping[str, Any], given: Mapping[str, int], overrides: tuple[Override, ...] = ()) -> Recipe:
    """The recipe of one run, from the options of quantize; `given` maps those not left to default to their source.

    The lower its source, the more explicit an option. A preset decides the scheme, except where an option of it is at
    least as explicit: `--scheme` on the command line beats `bits` in the file, and `--bits` beats both.
    """
    chosen = dict(METHOD_DEFAULTS[options["method"]])
    if options["scheme"] is not None:
        preset = PRESETS[options["scheme"]]
        chosen |= {name: getattr(preset, name) for name in SCHEME_OPTIONS}
    for name in SCHEME_OPTIONS:
        fixed = options[name] is None and options["method"] not in INTEGER_METHODS  # auto: what the method has
        if name in given and given[name] <= given.get("scheme", given[name]) and not fixed:
            chosen[name] = options[name]
    for name in ("format", "double_quant", "outlier_threshold"):
        if name in given:
            chosen[name] = options[name]
    ignore = tuple(pattern for pattern in options["ignore"] if pattern)
    return Recipe(
        method=options["method"], **chosen, ignore=ignore, overrides=overrides, options=method_options(options)
    )


def method_options(options: Mapping[str, Any]) -> MethodOptions:
    """What the options of a command say to its methods."""
    names = [option.name for option in fields(MethodOptions)]
    return MethodOptions(**{name: options[name] for name in names if name in options})


def matches(pattern: str, name: str) -> bool:
    """Whether `pattern` means module `name`: its full name, the last dotted parts of it, or `re:REGEX` (re.match)."""
    if pattern.startswith(REGEX):
        return re.match(pattern.removeprefix(REGEX), name) is not None
    return name == pattern or name.endswith(f".{pattern}")


def check_pattern(pattern: str) -> None:
    """Raise UsageError when `pattern` is empty, or is a regular expression that does not compile."""
    if not pattern.removeprefix(REGEX):
        raise UsageError(f"module pattern '{pattern}' is empty", hint="use a module name such as lm_head")
    if not pattern.startswith(REGEX):
        return
    try:
        re.compile(pattern.removeprefix(REGEX))
    except (re.error, OverflowError, RecursionError) as error:
        raise UsageError(
            f"module pattern '{pattern}': {error or 'too deeply nested'}",
            hint=r"use a Python regular expression, such as 're:.*\.down_proj'",
        ) from error


def load_section(path: Path, command: str, known: Mapping[str, str]) -> dict[str, Any]:
    """The settings that recipe file `path` has for `command`, their types checked; `overrides` as Override objects.

    `known` maps each key that the command takes to its kind, a key of KINDS. Raises UsageError, one line that names
    file, key, expected and found, for anything that cannot be used.
    """
    sections = _read_yaml(path)
    for name in sections:
        _check_word(name, SECTIONS, f"{path}: unknown section")
    if command not in sections:
        raise UsageError(
            f"{path}: no section '{command}', it has {', '.join(sections) or 'none'}", hint=f"add '{command}:' to it"
        )
    section = _mapping(sections[command] or {}, f"{path}: section '{command}'")
    _check_entries(section, known, f"{path}: {command}")
    if "overrides" in section:
        section["overrides"] = tuple(_override(entry, path, i) for i, entry in enumerate(section["overrides"], 1))
    return section


def _override(entry: object, path: Path, number: int) -> Override:
    where = f"{path}: overrides entry {number}"
    settings = _mapping(entry, where)
    _check_entries(settings, OVERRIDE_KEYS, where)
    if "match" not in settings:
        raise UsageError(f"{where}: no 'match'", hint="name the modules it is for, such as match: mlp.down_proj")
    try:
        return Override(**settings)
    except UsageError as error:
        raise UsageError(f"{where}: {error.message}", hint=error.hint) from error


def _check_entries(entries: Mapping[Any, Any], kinds: Mapping[str, str], where: str) -> None:
    for key, value in entries.items():
        _check_word(key, kinds, f"{where}: unknown key")
        _check_kind(value, kinds[key], f"{where}: {key}")


def _check_kind(value: object, kind: str, where: str) -> None:
    if not KINDS[kind](value):
        raise UsageError(f"{where} is {_found(value)}, expected {kind}", hint="see the recipes in configs/")


def _mapping(value: object, where: str) -> dict[Any, Any]:
    if not isinstance(value, dict):
        raise UsageError(f"{where} is {_found(value)}, expected keys and values", hint="see the recipes in configs/")
    return value


def _check_word(word: object, known: Collection[str], what: str) -> None:
    if word in known:
        return
    near = difflib.get_close_matches(str(word), known, n=1)
    hint = f"did you mean '{near[0]}'?" if near else f"known are {', '.join(known)}"
    raise UsageError(f"{what} {_found(word)}", hint=hint)


def _check_ranges(
    bits: int | None, group_size: int | None, *, act_bits: int = 16, outlier_threshold: float | None = None
) -> None:
    bits, group_size = 4 if bits is None else bits, 128 if group_size is None else group_size
    QuantScheme(bits, group_size, act_bits=act_bits, outlier_threshold=outlier_threshold)


def _found(value: object) -> str:
    """`value` for a message: scalars as they are and short, containers by kind, for they can be of any size."""
    if value is None:
        return "empty"
    if isinstance(value, dict | list | tuple | set):
        return "keys and values" if isinstance(value, dict) else "a list"
    text = str(value).lower() if isinstance(value, bool) else str(value)
    text = text if len(text) <= 60 else f"{text[:60]}..."
    return f"'{text}'" if isinstance(value, str) else text


def _read_yaml(path: Path) -> dict[Any, Any]:
    """The sections of the file, {} when it is empty."""
    import yaml

    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise UsageError(f"{path}: {path.stat().st_size} bytes, too large for a recipe", hint="use a YAML file")
        loader = yaml.SafeLoader(path.read_text(encoding="utf-8"))
        node = loader.get_single_node()
        if node is None:
            return {}
        _check_duplicates(node, path)
        sections = loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise UsageError(f"{path}: {line}{error.problem or error.context}", hint="use valid YAML") from error
    except (yaml.YAMLError, UnicodeDecodeError, ValueError, RecursionError) as error:
        raise UsageError(f"{path}: not a YAML text file", hint="see the recipes in configs/") from error
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}", hint="check the path") from error
    return _mapping(sections, f"{path}: the file")


def _check_duplicates(root: "Node", path: Path) -> None:
    """YAML forbids a key said twice; PyYAML would silently keep the last."""
    import yaml

    seen: set[int] = set()
    pending = [root]
    while pending:
        node = pending.pop()
        if id(node) in seen or not isinstance(node, yaml.CollectionNode):
            continue
        seen.add(id(node))
        if isinstance(node, yaml.MappingNode):
            keys: set[str] = set()
            for key, _ in node.value:
                if isinstance(key.value, str) and key.value in keys:
                    line = key.start_mark.line + 1
                    raise UsageError(f"{path}: line {line}: '{key.value}' is said twice", hint="keep one of them")
                keys.add(str(key.value))
            pending += [value for _, value in node.value]
        else:
            pending += node.value
