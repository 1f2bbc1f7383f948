"""What is in a checkpoint, a quantized artifact, a GGUF or a calibration file, and what was lost against a reference.

Only headers are read unless `stats`, `against` or `verify` asks for values. A parameter is a weight of the model:
packed codes count as the weights they stand for, scales and zero points as bytes but not as parameters.
"""

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from quantool.data import Progress, no_progress
from quantool.errors import CheckFailed, QuantoolError
from quantool.formats import detect
from quantool.io import Checkpoint, TensorInfo, open_checkpoint
from quantool.io.safetensors import MappedFile
from quantool.model.names import module_kind
from quantool.quant import dequantize_affine
from quantool.runtime import PackedCheckpoint

PIECE = 1 << 24  # values compared at a time


@dataclass(frozen=True, slots=True)
class TensorRow:
    """One stored tensor, or one quantized module with all its packed tensors."""

    name: str
    dtype: str
    shape: list[int]
    bytes: int
    bits_per_weight: float | None
    relative_error: float | None = None
    min: float | None = None
    max: float | None = None
    mean: float | None = None


@dataclass(frozen=True, slots=True)
class InspectResult:
    """`bits_per_weight` is over the whole artifact; `schemes` counts modules per scheme."""

    artifact: str
    format: str
    parameters: int
    bytes: int
    bits_per_weight: float
    by_dtype: dict[str, dict[str, float]]
    by_kind: dict[str, dict[str, float]]
    schemes: dict[str, int]
    metadata: dict[str, str]
    tensors: list[TensorRow] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Artifact:
    """Tensors by name, the quantized modules among them, and how to get float values of either."""

    path: Path
    format: str
    infos: Mapping[str, TensorInfo]
    stored: "Checkpoint | MappedFile"
    packed: PackedCheckpoint | None
    metadata: dict[str, str]

    def has(self, name: str) -> bool:
        """Whether `values` can give this tensor."""
        quantized = self.packed is not None and name.removesuffix(".weight") in self.packed.schemes
        return quantized or name in self.infos

    def values(self, name: str) -> torch.Tensor:
        """The tensor `name`, dequantized where it is "X.weight" of a quantized module X."""
        module = name.removesuffix(".weight")
        if self.packed is not None and module in self.packed.schemes:
            return dequantize_affine(self.packed.quantized(module))
        return self.stored.read(name)


@torch.inference_mode()
def run(
    artifact: str,
    *,
    tensors: bool = False,
    filter: str | None = None,  # noqa: A002 - the command line's word
    stats: bool = False,
    against: str | None = None,
    verify: bool = False,
    progress: Progress = no_progress,
) -> InspectResult:
    """Describe `artifact`. `filter` is a regular expression searched in tensor names and limits rows, not sums.

    Raises QuantoolError when it cannot be opened, CheckFailed when `verify` finds a value that is not finite.
    """
    opened = _open(artifact)
    rows = list(_rows(opened))
    kept = [row for row in rows if filter is None or re.search(filter, row.name)]
    if against is not None:
        kept = _with_errors(opened, _open(against), kept, progress)
    if stats:
        kept = [_with_stats(row, opened.values(row.name)) for row in kept]
    if verify:
        _verify(opened, rows, progress)
    size = sum(info.nbytes for info in opened.infos.values())
    parameters = sum(math.prod(row.shape) for row in rows if row.bits_per_weight is not None)
    return InspectResult(
        artifact=artifact,
        format=opened.format,
        parameters=parameters,
        bytes=size,
        bits_per_weight=size * 8 / parameters if parameters else math.nan,
        by_dtype=_by_dtype(opened.infos),
        by_kind=_by_kind(rows),
        schemes=dict(Counter(map(str, opened.packed.schemes.values()))) if opened.packed else {},
        metadata=opened.metadata,
        tensors=kept if tensors or filter or stats or against else [],
    )


def _open(artifact: str) -> _Artifact:
    path = Path(artifact).expanduser()
    if path.suffix == ".safetensors" and path.is_file():
        file = MappedFile(path)
        kind = "calibration" if "input_ids" in file.infos else "safetensors"
        return _Artifact(path, kind, file.infos, file, None, dict(file.metadata))
    checkpoint = open_checkpoint(artifact)
    config = checkpoint.config
    format_ = detect(config)
    metadata = {key: str(value) for key, value in checkpoint.metadata.items()}
    metadata |= {key: str(config[key]) for key in ("model_type", "architectures", "num_hidden_layers") if key in config}
    if format_ is None:
        kind = "gguf" if checkpoint.path.suffix == ".gguf" else "safetensors"
        return _Artifact(checkpoint.path, kind, checkpoint.infos, checkpoint, None, metadata)
    section = config["quantization_config"]
    kind = " ".join(str(word) for word in (format_.NAME, section.get("format") or section.get("version")) if word)
    packed = PackedCheckpoint(checkpoint, format_)
    return _Artifact(checkpoint.path, kind, checkpoint.infos, checkpoint, packed, metadata)


