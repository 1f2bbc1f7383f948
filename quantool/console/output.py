"""Streams and pieces: errors, log and progress on stderr, JSON and tables on stdout, numbers and sizes as words."""

import errno
import json
import logging
import math
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from quantool.errors import NOTE, QuantoolError

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.table import Table

Record = Mapping[str, Any]
WIDTH = 100_000  # characters: no line is ever wrapped or cut


def escape(text: object) -> str:
    """`text` with everything unprintable (control, bidirectional, lone surrogate) spelled as Python would."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def size(nbytes: int) -> str:
    """Bytes for people, in decimal units as `--max-shard-size` takes them: 537 B, 12.3 MB, 4.10 GB."""
    for unit, digits, name in ((10**9, 2, "GB"), (10**6, 1, "MB"), (10**3, 1, "kB")):
        if nbytes >= unit:
            return f"{nbytes / unit:.{digits}f} {name}"
    return f"{nbytes} B"


def duration(seconds: float) -> str:
    """Seconds for people: 12.3 s, 2 min 03 s."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{seconds:.1f} s"


def number(value: float | None, digits: int) -> str:
    """A fixed number of decimals; "-" for what was not measured."""
    return "-" if value is None else f"{value:.{digits}f}"


# stderr


def print_error(message: str, hint: str | None) -> None:
    """`error: ...` and `hint: ...`, one line each."""
    from rich.text import Text

    console = _console(sys.stderr)
    console.print(Text.assemble(("error: ", "bold red"), escape(message)), soft_wrap=True)
    if hint:
        console.print(Text.assemble(("hint: ", "bold cyan"), escape(hint)), soft_wrap=True)


def print_traceback(error: BaseException) -> None:
    """The whole traceback, for -vv."""
    for entry in traceback.format_exception(error):
        for line in entry.splitlines():
            print(escape(line), file=sys.stderr)


@contextmanager
def log(verbosity: int) -> Iterator[None]:
    """Show quantool's log on stderr: nothing at -1, notes and warnings at 0, then info and debug."""
    logger = logging.getLogger("quantool")
    logging.addLevelName(NOTE, "NOTE")
    level = {-1: logging.CRITICAL + 1, 0: NOTE, 1: logging.INFO}.get(verbosity, logging.DEBUG)
    before = logger.level, logger.propagate
    handler = _StderrHandler()
    logger.addHandler(handler)
    logger.setLevel(level)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before[0])
        logger.propagate = before[1]


class _StderrHandler(logging.Handler):
    """Looks sys.stderr up for every line: a progress bar replaces it to print above itself."""

    def emit(self, record: logging.LogRecord) -> None:
        print(f"{record.levelname.lower()}: {escape(self.format(record))}", file=sys.stderr)


@contextmanager
def progress(enabled: bool) -> Iterator[Callable[[int, int, str], None]]:
    """A bar on stderr, when that is a terminal; it is fed with done, total and label, and gone when the work is done.

    A total that changes or a count that falls is the next part of the work: the clock starts anew.
    """
    if not enabled or not sys.stderr or not sys.stderr.isatty():
        yield lambda done, total, label: None
        return
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=_console(sys.stderr), transient=True, redirect_stdout=False) as bar:
        task = bar.add_task("starting", total=None)

        def show(done: int, total: int, label: str) -> None:
            current = bar.tasks[0]
            if current.total is not None and (total != current.total or done < current.completed):
                bar.reset(task)
            bar.update(task, completed=done, total=total, description=escape(label))

        yield show


# stdout


def print_json(record: Record) -> None:
    """One object; NaN and infinities are null, for JSON has no word for them."""
    _write(json.dumps(_finite(record), indent=2) + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def print_environment(kernels: Mapping[str, str]) -> None:
    """What a report of a bug should say."""
    import platform
    from importlib import metadata

    pairs = [("python", f"{platform.python_version()} ({sys.executable})"), ("platform", platform.platform())]
    installed = {distribution.name.lower(): distribution.version for distribution in metadata.distributions()}
    packages = ("torch", "transformers", "safetensors", "gguf", "datasets", "compressed-tensors")
    pairs += [(package, installed.get(package, "not installed")) for package in packages]
    try:
        import torch
    except ImportError:
        pairs.append(("cuda", "unknown without torch"))
    else:
        names = ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
        pairs.append(("cuda", f"{torch.version.cuda}: {names}" if names else "not available"))
    show(two_columns([*pairs, *kernels.items()]))


def columns(header: Sequence[str], rows: Iterable[Sequence[str]], *, numeric: int = 0) -> "Table":
    """Columns two spaces apart, the last `numeric` of them to the right."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for i, word in enumerate(header):
        table.add_column(word, no_wrap=True, justify="right" if i >= len(header) - numeric else "left")
    for row in rows:
        table.add_row(*(Text(escape(cell)) for cell in row))
    return table


def two_columns(pairs: Iterable[tuple[str, str]]) -> "Table":
    """Keys, bold, and values."""
    table = columns(("key", "value"), pairs)
    table.show_header = False
    table.columns[0].style = "bold"
    return table


def show(*blocks: "RenderableType") -> None:
    """Blocks with an empty line between them."""
    console = _console(sys.stdout)
    with console.capture() as captured:
        for i, block in enumerate(blocks):
            if i:
                console.print()
            console.print(block)
    _write("".join(f"{line.rstrip()}\n" for line in captured.get().splitlines()))


def _console(stream: TextIO) -> "Console":
    from rich.console import Console

    # rich would keep bold under NO_COLOR; no color system is no escape sequence at all. Its own width wraps lines.
    plain = bool(os.environ.get("NO_COLOR")) or not (stream and stream.isatty())
    width = None if stream is sys.stderr else WIDTH
    return Console(file=stream, color_system=None if plain else "auto", width=width, highlight=False)


def _write(text: str) -> None:
    """Write to stdout now. A reader that has gone (`| head`) is no error; a full disk is."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    try:
        print(text.encode(encoding, "backslashreplace").decode(encoding), end="", flush=True)
    except OSError as error:
        # What is left in the buffer would fail once more at exit, with a message of Python's own.
        with Path(os.devnull).open("w") as devnull:
            os.dup2(devnull.fileno(), sys.stdout.fileno())
        if error.errno != errno.EPIPE:
            raise QuantoolError(
                f"the result cannot be written to standard output: {error.strerror}", hint="free some space"
            ) from error
