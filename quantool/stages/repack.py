"""Write a quantized checkpoint in another format, code for code: nothing is quantized again, no weight changes.

    X.weight_packed, X.weight_scale, ... --unpack--> codes, scales, zeros --pack--> X.qweight, X.qzeros, X.scales

What a runtime dequantizes is bit for bit what it was, so a format that cannot hold the codes (bits, groups, order of
the columns) or the exact values of the scales is refused. The same format is allowed too: what other tools and older
releases wrote becomes what `quantize` writes. Weights whose zero points all lie in the middle are symmetric, whatever
their config says: AWQ's layout has zero points for symmetric weights too, and runtimes are particular about asymmetric
ones in the other layouts.

Modules are read, packed and written one by one. Every other tensor is copied, bit for bit.
"""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from quantool.data import Progress, no_progress
from quantool.errors import QuantoolError, UsageError
from quantool.formats import FORMATS, Format, detect, exact_scales
from quantool.io import Checkpoint, model_dtype
from quantool.io.gguf import GgufCheckpoint
from quantool.io.safetensors import DTYPES, dtype_name
from quantool.io.writer import CheckpointWriter, PlannedTensor, planned_bytes
from quantool.model.names import find_linears
from quantool.quant import QuantizedTensor, require_finite
from quantool.runtime import PackedCheckpoint
from quantool.scheme import QuantScheme
from quantool.stages.gguf_packed import GgufPacked
from quantool.stages.plan import PlanRow, QuantizeResult, check_output, describe, stored_dtype
from quantool.stages.resources import Stopwatch, peak_memory_bytes

SCALE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
FLOAT_CHECKPOINT = "quantize the float checkpoint that it was made from"


@dataclass(frozen=True, slots=True)
class _Source:
    """A quantized checkpoint, and what the config and the layout of a target follow from."""

    checkpoint: Checkpoint
    packed: PackedCheckpoint | GgufPacked
    schemes: dict[str, QuantScheme]
    shapes: dict[str, tuple[int, int]]
    kept: tuple[str, ...]  # linears that are in float
    ordered: frozenset[str]  # modules whose columns of one group lie apart
    model_dtype: torch.dtype
    weight_dtypes: dict[str, torch.dtype]  # of modules whose format records what their weight was before

    def layout(self, target: Format, module: str, dtype: torch.dtype) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Suffix -> (dtype, shape) of a module in the target format, for a model of `dtype`."""
        return target.layout(self.schemes[module], self.shapes[module], self.weight_dtypes.get(module, dtype))

    def section(self, target: Format) -> dict[str, Any]:
        """The target's "quantization_config"; raises QuantoolError when it cannot say it."""
        return target.quantization_config(self.schemes, self.kept, act_order=bool(self.ordered))


@torch.inference_mode()
def run(
    checkpoint: Checkpoint,
    output: Path,
    format_name: str,
    *,
    max_shard_size: int = 5_000_000_000,
    dry_run: bool = False,
    overwrite: bool = False,
    progress: Progress = no_progress,
) -> QuantizeResult:
    """Write the quantized `checkpoint` into the directory `output` as `format_name`; with `dry_run` only plan.

    Raises UsageError when the format cannot hold the codes exactly, or `output` may not be written: before anything
    is. QuantoolError for a checkpoint that is not quantized, or is damaged.
    """
    watch = Stopwatch()
    if not dry_run:
        check_output(checkpoint, output, overwrite)
    target = FORMATS[format_name]
    source = _read_source(checkpoint)
    dtype = _require_fit(source, target)
    tensors, rows = _layout(source, target, dtype)
    size = planned_bytes(tensors, max_shard_size)
    if not dry_run:
        config = {**checkpoint.config, "quantization_config": source.section(target)}
        with CheckpointWriter(
            output, tensors, config=config, max_shard_size=max_shard_size, overwrite=overwrite
        ) as writer:
            checkpoint.write_aux(writer.directory)
            _write(source, target, dtype, writer, progress)
            writer.commit()
    return QuantizeResult(
        output=str(output),
        method="repack",
        format=format_name,
        scheme=describe(source.schemes),
        group_size=Counter(scheme.group_size for scheme in source.schemes.values()).most_common(1)[0][0],
        bytes=size,
        bits_per_weight=size * 8 / sum(math.prod(row.shape) for row in rows),
        quantized=len(source.schemes),
        copied=len(rows) - len(source.schemes),
        folded=0,
        dropped=0,
        seconds=watch.seconds,
        peak_memory_bytes=peak_memory_bytes(),
        plan=rows if dry_run else [],
        notes=_notes(source, dtype),
    )


