"""The options of convert-gguf."""

import click

from quantool.cli import options
from quantool.scheme import OUTTYPES

METHODS = ("rtn", "awq", "gptq", "awq+gptq")
METHOD_OPTIONS = {
    **{name: owners for name, owners in options.METHOD_OPTIONS.items() if owners == options.CALIBRATED},
    "n_grid": ("awq", "awq+gptq"),
    "damp_percent": ("gptq", "awq+gptq"),
    "imatrix": ("rtn",),
}


def check_method_options(ctx: click.Context) -> None:
    """Raise UsageError for an option that the chosen method, or a calibration file, leaves without effect."""
    options.check_method_options(ctx, METHOD_OPTIONS, METHODS)


def parse_tensor_type(text: str) -> tuple[str, str]:
    """REGEX=TYPE: a regular expression that is searched for in the GGUF name, and a type's name."""
    pattern, equals, kind = text.rpartition("=")
    if not equals or not pattern or not kind:
        raise click.BadParameter(f"'{text}' is not REGEX=TYPE, expected such as attn_v=q8_0")
    return options.parse_regex(pattern), kind.upper()


gguf = options.together(
    click.option(
        "-o",
        "--output",
        "--outfile",
        "output",
        type=options.OUTPUT,
        help="File to write.  [default: MODEL-OUTTYPE.gguf]",
    ),
    click.option(
        "--outtype",
        type=click.Choice(OUTTYPES, case_sensitive=False),
        metavar="TYPE",
        default="auto",
        help=f"Types of the tensors: auto (as they are stored), {', '.join(OUTTYPES[1:])}.",
    ),
    click.option(
        "--imatrix",
        type=options.FILE,
        help="What an error of each channel costs: output of quantool calibrate, or an imatrix of llama.cpp "
        "(.gguf or .dat).",
    ),
    click.option(
        "--method",
        type=click.Choice(METHODS),
        default="rtn",
        help="How to choose the codes; awq and gptq calibrate them, and the file stays a standard one.",
    ),
    click.option("--calibration", type=options.FILE, help="Output of quantool calibrate, instead of text options."),
    options.text_windows(split="train", num_samples=128),
    options.seed,
    *options.gguf_methods,
    click.option(
        "--tensor-type",
        "tensor_types",
        type=parse_tensor_type,
        metavar="REGEX=TYPE",
        multiple=True,
        help="Type of the tensors in whose name REGEX is found. Repeatable, the first that matches wins.",
    ),
    click.option("--token-embedding-type", metavar="TYPE", help="Type of token_embd.weight."),
    click.option("--output-tensor-type", metavar="TYPE", help="Type of output.weight."),
    click.option("--pure", is_flag=True, help="The same type for every matrix, no mix."),
    click.option(
        "--split-max-size", type=options.parse_size, metavar="SIZE", help="Write several files of at most this size."
    ),
    click.option("--pre", metavar="NAME", help="Pre-tokenizer, in llama.cpp's word.  [default: recognised]"),
    click.option(
        "--no-fallback",
        "fallback",
        is_flag=True,
        flag_value=False,
        default=True,
        show_default=False,
        help="Fail where the rows of a tensor are not whole blocks of its type, instead of choosing another.",
    ),
    click.option("--allow-requantize", is_flag=True, help="Quantize weights that are quantized already."),
    options.computes("CONVERT_GGUF"),
)
