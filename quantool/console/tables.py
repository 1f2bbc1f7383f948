"""What each command prints on stdout: functions named after it, of its result as the dict that `--json` prints."""

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from quantool.console.output import Record, columns, duration, number, show, size, two_columns

if TYPE_CHECKING:
    from rich.table import Table

MAX_NOTES = 8  # a note can be of every block
MAX_METADATA = 100  # characters of a metadata value
TEXT_KEYS = ("dataset", "split", "num_samples", "seq_len")  # of a calibration file's metadata


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
    show(two_columns(pairs))


def print_quantize(result: Record) -> None:
    """What quantize wrote."""
    show(_quantize_summary(result, dry_run=False))


def _quantize_summary(result: Record, *, dry_run: bool) -> "Table":
    counts = ", ".join(f"{result[word]} {word}" for word in ("quantized", "copied", "folded", "dropped"))
    return two_columns(
        [
            ("output", _output(result, dry_run)),
            ("method", result["method"]),
            ("format", result["format"]),
            ("scheme", result["scheme"]),
            ("size", size(result["bytes"])),
            ("bits per weight", number(result["bits_per_weight"], 3)),
            ("tensors", counts),
            *_cost(result),
            *_notes(result),
        ]
    )


def print_plan(result: Record) -> None:
    """What `--dry-run` of quantize would write: every tensor, then the summary."""
    rows = [
        (row["name"], _shape(row["shape"]), row["dtype"], row["action"], row["scheme"] or "-", size(row["bytes"]))
        for row in result["plan"]
    ]
    table = columns(("tensor", "shape", "dtype", "action", "scheme", "size"), rows, numeric=1)
    show(table, _quantize_summary(result, dry_run=True))


def print_convert(result: Record, *, dry_run: bool = False) -> None:
    """What convert-gguf wrote; of a dry run, every tensor first."""
    counts = ", ".join(f"{result[word]} {word}" for word in ("quantized", "copied", "folded", "dropped"))
    kinds = sorted(result["types"].items(), key=lambda item: -item[1])
    summary = two_columns(
        [
            ("output", _output(result, dry_run)),
            ("architecture", result["architecture"]),
            ("method", result["method"]),
            ("outtype", result["outtype"]),
            ("types", ", ".join(f"{kind} ({count})" for kind, count in kinds)),
            ("size", size(result["bytes"])),
            ("bits per weight", number(result["bits_per_weight"], 3)),
            ("tensors", counts),
            *_cost(result),
            *_notes(result),
        ]
    )
    rows = [
        (
            *(row["name"], _shape(row["shape"]), row["dtype"], row["action"]),
            *(row["type"], row["wanted"] or "-", size(row["bytes"])),
        )
        for row in result["plan"]
    ]
    header = ("tensor", "shape", "dtype", "action", "type", "instead of", "size")
    show(*([columns(header, rows, numeric=1)] if rows else []), summary)


def _notes(result: Record) -> Iterator[tuple[str, str]]:
    yield from (("note", note) for note in result["notes"][:MAX_NOTES])
    if (more := len(result["notes"]) - MAX_NOTES) > 0:
        yield "note", f"{more} more notes, see --json"


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
    pairs += _gguf_pairs(result.get("gguf") or {})
    pairs += [("note", note) for note in result.get("notes", ())]
    tables = () if recorded else _weight_tables(result)
    show(two_columns(pairs), *tables, *_inspect_tables(result))


def _gguf_pairs(facts: Record) -> Iterator[tuple[str, str]]:
    """What a GGUF file says it is."""
    for key in ("architecture", "file_type"):
        if facts.get(key) is not None:
            yield key.replace("_", " "), facts[key]
    if facts.get("parts", 1) > 1:
        yield "files", str(facts["parts"])
    words = dict(facts.get("tokenizer", {}))
    if words:
        name = " ".join(words.pop(key) for key in ("model", "pre") if key in words)
        yield "tokenizer", ", ".join((name, *(_tokenizer_word(key, value) for key, value in words.items())))


