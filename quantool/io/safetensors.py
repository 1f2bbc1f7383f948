"""Reads safetensors: one file, or the shards of a Hugging Face directory, mapped and checked before use.

A file is a little-endian length, a JSON header and the data, without holes:

    | 8 bytes: n | n bytes: {"name": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [0, 12]}, ...} | data |

Offsets count from the first data byte. Everything in the header is checked against the size of the file
before anything is allocated, so a hostile file costs one error line.
Format: https://github.com/huggingface/safetensors#format
"""

import json
import mmap
import os
import shutil
import stat
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, TypeGuard

import torch

from quantool.errors import QuantoolError
from quantool.io import TensorInfo

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}
MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library
MAP_NORESERVE = 0x4000  # <asm-generic/mman-common.h>; Python 3.11's mmap has no name for it
MAX_DIMENSIONS = 64  # the limit of torch
DOWNLOAD_AGAIN = "download or copy the file again"
AUX_PATTERNS = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "*.model",
    "*.tiktoken",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/*.jinja",
)


def dtype_name(dtype: torch.dtype) -> str:
    """The safetensors word of a torch dtype: torch.bfloat16 -> "BF16"."""
    for name, known in DTYPES.items():
        if known == dtype:
            return name
    raise damaged(f"safetensors cannot store {dtype}, expected one of {', '.join(DTYPES)}")


def nbytes(dtype: str, shape: Iterable[int]) -> int:
    """Bytes of a tensor; `dtype` is a key of DTYPES."""
    size = DTYPES[dtype].itemsize
    for length in shape:
        size *= length
    return size


def read_file(path: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Header of one file, checked: tensors in file order, and `__metadata__`."""
    file = MappedFile(path)
    return file.infos, file.metadata


class MappedFile:
    """One safetensors file: `infos` in file order, `metadata`, and tensors that are views of the mapping.

    Raises QuantoolError when the file cannot be read or its header does not describe exactly its bytes.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            header, data_start = _read_header(path, file, size)
            self.metadata = _metadata(path, header.pop("__metadata__", {}))
            spans = {name: _span(path, name, entry) for name, entry in header.items()}
            ordered = sorted(spans.values(), key=lambda span: span[1:])
            _check_cover(path, ordered, size - data_start)
            self._map = map_private(path, file, size)
        self.infos = {info.name: info for info, _, _ in ordered}
        self._starts = {info.name: data_start + begin for info, begin, _ in ordered}

    def read(self, name: str) -> torch.Tensor:
        """A view of the mapped file; writing to it changes memory, never the file. Keeps the mapping alive."""
        info, start = self.infos[name], self._starts[name]
        dtype = DTYPES[info.dtype]
        if info.nbytes == 0:
            return torch.empty(info.shape, dtype=dtype)
        count = info.nbytes // dtype.itemsize
        if start % dtype.itemsize:  # legal in the format, not for vector loads: this one is copied
            data = bytearray(self._map[start : start + info.nbytes])
            return torch.frombuffer(data, dtype=dtype, count=count).reshape(info.shape)
        return torch.frombuffer(self._map, dtype=dtype, count=count, offset=start).reshape(info.shape)

    def drop(self, name: str) -> None:
        """Forget the resident pages of a tensor. Views stay valid: they are read from the file again."""
        start, length = self._starts[name], self.infos[name].nbytes
        drop_pages(self._map, start, length)


class SafetensorsCheckpoint:
    """A Hugging Face directory: config.json, and model.safetensors or an index of shards.

    Raises QuantoolError for every way the directory can be incomplete or inconsistent, before reading data.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config: Mapping[str, Any] = _read_config(path)
        weights, index = _find_weights(path)
        files = [MappedFile(file) for file in weights]
        self.metadata = {key: value for file in files for key, value in file.metadata.items()}
        self._files = _files_by_tensor(files)
        if index is not None:
            _check_index(path, index, self._files)
        self.infos: Mapping[str, TensorInfo] = {name: file.infos[name] for name, file in self._files.items()}

    def read(self, name: str) -> torch.Tensor:
        """The tensor as a view of its mapped shard, see MappedFile.read."""
        if name not in self._files:
            raise damaged(f"{self.path}: there is no tensor {name!r}")
        return self._files[name].read(name)

    def drop(self, name: str) -> None:
        self._files[name].drop(name)

    def write_aux(self, directory: Path) -> None:
        """Copy generation_config.json and every tokenizer file into `directory`; code (.py) is never copied."""
        for pattern in AUX_PATTERNS:
            for source in sorted(self.path.glob(pattern)):
                if not source.is_file():
                    continue
                target = directory / source.relative_to(self.path)
                try:
                    target.parent.mkdir(exist_ok=True)
                    shutil.copyfile(source, target)
                except OSError as error:
                    raise QuantoolError(
                        f"{source}: cannot be copied: {error.strerror or error}",
                        hint="free some space or choose another -o",
                    ) from error


def damaged(message: str) -> QuantoolError:
    """The error for a file that is not what it was when it was made."""
    return QuantoolError(message, hint=DOWNLOAD_AGAIN)


def open_regular(path: Path) -> BinaryIO:
    """Open for reading; a directory, a pipe (which would block) or a missing permission is one error line."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise damaged(f"{path}: is {'a directory' if path.is_dir() else 'not a regular file'}, expected a file")
        return open(path, "rb")
    except FileNotFoundError as error:
        raise damaged(f"{path}: no such file") from error
    except PermissionError as error:
        raise QuantoolError(f"{path}: permission denied", hint=f"chmod u+r '{path}'") from error
    except OSError as error:
        raise damaged(f"{path}: {error.strerror or error}") from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of the checkpoint."""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > MAX_HEADER_BYTES:
            raise damaged(f"{path}: has {size} bytes, expected at most {MAX_HEADER_BYTES} bytes of JSON")
        try:
            return _json_object(file.read())
        except (ValueError, RecursionError) as error:
            raise damaged(f"{path}: is not a JSON object: {error}") from error


def drop_pages(mapping: mmap.mmap, start: int, length: int) -> None:
    """Forget the whole pages inside a range of a private file mapping (they are read again when touched)."""
    page = mmap.PAGESIZE
    first, last = -(-start // page) * page, (start + length) // page * page
    if last > first and hasattr(mmap, "MADV_DONTNEED"):
        mapping.madvise(mmap.MADV_DONTNEED, first, last - first)


def map_private(path: Path, file: BinaryIO, size: int) -> mmap.mmap:
    """Map a whole file; views of the mapping keep it alive after the file is closed."""
    # Writable, because torch warns about tensors on read-only memory; private, so that the file cannot change.
    # NORESERVE: without it Linux refuses a private mapping larger than memory, though no page is ever written.
    flags = mmap.MAP_PRIVATE | (MAP_NORESERVE if sys.platform == "linux" else 0)
    try:
        return mmap.mmap(file.fileno(), size, flags=flags, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    except (OSError, ValueError) as error:
        raise QuantoolError(f"{path}: cannot be mapped: {error}") from error


def _json_object(data: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for name, value in pairs:
            if name in result:
                raise ValueError(f"key {name!r} appears twice")
            (name + value if isinstance(value, str) else name).encode()  # lone surrogates cannot be written or printed
            result[name] = value
        return result

    value = json.loads(data, object_pairs_hook=unique)
    if not isinstance(value, dict):
        raise ValueError(f"found {type(value).__name__}, expected an object")
    return value


def _read_header(path: Path, file: BinaryIO, size: int) -> tuple[dict[str, Any], int]:
    """The header object and the offset of the first data byte."""
    if size < 8:
        raise damaged(f"{path}: has {size} bytes, a safetensors file has at least 8")
    length = int.from_bytes(file.read(8), "little")
    if length > MAX_HEADER_BYTES:
        raise damaged(
            f"{path}: the header claims {length} bytes, expected at most {MAX_HEADER_BYTES}: not a safetensors file"
        )
    if length > size - 8:
        raise damaged(f"{path}: the header needs {length} bytes, the file has {size - 8}")
    try:
        return _json_object(file.read(length)), 8 + length
    except (ValueError, RecursionError) as error:
        raise damaged(f"{path}: bad header: {error}") from error


def _metadata(path: Path, value: Any) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(item, str) for item in value.values()):
        raise damaged(f"{path}: bad header: __metadata__ is not an object of strings")
    return value


def _span(path: Path, name: str, entry: Any) -> tuple[TensorInfo, int, int]:
    """One header entry, checked for itself: (info, begin, end)."""
    where = f"{path.name}: tensor {name!r}:"
    if not isinstance(entry, dict):
        raise damaged(f"{where} bad header: the entry is {type(entry).__name__}, expected an object")
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise damaged(f"{where} unknown dtype {dtype!r}, expected one of {', '.join(DTYPES)}")
    if not _naturals(shape) or len(shape) > MAX_DIMENSIONS or nbytes(dtype, (max(n, 1) for n in shape)) >= 1 << 63:
        raise damaged(f"{where} shape is {_short(shape)}, expected a list of sizes a tensor can have")
    if not _naturals(offsets) or len(offsets) != 2 or not offsets[0] <= offsets[1] < 1 << 63:
        raise damaged(f"{where} data_offsets is {_short(offsets)}, expected [begin, end]")
    needed, (begin, end) = nbytes(dtype, shape), offsets
    if needed != end - begin:
        raise damaged(f"{where} shape {shape} {dtype} needs {needed} bytes, the file has {end - begin}")
    return TensorInfo(name, tuple(shape), dtype, needed, path), begin, end


def _naturals(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 160 else text[:157] + "..."


def _check_cover(path: Path, ordered: list[tuple[TensorInfo, int, int]], size: int) -> None:
    """Tensors sorted by offset must cover the data bytes exactly: no overlap, no hole, no end beyond the file."""
    reached = 0
    for info, begin, end in ordered:
        where = f"{path.name}: tensor {info.name!r}:"
        if begin < reached:
            raise damaged(f"{where} starts at byte {begin}, before the tensor in front of it ends at {reached}")
        if begin > reached:
            raise damaged(f"{where} starts at byte {begin}, expected {reached}: no tensor owns the bytes between")
        if end > size:
            total = max(last for _, _, last in ordered)
            raise damaged(f"{where} ends at byte {end}, the file has {size} data bytes of {total}: truncated")
        reached = end
    if reached != size:
        raise damaged(f"{path}: has {size} data bytes, its header describes {reached}")


def _read_config(path: Path) -> dict[str, Any]:
    try:
        names = os.listdir(path)
    except PermissionError as error:
        raise QuantoolError(f"{path}: permission denied", hint=f"chmod u+rx '{path}'") from error
    except OSError as error:
        raise damaged(f"{path}: {error.strerror or error}") from error
    if not names:
        raise damaged(f"{path}: the directory is empty, expected config.json and *.safetensors")
    if "config.json" not in names:
        found = sorted(names)
        listing = ", ".join(repr(name) for name in found[:3]) + (", ..." if len(found) > 3 else "")
        hint = "give the directory that holds config.json, or a .gguf file"
        raise QuantoolError(f"{path}: there is no config.json, found {listing}", hint=hint)
    return read_json(path / "config.json")


def _find_weights(path: Path) -> tuple[list[Path], dict[str, str] | None]:
    """The safetensors files of a directory, and the index's tensor -> file name where there is an index."""
    single, index = path / "model.safetensors", path / "model.safetensors.index.json"
    if os.path.lexists(single):
        return [single], None
    if os.path.lexists(index):
        shards = _read_index(index)
        return [path / name for name in sorted(set(shards.values()))], shards
    others = sorted(path.glob("*.safetensors"))
    if len(others) == 1:
        return others, None
    if others:
        hint = "keep one .safetensors file in the directory, or add model.safetensors.index.json"
        raise QuantoolError(f"{path}: has {len(others)} .safetensors files and no index", hint=hint)
    pickles = sorted(name for suffix in ("bin", "pt", "pth") for name in path.glob(f"*.{suffix}"))
    if pickles:
        raise pickle_error(pickles[0], path)
    raise damaged(f"{path}: there is no model.safetensors")


def pickle_error(file: Path, directory: Path) -> QuantoolError:
    """Pickles run code when they are opened, so quantool opens none."""
    convert = (
        'python -c "from transformers import AutoModelForCausalLM as M, AutoTokenizer as T; '
        f"[c.from_pretrained('{directory}').save_pretrained('{directory}-safetensors') for c in (M, T)]\""
    )
    return QuantoolError(f"{file}: is a pickle, quantool reads safetensors only", hint=convert)


def _read_index(index: Path) -> dict[str, str]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise damaged(f"{index}: weight_map is {_short(weight_map)}, expected tensor names and files")
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise damaged(
                f"{index.name}: tensor {name!r} is in {_short(shard)}, expected a .safetensors file beside the index"
            )
    for shard in sorted(set(weight_map.values())):
        if not shard.isprintable() or not os.path.lexists(index.parent / shard):
            raise QuantoolError(
                f"{index}: shard {shard!r} is missing", hint=f"copy or download it into '{index.parent}'"
            )
    return weight_map


def _files_by_tensor(files: list[MappedFile]) -> dict[str, MappedFile]:
    owners: dict[str, MappedFile] = {}
    for file in files:
        for name in file.infos:
            if name in owners:
                raise damaged(f"{file.path}: tensor {name!r} is also in {owners[name].path.name}")
            owners[name] = file
    return owners


def _check_index(path: Path, index: dict[str, str], owners: Mapping[str, MappedFile]) -> None:
    for name, shard in index.items():
        if name not in owners or owners[name].path.name != shard:
            raise damaged(f"{path / shard}: has no tensor {name!r}, which the index puts there")
    for name, file in owners.items():
        if name not in index:
            raise damaged(f"{file.path}: tensor {name!r} is not in the index")
