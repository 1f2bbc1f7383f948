"""The commands: each parses its options, calls one stage and prints the result."""

import functools
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal

import click

from quantool import __version__, console
from quantool.cli import gguf_options, options
from quantool.cli.options import Output, text_options
from quantool.cli.working import emit, working
from quantool.errors import CheckFailed, UsageError
from quantool.recipe import build_recipe, method_options
from quantool.scheme import CALIBRATION_FORMATS, FORMAT_NAMES, METHOD_NAMES, GgufOptions


def _print_version(ctx: click.Context, option: click.Parameter, asked: bool) -> None:
    if not asked:
        return
    click.echo(f"quantool {__version__}")
    if verbose := ctx.ensure_object(Output).verbose:
        from quantool import kernels

        with console.log(verbose):  # says when it has to compile them
            console.print_environment(kernels.status())
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
@click.option(
    "-o",
    "--output",
    type=options.OUTPUT,
    help="File to write.  [default: calibration.safetensors; with --format imatrix imatrix.gguf]",
)
@click.option(
    "--format",
    "format_name",
    type=click.Choice(CALIBRATION_FORMATS),
    default="safetensors",
    help="quantool's own, which every method reads, or llama.cpp's importance matrix.",
)
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
    output: Path | None,
    format_name: str,
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
            format_name=format_name,
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


@cli.command(
    "convert-gguf",
    epilog=_examples(
        "quantool convert-gguf MODEL --outtype q4_k_m --imatrix calibration.safetensors",
        "quantool convert-gguf MODEL --outtype q4_k_m --method gptq",
    ),
)
@click.argument("model")
@gguf_options.gguf
@options.writes
@options.prints
@click.pass_context
def convert_gguf(
    ctx: click.Context,
    /,
    *,
    model: str,
    output: Path | None,
    imatrix: Path | None,
    method: str,
    calibration: Path | None,
    split_max_size: int | None,
    batch_size: int | None,
    dtype: str,
    device: str,
    dry_run: bool,
    overwrite: bool,
    **values: Any,
) -> None:
    """Write MODEL as one GGUF file of its final types, for llama.cpp."""
    gguf_options.check_method_options(ctx)
    with working(ctx.obj) as progress:
        from quantool.stages import convert_gguf as stage

        result = stage.run(
            model,
            output,
            GgufOptions(**{field.name: values[field.name] for field in fields(GgufOptions)}),
            imatrix=imatrix,
            method=method,
            method_options=method_options(values),
            calibration=calibration,
            text=text_options(values),
            batch_size=batch_size,
            split_max_size=split_max_size,
            dtype=dtype,
            device=device,
            dry_run=dry_run,
            overwrite=overwrite,
            progress=progress,
        )
    emit(ctx.obj, result, functools.partial(console.print_convert, dry_run=dry_run))


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
_protocol_help = (
    "hf: independent windows, every next token counts. llama.cpp: as llama-perplexity does, windows of 512 of the raw "
    "text, of which the second half counts."
)


@cli.command("eval-ppl", epilog=_examples("quantool eval-ppl OUT --reference MODEL --max-kld 0.2"))
@click.argument("model")
@options.text_windows(split="test", num_samples=None)
@click.option("--stride", type=options.COUNT, metavar="N", help="Tokens from window to window.  [default: --seq-len]")
@click.option("--protocol", type=click.Choice(["hf", "llama.cpp"]), default="hf", help=_protocol_help)
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
    protocol: Literal["hf", "llama.cpp"],
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
            protocol=protocol,
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
