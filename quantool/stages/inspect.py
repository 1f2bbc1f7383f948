"""What is in a checkpoint, a quantized artifact, a GGUF or a calibration file, and what was lost against a reference.

Only headers are read unless `stats`, `against` or `verify` asks for values. A parameter is a weight of the model:
packed codes count as the weights they stand for, scales and zero points as bytes but not as parameters.

`stats` of a calibration file shows why INT8 activations break: one scale has to serve all K channels of a token, and
a few channels are far larger than the rest. Per linear, over the tokens x that reached it:

    outlier_share = sum of mean x[k]^2 over the n largest channels / sum over all    n = K / 100, at least 1
    max_to_median = max over k of amax[k] / median over k of amax[k],                 amax[k] = max over tokens |x[k]|

Channels alike have a share of 0.01 and a ratio of a little above 1. With a ratio r half of the channels use at most
127 / r of the 127 steps of INT8 (Xiao et al. 2023, SmoothQuant, section 3).
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
from quantool.model.views import as_linears
from quantool.runtime import PackedCheckpoint
from quantool.stages.inspect_gguf import GgufFacts, GgufTensors, facts_of, open_gguf
from quantool.stages.inspect_gguf import verify as verify_gguf

PIECE = 1 << 24  # values compared at a time
# Where a "quantization_config" says which of a format's layouts it is: compressed-tensors, awq, gptq, auto-round.
VARIANTS = ("format", "checkpoint_format", "packing_format", "version")
STATISTICS = ("act_amax", "act_mean_sq")


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
class ActivationRow:
    """What reached one linear: see the top of the module. None where no token did."""

    name: str
    channels: int
    tokens: int
    amax: float | None
    outlier_share: float | None
    max_to_median: float | None


@dataclass(frozen=True, slots=True)
class InspectResult:
    """`bits_per_weight` is over the whole artifact, None for what is no model; `schemes` counts modules per scheme.

    `linears` is how many linears a calibration file has statistics of, and `activations` these, the largest
    `max_to_median` first. `gguf` is None for every other kind of file.
    """

    artifact: str
    format: str
    parameters: int
    bytes: int
    bits_per_weight: float | None
    by_dtype: dict[str, dict[str, float]]
    by_kind: dict[str, dict[str, float]]
    schemes: dict[str, int]
    metadata: dict[str, str]
    tensors: list[TensorRow] = field(default_factory=list)
    linears: int | None = None
    activations: list[ActivationRow] = field(default_factory=list)
    gguf: GgufFacts | None = None
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Artifact:
    """Tensors by name, the quantized modules among them, and how to get float values of either."""

    path: Path
    format: str
    infos: Mapping[str, TensorInfo]
    stored: "Checkpoint | MappedFile | GgufTensors"
    packed: PackedCheckpoint | None
    metadata: dict[str, str]
    notes: list[str] = field(default_factory=list)

    def has(self, name: str) -> bool:
        """Whether `values` can give this tensor."""
        quantized = self.packed is not None and name.removesuffix(".weight") in self.packed.schemes
        return quantized or name in self.infos

    def values(self, name: str) -> torch.Tensor:
        """The tensor `name`, dequantized where it is "X.weight" of a quantized module X."""
        module = name.removesuffix(".weight")
        if self.packed is not None and module in self.packed.schemes:
            return self.packed.dequantized(module)
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
    opened = _open(artifact, linears=against is not None)
    rows = list(_rows(opened))
    kept = [row for row in rows if filter is None or re.search(filter, row.name)]
    linears = _recorded(opened) if opened.format == "calibration" else None
    # The statistics of a calibration file are what it says of its linears; its own tensors only when asked for.
    listed = tensors or against or (linears is None and stats) or (filter and not (linears and stats))
    if against is not None:
        kept = _with_errors(opened, _open(against, linears=True), kept, progress)
    if stats and listed:
        kept = [_with_stats(row, opened.values(row.name)) for row in kept]
    gguf = opened.stored.file if isinstance(opened.stored, GgufTensors) else None
    if verify and gguf is not None:
        verify_gguf(gguf, progress)
    elif verify:
        _verify(opened, rows, progress)
    size = sum(info.nbytes for info in opened.infos.values())
    parameters = sum(math.prod(row.shape) for row in rows if row.bits_per_weight is not None)
    return InspectResult(
        artifact=artifact,
        format=opened.format,
        parameters=parameters,
        bytes=size,
        bits_per_weight=size * 8 / parameters if parameters else None,
        by_dtype=_by_dtype(opened.infos),
        by_kind=_by_kind(rows),
        schemes=dict(Counter(map(str, opened.packed.schemes.values()))) if opened.packed else {},
        metadata=opened.metadata,
        tensors=kept if listed else [],
        linears=None if linears is None else len(linears),
        activations=_activations(opened, linears, filter) if linears and stats else [],
        gguf=None if gguf is None else facts_of(gguf),
        notes=opened.notes,
    )


def _open(artifact: str, *, linears: bool = False) -> _Artifact:
    """With `linears` every linear is a matrix [N, K] of its own, as it is in a quantized artifact."""
    path = Path(artifact).expanduser()
    if path.suffix == ".safetensors" and path.is_file():
        file = MappedFile(path)
        kind = "calibration" if "input_ids" in file.infos else "safetensors"
        return _Artifact(path, kind, file.infos, file, None, dict(file.metadata))
    if path.suffix == ".gguf" and path.is_file():
        stored, metadata, notes = open_gguf(path, linears=linears)
        return _Artifact(path, "gguf", stored.infos, stored, None, metadata, notes)
    checkpoint: Checkpoint = open_checkpoint(artifact)
    checkpoint = as_linears(checkpoint) if linears else checkpoint
    config = checkpoint.config
    format_ = detect(config)
    metadata = {key: str(value) for key, value in checkpoint.metadata.items()}
    metadata |= {key: str(config[key]) for key in ("model_type", "architectures", "num_hidden_layers") if key in config}
    if format_ is None:
        return _Artifact(checkpoint.path, "safetensors", checkpoint.infos, checkpoint, None, metadata)
    section = config["quantization_config"]
    words = [section[key] for key in VARIANTS if isinstance(section.get(key), str) and section[key] != format_.NAME]
    kind = " ".join((format_.NAME, *words[:1]))
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
        counted = opened.format != "calibration" and opened.metadata.get("general.type") != "imatrix" and count
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


def _recorded(opened: _Artifact) -> list[str]:
    """The linears of a calibration file; QuantoolError where the statistics of one are not what `calibrate` writes."""
    linears = [name.removesuffix(".tokens") for name in opened.infos if name.endswith(".tokens")]
    for linear in linears:
        stored = [opened.infos.get(f"{linear}.{word}") for word in (*STATISTICS, "tokens")]
        found = [(info.dtype, info.shape) if info else None for info in stored]
        channels = stored[0].shape if stored[0] else ()
        if len(channels) != 1 or 0 in channels or found != [("F32", channels), ("F32", channels), ("I64", (1,))]:
            raise QuantoolError(
                f"{opened.path}: statistics of '{linear}': expected act_amax and act_mean_sq F32 [K] and tokens I64 "
                f"[1], found {', '.join(f'{info.dtype} {list(info.shape)}' if info else 'none' for info in stored)}",
                hint="make the file again: quantool calibrate MODEL",
            )
    return linears


def _activations(opened: _Artifact, linears: list[str], pattern: str | None) -> list[ActivationRow]:
    rows = [_activation_row(opened, name) for name in linears if pattern is None or re.search(pattern, name)]
    return sorted(rows, key=lambda row: -1 if row.max_to_median is None else row.max_to_median, reverse=True)


def _activation_row(opened: _Artifact, linear: str) -> ActivationRow:
    amax, energy = (opened.stored.read(f"{linear}.{statistic}").double() for statistic in STATISTICS)
    tokens, channels = int(opened.stored.read(f"{linear}.tokens")), amax.numel()
    largest, total = float(amax.max()), float(energy.sum())
    if tokens == 0 or total == 0:
        return ActivationRow(linear, channels, tokens, None if tokens == 0 else largest, None, None)
    top, middle = energy.topk(max(1, channels // 100)).values, slice((channels - 1) // 2, channels // 2 + 1)
    median = float(amax.sort().values[middle].mean())  # torch.quantile has a limit of 16 million
    return ActivationRow(
        name=linear,
        channels=channels,
        tokens=tokens,
        amax=largest,
        outlier_share=float(top.sum()) / total,
        max_to_median=largest / median if median else math.inf,
    )


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
