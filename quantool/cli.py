"""The command line: parse, call one stage, print its result. No tensor is touched here.

Every failure passes through `main`, which turns it into one line, a hint and an exit code: 0 done, 1 the work failed,
2 wrong usage or recipe, 3 a requested check failed, 130 interrupted (143 by SIGTERM). Stages are imported inside their
command, for `--help` needs no torch.
"""

import contextlib
import dataclasses
import functools
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import click

from quantool import __version__, console, options
from quantool.data import Progress
from quantool.errors import CheckFailed, QuantoolError, UsageError
from quantool.options import Output, text_options
from quantool.recipe import build_recipe
from quantool.scheme import FORMAT_NAMES, METHOD_NAMES

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


# The boundary


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


# The commands


def _print_version(ctx: click.Context, option: click.Parameter, asked: bool) -> None:
    if not asked:
        return
    click.echo(f"quantool {__version__}")
    if ctx.ensure_object(Output).verbose:
        console.print_environment()
    ctx.exit()


def _examples(*lines: str) -> str:
    return "\n".join(("\b", "Examples:", *(f"  {line}" for line in lines)))  # \b: click must not rewrap this


_settings = {"help_option_names": ["-h", "--help"], "auto_envvar_prefix": "QUANTOOL", "show_default": True}
_version_help = "Print the version; with -v, also what it runs on."


@click.group(
    context_settings={**_settings, "max_content_width": 100},
    epilog=_examples("quantool quantize MODEL --bits 4 --method awq"),
)
@options.verbose
@click.option("--version", is_flag=True, expose_value=False, callback=_print_version, help=_version_help)
def cli() -> None:
    """Calibrate, quantize, inspect and evaluate LLM checkpoints.

    MODEL is a Hugging Face directory, a .gguf file, or a hub name.
    """


@cli.command(
    epilog=_examples(
        "quantool calibrate MODEL", "quantool quantize MODEL --method awq --calibration calibration.safetensors"
    )
)
@click.argument("model")
@click.option("-o", "--output", type=options.OUTPUT, default="calibration.safetensors", help="File to write.")
@options.text_windows(split="train", num_samples=128)
@options.seed
@options.computes("CALIBRATE")
@options.writes
@options.prints
@click.pass_context
def calibrate(
    ctx: click.Context,
    /,
    *,
    model: str,
    output: Path,
    batch_size: int | None,
    dtype: str,
    device: str,
    dry_run: bool,
    overwrite: bool,
    **text: Any,
) -> None:
    """Run MODEL on sample text and record activation statistics."""
    with working(ctx.obj) as progress:
        from quantool.stages import calibrate as stage

        result = stage.run(
            model,
            output,
            text=text_options(text),
            batch_size=batch_size,
            dtype=dtype,
            device=device,
            dry_run=dry_run,
            overwrite=overwrite,
            progress=progress,
        )
    emit(ctx.obj, result, functools.partial(console.print_calibrate, dry_run=dry_run))


_quantize_options = options.together(
    click.option(
        "-o", "--output", type=options.OUTPUT, help="Directory to write.  [default: MODEL-METHOD-wBITS-gGROUP]"
    ),
    click.option("--method", type=click.Choice(METHOD_NAMES), default="rtn", help="How to choose the codes."),
    *options.scheme,
    click.option(
        "--format",
        type=click.Choice(FORMAT_NAMES),
        help="Layout on disk; alone, with a quantized MODEL, repack its codes.  [default: compressed-tensors; nf4, "
        "fp4 and llm-int8 bitsandbytes]",
    ),
    click.option("--calibration", type=options.FILE, help="Output of quantool calibrate, instead of text options."),
    options.text_windows(split="train", num_samples=128),
    options.seed,
    click.option(
        "--ignore",
        multiple=True,
        metavar="NAME|re:REGEX",
        default=("lm_head",),
        help="Module to leave in float, by its name or the end of it; '' for none. Repeatable.",
    ),
    *options.methods,
    click.option(
        "--max-shard-size", type=options.parse_size, metavar="SIZE", default="5GB", help="Largest file to write."
    ),
    options.computes("QUANTIZE"),
)


