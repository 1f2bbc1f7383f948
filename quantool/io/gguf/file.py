"""Reads the bytes of a GGUF file: metadata and named tensors, mapped and checked before use.

    | "GGUF" | u32 version | u64 tensors | u64 keys | key: string, u32 type, value ... |
    | name: string, u32 dimensions, u64 sizes (innermost first), u32 type, u64 offset ... | padding | data |

Strings are a u64 length and UTF-8. The header is parsed here and not by gguf.GGUFReader, which takes seconds
for a large vocabulary and never ends on a hostile array length; blocks are decoded by gguf.quants.
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import math
import os
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from quantool.errors import QuantoolError
from quantool.io.safetensors import DOWNLOAD_AGAIN, map_private, open_regular

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


class GgufFile:
    """The mapped file: metadata `fields` by key (arrays undecoded) and `tensors` by their GGUF name."""

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
            raise QuantoolError(f"{path}: bad GGUF header: {error}", hint=DOWNLOAD_AGAIN) from error

    def values(self, key: str) -> list[Any]:
        """A metadata array, decoded; [] when there is no such key."""
        array = self.fields.get(key)
        if array is None:
            return []
        if not isinstance(array, Array):
            raise QuantoolError(f"{self.path}: {key} is {array!r}, expected an array")
        if array.kind != STRING:
            return list(np.frombuffer(self.map, SCALARS[array.kind], array.count, array.start).tolist())
        self._at = array.start
        try:
            return [self._string() for _ in range(array.count)]
        except ValueError as error:
            raise QuantoolError(f"{self.path}: {key}: {error}") from error

    def rows(self, tensor: Tensor) -> "np.ndarray[Any, np.dtype[np.uint8]]":
        """The stored bytes [rows, bytes per row], a view of the mapping; a vector is one row."""
        data = np.frombuffer(self.map, np.uint8, tensor.nbytes, tensor.start)
        return data.reshape(tensor.shape[0] if len(tensor.shape) > 1 and tensor.nbytes else 1, -1)

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

    def _unique(self, pairs: Iterator[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
        seen: set[str] = set()
        for key, value in pairs:
            if key in seen:
                raise ValueError(f"{key!r} appears twice")
            seen.add(key)
            yield key, value

    def _field(self) -> tuple[str, Any]:
        key, kind = self._string(), self._unpack("<I")
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
        name, dimensions = self._string(), self._unpack("<I")
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
            tensors[name] = Tensor(name, shape, dtype, data_start + offset, nbytes)
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
    if math.prod(max(n, 1) for n in shape) >= 1 << 60:
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

    if not tensor.nbytes:
        return torch.empty(tensor.shape, dtype=TORCH_TYPES.get(tensor.dtype, torch.float32))
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
