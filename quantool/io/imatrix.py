"""Reads and writes llama.cpp's importance matrix: the mean of x[k]^2 over the tokens x that reached each linear.

The GGUF form has two F32 tensors per linear, K input channels wide, with a row for each of its E experts (or one):

    NAME.in_sum2 [E, K]   sum of x[k]^2          NAME.counts [E, 1]   how many tokens
    general.type "imatrix", imatrix.datasets [string], imatrix.chunk_count u32, imatrix.chunk_size u32

The older form (.dat) has one count of calls for all experts, and the mean times that count; little-endian:

    | i32 entries | i32 length, name, i32 calls, i32 values, f32 value ... | ... | i32 chunks | i32 length, dataset |

An expert that no token reached has count 0: its values are 1 here, as llama-quantize takes them, so that all its
channels count alike.
Source: tools/imatrix/imatrix.cpp, common/imatrix-loader.cpp, tools/quantize/quantize.cpp of llama.cpp
"""

import math
import mmap
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from quantool.errors import QuantoolError
from quantool.io.gguf.file import GgufFile, Tensor, decode, short
from quantool.io.gguf.writer import LONGEST_NAME, GgufWriter, PlannedGguf, Value, planned_bytes
from quantool.io.safetensors import DOWNLOAD_AGAIN, damaged, map_private, open_regular

SUMS, COUNTS = ".in_sum2", ".counts"
DATASETS, CHUNKS, CHUNK_SIZE = "imatrix.datasets", "imatrix.chunk_count", "imatrix.chunk_size"
MAKE_ONE = "make one: quantool calibrate MODEL --format imatrix -o imatrix.gguf"
SHORTEST = 16  # bytes of an entry of the older form: an empty name and one value


@dataclass(frozen=True, slots=True, eq=False)
class Importance:
    """Statistics of one linear: `values` float32 [E, K], finite and not negative; 1 where `counts` int64 [E] is 0."""

    values: torch.Tensor
    counts: torch.Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Imatrix:
    """Entries by the GGUF name of the weight; `chunks` windows of `chunk_size` tokens of `dataset` were seen.

    The older form does not say how many experts a stack has: there E is 1, and K counts the channels of all.
    """

    entries: Mapping[str, Importance]
    dataset: str
    chunks: int
    chunk_size: int = 512


def read_imatrix(path: Path) -> Imatrix:
    """Read either form, told apart by their first bytes.

    Raises QuantoolError when the file is neither, is damaged, or has values that no statistic can have.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if file.read(4) != b"GGUF":
            if size < SHORTEST:
                raise QuantoolError(f"{path}: has {size} bytes, which is no imatrix of llama.cpp", hint=MAKE_ONE)
            return _read_dat(path, map_private(path, file, size))
    return _read_gguf(GgufFile(path))


def write_imatrix(path: Path, imatrix: Imatrix, *, overwrite: bool) -> int:
    """Write the GGUF form atomically, which llama-quantize takes as --imatrix; returns its size in bytes.

    Raises UsageError when `path` exists and may not be replaced, QuantoolError when it cannot be written.
    """
    tensors: dict[str, torch.Tensor] = {}
    for name, entry in sorted(imatrix.entries.items()):
        _check(path, name, entry.values, entry.counts)
        counts = entry.counts.to(torch.float32).reshape(-1, 1)
        tensors[name + SUMS] = entry.values.to(torch.float32).reshape(len(counts), -1) * counts
        tensors[name + COUNTS] = counts
    plan, metadata = _plan(imatrix)
    with GgufWriter(path, plan, metadata=metadata, overwrite=overwrite) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
        writer.commit()
    return writer.nbytes


def imatrix_bytes(imatrix: Imatrix) -> int:
    """Size of what `write_imatrix` would write; the values may be on the meta device."""
    plan, metadata = _plan(imatrix)
    return planned_bytes(plan, metadata=metadata)


def _plan(imatrix: Imatrix) -> tuple[list[PlannedGguf], dict[str, Value]]:
    plan = []
    for name, entry in sorted(imatrix.entries.items()):
        experts = entry.counts.numel()
        plan.append(PlannedGguf(name + SUMS, "F32", (experts, entry.values.numel() // experts)))
        plan.append(PlannedGguf(name + COUNTS, "F32", (experts, 1)))
    metadata: dict[str, Value] = {
        "general.type": "imatrix",
        DATASETS: [imatrix.dataset],
        CHUNKS: imatrix.chunks,
        CHUNK_SIZE: imatrix.chunk_size,
    }
    return plan, metadata


def _read_gguf(file: GgufFile) -> Imatrix:
    names = [name.removesuffix(SUMS) for name in file.tensors if name.endswith(SUMS)]
    lone = {name.removesuffix(COUNTS) for name in file.tensors if name.endswith(COUNTS)} ^ set(names)
    if lone:
        raise damaged(f"{file.path}: {min(lone)!r} has only one of {SUMS} and {COUNTS}")
    if not names:
        raise QuantoolError(f"{file.path}: is a GGUF file without '*{SUMS}', so it is no imatrix", hint=MAKE_ONE)
    entries = {}
    for name in names:
        sums, counts = (_floats(file, file.tensors[name + suffix]) for suffix in (SUMS, COUNTS))
        if not counts.numel() or not sums.numel() or sums.numel() % counts.numel():
            raise damaged(f"{file.path}: {name!r}: {sums.numel()} sums do not divide by {counts.numel()} counts")
        sums = sums.reshape(counts.numel(), -1)
        _check(file.path, name, sums, counts)
        whole = counts.round()
        entries[name] = Importance(torch.where(whole > 0, sums / whole, 1.0), whole.reshape(-1).long())
    datasets = file.values(DATASETS) or [""]
    return Imatrix(entries, str(datasets[0]), _number(file, CHUNKS), _number(file, CHUNK_SIZE))


def _floats(file: GgufFile, tensor: Tensor) -> torch.Tensor:
    """A column [n, 1] of the tensor's values."""
    if tensor.dtype != "F32":
        raise damaged(f"{file.path}: tensor {tensor.name!r} is {tensor.dtype}, expected F32")
    return decode(file.rows(tensor), tensor).reshape(-1, 1)