@cli.command(
    epilog=_examples(
        "quantool quantize MODEL --bits 4 --method awq",
        "quantool quantize MODEL -c configs/w4a16-awq-g128.yaml -o OUT",
        "quantool quantize OUT --format gptq",
    )
)
@click.argument("model")
@_quantize_options
@options.writes
@options.prints
@click.pass_context
def quantize(
    ctx: click.Context,
    /,
    *,
    model: str,
    output: Path | None,
    calibration: Path | None,
    max_shard_size: int,
    batch_size: int | None,
    dtype: str,
    device: str,
    dry_run: bool,
    overwrite: bool,
    **values: Any,
) -> None:
    """Quantize the linear layers of MODEL and write a checkpoint."""
    options.check_method_options(ctx)
    recipe = build_recipe(values, options.sources(ctx), (ctx.default_map or {}).get("overrides", ()))
    with working(ctx.obj) as progress:
        from quantool.stages import quantize as stage

        result = stage.run(
            model,
            output,
            recipe,
            calibration=calibration,
            text=text_options(values),
            batch_size=batch_size,
            max_shard_size=max_shard_size,
            dtype=dtype,
            device=device,
            dry_run=dry_run,
            overwrite=overwrite,
            repack_to=None if options.change_codes(ctx) else values["format"],
            progress=progress,
        )
    emit(ctx.obj, result, console.print_plan if dry_run else console.print_quantize)


_stats_help = (
    "Read the data: range and mean of each tensor; of a calibration file, the outlier channels of each linear."
)


@cli.command(
    epilog=_examples(
        "quantool inspect OUT",
        "quantool inspect OUT --filter down_proj --against MODEL",
        "quantool inspect calibration.safetensors --stats",
    )
)
@click.argument("artifact")
@click.option("--tensors", is_flag=True, help="List every tensor.")
@click.option("--filter", type=options.parse_regex, metavar="REGEX", help="List the tensors whose name matches.")
@click.option("--stats", is_flag=True, help=_stats_help)
@click.option("--against", metavar="REFERENCE", help="Relative error of each weight against this model's.")
@click.option("--verify", is_flag=True, help="Check offsets, sizes and finiteness; exit 3 on failure.")
@options.prints
@click.pass_context
def inspect(
    ctx: click.Context,
    /,
    *,
    artifact: str,
    tensors: bool,
    filter: str | None,  # noqa: A002 - click names the argument after the option
    stats: bool,
    against: str | None,
    verify: bool,
) -> None:
    """Show what is in a checkpoint, a .gguf or a calibration file.

    ARTIFACT is anything that quantool reads or writes.
    """
    with working(ctx.obj) as progress:
        from quantool.stages import inspect as stage

        result = stage.run(
            artifact, tensors=tensors, filter=filter, stats=stats, against=against, verify=verify, progress=progress
        )
    emit(ctx.obj, result, console.print_inspect)


_limit = click.FloatRange(0)
_protocol_help = "hf: independent windows, every next token counts."


@cli.command("eval-ppl", epilog=_examples("quantool eval-ppl OUT --reference MODEL --max-kld 0.2"))
@click.argument("model")
@options.text_windows(split="test", num_samples=None)
@click.option("--stride", type=options.COUNT, metavar="N", help="Tokens from window to window.  [default: --seq-len]")
@click.option("--protocol", type=click.Choice(["hf"]), default="hf", expose_value=False, help=_protocol_help)
@click.option("--reference", metavar="MODEL", help="Also measure KL divergence and top-1 agreement with this model.")
@click.option("--max-ppl", type=_limit, metavar="F", help="Exit 3 if perplexity is above this.")
@click.option("--max-kld", type=_limit, metavar="F", help="Exit 3 if KL divergence is above this.")
@options.computes("EVAL_PPL")
@options.prints
@click.pass_context
def eval_ppl(
    ctx: click.Context,
    /,
    *,
    model: str,
    stride: int | None,
    reference: str | None,
    max_ppl: float | None,
    max_kld: float | None,
    batch_size: int | None,
    dtype: str,
    device: str,
    **text: Any,
) -> None:
    """Measure perplexity, and how far MODEL is from a reference."""
    if max_kld is not None and reference is None:
        raise UsageError("--max-kld needs a model to compare with", hint="add --reference MODEL")
    with working(ctx.obj) as progress:
        from quantool.stages import eval_ppl as stage

        result = stage.run(
            model,
            text=text_options(text),
            stride=stride,
            reference=reference,
            batch_size=batch_size,
            dtype=dtype,
            device=device,
            progress=progress,
        )
    emit(ctx.obj, result, console.print_eval)
    check_limit("perplexity", result.perplexity, "--max-ppl", max_ppl)
    check_limit("KL divergence", result.kl_divergence, "--max-kld", max_kld)


def check_limit(what: str, value: float | None, option: str, limit: float | None) -> None:
    """Raise CheckFailed unless `value` is at most `limit`; NaN and what could not be measured fail."""
    if limit is not None and not (value is not None and value <= limit):
        found = "not measured" if value is None else f"{value:.6g}"
        raise CheckFailed(f"{what} is {found}, {option} allows {limit:g}")