def _read_source(checkpoint: Checkpoint) -> _Source:
    packed = _open_packed(checkpoint)
    if packed is None or not packed.schemes:
        raise QuantoolError(
            f"{checkpoint.path}: has no quantized weights, expected a quantized checkpoint to repack",
            hint="quantize it: quantool quantize MODEL --bits 4",
        )
    shapes = {module: packed.weight_shape(module) for module in packed.schemes}
    return _Source(
        checkpoint=checkpoint,
        packed=packed,
        schemes=_actual_schemes(packed),
        shapes=shapes,
        kept=_kept(packed, shapes),
        ordered=frozenset(module for module in packed.schemes if packed.ordered(module)),
        model_dtype=model_dtype(checkpoint),
        weight_dtypes=_weight_dtypes(packed),
    )


def holds_codes(checkpoint: Checkpoint) -> bool:
    """Whether a GGUF file has codes that another format may hold as they are."""
    return isinstance(checkpoint, GgufCheckpoint) and bool(GgufPacked(checkpoint).schemes)


def _open_packed(checkpoint: Checkpoint) -> PackedCheckpoint | GgufPacked | None:
    if isinstance(checkpoint, GgufCheckpoint):
        return GgufPacked(checkpoint)
    format_ = detect(checkpoint.config)
    return None if format_ is None else PackedCheckpoint(checkpoint, format_)


def _weight_dtypes(packed: PackedCheckpoint | GgufPacked) -> dict[str, torch.dtype]:
    """bitsandbytes writes the dtype of a 4-bit weight into its JSON, and dequantizes to that."""
    found = {}
    for module, scheme in packed.schemes.items():
        if scheme.flat and (dtype := packed.quantized(module).weight_dtype) is not None:
            found[module] = dtype
            _drop(packed, module)
    return found


def _actual_schemes(packed: PackedCheckpoint | GgufPacked) -> dict[str, QuantScheme]:
    """The schemes, symmetric where no module of one has a zero point off the middle; the first that has ends it."""
    middle = {scheme for scheme in packed.schemes.values() if not scheme.sym}
    for module, scheme in packed.schemes.items():
        if scheme in middle:
            zeros = packed.quantized(module).zeros
            if zeros is not None and bool((zeros != scheme.zero).any()):
                middle.discard(scheme)
            _drop(packed, module)
    return {name: replace(scheme, sym=scheme.sym or scheme in middle) for name, scheme in packed.schemes.items()}


def _drop(packed: PackedCheckpoint | GgufPacked, module: str) -> None:
    """Forget the pages of a module that has been read."""
    for name in packed.packed_names(module):
        packed.drop(name)


def _kept(packed: PackedCheckpoint | GgufPacked, shapes: Mapping[str, tuple[int, int]]) -> tuple[str, ...]:
    """The linears in float, told as `quantize` tells them: from the names and shapes of the float checkpoint."""
    for module, shape in shapes.items():
        packed.place(module, {"weight": (shape, torch.float32)})
    linears = find_linears(packed)
    return tuple(name for name in (*linears.candidates, *linears.others) if name not in shapes)


def _require_fit(source: _Source, target: Format) -> torch.dtype:
    """What `_fit` finds; UsageError with the reason, and the formats that can, when the target cannot hold it."""
    found = _fit(source, target)
    if isinstance(found, torch.dtype):
        return found
    own = source.checkpoint.config.get("quantization_config", {}).get("quant_method")
    able = [name for name, other in FORMATS.items() if name != own and isinstance(_fit(source, other), torch.dtype)]
    raise UsageError(
        f"{source.checkpoint.path}: cannot be repacked as {target.NAME} without requantizing: {found}",
        hint=f"use --format {' or '.join(able)}, or {FLOAT_CHECKPOINT}" if able else FLOAT_CHECKPOINT,
    )


