"""What `quantize` will do, from names and shapes alone: which tensors are quantized how, and every byte written.

The plan gives the file headers, the `--dry-run` table, the predicted size and every refusal that can be made
before any work.
"""

import math
from collections import Counter
from dataclasses import dataclass

import torch

from quantool.errors import QuantoolError, UsageError
from quantool.formats import FORMATS, detect
from quantool.io import Checkpoint, TensorInfo, model_dtype
from quantool.io.safetensors import DTYPES, dtype_name
from quantool.io.writer import PlannedTensor
from quantool.model.names import HEADS, find_linears
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
class Plan:
    """`schemes` is what will be quantized; `kept` the linears left in float; `tensors` everything written."""

    schemes: dict[str, QuantScheme]
    kept: tuple[str, ...]
    group_size: int
    tensors: list[PlannedTensor]
    rows: list[PlanRow]
    model_dtype: torch.dtype
    notes: list[str]

    @property
    def parameters(self) -> int:
        return sum(math.prod(row.shape) for row in self.rows)


def make_plan(checkpoint: Checkpoint, recipe: Recipe) -> Plan:
    """Decide everything that can be decided without reading a weight.

    Raises UsageError for a group size that does not divide, a scheme the format cannot hold and a pattern that
    matches nothing; QuantoolError for a checkpoint that cannot be quantized.
    """
    if detect(checkpoint.config) is not None:
        method = checkpoint.config["quantization_config"].get("quant_method")
        raise QuantoolError(
            f"{checkpoint.path}: is already quantized ({method}), expected a float checkpoint",
            hint="quantize the checkpoint that it was made from",
        )
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
    kept = tuple(name for name in (*linears.candidates, *linears.others) if name not in schemes)
    dtype = model_dtype(checkpoint)
    _check_format(recipe.format, schemes, linears.candidates)
    FORMATS[recipe.format].quantization_config(schemes, kept)
    tensors, rows = _layout(checkpoint, recipe.format, schemes, dtype)
    return Plan(schemes, kept, group_size, tensors, rows, dtype, notes)


def _known_as(name: str) -> str:
    """A head is `lm_head` to a recipe, whatever the family calls it."""
    return HEADS[0] if name in HEADS else name


def stored_dtype(info: TensorInfo, model: torch.dtype) -> str:
    """What a tensor that is not quantized is written as: a GGUF block type is no safetensors dtype."""
    return info.dtype if info.dtype in DTYPES else dtype_name(model)


def _layout(
    checkpoint: Checkpoint, format_name: str, schemes: dict[str, QuantScheme], model: torch.dtype
) -> tuple[list[PlannedTensor], list[PlanRow]]:
    tensors: list[PlannedTensor] = []
    rows: list[PlanRow] = []
    for info in checkpoint.infos.values():
        module = info.name.removesuffix(".weight")
        scheme = schemes.get(module) if info.name.endswith(".weight") else None
        if scheme is None:
            written = [PlannedTensor(info.name, stored_dtype(info, model), info.shape)]
        else:
            layout = FORMATS[format_name].layout(scheme, (info.shape[0], info.shape[1]), model)
            written = [PlannedTensor(f"{module}.{suffix}", *entry) for suffix, entry in layout.items()]
        tensors += written
        size = sum(tensor.nbytes for tensor in written)
        action, label = ("copied", "") if scheme is None else ("quantized", str(scheme))
        rows.append(PlanRow(info.name, list(info.shape), info.dtype, action, label, size))
    return tensors, rows


def _resolve_group_size(recipe: Recipe, candidates: dict[str, tuple[int, int]], notes: list[str]) -> int:
    """The recipe's group size, or the largest usual one that divides every row that will take the default."""
    if recipe.group_size is not None:
        return recipe.group_size
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


def _check_format(format_name: str, schemes: dict[str, QuantScheme], shapes: dict[str, tuple[int, int]]) -> None:
    for name, scheme in schemes.items():
        if reason := FORMATS[format_name].rejects(scheme, shapes[name]):
            raise UsageError(
                f"format '{format_name}' cannot hold '{name}': {reason}",
                hint="use --format compressed-tensors" if format_name != "compressed-tensors" else None,
            )


def _check_patterns(recipe: Recipe, names: list[str]) -> None:
    """A pattern that matches no module is a typing error, not a wish; the default `lm_head` may be absent."""
    asked = [pattern for pattern in recipe.ignore if pattern != "lm_head"]
    for pattern in [*asked, *(override.match for override in recipe.overrides)]:
        if not any(matches(pattern, name) for name in names):
            raise UsageError(
                f"pattern '{pattern}' matches no linear of the model", hint=f"linears are named like '{names[0]}'"
            )
