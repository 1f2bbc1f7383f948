"""The command line: parse, call one stage, print its result. No tensor is touched here.

    __init__.py    the boundary: every failure becomes one line, a hint and an exit code
    commands.py    the commands; working.py what surrounds each; options.py the options they share

Exit codes: 0 done, 1 the work failed, 2 wrong usage or recipe, 3 a requested check failed, 130 interrupted (143 by
SIGTERM).
"""

import contextlib
import signal
import sys
from collections.abc import Iterator, Sequence
from typing import NoReturn

import click

from quantool import console
from quantool.cli import options
from quantool.cli.commands import cli
from quantool.cli.options import Output
from quantool.cli.working import QUIET_LIBRARIES
from quantool.errors import QuantoolError

__all__ = ["QUIET_LIBRARIES", "Terminated", "cli", "explain", "main"]


class Terminated(KeyboardInterrupt):
    """SIGTERM: unwinds as Ctrl-C does, so that nothing half written stays."""


def main(args: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit; the one place where a failure becomes `error:`, `hint:` and an exit code."""
    output = Output()
    try:
        with _sigterm_unwinds():
            code = cli.main(args, prog_name="quantool", standalone_mode=False, obj=output)
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        code = error.exit_code
    except Exception as error:  # noqa: BLE001 - a bug too is one line, unless -vv asks for more
        code, message, hint = explain(error)
        if output.verbose > 1:
            console.print_traceback(error)
        console.print_error(message, hint)
    sys.exit(code or 0)


@contextlib.contextmanager
def _sigterm_unwinds() -> Iterator[None]:
    def unwind(signum: int, frame: object) -> NoReturn:
        raise Terminated

    try:
        before = signal.signal(signal.SIGTERM, unwind)
    except ValueError:  # not the main thread, the only one that gets signals
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def explain(error: Exception) -> tuple[int, str, str | None]:
    """Exit code, message and hint of a failure."""
    if isinstance(error, QuantoolError):
        return error.exit_code, error.message, error.hint
    if isinstance(error, click.Abort):
        return (143, "terminated", None) if isinstance(error.__cause__, Terminated) else (130, "interrupted", None)
    if isinstance(error, click.ClickException):
        return error.exit_code, *_explain_usage(error)
    first_line = (str(error).strip() or "no message").splitlines()[0]
    # torch has its own class for the device's memory and a RuntimeError for the host's; torch is not imported here.
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or "can't allocate" in first_line:
        return 1, "out of memory", "use a smaller --batch-size or --seq-len, or --device cpu"
    if isinstance(error, OSError):
        reason = (error.strerror or first_line).rstrip(".")
        return (
            1,
            f"{error.filename}: {reason}" if error.filename else reason,
            "check the path, its permissions and disk",
        )
    return 1, f"internal error: {type(error).__name__}: {first_line}", "run again with -vv and report what it prints"


def _explain_usage(error: click.ClickException) -> tuple[str, str]:
    """Message and hint of what click found wrong; a bad value is named by where it came from."""
    ctx: click.Context | None = getattr(error, "ctx", None)
    hint = f"see {ctx.command_path if ctx else 'quantool'} --help"
    if isinstance(error, click.BadParameter) and ctx and error.param and error.message:
        return f"{options.spelled(ctx, error.param)}: {error.message.rstrip('.')}", hint
    message = error.format_message()
    if near := getattr(error, "possibilities", None):
        message, hint = error.message, f"did you mean '{near[0]}'?"
    return message[:1].lower() + message[1:].rstrip("."), hint
