"""What surrounds every stage, and printing its result. Stages are imported inside commands: `--help` needs no torch."""

import contextlib
import dataclasses
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

from quantool import console
from quantool.cli.options import Output
from quantool.data import Progress
from quantool.errors import UsageError

# The libraries below have progress bars and warnings of their own, and read these when they are imported.
QUIET_LIBRARIES = {
    "TRANSFORMERS_VERBOSITY": "error",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "DATASETS_VERBOSITY": "critical",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
}


@contextlib.contextmanager
def working(output: Output) -> Iterator[Progress]:
    """What surrounds every stage: quiet libraries, the log on stderr, and the progress bar."""
    if output.quiet and output.verbose:
        raise UsageError("-q and -v exclude each other", hint="leave one of them out")
    if not output.verbose:
        for name, value in QUIET_LIBRARIES.items():
            os.environ.setdefault(name, value)
    with (
        warnings.catch_warnings(),
        console.log(-1 if output.quiet else output.verbose),
        console.progress(enabled=not output.quiet) as progress,
    ):
        if not output.verbose and not sys.warnoptions:
            warnings.simplefilter("ignore")
        yield progress


def emit(output: Output, result: Any, show: Callable[[console.Record], None]) -> None:
    """Print a stage's result dataclass: as one JSON object, or as `show` lays it out."""
    record = dataclasses.asdict(result)
    (console.print_json if output.json else show)(record)
