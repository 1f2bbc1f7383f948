"""The options that commands share, what their values mean, and where a value came from. Half of the `cli` layer.

A value comes from the flag, else from the environment (`QUANTOOL_<COMMAND>_<OPTION>`), else from the command's section
of the recipe, else from the default. Messages name an option as it was given.
"""

import functools
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from quantool.data import TextOptions
from quantool.errors import UsageError
from quantool.recipe import INTEGER_METHODS, load_section
from quantool.scheme import ACTORDERS, METHOD_NAMES, PRESETS, STARVED_EXPERTS

Decorator = Callable[[Any], Any]

INLINE_TEXT = ("dataset", "split", "text_column", "num_samples", "seq_len", "seed")
CALIBRATED = ("gptq", "awq", "awq+gptq", "smoothquant")
# Options of quantize that only some methods have a use for; to give one to another method is an error.
METHOD_OPTIONS = {
    "mse": ("rtn",),
    "n_grid": ("awq", "awq+gptq"),
    **dict.fromkeys(("damp_percent", "actorder"), ("gptq", "awq+gptq", "smoothquant")),
    "smoothing_strength": ("smoothquant",),
    "double_quant": ("nf4", "fp4"),
    "outlier_threshold": ("llm-int8",),
    **dict.fromkeys(("scheme", "act_bits", "act_dynamic", "act_sym"), INTEGER_METHODS),
    **dict.fromkeys(
        ("calibration", *INLINE_TEXT, "batch_size", "dtype", "min_expert_tokens", "starved_experts"), CALIBRATED
    ),
}
# What a repack has a use for: the rest of quantize's options would change codes.
REPACK_OPTIONS = ("model", "output", "format", "max_shard_size", "config", "dry_run", "overwrite", "device")
NOT_IN_RECIPE = ("config", "dry_run", "overwrite", "json", "verbose", "quiet")
SIZE_UNITS = {"": 1, "B": 1, **{f"{p}B": 1000**i for i, p in enumerate("KMGT", 1)}}
SIZE_UNITS |= {f"{p}IB": 1024**i for i, p in enumerate("KMGT", 1)}


@dataclass(slots=True)
class Output:
    """What --json, -v and -q said. Mutable: `main` has to know it when the command has failed half way."""

    json: bool = False
    verbose: int = 0
    quiet: bool = False


# Values


def parse_size(text: str | int) -> int:
    """Bytes: 5GB, 500MB and 1.5GB are decimal, 2GiB is binary, a plain number is bytes."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Z]*)", str(text).strip().upper())
    nbytes = int(float(match[1]) * SIZE_UNITS[match[2]]) if match and match[2] in SIZE_UNITS else 0
    if nbytes < 1:
        raise click.BadParameter(f"'{text}' is not a size, expected a number of bytes or such as 5GB, 500MB, 2GiB")
    return nbytes


def parse_group_size(text: str | int) -> int | None:
    """A group size; None is auto."""
    if str(text).lower() == "auto":
        return None
    if not re.fullmatch(r"-1|\d{1,9}", str(text)):
        raise click.BadParameter(f"'{text}' is not a group size, expected auto, a number, -1 (channel) or 0 (tensor)")
    return int(text)


def parse_device(text: str) -> str:
    """The word for a device; whether there is one is for the stage to say."""
    if not re.fullmatch(r"auto|cpu|cuda(:\d{1,3})?", text):
        raise click.BadParameter(f"'{text}' is not a device, expected auto, cpu, cuda or cuda:N")
    return text


def parse_regex(text: str) -> str:
    """`text`, which compiles."""
    try:
        re.compile(text)
    except (re.error, OverflowError, RecursionError) as error:
        raise click.BadParameter(f"'{text}' is not a regular expression: {error}") from error
    return text


def text_options(values: Mapping[str, Any]) -> TextOptions:
    """The text that `text_windows` and `seed` describe."""
    names = [field.name for field in fields(TextOptions)]
    return TextOptions(**{name: values[name] for name in names if name in values})


# Where a value came from


def sources(ctx: click.Context) -> dict[str, int]:
    """Options that were given: name -> source, the lower the more explicit (a flag, the environment, the recipe)."""
    found = {name: ctx.get_parameter_source(name) for name in ctx.params}
    return {name: int(source) for name, source in found.items() if source and source < ParameterSource.DEFAULT}


def spelled(ctx: click.Context, option: click.Parameter) -> str:
    """An option as the user gave it: the flag, the environment variable, or the key in the recipe."""
    source = ctx.get_parameter_source(option.name or "")
    if source is ParameterSource.DEFAULT_MAP:
        return f"{ctx.params['config']}: {ctx.info_name}: {option.name}"
    if source is ParameterSource.ENVIRONMENT:
        names = [option.envvar] if isinstance(option.envvar, str) else list(option.envvar or ())
        names.append(f"{ctx.auto_envvar_prefix}_{(option.name or '').upper()}")
        return next(name for name in names if os.environ.get(name))
    names = option.secondary_opts if ctx.params.get(option.name or "") is False else option.opts
    return max(names or option.opts, key=len)


def check_method_options(
    ctx: click.Context, methods_of: Mapping[str, Sequence[str]] = METHOD_OPTIONS, known: Sequence[str] = METHOD_NAMES
) -> None:
    """Raise UsageError for an option that the chosen method, or a calibration file, leaves without effect."""
    given, method = sources(ctx), ctx.params["method"]
    overrides = (ctx.default_map or {}).get("overrides", ())
    methods = {method, *(override.method for override in overrides if override.method)}
    for option in ctx.command.params:
        if option.name not in given:
            continue
        owners = [method for method in methods_of.get(option.name, known) if method in known]
        if not methods & set(owners):
            raise UsageError(
                f"{spelled(ctx, option)} belongs to method {any_of(owners)}, the method is '{method}'",
                hint=f"use --method {owners[0]}, or leave it out",
            )
        if ctx.params["calibration"] and option.name in INLINE_TEXT:
            raise UsageError(
                f"{spelled(ctx, option)} has no effect with --calibration, whose text is fixed",
                hint="leave one of the two out",
            )


def any_of(words: Sequence[str]) -> str:
    """'a', 'b' or 'c'."""
    *others, last = [f"'{word}'" for word in words]
    return f"{', '.join(others)} or {last}" if others else last


def change_codes(ctx: click.Context) -> bool:
    """Whether an option was given that a repack of existing codes has no use for."""
    return not sources(ctx).keys() <= set(REPACK_OPTIONS)


def load_recipe(ctx: click.Context, option: click.Parameter, path: Path | None) -> Path | None:
    """Make this command's section of the recipe its defaults."""
    if path is not None:
        known = dict(recipe_keys(ctx.command))
        ctx.default_map = load_section(path, ctx.info_name or "", known)
    return path


