"""Writes GGUF: planned from shapes alone, tensors in any order and by ranges of rows, atomic, in parts when asked.

    | "GGUF" | u32 3 | u64 tensors | u64 keys | key: string, u32 type, value ... |
    | name: string, u32 dimensions, u64 sizes (innermost first), u32 type, u64 offset ... | padding | data |

Every tensor starts at a multiple of 32 bytes of the data, which starts at one of the file, and is padded to the next.
The plan fixes every byte position before the work starts: the header is written and the file allocated as a hidden
sibling `.NAME.tmp-PID`, rows are written at their offsets as they come, and `commit` renames. A full disk is found
before the work, and whatever goes wrong leaves nothing behind.

A model in parts is NAME-00001-of-00003.gguf and so on, as llama-gguf-split makes it: all metadata is in the first,
and split.no, split.count (u16) and split.tensors.count (i32) are in each.
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md; llama.cpp's tools/gguf-split/gguf-split.cpp
"""

import bisect
import contextlib
import math
import os
import struct
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

import numpy as np
import torch

from quantool.errors import QuantoolError
from quantool.io.gguf.file import ARRAY, SCALARS, STRING, TORCH_TYPES
from quantool.io.writer import (
    bytes_of,
    check_output_file,
    check_space,
    fsync,
    missing_parents,
    preallocate,
    temporary_path,
    write_at,
    writing,
)

Scalar = str | bool | int | float | np.generic
Value = Scalar | Sequence[str] | Sequence[bool] | Sequence[int] | Sequence[float] | Sequence[np.generic]

ALIGNMENT = 32  # what a reader takes when general.alignment is not there
LONGEST_NAME = 63  # bytes of a tensor's name: GGML_MAX_NAME less the closing zero
UINT32, INT32, FLOAT32, BOOL = 4, 5, 6, 7
NUMPY_KINDS = {np.dtype(form): kind for kind, form in SCALARS.items()}


@dataclass(frozen=True, slots=True)
class PlannedGguf:
    """A tensor that will be written; `dtype` is ggml's word ("Q4_K"), `shape` in torch order.

    Raises QuantoolError when ggml has no such type, shape or name.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        from gguf.constants import GGMLQuantizationType

        where = f"tensor {self.name!r}"
        if self.dtype not in GGMLQuantizationType.__members__:
            raise QuantoolError(f"{where}: GGUF has no type {self.dtype!r}")
        if not 1 <= len(self.shape) <= 4 or min(self.shape) < 1:
            raise QuantoolError(f"{where}: shape {list(self.shape)}, GGUF holds 1 to 4 dimensions above 0")
        if not 1 <= len(_encode(where, self.name)) <= LONGEST_NAME:
            raise QuantoolError(f"{where}: the name is too long, llama.cpp reads at most {LONGEST_NAME} bytes")
        if self.shape[-1] % self._block[0]:
            message = f"rows of {self.shape[-1]} are not whole {self.dtype} blocks of {self._block[0]}"
            raise QuantoolError(f"{where}: {message}")

    @property
    def kind(self) -> int:
        """ggml's number of the type."""
        from gguf.constants import GGMLQuantizationType

        return int(GGMLQuantizationType[self.dtype])

    @property
    def rows(self) -> int:
        """Rows of the last dimension, all others flattened."""
        return math.prod(self.shape[:-1])

    @property
    def row_bytes(self) -> int:
        return self.shape[-1] // self._block[0] * self._block[1]

    @property
    def nbytes(self) -> int:
        return self.rows * self.row_bytes

    @property
    def _block(self) -> tuple[int, int]:
        """Weights and bytes of one block."""
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

        return GGML_QUANT_SIZES[GGMLQuantizationType[self.dtype]]


@dataclass(frozen=True, slots=True)
class _File:
    """One planned file: header bytes, and where each tensor starts in the file."""

    path: Path
    header: bytes
    starts: Mapping[str, int]
    nbytes: int


@dataclass(slots=True)
class _Slot:
    """Where a tensor goes, and the ranges of rows [first, end) that are written: sorted, none touching another."""

    tensor: PlannedGguf
    path: Path
    start: int
    ranges: list[tuple[int, int]] = field(default_factory=list)

    def claim(self, first: int, end: int) -> bool:
        """Add a range; False when some of it is there already."""
        at = bisect.bisect_left(self.ranges, (first, end))
        before, after = self.ranges[at - 1 : at] if at else [], self.ranges[at : at + 1]
        if (before and before[0][1] > first) or (after and after[0][0] < end):
            return False
        if before and before[0][1] == first:
            at, first = at - 1, before[0][0]
        if after and after[0][0] == end:
            end = after[0][1]
        stop = at + sum(first <= low and high <= end for low, high in self.ranges[at : at + 2])
        self.ranges[at:stop] = [(first, end)]
        return True

    @property
    def complete(self) -> bool:
        return self.ranges == [(0, self.tensor.rows)]


