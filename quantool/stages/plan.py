"""What `quantize` will do, from names and shapes alone: which tensors are quantized how, and every byte written.

The plan gives the file headers, the `--dry-run` table, the predicted size and every refusal that can be made
before any work.
"""

import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from quantool.errors import QuantoolError, UsageError
from quantool.formats import FORMATS
from quantool.io import Checkpoint, TensorInfo, model_dtype
from quantool.io.safetensors import DTYPES, dtype_name
from quantool.io.writer import PlannedTensor, check_output_directory
from quantool.model.experts import expert_of
from quantool.model.names import HEADS, find_linears, fused_sets
from quantool.model.views import LinearsCheckpoint
from quantool.recipe import Recipe, matches
from quantool.scheme import AUTO_GROUP_SIZES, PER_CHANNEL, QuantScheme, fitting_group_sizes


@dataclass(frozen=True, slots=True)
class PlanRow:
    """One source tensor and what becomes of it; `bytes` is what is written for it."""

    name: str
    shape: list[int]
    dtype: str
    action: str
    scheme: str
    bytes: int


@dataclass(frozen=True, slots=True)
class QuantizeResult:
    """Every source tensor is counted once: quantized, copied, folded (changed by a scale) or dropped.

    `bound` and `busy_seconds` (streaming.py) are of weights that went through a GPU.
    """

    output: str
    method: str
    format: str
    scheme: str
    group_size: int
    bytes: int
    bits_per_weight: float
    quantized: int
    copied: int
    folded: int
    dropped: int
    seconds: float
    peak_memory_bytes: int
    plan: list[PlanRow] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    bound: str | None = None
    busy_seconds: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Plan:
    """`schemes` is what will be quantized, `methods` by what; `kept` the linears left in float.

    `tensors` is everything written.
    """

    schemes: dict[str, QuantScheme]
    methods: dict[str, str]
    kept: tuple[str, ...]
    group_size: int
    tensors: list[PlannedTensor]
    rows: list[PlanRow]
    model_dtype: torch.dtype
    notes: list[str]

    @property
    def parameters(self) -> int:
        return sum(math.prod(row.shape) for row in self.rows)


def make_plan(checkpoint: LinearsCheckpoint, recipe: Recipe) -> Plan:
    """Decide everything that can be decided without reading a weight.

    Raises UsageError for a group size that does not divide, a scheme the format cannot hold and a pattern that
    matches nothing; QuantoolError for a checkpoint that cannot be quantized.
    """
    linears = find_linears(checkpoint)
    _check_patterns(recipe, [*linears.candidates, *linears.others])
    notes: list[str] = []
    group_size = _resolve_group_size(recipe, linears.candidates, notes)
    schemes = {
        name: scheme
        for name in linears.candidates
        if (scheme := recipe.scheme_for(_known_as(name), group_size)) is not None
    }
    if not schemes:
        raise UsageError("every linear is ignored, nothing to quantize", hint="check --ignore and the overrides")
    _check_division({name: linears.candidates[name][1] for name in schemes}, schemes)
    methods = {name: recipe.method_for(_known_as(name)) for name in schemes}
    _check_fused(linears.candidates, schemes, methods)
    _check_static(schemes)
    kept = tuple(name for name in (*linears.candidates, *linears.others) if name not in schemes)
    dtype = model_dtype(checkpoint)
    act_order = needs_g_idx(recipe, schemes)
    _check_format(recipe.format, schemes, linears.candidates, act_order=act_order)
    _check_config(recipe.format, schemes, kept, act_order=act_order)
    _check_transposed(checkpoint, recipe.format)
    notes += _loading_notes(checkpoint, recipe.format, schemes)
    if linears.stacks:
        some = f"'{linears.stacks[0]}'"
        notes.append(f"{len(linears.stacks)} stacks of experts stay in float, their layout is not known: {some}")
    tensors, rows = _layout(checkpoint, recipe.format, schemes, dtype)
    return Plan(schemes, methods, kept, group_size, tensors, rows, dtype, notes)


def _check_transposed(checkpoint: LinearsCheckpoint, format_name: str) -> None:
    """Refuse the one format in which a runtime would make up the weights of a Conv1D instead of failing."""
    if checkpoint.transposed and format_name == "awq":
        raise UsageError(
            f"format 'awq' cannot hold the Conv1D of {checkpoint.config['model_type']}: transformers replaces "
            "nn.Linear only, and would make up the weights",
            hint="use --format gptq",
        )