def recipe_keys(command: click.Command) -> Iterator[tuple[str, str]]:
    """The keys that a recipe may have for `command`, each with its kind, a word of recipe.KINDS."""
    for option in command.params:
        if not isinstance(option, click.Option) or option.name is None or option.name in NOT_IN_RECIPE:
            continue
        if option.is_flag:
            kind = "true or false"
        elif option.multiple:
            kind = "a list of text"
        elif isinstance(option.type, click.types.IntParamType):
            kind = "an integer"
        elif isinstance(option.type, click.types.FloatParamType):
            kind = "a number"
        else:  # click converts these, and says what is wrong with them
            kind = "an integer or text" if option.name in ("group_size", "max_shard_size") else "text"
        yield option.name, kind
    if command.name == "quantize":
        yield "overrides", "a list"


# Options


def together(*options: Decorator) -> Decorator:
    """Several options as one decorator, listed in `--help` in the order given."""
    return lambda command: functools.reduce(lambda f, option: option(f), reversed(options), command)


def _remember(ctx: click.Context, option: click.Parameter, value: Any) -> None:
    """Keep an output option for `main`; a `-v` before the command adds to those after it."""
    output = ctx.ensure_object(Output)
    if option.name == "verbose":
        output.verbose += value
    elif value:
        setattr(output, option.name or "", True)


_output_option = functools.partial(click.option, is_eager=True, expose_value=False, callback=_remember)
verbose = _output_option(
    "-v", "--verbose", count=True, show_default=False, help="Log to stderr; -vv for debug and tracebacks."
)
prints = together(
    _output_option("--json", is_flag=True, help="Print the result as one JSON object."),
    verbose,
    _output_option("-q", "--quiet", is_flag=True, help="No progress bar, no log, no warnings."),
)

FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
OUTPUT = click.Path(path_type=Path)
COUNT = click.IntRange(1)
_config_help = "YAML recipe; flags and environment override it."
writes = together(
    click.option("-c", "--config", type=FILE, is_eager=True, callback=load_recipe, help=_config_help),
    click.option("--dry-run", is_flag=True, help="Print the plan and the sizes; write nothing."),
    click.option("--overwrite", is_flag=True, help="Replace an existing output."),
)


