"""What a run cost: wall seconds and peak resident memory."""

import resource
import sys
import time


class Stopwatch:
    """Starts when made."""

    def __init__(self) -> None:
        self._start = time.perf_counter()

    @property
    def seconds(self) -> float:
        return round(time.perf_counter() - self._start, 3)


def peak_memory_bytes() -> int:
    """The process's highest resident set so far, mapped file pages included (getrusage)."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