class GgufWriter:
    """A GGUF file, or the parts of one, that appears complete or not at all; a context manager.

    `split_max_size` bounds the tensor bytes of a part (a larger tensor gets its own); what fits into one part is
    one file called `output`. `nbytes` is the size of all `paths`, headers included.

    Raises UsageError when a file exists and may not be replaced, QuantoolError when it cannot be written.
    """

    def __init__(
        self,
        output: Path,
        plan: Sequence[PlannedGguf],
        *,
        metadata: Mapping[str, Value],
        split_max_size: int | None = None,
        overwrite: bool = False,
    ) -> None:
        self.output = Path(os.path.realpath(output))
        self._files = _plan_files(self.output, plan, metadata, split_max_size)
        for file in self._files:
            check_output_file(file.path, overwrite)
        self.paths = [file.path for file in self._files]
        self.nbytes = sum(file.nbytes for file in self._files)
        tensors = {tensor.name: tensor for tensor in plan}
        self._slots = {
            name: _Slot(tensors[name], file.path, start) for file in self._files for name, start in file.starts.items()
        }
        self._lock = threading.Lock()
        self._descriptors: dict[Path, int] = {}
        self._parents = missing_parents(self.output)
        try:
            self._allocate()
        except BaseException:
            self._discard()
            raise

    def __enter__(self) -> "GgufWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._discard()

    def write(self, name: str, data: torch.Tensor, *, first_row: int = 0) -> None:
        """Write rows of one planned tensor, each once, in any order, from any thread.

        `data` is uint8 [rows, row_bytes], or [..., K] of the dtype itself where it is one of torch's.
        """
        slot = self._slots.get(name)
        if slot is None:
            raise QuantoolError(f"{self.output}: tensor {name!r} is not in the plan")
        tensor, rows = slot.tensor, _rows_of(slot.tensor, data)
        if rows is None or not 0 <= first_row <= first_row + rows <= tensor.rows:
            raise QuantoolError(
                f"{self.output}: tensor {name!r}: planned {tensor.dtype} {list(tensor.shape)} in {tensor.rows} rows of "
                f"{tensor.row_bytes} bytes, got {str(data.dtype).removeprefix('torch.')} {list(data.shape)} "
                f"for row {first_row}"
            )
        if not rows:
            return
        with self._lock:
            if not slot.claim(first_row, first_row + rows):
                end = first_row + rows - 1
                raise QuantoolError(f"{self.output}: tensor {name!r}: rows {first_row} to {end} are written twice")
        with writing(self.output):
            write_at(self._descriptors[slot.path], bytes_of(data), slot.start + first_row * tensor.row_bytes)

    def commit(self) -> None:
        """Make everything durable and rename it into place; every row of every tensor must have been written."""
        missing = [slot.tensor for slot in self._slots.values() if not slot.complete]
        if missing:
            message = f"{len(missing)} planned tensors were not written completely, first {missing[0].name!r}"
            raise QuantoolError(f"{self.output}: {message}")
        with writing(self.output):
            for descriptor in self._descriptors.values():
                os.fsync(descriptor)
            self._close()
            if len(self.paths) == 1:
                os.replace(temporary_path(self.output), self.output)
            else:
                _replace_all(self.paths)
            self._parents = []
            fsync(self.output.parent)

    def _allocate(self) -> None:
        with writing(self.output):
            self.output.parent.mkdir(parents=True, exist_ok=True)
            check_space(self.output, self.nbytes)
            for file in self._files:
                temporary = temporary_path(file.path)
                temporary.unlink(missing_ok=True)  # a process with our PID is us or dead
                descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
                self._descriptors[file.path] = descriptor
                preallocate(descriptor, file.nbytes)
                write_at(descriptor, memoryview(file.header), 0)

    def _close(self) -> None:
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])

    def _discard(self) -> None:
        """Remove what is still temporary; after `commit` there is nothing."""
        self._close()
        for path in self.paths:
            with contextlib.suppress(OSError):
                temporary_path(path).unlink()
        for parent in self._parents:
            with contextlib.suppress(OSError):  # not empty: somebody else uses it by now
                parent.rmdir()


def planned_bytes(
    plan: Sequence[PlannedGguf], *, metadata: Mapping[str, Value], split_max_size: int | None = None
) -> int:
    """Size of all files that GgufWriter would write, headers included."""
    return sum(file.nbytes for file in _plan_files(Path("planned.gguf"), plan, metadata, split_max_size))


def _rows_of(tensor: PlannedGguf, data: torch.Tensor) -> int | None:
    """How many rows `data` has, None when they are not rows of this tensor."""
    if not data.dim():
        return None
    if data.dtype == torch.uint8:
        return math.prod(data.shape[:-1]) if data.shape[-1] == tensor.row_bytes else None
    fits = data.dtype == TORCH_TYPES.get(tensor.dtype) and data.shape[-1] == tensor.shape[-1]
    return math.prod(data.shape[:-1]) if fits else None


