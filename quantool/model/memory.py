"""When the GPU has no room: half as much at a time, said once, or the number of bytes that would be enough.

    for start, codes in in_pieces("rows", len(W), 8192, lambda rows: quantize(W[rows])):

Memory of the host is no concern of this module: what is done there is done in pieces from the start.
"""

import logging
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch

from quantool.errors import NOTE, QuantoolError

T = TypeVar("T")
UNITS = {"bytes": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}
_said: set[str] = set()


def halving(what: str, size: int, work: Callable[[int], T]) -> tuple[int, T]:
    """work(size), or where that does not fit work(size / 2) and so on; with the size that did fit.

    `work` keeps nothing of what it has done when it fails. Raises torch.OutOfMemoryError when work(1) does not fit.
    """
    while True:
        try:
            return size, work(size)
        except torch.OutOfMemoryError:
            if size <= 1:
                raise
        # Not in the except clause: until it ends, the traceback keeps what `work` had on the device.
        if what not in _said:
            _said.add(what)
            logging.getLogger("quantool").log(NOTE, "the GPU has no room for %d %s at a time: taking fewer", size, what)
        size = -(-size // 2)


def in_pieces(what: str, count: int, size: int, work: Callable[[slice], T]) -> Iterator[tuple[int, T]]:
    """The first of each piece of `count` things and work(piece), `size` at a time or as many as fit (see `halving`)."""
    start = 0
    while start < count:
        size, done = halving(what, min(size, count - start), lambda n: work(slice(start, start + n)))  # noqa: B023
        yield start, done
        start += size


@contextmanager
def explained() -> Iterator[None]:
    """What is done inside has no room on the GPU even in the smallest pieces: QuantoolError with the bytes it needs."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        needed = torch.cuda.memory_allocated() + _asked_for(str(error))
        raise QuantoolError(
            f"out of GPU memory: {needed} bytes of it would have been enough to go on",
            hint="use a smaller --batch-size or --seq-len, or --device cpu",
        ) from error


def _asked_for(message: str) -> int:
    """Bytes of the allocation that failed, which torch has only as text: "Tried to allocate 2.50 GiB."."""
    found = re.search(rf"Tried to allocate ([\d.]+) ({'|'.join(UNITS)})", message)
    return round(float(found[1]) * UNITS[found[2]]) if found else 0