def _fit(source: _Source, target: Format) -> torch.dtype | str:
    """The dtype of a model whose layout in the target format has exact scales, or why there is none."""
    for module, scheme in source.schemes.items():
        if reason := target.rejects(scheme, source.shapes[module], act_order=module in source.ordered):
            return f"'{module}': {reason}"
    try:
        source.section(target)
    except QuantoolError as error:
        return error.message
    return _scale_dtype(source, target)


def _scale_dtype(source: _Source, target: Format) -> torch.dtype | str:
    """The model's dtype if scales stored for it are exact, else the narrowest that they are exact for."""
    stored = {dtype: target.round_scales(torch.ones(1), dtype).dtype for dtype in (source.model_dtype, *SCALE_DTYPES)}
    exact = set(stored.values())
    for module in source.schemes:
        found = source.packed.scales(module)
        if found is None or exact == {torch.float32}:  # float32 holds what any format stores
            continue
        name, scales = found
        held = {dtype for dtype in exact if torch.equal(scales.to(dtype).double(), scales.double())}
        if not held:
            require_finite(name, scales)
            words = dtype_name(scales.dtype), " or ".join(sorted(map(dtype_name, exact)))
            return f"'{module}': its scales are {words[0]} values that {words[1]} does not hold exactly"
        source.packed.drop(name)
        exact = held
    return next(dtype for dtype, name in stored.items() if name in exact)


def _layout(source: _Source, target: Format, dtype: torch.dtype) -> tuple[list[PlannedTensor], list[PlanRow]]:
    """Everything written, in stored order; the tensors of a module become one row under the name of its weight."""
    module_of = {name: module for module in source.schemes for name in source.packed.packed_names(module)}
    tensors: list[PlannedTensor] = []
    rows: list[PlanRow] = []
    for module in dict.fromkeys(module_of.get(name, name) for name in source.checkpoint.infos):
        if module not in source.schemes:
            info = source.checkpoint.infos[module]
            kept = PlannedTensor(info.name, stored_dtype(info, dtype), info.shape)
            tensors.append(kept)
            rows.append(PlanRow(info.name, list(info.shape), info.dtype, "copied", "", kept.nbytes))
            continue
        layout = source.layout(target, module, dtype)
        written = [PlannedTensor(f"{module}.{suffix}", *entry) for suffix, entry in layout.items()]
        tensors += written
        before, after = str(source.packed.schemes[module]), str(source.schemes[module])
        size = sum(tensor.nbytes for tensor in written)
        rows.append(PlanRow(f"{module}.weight", list(source.shapes[module]), before, "repacked", after, size))
    return tensors, rows


def _write(source: _Source, target: Format, dtype: torch.dtype, writer: CheckpointWriter, progress: Progress) -> None:
    """Module by module, then the rest."""
    repacked = {name for module in source.schemes for name in source.packed.packed_names(module)}
    copied = [name for name in source.checkpoint.infos if name not in repacked]
    total = len(source.schemes) + len(copied)
    for i, module in enumerate(source.schemes):
        for suffix, tensor in target.pack(_packable(source, module, target, dtype)).items():
            writer.write(f"{module}.{suffix}", tensor)
        _drop(source.packed, module)
        progress(i + 1, total, "repacking")
    for i, name in enumerate(copied):
        stored = DTYPES[stored_dtype(source.checkpoint.infos[name], dtype)]  # a block type of ggml is none
        writer.write(name, source.checkpoint.read(name).to(stored))
        source.checkpoint.drop(name)
        progress(len(source.schemes) + i + 1, total, "repacking")


def _packable(source: _Source, module: str, target: Format, dtype: torch.dtype) -> QuantizedTensor:
    """The codes of a module under the scheme they are packed with; `_fit` has seen to it that nothing is lost."""
    q, scheme = source.packed.quantized(module), source.schemes[module]
    require_finite(f"{module}, scales", q.scales)
    return exact_scales(replace(q, scheme=scheme, zeros=None if scheme.sym else q.zeros), target, dtype)


def _notes(source: _Source, dtype: torch.dtype) -> list[str]:
    notes = []
    if source.schemes != source.packed.schemes:
        notes.append("every zero point lay in the middle: the weights are symmetric")
    if dtype != source.model_dtype:
        words = dtype_name(dtype), dtype_name(source.model_dtype)
        notes.append(f"scales are {words[0]}: {words[1]}, the model's dtype, does not hold them exactly")
    return notes
