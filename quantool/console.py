"""What the user sees: tables and JSON on stdout; progress, log and errors on stderr. The only importer of rich.

rich is imported where it is used, so that `--help` does not pay for it. Nothing is printed as markup, and control
characters in names and metadata, which come from files that others wrote, are printed escaped. A table is as wide
as its content, whatever the terminal, so that what is piped reads the same.

The functions named after a command take its result as the dict that `--json` prints.
"""

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

from quantool.errors import QuantoolError

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.table import Table

Record = Mapping[str, Any]
WIDTH = 100_000  # characters: no line is ever wrapped or cut
MAX_NOTES = 8  # a note can be of every block
MAX_METADATA = 100  # characters of a metadata value
TEXT_KEYS = ("dataset", "split", "num_samples", "seq_len")  # of a calibration file's metadata


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
    """Show quantool's log on stderr: nothing at -1, warnings at 0, then info and debug."""
    logger = logging.getLogger("quantool")
    level = {-1: logging.CRITICAL + 1, 0: logging.WARNING, 1: logging.INFO}.get(verbosity, logging.DEBUG)
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


def print_environment() -> None:
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
    _print(_pairs(pairs))


def print_calibrate(result: Record, *, dry_run: bool = False) -> None:
    """What calibrate wrote, or would write."""
    pairs = [
        ("output", _output(result, dry_run)),
        ("text", _text(result)),
        ("statistics", f"{result['linears']} linears over {result['tokens']:,} tokens"),
        ("size", size(result["bytes"])),
        *_cost(result),
    ]
    if result["least_expert"] is not None:
        starved = f"{result['starved_experts']} saw fewer than one window of {result['seq_len']} tokens"
        pairs.insert(3, ("experts", f"{starved}; the least, {result['least_tokens']:,}: {result['least_expert']}"))
    _print(_pairs(pairs))


def print_quantize(result: Record) -> None:
    """What quantize wrote."""
    _print(_quantize_summary(result, dry_run=False))


def _quantize_summary(result: Record, *, dry_run: bool) -> "Table":
    counts = ", ".join(f"{result[word]} {word}" for word in ("quantized", "copied", "folded", "dropped"))
    return _pairs(
        [
            ("output", _output(result, dry_run)),
            ("method", result["method"]),
            ("format", result["format"]),
            ("scheme", result["scheme"]),
            ("size", size(result["bytes"])),
            ("bits per weight", number(result["bits_per_weight"], 3)),
            ("tensors", counts),
            *_cost(result),
            *(("note", note) for note in result["notes"][:MAX_NOTES]),
            *(("note", f"{more} more notes, see --json") for more in [len(result["notes"]) - MAX_NOTES] if more > 0),
        ]
    )


def print_plan(result: Record) -> None:
    """What `--dry-run` of quantize would write: every tensor, then the summary."""
    rows = [
        (row["name"], _shape(row["shape"]), row["dtype"], row["action"], row["scheme"] or "-", size(row["bytes"]))
        for row in result["plan"]
    ]
    table = _table(("tensor", "shape", "dtype", "action", "scheme", "size"), rows, numeric=1)
    _print(table, _quantize_summary(result, dry_run=True))


def print_inspect(result: Record) -> None:
    """What inspect found: the summary, then a table for each thing there is."""
    recorded = result["linears"] is not None  # a calibration file holds no weights
    pairs = [("artifact", result["artifact"]), ("format", result["format"])]
    if recorded:
        pairs += [("text", _recorded_text(result["metadata"])), ("statistics", f"{result['linears']} linears")]
    else:
        pairs.append(("parameters", f"{result['parameters']:,}"))
    pairs.append(("size", size(result["bytes"])))
    if not recorded:
        pairs.append(("bits per weight", number(result["bits_per_weight"], 3)))
    tables = () if recorded else _weight_tables(result)
    _print(_pairs(pairs), *tables, *_inspect_tables(result))


def _recorded_text(metadata: Mapping[str, str]) -> str:
    """What a calibration file was recorded on, as far as it says."""
    dataset, split, windows, length = (metadata.get(key, "?") for key in TEXT_KEYS)
    return f"{dataset} ({split}), {windows} windows of {length} tokens"


