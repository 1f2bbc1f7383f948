"""Writes safetensors: planned from shapes alone, in any order, atomic.

The plan fixes every byte position before the work starts: headers are written and the files are allocated in
a sibling directory `.NAME.tmp-PID`, tensors are written at their offsets as they come, and `commit` renames
the directory. A full disk is found before the work, and whatever goes wrong leaves nothing behind.

Within a shard tensors are laid out by falling item size, then in plan order, as the safetensors library does:
that keeps every tensor aligned without holes.
"""

import contextlib
import errno
import json
import os
import shutil
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from quantool.errors import QuantoolError, UsageError
from quantool.io.safetensors import DTYPES, dtype_name, nbytes

FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
NO_FALLOCATE = (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)
FREE_SPACE = "free some space or choose another -o"
OVERWRITE = "add --overwrite or choose another -o"


PT = {"format": "pt"}  # without it transformers refuses a file


@dataclass(frozen=True, slots=True)
class PlannedTensor:
    """A tensor that will be written; `dtype` is the safetensors word ("I32")."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return nbytes(self.dtype, self.shape)


@dataclass(frozen=True, slots=True)
class _File:
    """One planned file: header bytes, and where each tensor starts in the file."""

    name: str
    header: bytes
    starts: Mapping[str, int]
    nbytes: int


class CheckpointWriter:
    """A checkpoint directory that appears complete or not at all; a context manager.

    `directory` is the temporary sibling, for auxiliary files (tokenizer); `nbytes` is the size of all shards,
    headers included. `max_shard_size` bounds the tensor bytes of a shard; a larger tensor gets its own.

    Raises UsageError when `output` exists and may not be replaced, QuantoolError when it cannot be written.
    """

    def __init__(
        self,
        output: Path,
        plan: Sequence[PlannedTensor],
        *,
        config: Mapping[str, Any],
        max_shard_size: int,
        metadata: Mapping[str, str] | None = None,
        overwrite: bool = False,
    ) -> None:
        self.output = Path(os.path.realpath(output))
        check_output_directory(self.output, overwrite)
        _check_plan(plan)
        self._plan = {tensor.name: tensor for tensor in plan}
        self._files = _plan_files(plan, max_shard_size, {**PT, **(metadata or {})})
        self.nbytes = sum(file.nbytes for file in self._files)
        self._config = config
        self._overwrite = overwrite
        self._written: set[str] = set()
        self._lock = threading.Lock()
        self._descriptors: dict[str, int] = {}
        self._slots = {name: (file.name, start) for file in self._files for name, start in file.starts.items()}
        self.directory = temporary_path(self.output)
        self._parents = missing_parents(self.output)
        try:
            self._allocate()
        except BaseException:
            self._discard()
            raise

    def __enter__(self) -> "CheckpointWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._discard()

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Write one planned tensor, once, in any order, from any thread; dtype and shape must be the plan's."""
        planned = self._plan.get(name)
        if planned is None:
            raise QuantoolError(f"{self.output}: tensor {name!r} is not in the plan")
        if tensor.dtype != DTYPES[planned.dtype] or tuple(tensor.shape) != planned.shape:
            raise QuantoolError(
                f"{self.output}: tensor {name!r}: planned {planned.dtype} {list(planned.shape)}, "
                f"got {dtype_name(tensor.dtype)} {list(tensor.shape)}"
            )
        with self._lock:
            if name in self._written:
                raise QuantoolError(f"{self.output}: tensor {name!r} is written twice")
            self._written.add(name)
        file, start = self._slots[name]
        with writing(self.output):
            write_at(self._descriptors[file], bytes_of(tensor), start)

    def commit(self) -> None:
        """Write config.json and the index, make everything durable and rename it to `output`."""
        missing = [name for name in self._plan if name not in self._written]
        if missing:
            raise QuantoolError(f"{self.output}: {len(missing)} planned tensors were not written, first {missing[0]!r}")
        with writing(self.output):
            _write_json(self.directory / "config.json", self._config)
            if len(self._files) > 1:
                index = {"metadata": {"total_size": sum(tensor.nbytes for tensor in self._plan.values())}}
                names = {name: self._slots[name][0] for name in self._plan}
                _write_json(self.directory / "model.safetensors.index.json", {**index, "weight_map": names})
            self._close()
            for path in sorted(self.directory.rglob("*"), reverse=True):
                fsync(path)
            fsync(self.directory)
            if self._overwrite and self.output.exists():
                _replace_directory(self.directory, self.output)
            else:
                self.directory.rename(self.output)
            self._parents = []
            fsync(self.output.parent)

    def _allocate(self) -> None:
        with writing(self.output):
            self.output.parent.mkdir(parents=True, exist_ok=True)
            check_space(self.output, self.nbytes)
            _make_temporary(self.directory)
            for file in self._files:
                descriptor = os.open(self.directory / file.name, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
                self._descriptors[file.name] = descriptor
                preallocate(descriptor, file.nbytes)
                write_at(descriptor, memoryview(file.header), 0)

    def _close(self) -> None:
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])

    def _discard(self) -> None:
        """Remove what is still temporary; after `commit` there is nothing."""
        self._close()
        shutil.rmtree(self.directory, ignore_errors=True)
        for parent in self._parents:
            with contextlib.suppress(OSError):  # not empty: somebody else uses it by now
                parent.rmdir()