def _loading_notes(checkpoint: LinearsCheckpoint, format_name: str, schemes: Mapping[str, QuantScheme]) -> list[str]:
    """What is known not to load an artifact in this format (tests/test_families.py, transformers 5.23)."""
    if format_name != "compressed-tensors":
        return []
    notes = []
    if checkpoint.transposed:
        notes.append("transformers does not load a quantized Conv1D in this format; quantool does")
    experts = [scheme for name, scheme in schemes.items() if expert_of(name)]
    if any(not scheme.sym for scheme in experts):
        notes.append("transformers 5.23 does not load experts with zero points; quantool and vLLM do")
    if any(scheme.act_bits == 8 for scheme in experts):
        notes.append("transformers 5.23 does not load experts with 8-bit activations; quantool and vLLM do")
    return notes


def _known_as(name: str) -> str:
    """A head is `lm_head` to a recipe, whatever the family calls it."""
    return HEADS[0] if name in HEADS else name


def stored_dtype(info: TensorInfo, model: torch.dtype) -> str:
    """What a tensor that is not quantized is written as: a GGUF block type is no safetensors dtype."""
    return info.dtype if info.dtype in DTYPES else dtype_name(model)


def _layout(
    checkpoint: LinearsCheckpoint, format_name: str, schemes: dict[str, QuantScheme], model: torch.dtype
) -> tuple[list[PlannedTensor], list[PlanRow]]:
    tensors: list[PlannedTensor] = []
    rows: list[PlanRow] = []
    for name, parts in checkpoint.parts.items():
        # A fused tensor of experts is quantized part by part, and copied whole.
        if any(part.removesuffix(".weight") in schemes and part.endswith(".weight") for part in parts):
            for part in parts:
                info, module = checkpoint.infos[part], part.removesuffix(".weight")
                layout = FORMATS[format_name].layout(schemes[module], (info.shape[0], info.shape[1]), model)
                written = [PlannedTensor(f"{module}.{suffix}", *entry) for suffix, entry in layout.items()]
                tensors += written
                rows.append(_row(info, written, "quantized", str(schemes[module])))
        else:
            info = checkpoint.stored.infos[name]
            written = [PlannedTensor(name, stored_dtype(info, model), info.shape)]
            tensors += written
            rows.append(_row(info, written, "copied", ""))
    return tensors, rows


def _row(info: TensorInfo, written: list[PlannedTensor], action: str, scheme: str) -> PlanRow:
    return PlanRow(info.name, list(info.shape), info.dtype, action, scheme, sum(tensor.nbytes for tensor in written))


def _resolve_group_size(recipe: Recipe, candidates: dict[str, tuple[int, int]], notes: list[str]) -> int:
    """The recipe's group size, or the largest usual one that divides every row that will take the default."""
    if recipe.group_size is not None:
        return recipe.group_size
    if recipe.act_bits == 8:  # no runtime has groups beside 8-bit activations
        return PER_CHANNEL
    probe = AUTO_GROUP_SIZES[0]
    widths = Counter(
        columns
        for name, (_, columns) in candidates.items()
        if (scheme := recipe.scheme_for(_known_as(name), probe)) is not None and scheme.group_size == probe
    )
    for size in AUTO_GROUP_SIZES:
        if all(columns % size == 0 for columns in widths):
            notes.append(f"group size {size}: the largest of 128, 64, 32 that divides every row")
            return size
    notes.append("per channel: none of 128, 64, 32 divides every row")
    return PER_CHANNEL


def _check_division(widths: dict[str, int], schemes: dict[str, QuantScheme]) -> None:
    bad = {name: width for name, width in widths.items() if not schemes[name].divides(width)}
    if not bad:
        return
    fitting = fitting_group_sizes(math.gcd(*widths.values()))
    names = ", ".join(f"'{name}' ({width})" for name, width in list(bad.items())[:3])
    more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
    sizes = ", ".join(map(str, fitting)) or "none of 256 to 16"
    size = schemes[next(iter(bad))].group_size
    raise UsageError(
        f"group size {size} does not divide the rows of {names}{more}; sizes that fit all: {sizes}",
        hint=f"use --group-size {fitting[0] if fitting else PER_CHANNEL}, or override these modules in a recipe",
    )


