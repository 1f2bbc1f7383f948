"""How much an error of each input channel costs, per tensor of a GGUF file: from a calibration file or an imatrix.

Both record the mean of x[k]^2 over the tokens x that reached a linear, the diagonal of GPTQ's Hessian. A calibration
file of quantool knows Hugging Face's names, an imatrix of llama.cpp those of GGUF; a stack of experts has a row for
each, and an expert that no token reached has no statistics: all its channels count alike, which is reported.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from quantool.errors import QuantoolError
from quantool.io import Checkpoint
from quantool.io.gguf.architectures import find_architecture
from quantool.io.gguf.tensors import Target, targets
from quantool.io.gguf.writer import Value
from quantool.io.imatrix import Imatrix, Importance, read_imatrix
from quantool.io.safetensors import MappedFile
from quantool.model.views import as_linears

MEAN_SQ, TOKENS = "act_mean_sq", "tokens"
ByTensor = dict[str, torch.Tensor]
"""GGUF name -> float32 [E, K], a row for each expert, or one."""


def read_importance(path: Path, targets: Sequence[Target]) -> tuple[ByTensor, list[str], dict[str, Value]]:
    """The importance of each target that `path` knows, notes for the user, and metadata that llama.cpp writes too.

    Raises QuantoolError when `path` is neither kind of file, or is of another model.
    """
    if path.suffix == ".safetensors":
        found, unseen = _of_calibration(path, targets)
        described: dict[str, Value] = {}
    else:
        imatrix = read_imatrix(path)
        found, unseen = _of_imatrix(path, imatrix, targets)
        described = {"quantize.imatrix.dataset": imatrix.dataset, "quantize.imatrix.chunks_count": imatrix.chunks}
    notes = []
    if unseen:
        some = ", ".join(f"'{name}' ({count})" for name, count in list(unseen.items())[:3])
        more = f" and {len(unseen) - 3} more tensors" if len(unseen) > 3 else ""
        total = sum(unseen.values())
        notes.append(f"{total} experts saw no calibration token, their channels count alike: {some}{more}")
    described |= {"quantize.imatrix.file": path.name, "quantize.imatrix.entries_count": len(found)}
    return found, notes, described


def imatrix_of(
    checkpoint: Checkpoint, statistics: Mapping[str, torch.Tensor], dataset: str, windows: torch.Tensor
) -> Imatrix:
    """The statistics that `calibrate` records, as llama.cpp has them; QuantoolError for a model it cannot run."""
    infos = as_linears(checkpoint).infos
    found, _ = targets(find_architecture(checkpoint.config), infos, checkpoint.config)
    entries = {}
    for target in found:
        linears = [source.removesuffix(".weight") for source in target.sources]
        if linears and all(f"{linear}.{MEAN_SQ}" in statistics for linear in linears):
            values = torch.stack([statistics[f"{linear}.{MEAN_SQ}"] for linear in linears])
            counts = torch.cat([statistics[f"{linear}.{TOKENS}"] for linear in linears])
            entries[target.name] = Importance(values, counts)
    return Imatrix(entries, dataset, windows.shape[0], windows.shape[1])


def _of_calibration(path: Path, targets: Sequence[Target]) -> tuple[ByTensor, dict[str, int]]:
    file = MappedFile(path)
    found: ByTensor = {}
    unseen: dict[str, int] = {}
    for target in targets:
        linears = [source.removesuffix(".weight") for source in target.sources]
        names = [f"{linear}.{MEAN_SQ}" for linear in linears]
        if not names or not all(name in file.infos for name in names):
            continue
        rows = [file.read(name).float() for name in names]
        _require_columns(path, target, {name: len(row) for name, row in zip(names, rows, strict=True)})
        seen = [int(file.read(f"{linear}.{TOKENS}")) if f"{linear}.{TOKENS}" in file.infos else 1 for linear in linears]
        _add(found, unseen, target.name, torch.stack(rows), torch.tensor(seen))
    if not found:
        raise QuantoolError(
            f"{path}: holds no '*.{MEAN_SQ}' of this model's linears, expected such as '{_example(targets)}'",
            hint="make one: quantool calibrate MODEL -o calibration.safetensors",
        )
    return found, unseen


def _of_imatrix(path: Path, imatrix: Imatrix, targets: Sequence[Target]) -> tuple[ByTensor, dict[str, int]]:
    known = {target.name: target for target in targets}
    foreign = [name for name in imatrix.entries if name not in known]
    if foreign:
        raise QuantoolError(
            f"{path}: {len(foreign)} of {len(imatrix.entries)} entries are of tensors that this model has not, first "
            f"'{foreign[0]}'",
            hint="it was made from another model: make one with quantool calibrate MODEL",
        )
    found: ByTensor = {}
    unseen: dict[str, int] = {}
    for name, entry in imatrix.entries.items():
        target = known[name]
        experts, values = max(1, len(target.sources)), entry.values
        if values.numel() == experts * target.shape[-1]:  # the older form has the experts in one row
            values = values.reshape(experts, -1)
        _require_columns(path, target, {name: values.shape[-1]})
        if values.shape[0] not in (1, experts):
            raise QuantoolError(f"{path}: '{name}': {values.shape[0]} experts, the model has {experts}")
        _add(found, unseen, name, values.expand(experts, -1), entry.counts.expand(experts))
    return found, unseen


def _require_columns(path: Path, target: Target, lengths: Mapping[str, int]) -> None:
    for name, length in lengths.items():
        if length != target.shape[-1]:
            raise QuantoolError(
                f"{path}: '{name}' has {length} channels, tensor '{target.name}' has rows of {target.shape[-1]}",
                hint="it was made from another model: make one with quantool calibrate MODEL",
            )


def _add(found: ByTensor, unseen: dict[str, int], name: str, values: torch.Tensor, counts: torch.Tensor) -> None:
    """llama.cpp's rule: what was never seen counts alike."""
    missing = counts <= 0
    if missing.any():
        unseen[name] = int(missing.sum())
    if not missing.all():
        found[name] = torch.where(missing.unsqueeze(-1), 1.0, values.float())


def _example(targets: Sequence[Target]) -> str:
    name = next((t.sources[0] for t in targets if ".attn" in t.name and t.sources), "model.layers.0.X.weight")
    return f"{name.removesuffix('.weight')}.{MEAN_SQ}"