def _rows(opened: _Artifact) -> Iterator[TensorRow]:
    """One row per stored tensor; the packed tensors of a module are one row under the name of its weight."""
    packed = opened.packed
    left = dict(opened.infos)
    for module in packed.schemes if packed is not None else ():
        if packed is not None:
            shape = list(packed.weight_shape(module))
            size = packed.packed_bytes(module)
            for name in packed.packed_names(module):
                left.pop(name, None)
            bits = size * 8 / math.prod(shape)
            yield TensorRow(f"{module}.weight", str(packed.schemes[module]), shape, size, bits)
    for info in left.values():
        count = math.prod(info.shape)
        # Statistics and indices are no weights of a model.
        counted = opened.format != "calibration" and count
        yield TensorRow(
            info.name, info.dtype, list(info.shape), info.nbytes, info.nbytes * 8 / count if counted else None
        )


def _with_errors(opened: _Artifact, reference: _Artifact, rows: list[TensorRow], progress: Progress) -> list[TensorRow]:
    """Rows with ||W - R|| / ||R||; None where the reference has no such tensor."""
    out = []
    for i, row in enumerate(rows):
        out.append(replace(row, relative_error=_relative_error(opened, reference, row)))
        progress(i + 1, len(rows), "comparing")
    if all(row.relative_error is None for row in out):
        raise QuantoolError(
            f"{reference.path}: has none of the tensors of {opened.path}",
            hint="compare with the model it was made from",
        )
    return out


def _relative_error(opened: _Artifact, reference: _Artifact, row: TensorRow) -> float | None:
    if not reference.has(row.name):
        return None
    ours, theirs = opened.values(row.name), reference.values(row.name)
    if ours.shape != theirs.shape:
        raise QuantoolError(
            f"{reference.path}: tensor '{row.name}': shape {list(theirs.shape)}, {opened.path} has {list(ours.shape)}",
            hint="compare with the model it was made from",
        )
    lost = total = 0.0
    for a, b in zip(ours.flatten().split(PIECE), theirs.flatten().split(PIECE), strict=True):
        lost += float((a.double() - b.double()).square().sum())
        total += float(b.double().square().sum())
    if total == 0:
        return 0.0 if lost == 0 else math.inf
    return math.sqrt(lost / total)


def _with_stats(row: TensorRow, values: torch.Tensor) -> TensorRow:
    if values.numel() == 0:
        return row
    wide = values.float()
    return replace(row, min=float(wide.min()), max=float(wide.max()), mean=float(wide.mean(dtype=torch.float64)))


def _verify(opened: _Artifact, rows: list[TensorRow], progress: Progress) -> None:
    """Every value that can be read is finite; offsets and sizes were checked on opening."""
    for i, row in enumerate(rows):
        values = opened.values(row.name)
        if values.is_floating_point() and not bool(torch.isfinite(values).all()):
            raise CheckFailed(f"{opened.path}: tensor '{row.name}' holds NaN or Inf, expected finite values")
        progress(i + 1, len(rows), "verifying")


def _by_dtype(infos: Mapping[str, TensorInfo]) -> dict[str, dict[str, float]]:
    out: dict[str, dict[str, float]] = {}
    for info in infos.values():
        _add(out, info.dtype, tensors=1, parameters=math.prod(info.shape), bytes=info.nbytes)
    return dict(sorted(out.items(), key=lambda item: -item[1]["bytes"]))


def _by_kind(rows: list[TensorRow]) -> dict[str, dict[str, float]]:
    out: dict[str, dict[str, float]] = {}
    for row in rows:
        if row.bits_per_weight is not None:
            _add(out, module_kind(row.name), parameters=math.prod(row.shape), bytes=row.bytes)
    for entry in out.values():
        entry["bits_per_weight"] = entry["bytes"] * 8 / entry["parameters"] if entry["parameters"] else math.nan
    return dict(sorted(out.items(), key=lambda item: -item[1]["bytes"]))


def _add(table: dict[str, dict[str, float]], key: str, **amounts: float) -> None:
    entry: dict[str, Any] = table.setdefault(key, dict.fromkeys(amounts, 0))
    for name, amount in amounts.items():
        entry[name] += amount