def _replace_all(paths: Sequence[Path]) -> None:
    """Rename every temporary to its path: all, or after a failure none, with what was there before put back."""
    olds = {path: path.with_name(f".{path.name}.old-{os.getpid()}") for path in paths}
    moved: list[Path] = []
    new: list[Path] = []
    try:
        for path in paths:
            if os.path.lexists(path):
                os.replace(path, olds[path])
                moved.append(path)
        for path in paths:
            os.replace(temporary_path(path), path)
            new.append(path)
    except BaseException:
        for path in new:
            path.unlink()
        for path in moved:
            os.replace(olds[path], path)
        raise
    for path in moved:
        olds[path].unlink()


def _plan_files(
    output: Path, plan: Sequence[PlannedGguf], metadata: Mapping[str, Value], split_max_size: int | None
) -> list[_File]:
    names = [tensor.name for tensor in plan]
    twice = next((name for name in names if names.count(name) > 1), None) if len(set(names)) < len(names) else None
    if twice is not None:
        raise QuantoolError(f"{output}: tensor {twice!r} is planned twice")
    if metadata.get("general.alignment", ALIGNMENT) != ALIGNMENT:
        raise QuantoolError(f"{output}: general.alignment is {metadata['general.alignment']!r}, expected {ALIGNMENT}")
    parts: list[list[PlannedGguf]] = [[]]
    size = 0
    for tensor in plan:
        padded = _padded(tensor.nbytes)
        if parts[-1] and split_max_size is not None and size + padded > split_max_size:
            parts.append([])
            size = 0
        parts[-1].append(tensor)
        size += padded
    if len(parts) == 1:
        return [_plan_file(output, plan, metadata)]
    if len(parts) > 0xFFFF:
        raise QuantoolError(f"{output}: {len(parts)} parts, expected at most 65535", hint="raise --split-max-size")
    stem = output.name.removesuffix(".gguf")
    files = []
    for i, part in enumerate(parts):
        place: dict[str, Value] = {
            "split.no": np.uint16(i),
            "split.count": np.uint16(len(parts)),
            "split.tensors.count": np.int32(len(plan)),
        }
        path = output.with_name(f"{stem}-{i + 1:05d}-of-{len(parts):05d}.gguf")
        files.append(_plan_file(path, part, place if i else {**metadata, **place}))
    return files


def _plan_file(path: Path, tensors: Sequence[PlannedGguf], metadata: Mapping[str, Value]) -> _File:
    pieces = [b"GGUF", struct.pack("<IQQ", 3, len(tensors), len(metadata))]
    for key, value in metadata.items():
        pieces += [_string(key, key), _field(key, value)]
    offset, offsets = 0, {}
    for tensor in tensors:
        sizes = tuple(reversed(tensor.shape))
        entry = struct.pack(f"<I{len(sizes)}QIQ", len(sizes), *sizes, tensor.kind, offset)
        pieces += [_string(tensor.name, tensor.name), entry]
        offsets[tensor.name] = offset
        offset += _padded(tensor.nbytes)
    header = b"".join(pieces)
    header += b"\0" * (_padded(len(header)) - len(header))
    starts = {name: len(header) + offset for name, offset in offsets.items()}
    return _File(path, header, starts, len(header) + offset)


def _padded(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _encode(where: str, text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise QuantoolError(f"{where}: {text[:80]!r} cannot be written as UTF-8") from error


def _string(where: str, text: str) -> bytes:
    data = _encode(where, text)
    return len(data).to_bytes(8, "little") + data


def _field(key: str, value: Value) -> bytes:
    """Type and value of one metadata key."""
    if isinstance(value, Sequence) and not isinstance(value, str):
        if len({type(item) for item in value}) > 1:
            raise QuantoolError(f"metadata {key!r}: items are of several types")
        kind = _kind(key, value[0], INT32) if value else STRING
        return struct.pack("<IIQ", ARRAY, kind, len(value)) + _items(key, value, kind)
    kind = _kind(key, value, INT32 if isinstance(value, int) and value < 0 else UINT32)
    return struct.pack("<I", kind) + _items(key, [value], kind)


def _kind(key: str, value: object, integer: int) -> int:
    """The number of a value's type; `integer` is the one of Python's int."""
    if isinstance(value, str):
        return STRING
    if isinstance(value, np.generic) and value.dtype in NUMPY_KINDS:
        return NUMPY_KINDS[value.dtype]
    kinds = {bool: BOOL, int: integer, float: FLOAT32}
    if type(value) not in kinds:
        raise QuantoolError(f"metadata {key!r}: {type(value).__name__} cannot be written to GGUF")
    return kinds[type(value)]


def _items(key: str, values: Sequence[object], kind: int) -> bytes:
    if kind == STRING:
        return b"".join(_string(f"metadata {key!r}", str(text)) for text in values)
    try:
        return struct.pack(f"<{len(values)}{SCALARS[kind][1]}", *values)
    except (struct.error, OverflowError) as error:
        raise QuantoolError(f"metadata {key!r}: a value does not fit: {error}") from error