def needs_g_idx(recipe: Recipe, schemes: Mapping[str, QuantScheme]) -> bool:
    """Whether groups are of channels that are not neighbours in storage."""
    grouped = any(scheme.group_size > 0 for scheme in schemes.values())
    return grouped and recipe.options.actorder == "group" and any("gptq" in method for method in recipe.methods)


def _check_format(
    format_name: str, schemes: dict[str, QuantScheme], shapes: dict[str, tuple[int, int]], *, act_order: bool
) -> None:
    for name, scheme in schemes.items():
        if reason := FORMATS[format_name].rejects(scheme, shapes[name], act_order=act_order):
            able = [
                word for word, other in FORMATS.items() if not other.rejects(scheme, shapes[name], act_order=act_order)
            ]
            raise UsageError(
                f"format '{format_name}' cannot hold '{name}': {reason}",
                hint=_remedy(scheme, able, act_order=act_order),
            )


def _remedy(scheme: QuantScheme, able: Sequence[str], *, act_order: bool) -> str:
    """What to change: the format for one that is able, or the scheme."""
    if able:
        return f"use --format {able[0]}{', or --actorder static' if act_order else ''}"
    if act_order:
        return "use --actorder static"
    if scheme.flat:
        return "use --group-size 64"
    return "use --bits 8 --group-size -1 --sym, also in overrides"


def _check_config(
    format_name: str, schemes: Mapping[str, QuantScheme], kept: tuple[str, ...], *, act_order: bool
) -> None:
    """Raise UsageError for schemes each of which the format can hold, but not beside the others."""
    try:
        FORMATS[format_name].quantization_config(schemes, kept, act_order=act_order)
    except QuantoolError as error:
        raise UsageError(error.message, hint=error.hint) from error


def _check_fused(candidates: Collection[str], schemes: Mapping[str, QuantScheme], methods: Mapping[str, str]) -> None:
    """Refuse different schemes for linears that runtimes fuse into one, and methods for those that share an input."""
    for names in fused_sets(candidates):
        _check_same(
            names, schemes, "runtimes fuse them into one linear, which has one scheme", "bits, group_size and sym"
        )
        if expert_of(names[0]) is None:
            _check_same(names, methods, "they share their input, which a method scales for all of them", "method")


def _check_same(names: Sequence[str], found: Mapping[str, object], why: str, remedy: str) -> None:
    first = names[0]
    other = next((name for name in names if found.get(name) != found.get(first)), None)
    if other is not None:
        said = [f"'{name}' is {found.get(name, 'float')}" for name in (first, other)]
        raise UsageError(f"{', '.join(said)}: {why}", hint=f"give both the same {remedy}, or ignore both")


def _check_static(schemes: Mapping[str, QuantScheme]) -> None:
    """Refuse a stored activation scale for what is in no block: activations are measured block by block."""
    head = next((name for name in schemes if name in HEADS), None)
    if head is not None and schemes[head].act_bits == 8 and not schemes[head].act_dynamic:
        raise UsageError(
            f"'{head}' is in no decoder block, where the range of activations is measured: it can have no stored scale",
            hint=f"use --ignore {HEADS[0]}, or --act-dynamic",
        )


def _check_patterns(recipe: Recipe, names: list[str]) -> None:
    """A pattern that matches no module is a typing error, not a wish; the default `lm_head` may be absent."""
    asked = [pattern for pattern in recipe.ignore if pattern != "lm_head"]
    for pattern in [*asked, *(override.match for override in recipe.overrides)]:
        if not any(matches(pattern, name) for name in names):
            raise UsageError(
                f"pattern '{pattern}' matches no linear of the model", hint=f"linears are named like '{names[0]}'"
            )


def describe(schemes: Mapping[str, QuantScheme]) -> str:
    """The scheme, or every scheme with its number of modules, the most common first."""
    counts = Counter(map(str, schemes.values())).most_common()
    return counts[0][0] if len(counts) == 1 else ", ".join(f"{scheme} ({count})" for scheme, count in counts)


def check_output(checkpoint: Checkpoint, target: Path, overwrite: bool) -> None:
    """Before any work; the model itself is never replaced by what is made of it."""
    where = target.expanduser().resolve()
    if where == checkpoint.path.resolve():
        raise UsageError(f"{target}: is the model itself", hint="choose another -o")
    check_output_directory(where, overwrite)


def stem(model: str) -> str:
    """What an output is called after: the last part of MODEL, of a GGUF file without its suffix."""
    return Path(model).name.removesuffix(".gguf") or Path(model).resolve().name
