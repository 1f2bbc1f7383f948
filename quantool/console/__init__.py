"""What the user sees: tables and JSON on stdout; progress, log and errors on stderr. The only importer of rich.

rich is imported where it is used, so that `--help` does not pay for it. Nothing is printed as markup, and control
characters in names and metadata, which come from files that others wrote, are printed escaped. A table is as wide
as its content, whatever the terminal, so that what is piped reads the same.
"""

from quantool.console.output import (
    Record,
    escape,
    log,
    print_environment,
    print_error,
    print_json,
    print_traceback,
    progress,
    size,
)
from quantool.console.tables import (
    print_calibrate,
    print_convert,
    print_eval,
    print_inspect,
    print_plan,
    print_quantize,
)

__all__ = [
    "Record",
    "escape",
    "log",
    "print_calibrate",
    "print_convert",
    "print_environment",
    "print_error",
    "print_eval",
    "print_inspect",
    "print_json",
    "print_plan",
    "print_quantize",
    "print_traceback",
    "progress",
    "size",
]
