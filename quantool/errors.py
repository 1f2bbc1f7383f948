"""Errors shown to the user: one line that says what is wrong, one line that says what to do about it.

The class is the exit code: 1 the work failed, 2 the command line or recipe is wrong, 3 a requested check
did not hold. `cli.py` is the only place that prints them; nothing below it ends the process.
"""

LONGEST = 300  # characters of another library's message
NOTE = 25  # the log's level, between info and warning, of what the command line shows without -v


class QuantoolError(Exception):
    """An expected failure: `message` names file, tensor, expected and found; `hint` can be pasted."""

    exit_code = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UsageError(QuantoolError):
    """The command line or the recipe is wrong."""

    exit_code = 2


class CheckFailed(QuantoolError):
    """A check the user asked for did not hold (`--max-ppl`, `--max-kld`, `--verify`)."""

    exit_code = 3


def one_line(error: BaseException) -> str:
    """What a library says of a failure, in one line of at most 300 characters, to put into a message of ours."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} ..."