def _number(file: GgufFile, key: str) -> int:
    value = file.fields.get(key, 0)
    if type(value) is not int or value < 0:
        raise damaged(f"{file.path}: {key} is {short(value)}, expected a count")
    return value


def _check(path: Path, name: str, values: torch.Tensor, counts: torch.Tensor) -> None:
    """A sum or mean of squares, or a count, is finite and not negative; a count is one that a double can hold."""
    for what, tensor, end in (("value", values, math.inf), ("count", counts, 2.0**53)):
        bad = ~((tensor >= 0) & (tensor < end))
        if bad.any():
            raise damaged(f"{path}: {name!r} has the {what} {tensor[bad][0].item()}, expected 0 or more")


class _Cursor:
    """Reads through a mapped file; raises ValueError where it ends too soon."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.at = data, 0

    def skip(self, size: int) -> int:
        start = self.at
        if not 0 <= size <= len(self.data) - start:
            raise ValueError(f"{size} bytes are expected at byte {start}, the file has {len(self.data)}")
        self.at += size
        return start

    def number(self) -> int:
        return int(struct.unpack_from("<i", self.data, self.skip(4))[0])

    def text(self) -> str:
        start = self.skip(self.number())
        return self.data[start : self.at].decode("utf-8")

    @property
    def left(self) -> int:
        return len(self.data) - self.at


def _read_dat(path: Path, data: mmap.mmap) -> Imatrix:
    cursor = _Cursor(data)
    try:
        count = cursor.number()
        if not 1 <= count <= cursor.left // SHORTEST:
            raise ValueError(f"{count} entries are announced in {len(data)} bytes")
        entries: dict[str, Importance] = {}
        for _ in range(count):
            name, entry = _dat_entry(path, cursor)
            if name in entries:
                raise ValueError(f"{name!r} appears twice")
            entries[name] = entry
        chunks = cursor.number() if cursor.left else 0  # the oldest files end here or there
        dataset = cursor.text() if cursor.left else ""
        if chunks < 0 or cursor.left:
            raise ValueError(f"{chunks} chunks and {cursor.left} bytes at the end")
    except ValueError as error:
        message = f"{path}: is no imatrix of llama.cpp, neither GGUF nor .dat: {error}"
        raise QuantoolError(message, hint=f"{DOWNLOAD_AGAIN}, or {MAKE_ONE}") from error
    return Imatrix(entries, dataset, chunks, chunk_size=0)


def _dat_entry(path: Path, cursor: _Cursor) -> tuple[str, Importance]:
    name, calls, count = cursor.text(), cursor.number(), cursor.number()
    if not 1 <= len(name) <= LONGEST_NAME or calls < 0 or count < 1:
        raise ValueError(f"the entry {name[:LONGEST_NAME]!r} has {calls} calls and {count} values")
    start = cursor.skip(4 * count)
    values = torch.from_numpy(np.frombuffer(cursor.data, "<f4", count, start).copy()).reshape(1, -1)
    counts = torch.tensor([max(calls, 1)])
    _check(path, name, values, counts)
    return name, Importance(values / counts.float(), counts)