def computes(command: str) -> Decorator:
    """How the model runs. `command` is the environment's word for it, whose own variable outranks QUANTOOL_DEVICE."""
    dtypes = click.Choice(["auto", "float32", "float16", "bfloat16"])
    environment = [f"QUANTOOL_{command}_DEVICE", "QUANTOOL_DEVICE"]
    device_help = "auto, cpu, cuda or cuda:N.  [env: QUANTOOL_DEVICE]"
    return together(
        click.option(
            "--batch-size", type=COUNT, metavar="N", help="Windows that run at once.  [default: 1024 tokens' worth]"
        ),
        click.option("--dtype", type=dtypes, default="auto", help="Compute dtype."),
        click.option(
            "--device", type=parse_device, metavar="DEVICE", default="auto", envvar=environment, help=device_help
        ),
    )


def text_windows(*, split: str, num_samples: int | None) -> Decorator:
    """Which text, and how much of it; `num_samples` None is all there is."""
    dataset_help = "Text, jsonl or parquet file, hub dataset, or `builtin`: Python's own documentation."
    num_default = f"Windows of text.{'' if num_samples else '  [default: all]'}"
    len_help = "Tokens per window.  [default: 2048, or the model's limit]"
    return together(
        click.option("--dataset", metavar="NAME|FILE", default="builtin", help=dataset_help),
        click.option("--split", metavar="NAME", default=split, help="Split of builtin or of a hub dataset."),
        click.option("--text-column", metavar="NAME", default="text", help="Column that has the text."),
        click.option("--num-samples", type=COUNT, metavar="N", default=num_samples, help=num_default),
        click.option("--seq-len", type=click.IntRange(2), metavar="N", help=len_help),
    )


_seed_help = "0: the first windows; any other: drawn at random."
seed = click.option("--seed", type=click.IntRange(0, 2**32 - 1), metavar="N", default=0, help=_seed_help)

scheme = (
    click.option(
        "--bits",
        type=click.IntRange(2, 8),
        metavar="N",
        help="Bits of a weight.  [default: 4; smoothquant and llm-int8 8]",
    ),
    click.option(
        "--group-size",
        type=parse_group_size,
        metavar="N|auto",
        help="Weights that share a scale; -1: a row; 0: a tensor; auto: the largest of 128, 64, 32 that divides.  "
        "[default: auto; nf4 and fp4 64; with 8-bit activations -1]",
    ),
    click.option(
        "--sym/--asym", default=None, help="Without or with a zero point.  [default: sym; awq and awq+gptq asym]"
    ),
    click.option(
        "--scheme",
        type=click.Choice(list(PRESETS), case_sensitive=False),
        metavar="PRESET",
        help=f"Bits, group size and symmetry in one word; their own options override it: {', '.join(PRESETS)}.",
    ),
    click.option(
        "--act-bits",
        type=click.INT,
        metavar="8|16",
        help="Bits of activations: 8, or 16 for float.  [default: smoothquant 8, others 16]",
    ),
    click.option(
        "--act-dynamic/--act-static",
        default=None,
        help="One scale per token at run time, or one stored.  [default: dynamic]",
    ),
    click.option(
        "--act-sym/--act-asym", default=None, help="Activations without or with a zero point.  [default: sym]"
    ),
)
_n_grid = click.option("--n-grid", type=COUNT, metavar="N", default=20, help="awq: steps of the scale search.")
_damp_percent = click.option(
    "--damp-percent",
    type=click.FloatRange(0, 1, min_open=True),
    metavar="F",
    default=0.01,
    help="gptq: damping, as a share of the Hessian's mean diagonal.",
)
_min_expert_tokens = click.option(
    "--min-expert-tokens",
    type=COUNT,
    metavar="N",
    help="Calibration tokens that every expert has to see.  [default: one window's worth]",
)
_starved_experts = click.option(
    "--starved-experts",
    type=click.Choice(STARVED_EXPERTS),
    default="error",
    help="An expert that sees fewer: fail, calibrate it on all tokens, or round it to nearest.",
)
methods = (
    _n_grid,
    _damp_percent,
    click.option(
        "--actorder",
        type=click.Choice(ACTORDERS),
        default="static",
        help="gptq: columns by the Hessian's diagonal, groups as stored (static) or in that order too (group); "
        "or all as stored (none).",
    ),
    click.option(
        "--smoothing-strength",
        type=click.FloatRange(0, 1),
        metavar="F",
        help="smoothquant: share of the difficulty that moves to the weights.  [default: searched per linear]",
    ),
    click.option("--mse", is_flag=True, help="rtn: search the clipping range for the least squared error."),
    click.option(
        "--double-quant/--no-double-quant", default=None, help="nf4, fp4: quantize the scales too.  [default: yes]"
    ),
    click.option(
        "--outlier-threshold",
        type=click.FloatRange(0),
        metavar="F",
        help="llm-int8: channels with a value of at least this are multiplied in float; 0: none.  [default: 6]",
    ),
    _min_expert_tokens,
    _starved_experts,
)
gguf_methods = (_n_grid, _damp_percent, _min_expert_tokens, _starved_experts)
