"""Weights on their way through a GPU: they are read, copied, computed on and written, all at the same time.

    reading thread    disk -> pinned memory -> device     of two pieces one is read while the other is copied
    main thread       compute
    writing thread    device -> pinned memory -> disk     also what is only copied, which never sees the device

Before its turn a weight is complete on the device and every copy of it done, so that no stream waits for another. At
most AHEAD weights wait there to be computed on, and BEHIND bytes of results to be written; the host holds two pieces
and one result. `Busy` adds up how long each part was at work, and what was at work longest bounds the run.

A CPU computes on weights where they lie mapped: all of this would only copy them. There everything happens in turn, in
the main thread, and a stage is written once for both.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from threading import Lock
from time import perf_counter
from types import TracebackType
from typing import Any, TypeVar

import torch

N = TypeVar("N")
PIECE = 1 << 25  # bytes of pinned memory, twice
AHEAD = 2
BEHIND = 1 << 29
_adding = Lock()


@dataclass(slots=True)
class Busy:
    """Seconds for which each part was at work. `reading` and `writing` are of the files, `copying` is both ways."""

    reading: float = 0.0
    copying: float = 0.0
    computing: float = 0.0
    writing: float = 0.0

    def add(self, part: str, seconds: float) -> None:
        """From any thread."""
        with _adding:
            setattr(self, part, getattr(self, part) + seconds)

    @property
    def bound(self) -> str:
        """What the run would be faster with more of."""
        parts = {"disk": max(self.reading, self.writing), "PCIe": self.copying, "compute": self.computing}
        return max(parts, key=lambda part: parts[part])

    @contextmanager
    def at(self, part: str) -> Iterator[None]:
        """Adds the time inside to `part`."""
        start = perf_counter()
        try:
            yield
        finally:
            self.add(part, perf_counter() - start)


class Flow:
    """What flows through `device`; a context manager, which waits at its end for what is still to be written.

    After an error it waits for what is being read and written at that moment, and leaves the rest.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.busy = Busy()
        self._threads = overlaps(device)
        self._closing = ExitStack()
        self._writer: ThreadPoolExecutor | None = None
        self._unwritten: deque[tuple[Future[None], int]] = deque()  # with the bytes that each holds on the device

    def __enter__(self) -> "Flow":
        if self._threads:
            self._writer = ThreadPoolExecutor(1, "writing", self._enter_thread)
            self._closing.callback(self._writer.shutdown, cancel_futures=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._closing:
            if kind is None:
                self._wait(-1)

    def read(
        self, items: Iterable[N], read: Callable[[N], torch.Tensor | None], drop: Callable[[N], None]
    ) -> Iterator[tuple[N, torch.Tensor | None]]:
        """Each item with what `read` makes of it, on the device; `drop` is called when that has been used.

        Where `read` gives None the device is not to see it. An error of `read` comes when it is the item's turn.
        """
        if not self._threads:
            for item in items:
                found = [read(item)]
                used = found[0] is not None
                yield item, found.pop()  # held by nobody else: one that was decoded is gone before the next is
                if used:
                    drop(item)
            return
        for item, tensor in self._ahead(self._fetch(items, read, drop)):
            with self.busy.at("computing"):
                yield item, tensor
                _synchronize(self.device)

    def write(self, write: Callable[..., None], name: str, tensor: torch.Tensor, **where: Any) -> None:
        """Write `tensor` sooner or later, and nobody may change it any more: calls `write` with these arguments."""
        if self._writer is None:
            write(name, tensor, **where)
            return
        made = torch.cuda.current_stream(tensor.device).record_event() if tensor.is_cuda else None

        def bring_and_write() -> None:
            if made is not None:
                made.synchronize()
            with self.busy.at("copying"):
                host = tensor.to("cpu", non_blocking=True)  # pinned, out of torch's own store of it
                _synchronize(tensor.device)
            with self.busy.at("writing"):
                write(name, host, **where)

        self._later(bring_and_write, tensor.nbytes)

    def copy(self, copy: Callable[..., None], *arguments: Any) -> None:
        """Call `copy`, which reads and writes by itself, with these arguments sooner or later."""
        if self._writer is None:
            copy(*arguments)
            return

        def timed() -> None:
            with self.busy.at("writing"):
                copy(*arguments)

        self._later(timed, 0)

    def cost(self) -> dict[str, Any]:
        """What results say of it: `bound` and `busy_seconds`, where parts of the work overlapped."""
        if not self._threads:
            return {}
        return {"bound": self.busy.bound, "busy_seconds": {k: round(v, 3) for k, v in asdict(self.busy).items()}}

    def _later(self, work: Callable[[], None], nbytes: int) -> None:
        assert self._writer is not None  # noqa: S101 - of threads only
        self._unwritten.append((self._writer.submit(torch.inference_mode()(work)), nbytes))
        start = perf_counter()
        self._wait(BEHIND)
        self.busy.add("computing", start - perf_counter())  # the caller computes between two of `read`, but not here

    def _wait(self, most: int) -> None:
        """Until no more than so many bytes are to be written; an error of writing comes out here."""
        while self._unwritten:
            first, _ = self._unwritten[0]
            if not first.done() and sum(nbytes for _, nbytes in self._unwritten) <= most:
                return
            self._unwritten.popleft()
            first.result()

    def _ahead(self, tensors: Iterator[tuple[N, torch.Tensor | None]]) -> Iterator[tuple[N, torch.Tensor | None]]:
        """The same, made in a thread before they are asked for."""
        reader = ThreadPoolExecutor(1, "reading", self._enter_thread)
        self._closing.callback(reader.shutdown, cancel_futures=True)
        coming = deque(reader.submit(next, tensors, None) for _ in range(AHEAD))
        while (found := coming.popleft().result()) is not None:
            coming.append(reader.submit(next, tensors, None))
            yield found

    def _fetch(
        self, items: Iterable[N], read: Callable[[N], torch.Tensor | None], drop: Callable[[N], None]
    ) -> Iterator[tuple[N, torch.Tensor | None]]:
        """Item by item on the device, in the reading thread."""
        send = _sender(self.device, self.busy)
        for item in items:
            with self.busy.at("reading"):
                tensor = read(item)
            if tensor is None:
                yield item, None
                continue
            sent = send(tensor)
            drop(item)
            del tensor
            yield item, sent

    def _enter_thread(self) -> None:
        """Settings of torch that each thread has of its own: copies go through a stream beside that of the kernels."""
        if self.device.type == "cuda":
            torch.cuda.set_stream(torch.cuda.Stream(self.device))


def overlaps(device: torch.device) -> bool:
    """Whether weights are copied to a memory of its own, by an engine of its own."""
    return device.type == "cuda"


def _sender(device: torch.device, busy: Busy) -> Callable[[torch.Tensor], torch.Tensor]:
    """Makes the copy on the device of a tensor of the host, complete when it returns."""
    if device.type != "cuda":
        return lambda tensor: tensor.to(device, copy=True)
    pieces = [_Pinned(busy), _Pinned(busy)]

    @torch.inference_mode()
    def send(tensor: torch.Tensor) -> torch.Tensor:
        sent = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
        source, target = (t.reshape(-1).view(torch.uint8).split(PIECE) for t in (tensor, sent))
        for i, pair in enumerate(zip(source, target, strict=True)):
            pieces[i % 2].pass_on(*pair)
        for piece in pieces:
            piece.wait()
        return sent

    return send


class _Pinned:
    """A piece of the host's memory that the device reads by itself."""

    def __init__(self, busy: Busy) -> None:
        self.memory = torch.empty(PIECE, dtype=torch.uint8, pin_memory=True)
        self.begin, self.end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.busy = busy
        self.in_use = False

    def pass_on(self, source: torch.Tensor, target: torch.Tensor) -> None:
        """Read the bytes of `source`, which is when a mapped file is read, and start their copy to the device."""
        self.wait()
        host = self.memory[: source.numel()]
        with self.busy.at("reading"):
            host.copy_(source)
        self.begin.record()
        target.copy_(host, non_blocking=True)
        self.end.record()
        self.in_use = True

    def wait(self) -> None:
        """Until the copy is done."""
        if self.in_use:
            self.end.synchronize()
            self.busy.add("copying", self.begin.elapsed_time(self.end) / 1000)
            self.in_use = False


def _synchronize(device: torch.device) -> None:
    """Wait for what this thread has asked of the device."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()