def _weight_tables(result: Record) -> Iterator["Table"]:
    rows: list[tuple[str, ...]]
    rows = [
        (dtype, str(use["tensors"]), f"{use['parameters']:,}", size(use["bytes"]))
        for dtype, use in result["by_dtype"].items()
    ]
    yield _table(("dtype", "tensors", "parameters", "size"), rows, numeric=3)
    rows = [
        (kind, f"{use['parameters']:,}", size(use["bytes"]), number(use["bits_per_weight"], 3))
        for kind, use in result["by_kind"].items()
    ]
    yield _table(("kind", "parameters", "size", "bits per weight"), rows, numeric=3)


def _inspect_tables(result: Record) -> Iterator["Table"]:
    if result["schemes"]:
        rows = [(scheme, str(modules)) for scheme, modules in result["schemes"].items()]
        yield _table(("scheme", "modules"), rows, numeric=1)
    said = TEXT_KEYS if result["linears"] is not None else ()
    metadata = [(key, _short(value)) for key, value in result["metadata"].items() if key not in said]
    if metadata:
        yield _table(("metadata", "value"), metadata)
    if result["activations"]:
        yield _activation_table(result["activations"])
    if result["tensors"]:
        yield _tensor_table(result["tensors"])


def _activation_table(activations: Sequence[Record]) -> "Table":
    """What reached each linear, the worst outliers first."""
    rows = [
        (
            *(row["name"], str(row["channels"]), f"{row['tokens']:,}"),
            "-" if row["amax"] is None else f"{row['amax']:.4g}",
            "-" if row["outlier_share"] is None else f"{100 * row['outlier_share']:.1f} %",
            number(row["max_to_median"], 1),
        )
        for row in activations
    ]
    header = ("linear", "channels", "tokens", "amax", "energy in top 1 %", "max / median")
    return _table(header, rows, numeric=5)


def _tensor_table(tensors: Sequence[Record]) -> "Table":
    """The tensors, with a column for each measurement that at least one of them has."""
    measured = ("bits_per_weight", "relative_error", "min", "max", "mean")
    optional = [key for key in measured if any(row[key] is not None for row in tensors)]
    rows = [
        (
            *(row["name"], row["dtype"], _shape(row["shape"]), size(row["bytes"])),
            *("-" if row[key] is None else f"{row[key]:.4g}" for key in optional),
        )
        for row in tensors
    ]
    words = [key.replace("_", " ") for key in optional]
    return _table(("tensor", "dtype", "shape", "size", *words), rows, numeric=1 + len(optional))


def print_eval(result: Record) -> None:
    """What eval-ppl measured."""
    pairs = [
        ("model", result["model"]),
        ("text", _text(result)),
        ("perplexity", f"{number(result['perplexity'], 4)} ± {number(result['perplexity_error'], 4)}"),
    ]
    if result["reference_perplexity"] is not None:
        divergence, error = number(result["kl_divergence"], 5), number(result["kl_divergence_error"], 5)
        agreement = result["top1_agreement"]
        pairs += [
            ("reference perplexity", number(result["reference_perplexity"], 4)),
            ("KL divergence", f"{divergence} ± {error}"),
            ("top-1 agreement", "-" if agreement is None else f"{100 * agreement:.2f} %"),
        ]
    _print(_pairs([*pairs, ("tokens", f"{result['tokens']:,}"), *_cost(result)]))


def _output(result: Record, dry_run: bool) -> str:
    return f"{result['output']}, not written: this is a dry run" if dry_run else str(result["output"])


def _text(result: Record) -> str:
    return f"{result['dataset']}, {result['num_samples']} windows of {result['seq_len']} tokens"


def _cost(result: Record) -> list[tuple[str, str]]:
    return [("time", duration(result["seconds"])), ("peak memory", size(result["peak_memory_bytes"]))]


def _shape(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape)) or "scalar"


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= MAX_METADATA else f"{text[:MAX_METADATA]}... ({len(text):,} characters)"


def _table(header: Sequence[str], rows: Iterable[Sequence[str]], *, numeric: int = 0) -> "Table":
    """Columns two spaces apart, the last `numeric` of them to the right."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for i, word in enumerate(header):
        table.add_column(word, no_wrap=True, justify="right" if i >= len(header) - numeric else "left")
    for row in rows:
        table.add_row(*(Text(escape(cell)) for cell in row))
    return table


def _pairs(pairs: Iterable[tuple[str, str]]) -> "Table":
    table = _table(("key", "value"), pairs)
    table.show_header = False
    table.columns[0].style = "bold"
    return table


def _print(*blocks: "RenderableType") -> None:
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
