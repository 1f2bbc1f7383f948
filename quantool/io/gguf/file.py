"""Reads the bytes of a GGUF file: metadata and named tensors, mapped and checked before use.

    | "GGUF" | u32 version | u64 tensors | u64 keys | key: string, u32 type, value ... |
    | name: string, u32 dimensions, u64 sizes (innermost first), u32 type, u64 offset ... | padding | data |

Strings are a u64 length and UTF-8. The header is parsed here and not by gguf.GGUFReader, which takes seconds
for a large vocabulary and never ends on a hostile array length; blocks are decoded by gguf.quants.

A split model is several such files, NAME-00001-of-00003.gguf: the first has the metadata, and each says with
split.no, split.count and split.tensors.count where it belongs. Opening one of them opens all.
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import math
import os
import re
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from quantool.errors import QuantoolError, one_line
from quantool.io.safetensors import DOWNLOAD_AGAIN, drop_pages, map_private, open_regular

SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
STRING, ARRAY = 8, 9
TORCH_TYPES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F64": torch.float64,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
}
LONGEST_KEY, LONGEST_NAME = 1024, 256  # llama.cpp's own are below 100 and 64
PART_NAME = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf", re.ASCII | re.DOTALL)
PART_KEYS = ("split.no", "split.count", "split.tensors.count")
CHUNK_ELEMENTS = 1 << 21  # the decoders of gguf.quants make several temporaries of this many floats


@dataclass(frozen=True, slots=True)
class Array:
    """A metadata array, checked but not decoded: vocabularies are large and most runs do not need them."""

    kind: int
    count: int
    start: int


@dataclass(frozen=True, slots=True)
class Tensor:
    """One stored tensor; `shape` is torch order, `start` counts from the beginning of the file."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    start: int
    nbytes: int
    path: Path


class GgufFile:
    """A mapped model: metadata `fields` by key (arrays undecoded) and `tensors` by their GGUF name.

    `path` may be any part of a split model; the keys that say which part it is are not in `fields`.
    Raises QuantoolError when a file is damaged or a part is missing or of another model.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        parts = _open_parts(path)
        self._first = parts[0]
        self._maps = {part.path: part.map for part in parts}
        self.fields = {key: value for key, value in parts[0].fields.items() if key not in PART_KEYS}
        self.tensors: dict[str, Tensor] = {}
        for part in parts:
            twice = next((name for name in part.tensors if name in self.tensors), None)
            if twice is not None:
                other = self.tensors[twice].path
                raise QuantoolError(f"{part.path}: tensor {twice!r} is also in {other.name}", hint=DOWNLOAD_AGAIN)
            self.tensors.update(part.tensors)

    def values(self, key: str) -> list[Any]:
        """A metadata array, decoded; [] when there is no such key."""
        array = self.fields.get(key)
        if array is None:
            return []
        if not isinstance(array, Array):
            message = f"{self.path}: {key} is {short(array)}, expected an array"
            raise QuantoolError(message, hint=DOWNLOAD_AGAIN)
        try:
            return self._first.values(array)
        except ValueError as error:
            raise QuantoolError(f"{self.path}: {key}: {one_line(error)}", hint=DOWNLOAD_AGAIN) from error

    def rows(self, tensor: Tensor) -> "np.ndarray[Any, np.dtype[np.uint8]]":
        """The stored bytes [rows, bytes per row], a view of the mapping; a vector is one row."""
        data = np.frombuffer(self._maps[tensor.path], np.uint8, tensor.nbytes, tensor.start)
        return data.reshape(tensor.shape[0] if len(tensor.shape) > 1 else 1, -1)

    def drop(self, tensor: Tensor) -> None:
        """Forget the resident pages of a tensor that has been used; it can be read again."""
        drop_pages(self._maps[tensor.path], tensor.start, tensor.nbytes)


def short(value: object) -> str:
    """repr of a metadata value for a message; a string in a file can be as long as the file."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _open_parts(path: Path) -> list["_Part"]:
    """The file, or every part of the split model that it belongs to, in order."""
    opened = _Part(path)
    count = opened.number("split.count", 1)
    if count < 2:
        return [opened]
    name = PART_NAME.fullmatch(path.name)
    if name is None or (int(name[2]), int(name[3])) != (opened.number("split.no", -1) + 1, count):
        expected = f"-{opened.number('split.no', -1) + 1:05d}-of-{count:05d}.gguf"
        raise QuantoolError(f"{path}: is one part of a split model, but its name does not end in {expected}")
    parts = []
    for i in range(count):
        sibling = path.with_name(f"{name[1]}-{i + 1:05d}-of-{count:05d}.gguf")
        if not os.path.lexists(sibling):
            hint = f"copy or download it into '{path.parent}'"
            raise QuantoolError(f"{path}: part {i + 1} of {count} is missing: {sibling.name}", hint=hint)
        part = opened if sibling == path else _Part(sibling)
        found = part.number("split.no", -1) + 1, part.number("split.count", 1)
        if found != (i + 1, count):
            expected = f"part {i + 1} of {count}"
            raise QuantoolError(
                f"{sibling}: is part {found[0]} of {found[1]}, expected {expected}", hint=DOWNLOAD_AGAIN
            )
        parts.append(part)
    stored = sum(len(part.tensors) for part in parts)
    for part in parts:
        expected_tensors = part.number("split.tensors.count", stored)
        if expected_tensors != stored:
            message = f"{part.path}: {expected_tensors} tensors are announced, the {count} parts have {stored}"
            raise QuantoolError(message, hint=DOWNLOAD_AGAIN)
    return parts