def write_file(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str], *, overwrite: bool) -> int:
    """Write one safetensors file atomically; returns its size in bytes.

    Raises UsageError when `path` exists and may not be replaced, QuantoolError when it cannot be written.
    """
    path = Path(os.path.realpath(path))
    check_output_file(path, overwrite)
    file, temporary, parents = _plan_of(path.name, tensors, metadata), temporary_path(path), missing_parents(path)
    try:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            check_space(path, file.nbytes)
            temporary.unlink(missing_ok=True)
            with open(temporary, "xb") as out:
                preallocate(out.fileno(), file.nbytes)
                write_at(out.fileno(), memoryview(file.header), 0)
                for name, tensor in tensors.items():
                    write_at(out.fileno(), bytes_of(tensor), file.starts[name])
                os.fsync(out.fileno())
            os.replace(temporary, path)
            parents = []
            fsync(path.parent)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
        for parent in parents:
            with contextlib.suppress(OSError):
                parent.rmdir()
    return file.nbytes


def file_bytes(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> int:
    """Size of what `write_file` would write; the tensors may be on the meta device."""
    return _plan_of("", tensors, metadata).nbytes


def _plan_of(name: str, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> _File:
    plan = [PlannedTensor(key, dtype_name(tensor.dtype), tuple(tensor.shape)) for key, tensor in tensors.items()]
    _check_plan(plan)
    return _plan_file(name, plan, metadata)


def check_output_file(path: Path, overwrite: bool) -> None:
    """Raises UsageError when a file may not be written at `path`; call it before the work."""
    if not os.path.lexists(path):
        return
    if not os.path.isfile(path):
        raise UsageError(f"{path}: exists and is not a file", hint="choose another -o")
    if not overwrite:
        raise UsageError(f"{path}: already exists", hint=OVERWRITE)


def check_output_directory(path: Path, overwrite: bool) -> None:
    """Raise UsageError when `path` exists and may not be replaced: also before any work, as CheckpointWriter does."""
    if not os.path.lexists(path):
        return
    if not os.path.isdir(path):
        raise UsageError(f"{path}: exists and is not a directory", hint="choose another -o")
    if not overwrite:
        raise UsageError(f"{path}: already exists", hint=OVERWRITE)
    try:
        # Replacing deletes: `-o ~ --overwrite` must not, so only what is plainly a checkpoint is replaced.
        names = os.listdir(path)
    except OSError as error:
        raise QuantoolError(f"{path}: {error.strerror or error}") from error
    if names and not ("config.json" in names and any(name.endswith(".safetensors") for name in names)):
        raise UsageError(f"{path}: is not a checkpoint, so --overwrite does not replace it", hint="choose another -o")


def _check_plan(plan: Sequence[PlannedTensor]) -> None:
    seen: set[str] = set()
    for tensor in plan:
        if tensor.name in seen or tensor.name == "__metadata__":
            raise QuantoolError(f"tensor {tensor.name!r} is planned twice")
        if tensor.dtype not in DTYPES:
            raise QuantoolError(f"tensor {tensor.name!r}: safetensors has no dtype {tensor.dtype!r}")
        seen.add(tensor.name)


def planned_bytes(plan: Sequence[PlannedTensor], max_shard_size: int) -> int:
    """Size of all shards that CheckpointWriter would write, headers included."""
    return sum(file.nbytes for file in _plan_files(plan, max_shard_size, PT))


def _plan_files(plan: Sequence[PlannedTensor], max_shard_size: int, metadata: Mapping[str, str]) -> list[_File]:
    shards: list[list[PlannedTensor]] = [[]]
    size = 0
    for tensor in plan:
        if shards[-1] and size + tensor.nbytes > max_shard_size:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.nbytes
    if len(shards) == 1:
        return [_plan_file("model.safetensors", shards[0], metadata)]
    names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    return [_plan_file(name, shard, metadata) for name, shard in zip(names, shards, strict=True)]


def _plan_file(name: str, tensors: Sequence[PlannedTensor], metadata: Mapping[str, str]) -> _File:
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset, offsets = 0, {}
    for tensor in sorted(tensors, key=lambda tensor: -DTYPES[tensor.dtype].itemsize):
        span = [offset, offset + tensor.nbytes]
        entries[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": span}
        offsets[tensor.name], offset = offset, span[1]
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    starts = {name: len(header) + offset for name, offset in offsets.items()}
    return _File(name, header, starts, len(header) + offset)


def temporary_path(path: Path) -> Path:
    """Where `path` is written before it is renamed: hidden, and on the same file system."""
    return path.with_name(f".{path.name}.tmp-{os.getpid()}")


def _make_temporary(directory: Path) -> None:
    # A process with our PID is us or dead: a leftover of a killed run may go.
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir()


def missing_parents(path: Path) -> list[Path]:
    """Directories that writing `path` will create, innermost first."""
    return [parent for parent in path.parents if not os.path.lexists(parent)]


def check_space(path: Path, needed: int) -> None:
    """Raises QuantoolError when the file system of `path` has less than `needed` bytes free."""
    free = shutil.disk_usage(path.parent).free
    if needed > free:
        raise QuantoolError(f"{path}: needs {needed} bytes, the file system has {free} free", hint=FREE_SPACE)


def preallocate(descriptor: int, size: int) -> None:
    """Reserve `size` bytes on the disk, so that a full one is found now; a hole where that cannot be done."""
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(descriptor, 0, size)
            return
        except OSError as error:
            if error.errno not in NO_FALLOCATE:
                raise
    os.ftruncate(descriptor, size)


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The tensor's bytes, without a copy when it is contiguous on the CPU."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")


def write_at(descriptor: int, data: memoryview, offset: int) -> None:
    """All of `data` at a position of the file, from any thread."""
    while data:  # one call writes at most 2 GiB on Linux
        count = os.pwrite(descriptor, data, offset)
        data, offset = data[count:], offset + count


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def fsync(path: Path) -> None:
    """Make a file, or the names in a directory, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _replace_directory(source: Path, target: Path) -> None:
    """Rename over an existing directory: it is moved aside first, and back if that fails."""
    old = target.with_name(f".{target.name}.old-{os.getpid()}")
    target.rename(old)
    try:
        source.rename(target)
    except BaseException:
        old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """OSErrors inside become one line that names `path`, with what to do about it."""
    try:
        yield
    except OSError as error:
        if error.errno in FULL_DISK:
            raise QuantoolError(f"{path}: cannot be written: {error.strerror}", hint=FREE_SPACE) from error
        raise QuantoolError(
            f"{path}: cannot be written: {error.strerror or error}", hint="choose another -o"
        ) from error