def _tokenizer_word(key: str, value: str | int | bool) -> str:
    word = key.replace("_", " ")
    if isinstance(value, bool):
        return word if value else f"no {word}"
    return f"{value:,} {word}" if isinstance(value, int) else f"{word} {value}"


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
    yield columns(("dtype", "tensors", "parameters", "size"), rows, numeric=3)
    rows = [
        (kind, f"{use['parameters']:,}", size(use["bytes"]), number(use["bits_per_weight"], 3))
        for kind, use in result["by_kind"].items()
    ]
    yield columns(("kind", "parameters", "size", "bits per weight"), rows, numeric=3)


def _inspect_tables(result: Record) -> Iterator["Table"]:
    if result["schemes"]:
        rows = [(scheme, str(modules)) for scheme, modules in result["schemes"].items()]
        yield columns(("scheme", "modules"), rows, numeric=1)
    said = TEXT_KEYS if result["linears"] is not None else ()
    metadata = [(key, _short(value)) for key, value in result["metadata"].items() if key not in said]
    if metadata:
        yield columns(("metadata", "value"), metadata)
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
    return columns(header, rows, numeric=5)


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
    return columns(("tensor", "dtype", "shape", "size", *words), rows, numeric=1 + len(optional))


def print_eval(result: Record) -> None:
    """What eval-ppl measured; under llama.cpp's protocol all that llama-perplexity prints, in the same order."""
    pairs = [("model", result["model"]), ("text", _text(result)), ("perplexity", _with_error(result, "perplexity", 4))]
    tables = []
    if result["reference_perplexity"] is not None and result.get("protocol") == "llama.cpp":
        pairs += _compared(result)
        rows = [
            (_percentile(name), f"{value:.6f}", f"{100 * result['delta_p_percentiles'][name]:.3f} %")
            for name, value in result["kl_divergence_percentiles"].items()
        ]
        tables.append(columns(("percentile", "KL divergence", "delta p"), rows, numeric=2))
    elif result["reference_perplexity"] is not None:
        agreement = result["top1_agreement"]
        pairs += [
            ("reference perplexity", number(result["reference_perplexity"], 4)),
            ("KL divergence", _with_error(result, "kl_divergence", 5)),
            ("top-1 agreement", "-" if agreement is None else f"{100 * agreement:.2f} %"),
        ]
    show(two_columns([*pairs, ("tokens", f"{result['tokens']:,}"), *_cost(result)]), *tables)


def _compared(result: Record) -> list[tuple[str, str]]:
    words = {"perplexity_difference": 4, "perplexity_ratio": 5, "ln_perplexity_ratio": 5, "kl_divergence": 6}
    return [
        ("reference perplexity", _with_error(result, "reference_perplexity", 4)),
        *((word.replace("_", " ").replace("kl", "KL"), _with_error(result, word, n)) for word, n in words.items()),
        ("correlation of ln perplexity", f"{100 * result['ln_perplexity_correlation']:.2f} %"),
        ("delta p, mean", _with_error(result, "delta_p", 3, percent=True)),
        ("delta p, root mean square", _with_error(result, "delta_p_rms", 3, percent=True)),
        ("top-1 agreement", _with_error(result, "top1_agreement", 3, percent=True)),
    ]


def _with_error(result: Record, key: str, digits: int, *, percent: bool = False) -> str:
    factor, unit = (100, " %") if percent else (1, "")
    return f"{number(factor * result[key], digits)} ± {number(factor * result[f'{key}_error'], digits)}{unit}"


def _percentile(name: str) -> str:
    return {"50": "median"}.get(name, f"{name} %" if name[0].isdigit() else name)


def _output(result: Record, dry_run: bool) -> str:
    return f"{result['output']}, not written: this is a dry run" if dry_run else str(result["output"])


def _text(result: Record) -> str:
    return f"{result['dataset']}, {result['num_samples']} windows of {result['seq_len']} tokens"


def _cost(result: Record) -> list[tuple[str, str]]:
    time = duration(result["seconds"]) + (f", bound by {bound}" if (bound := result.get("bound")) else "")
    return [("time", time), ("peak memory", size(result["peak_memory_bytes"]))]


def _shape(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape)) or "scalar"


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= MAX_METADATA else f"{text[:MAX_METADATA]}... ({len(text):,} characters)"