class _Part:
    """One mapped file, parsed and checked."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            if size < 24 or file.read(4) != b"GGUF":
                raise QuantoolError(f"{path}: is not a GGUF file", hint=DOWNLOAD_AGAIN)
            self.map = map_private(path, file, size)
        self._at = 4
        try:
            version, tensors, keys = self._unpack("<I"), self._unpack("<Q"), self._unpack("<Q")
            if version not in (2, 3):
                raise ValueError(f"version is {version}, expected 2 or 3 (little-endian)")
            self.fields = dict(self._unique(self._field() for _ in self._times(keys, 12)))
            entries = dict(self._unique(self._entry() for _ in self._times(tensors, 24)))
            self.tensors = self._place(entries)
        except (ValueError, struct.error) as error:
            raise QuantoolError(f"{path}: bad GGUF header: {one_line(error)}", hint=DOWNLOAD_AGAIN) from error

    def number(self, key: str, default: int) -> int:
        """One of the split keys, a 16-bit or 32-bit integer."""
        value = self.fields.get(key, default)
        if type(value) is not int:
            raise QuantoolError(f"{self.path}: {key} is {short(value)}, expected an integer", hint=DOWNLOAD_AGAIN)
        return value

    def values(self, array: Array) -> list[Any]:
        """Decode an array; raises ValueError when a string is not UTF-8."""
        if array.kind != STRING:
            return list(np.frombuffer(self.map, SCALARS[array.kind], array.count, array.start).tolist())
        self._at = array.start
        return [self._string() for _ in range(array.count)]

    def _unpack(self, form: str) -> Any:
        (value,) = struct.unpack_from(form, self.map, self._at)
        self._at += struct.calcsize(form)
        return value

    def _skip(self, size: int) -> int:
        """Move on by `size` bytes; returns where they start."""
        start = self._at
        if size > len(self.map) - start:
            raise ValueError(f"{size} bytes are expected at byte {start}, the file has {len(self.map)}")
        self._at += size
        return start

    def _times(self, count: int, least: int) -> range:
        """range(count), refused when `count` items of `least` bytes cannot be in the rest of the file."""
        if count > (len(self.map) - self._at) // least:
            raise ValueError(f"{count} items are expected at byte {self._at}, the file has {len(self.map)} bytes")
        return range(count)

    def _string(self) -> str:
        start = self._skip(self._unpack("<Q"))
        return self.map[start : self._at].decode("utf-8")

    def _name(self, longest: int) -> str:
        """A key or a tensor's name, of a length that error messages can hold."""
        name = self._string()
        if not 1 <= len(name) <= longest:
            raise ValueError(f"a name of {len(name)} characters at byte {self._at}, expected 1 to {longest}")
        return name

    def _unique(self, pairs: Iterator[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
        seen: set[str] = set()
        for key, value in pairs:
            if key in seen:
                raise ValueError(f"{key!r} appears twice")
            seen.add(key)
            yield key, value

    def _field(self) -> tuple[str, Any]:
        key, kind = self._name(LONGEST_KEY), self._unpack("<I")
        if kind == STRING:
            return key, self._string()
        if kind in SCALARS:
            return key, self._unpack(SCALARS[kind])
        if kind != ARRAY:
            raise ValueError(f"{key!r} has type {kind}, expected 0 to 12")
        kind, count = self._unpack("<I"), self._unpack("<Q")
        start = self._at
        if kind == STRING:
            for _ in self._times(count, 8):
                self._skip(self._unpack("<Q"))
        elif kind in SCALARS:
            self._skip(count * struct.calcsize(SCALARS[kind]))
        else:
            raise ValueError(f"{key!r} is an array of type {kind}, expected scalars or strings")
        return key, Array(kind, count, start)

    def _entry(self) -> tuple[str, tuple[tuple[int, ...], int, int]]:
        name, dimensions = self._name(LONGEST_NAME), self._unpack("<I")
        if not 1 <= dimensions <= 4:
            raise ValueError(f"tensor {name!r} has {dimensions} dimensions, expected 1 to 4")
        shape = tuple(reversed([self._unpack("<Q") for _ in range(dimensions)]))
        return name, (shape, self._unpack("<I"), self._unpack("<Q"))

    def _place(self, entries: Mapping[str, tuple[tuple[int, ...], int, int]]) -> dict[str, Tensor]:
        """Byte ranges from shapes and types; every one lies in the file and no two overlap."""
        alignment = self.fields.get("general.alignment", 32)
        if type(alignment) is not int or alignment < 8 or alignment % 8:
            raise ValueError(f"general.alignment is {alignment!r}, expected a multiple of 8")
        data_start = -(-self._at // alignment) * alignment
        tensors = {}
        for name, (shape, kind, offset) in entries.items():
            dtype, nbytes = _block_bytes(name, shape, kind)
            if offset % alignment:
                raise ValueError(f"tensor {name!r} starts at {offset}, expected a multiple of {alignment}")
            tensors[name] = Tensor(name, shape, dtype, data_start + offset, nbytes, self.path)
        reached = data_start
        for tensor in sorted(tensors.values(), key=lambda tensor: (tensor.start, tensor.nbytes)):
            where = f"tensor {tensor.name!r}: shape {list(tensor.shape)} {tensor.dtype}"
            if tensor.start < reached:
                raise ValueError(f"{where} starts at byte {tensor.start}, inside the tensor in front of it")
            reached = tensor.start + tensor.nbytes
            if reached > len(self.map):
                raise ValueError(f"{where} ends at byte {reached}, the file has {len(self.map)}: truncated")
        return tensors


def _block_bytes(name: str, shape: tuple[int, ...], kind: int) -> tuple[str, int]:
    """Type name and stored bytes of a tensor."""
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    try:
        dtype = GGMLQuantizationType(kind)
    except ValueError as error:
        raise ValueError(f"tensor {name!r} has unknown type {kind}") from error
    block, size = GGML_QUANT_SIZES[dtype]
    elements = math.prod(shape)
    if not elements:  # no file has such, and what goes over the rows of one never ends
        raise ValueError(f"tensor {name!r} has shape {list(shape)}, expected sizes above 0")
    if elements >= 1 << 60:
        raise ValueError(f"tensor {name!r} has shape {list(shape)}, larger than any file")
    if shape[-1] % block:
        raise ValueError(f"tensor {name!r}: rows of {shape[-1]} are not whole {dtype.name} blocks of {block}")
    return dtype.name, elements // block * size


def check_decodable(path: Path, names: Mapping[str, str]) -> None:
    """Every type in use can be decoded, found by decoding one block of zeros; `names` maps type to a tensor."""
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
    from gguf.quants import dequantize

    for dtype, name in names.items():
        if dtype in TORCH_TYPES:
            continue
        kind = GGMLQuantizationType[dtype]
        try:
            with np.errstate(all="ignore"):
                dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
        except NotImplementedError as error:
            raise QuantoolError(f"{path}: tensor {name!r}: the gguf package cannot decode {dtype}") from error


def decode(rows: "np.ndarray[Any, np.dtype[np.uint8]]", tensor: Tensor) -> torch.Tensor:
    """Stored rows as a tensor: a view where the type is torch's own, else float32."""
    from gguf.constants import GGMLQuantizationType
    from gguf.quants import dequantize

    if tensor.dtype in TORCH_TYPES:
        return torch.from_numpy(rows.reshape(-1)).view(TORCH_TYPES[tensor.dtype]).reshape(tensor.shape)
    elements = math.prod(tensor.shape) // len(rows)
    out = np.empty((len(rows), elements), np.float32)
    step = max(1, CHUNK_ELEMENTS // elements)
    for first in range(0, len(rows), step):
        chunk = rows[first : first + step]
        with np.errstate(all="ignore"):  # a bad scale gives NaN or Inf, which is for the caller to judge
            out[first : first + step] = dequantize(chunk, GGMLQuantizationType[tensor.dtype])
    return torch.from_numpy(out).reshape(tensor.shape)
