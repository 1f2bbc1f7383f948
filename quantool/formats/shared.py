"""What the formats share: stored tensors checked against a config before any is read, g_idx, float16 scales, names."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import zip_longest

import torch

from quantool.errors import QuantoolError, one_line
from quantool.io import TensorInfo
from quantool.quant import QuantizedTensor
from quantool.scheme import QuantScheme

FLOATS = ("F32", "F16", "BF16")
INDICES = ("I32", "I64")
REGEX = "re:"
EXPERT = re.compile(r"(^|\.)experts\.\d+\.")  # in the name of a linear of a routed expert
# The least float16 above 0 and the largest one that bfloat16 holds too.
MIN_FLOAT16, MAX_FLOAT16 = 2.0**-24, 65280.0
FLOAT_CHECKPOINT = "use the float checkpoint that it was made from"
EXPORT_AGAIN = "the config and the tensors disagree: download or export the checkpoint again"


def expect(infos: Mapping[str, TensorInfo], name: str, dtypes: tuple[str, ...], *shapes: tuple[int, ...]) -> None:
    """Raise QuantoolError unless tensor `name` exists with one of `dtypes` and, when any is given, one of `shapes`."""
    info = infos.get(name)
    if info is None:
        raise QuantoolError(f"tensor '{name}' is missing, the other tensors of its module are there", hint=EXPORT_AGAIN)
    if info.dtype in dtypes and (not shapes or info.shape in shapes):
        return
    wanted = " or ".join(dtypes)
    if shapes:
        wanted = f"{' or '.join(str(list(shape)) for shape in shapes)} {wanted}"
    raise QuantoolError(
        f"{info.path.name}: tensor '{name}': expected {wanted}, found {list(info.shape)} {info.dtype}",
        hint=EXPORT_AGAIN,
    )


def expect_matrix(info: TensorInfo, dtype: str) -> tuple[int, int]:
    """Shape of a tensor that must be two-dimensional and not empty; raises QuantoolError."""
    if info.dtype == dtype and len(info.shape) == 2 and 0 not in info.shape:
        return info.shape[0], info.shape[1]
    raise QuantoolError(
        f"{info.path.name}: tensor '{info.name}': expected a matrix of {dtype}, found {list(info.shape)} {info.dtype}",
        hint=EXPORT_AGAIN,
    )


def transposed(matrix: torch.Tensor) -> torch.Tensor:
    """The transpose in memory of its own. `contiguous()` alone keeps odd strides of length-1 dimensions.

    Such strides would stop a later view as bytes.
    """
    rows, columns = matrix.shape
    return matrix.t().reshape(-1).view(columns, rows)


def round_scales(scales: torch.Tensor, model_dtype: torch.dtype) -> torch.Tensor:
    """float32 scales -> float16, positive and finite; of a bfloat16 model, values that bfloat16 holds too.

    For the formats whose files hold float16: vLLM loads such scales into the dtype it runs in, transformers keeps
    float16. A value rounded to bfloat16 first is exact in both (float16 has more mantissa bits, and no finer steps
    below its normal range), so that both runtimes see the scale that the codes were computed with.
    """
    if model_dtype == torch.bfloat16:
        scales = scales.to(torch.bfloat16).to(torch.float32)
    return scales.clamp(MIN_FLOAT16, MAX_FLOAT16).to(torch.float16)


def require_contiguous_groups(q: QuantizedTensor, format_name: str) -> None:
    """Raise QuantoolError when `q` has a g_idx, for a format that has no place for it."""
    if q.g_idx is not None:
        raise QuantoolError(f"format {format_name} cannot hold groups in activation order", hint="use --format gptq")


def unpack_g_idx(stored: torch.Tensor | None, suffix: str, scheme: QuantScheme, columns: int) -> torch.Tensor | None:
    """The group of each column, int32 [K]; None when there is none to store or groups are contiguous.

    Raises QuantoolError when it does not give every group the same number of columns: such groups have no scheme.
    """
    if stored is None:
        return None
    width, groups = scheme.width(columns), scheme.groups(columns)
    in_order = torch.arange(columns, device=stored.device) // width
    if not torch.equal(stored.sort().values.to(torch.int64), in_order):
        raise QuantoolError(
            f"tensor '{suffix}': expected {columns} entries, {width} of each of {groups} groups, found others",
            hint=EXPORT_AGAIN,
        )
    return None if torch.equal(stored, in_order.to(stored.dtype)) else stored.to(torch.int32)


def module_patterns(names: Sequence[str]) -> list[str]:
    """Names, or regexes "re:..." to match from the beginning, that match exactly `names`.

    Names that differ in numbers only, as those of one linear in all blocks, are one regex that lists the numbers
    of each place, if the names are every combination of these; a config of experts would be long otherwise.
    """
    places: dict[tuple[str, ...], list[tuple[str, ...]]] = {}
    for name in names:
        parts = re.split(r"(?<=\.)([0-9]{1,9})(?=\.)", name)
        places.setdefault(tuple(parts[::2]), []).append(tuple(parts[1::2]))
    patterns = []
    for literals, numbers in places.items():
        choices = [sorted(set(column), key=int) for column in zip(*numbers, strict=True)]
        if len(numbers) > 1 and math.prod(map(len, choices)) == len(set(numbers)):
            fields = [f"({'|'.join(choice)})" for choice in choices]
            patterns.append(REGEX + _weave(map(re.escape, literals), fields) + "$")
        else:
            patterns += [_weave(literals, fields) for fields in numbers]
    return patterns


def _weave(literals: Iterable[str], fields: Iterable[str]) -> str:
    """literals[0] + fields[0] + literals[1] + ... + literals[-1]."""
    return "".join(map("".join, zip_longest(literals, fields, fillvalue="")))


def compile_pattern(pattern: str) -> re.Pattern[str]:
    """A regex of config.json; raises QuantoolError when it is none."""
    try:
        return re.compile(pattern.removeprefix(REGEX))
    except (re.error, RecursionError, OverflowError) as error:
        raise QuantoolError(
            f"quantization_config: {pattern!r:.80} is not a regular expression: {one_line(error)}"
        ) from error
