"""What benchmarks/kernels.py measures and what is asked of it: shapes, figures to reach, tables. Arithmetic only.

A time is that of one product y = x W^T of some kernel, x [tokens, columns] and W [rows, columns]. A figure is taken
over several shapes and says what its worst shape reaches: the goal, what is acceptable, or neither.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

Table = tuple[Sequence[str], Sequence[Sequence[str]]]  # header and lines


@dataclass(frozen=True, slots=True)
class Shape:
    """A linear layer of a llama of 8 or 70 billion weights."""

    name: str
    rows: int
    columns: int

    @property
    def weights(self) -> int:
        return self.rows * self.columns


# The most telling first: what a run has no time for is at the end. q, k and v are one linear here, as gate and up are
# in "gate+up"; gate alone has the shape of up.
SHAPES = (
    Shape("8B down", 4096, 14336),
    Shape("8B o", 4096, 4096),
    Shape("70B gate", 28672, 8192),
    Shape("70B down", 8192, 28672),
    Shape("8B gate", 14336, 4096),
    Shape("8B gate+up", 28672, 4096),
    Shape("70B qkv", 10240, 8192),
    Shape("70B o", 8192, 8192),
    Shape("8B qkv", 6144, 4096),
)
LARGE = tuple(shape for shape in SHAPES if shape.weights >= 58_000_000)
SQUARE = tuple(shape for shape in SHAPES if shape.rows == shape.columns == 4096)
TOKENS = (1, 8, 16, 32, 64, 128, 256, 1024)

BF16, W4A16, W8A8, LLM_INT8, NF4 = "bf16", "w4a16", "w8a8", "llm-int8", "nf4"
INT4PACK, INT_MM, MARLIN, HUMMING, BITSANDBYTES = "int4pack", "int_mm", "marlin", "humming", "bitsandbytes"


@dataclass(frozen=True, slots=True)
class Timing:
    """One kernel on one shape: seconds of a product, and how far two measurements of it lie apart."""

    seconds: float
    noise: float
    nbytes: int  # of the weight with its scales, of x and of y: each read or written once
    error: float  # |y - y of float64| / |y of float64|


@dataclass(slots=True)
class Measured:
    """All of a run."""

    copy: float  # bytes read and written per second by a copy within the device
    timings: dict[tuple[Shape, int, str], Timing] = field(default_factory=dict)

    def seconds(self, shape: Shape, tokens: int, kernel: str) -> float:
        """NaN where that was not measured."""
        timing = self.timings.get((shape, tokens, kernel))
        return math.nan if timing is None else timing.seconds

    def speed(self, shape: Shape, tokens: int, kernel: str, over: str) -> float:
        """How many products of `kernel` take as long as one of `over`."""
        return self.seconds(shape, tokens, over) / self.seconds(shape, tokens, kernel)

    def share(self, shape: Shape, tokens: int, kernel: str) -> float:
        """Bytes per second, as a share of the copy's."""
        timing = self.timings.get((shape, tokens, kernel))
        return math.nan if timing is None else timing.nbytes / timing.seconds / self.copy


@dataclass(frozen=True, slots=True)
class Figure:
    """One line of the table of goals."""

    label: str
    value: Callable[[Measured, Shape], float]
    goal: float
    accept: float
    shapes: Sequence[Shape] = SHAPES
    less_is_better: bool = False
    unit: str = "x"


def speed(kernel: str, tokens: int, over: str) -> Callable[[Measured, Shape], float]:
    return lambda measured, shape: measured.speed(shape, tokens, kernel, over)


def share(kernel: str, tokens: int) -> Callable[[Measured, Shape], float]:
    return lambda measured, shape: measured.share(shape, tokens, kernel)


def growth(kernel: str, tokens: int, own: int) -> Callable[[Measured, Shape], float]:
    """The time of `tokens` over the kernel's own time of `own` tokens."""
    return lambda measured, shape: measured.seconds(shape, tokens, kernel) / measured.seconds(shape, own, kernel)


FIGURES = (
    Figure("W4A16, M=1, at least 58M weights, over bf16 F.linear", speed(W4A16, 1, BF16), 3.2, 2.6, LARGE),
    Figure("the same, share of the measured copy bandwidth", share(W4A16, 1), 0.80, 0.65, LARGE, unit="%"),
    Figure("W4A16, M=1, 4096x4096, over bf16 F.linear", speed(W4A16, 1, BF16), 2.3, 1.7, SQUARE),
    Figure("W4A16, M=8 time over own M=1 time (less is better)", growth(W4A16, 8, 1), 1.10, 1.4, less_is_better=True),
    Figure("W4A16, M=1, over aten::_weight_int4pack_mm", speed(W4A16, 1, INT4PACK), 1.3, 1.0),
    Figure("W4A16, M=8, over aten::_weight_int4pack_mm", speed(W4A16, 8, INT4PACK), 2.5, 1.5),
    Figure("W4A16, M=32, over aten::_weight_int4pack_mm", speed(W4A16, 32, INT4PACK), 5, 3),
    Figure("W4A16, M=1024, over bf16 F.linear", speed(W4A16, 1024, BF16), 0.82, 0.7),
    Figure("W8A8, M=64, over bf16 F.linear", speed(W8A8, 64, BF16), 1.5, 1.2),
    Figure("W8A8, M=1024, over bf16 F.linear", speed(W8A8, 1024, BF16), 1.4, 1.1),
    Figure("NF4, M=1, at least 58M weights, over bf16 F.linear", speed(NF4, 1, BF16), 2.6, 1.8, LARGE),
    Figure("LLM.int8(), M=1, over bf16 F.linear", speed(LLM_INT8, 1, BF16), 1.0, 0.7),
    Figure("LLM.int8(), M=64, over bf16 F.linear", speed(LLM_INT8, 64, BF16), 1.0, 0.7),
)


@dataclass(frozen=True, slots=True)
class Reached:
    """What came of a figure: its value on the worst of the shapes that were measured; NaN when none was."""

    figure: Figure
    value: float
    shape: str
    measured: int

    @property
    def verdict(self) -> str:
        sign = -1 if self.figure.less_is_better else 1
        value, goal, accept = (sign * number for number in (self.value, self.figure.goal, self.figure.accept))
        return "goal" if value >= goal else "accept" if value >= accept else "below" if self.measured else "-"


def judge(figure: Figure, measured: Measured) -> Reached:
    values = {shape.name: figure.value(measured, shape) for shape in figure.shapes}
    seen = {name: value for name, value in values.items() if not math.isnan(value)}
    if not seen:
        return Reached(figure, math.nan, "-", 0)
    worst = (max if figure.less_is_better else min)(seen, key=seen.__getitem__)
    return Reached(figure, seen[worst], worst, len(seen))


def figure_table(judged: Sequence[Reached]) -> Table:
    """Goals and what was measured, on the worst shape."""
    header = ("", "goal", "accept", "measured", "verdict", "worst shape", "shapes")
    lines = []
    for r in judged:
        values = (in_unit(value, r.figure.unit) for value in (r.figure.goal, r.figure.accept, r.value))
        lines.append((r.figure.label, *values, r.verdict, r.shape, f"{r.measured} of {len(r.figure.shapes)}"))
    return header, lines


def timing_table(measured: Measured, kernels: Mapping[str, Sequence[str]]) -> Table:
    """Times of some kernels, and how many times faster they are than those that each is compared with."""
    seen = {name for _, _, name in measured.timings}
    others = list(dict.fromkeys(other for beside in kernels.values() for other in beside if other in seen))
    header = ("kernel", "shape", "NxK", "M", "us", "+-", "of copy", *(f"over {other}" for other in others))
    lines = []
    for kernel, shape, tokens in product(kernels, SHAPES, sorted({tokens for _, tokens, _ in measured.timings})):
        if (timing := measured.timings.get((shape, tokens, kernel))) is None:
            continue
        speeds = (measured.speed(shape, tokens, kernel, o) if o in kernels[kernel] else math.nan for o in others)
        time = (f"{1e6 * timing.seconds:.1f}", f"{100 * timing.noise:.1f}%")
        share = in_unit(measured.share(shape, tokens, kernel), "%")
        place = (kernel, shape.name, f"{shape.rows}x{shape.columns}", str(tokens))
        lines.append((*place, *time, share, *(in_unit(speed, "x") for speed in speeds)))
    return header, lines


def as_json(measured: Measured) -> Mapping[str, Any]:
    """What results/kernels-CARD.json holds of the measurements; null for what was not measured."""
    rows = [
        {
            "kernel": kernel,
            "shape": shape.name,
            "rows": shape.rows,
            "columns": shape.columns,
            "tokens": tokens,
            "seconds": timing.seconds,
            "noise": timing.noise,
            "bytes": timing.nbytes,
            "error": timing.error,
            "share_of_copy": measured.share(shape, tokens, kernel),
            "over_bf16": or_none(measured.speed(shape, tokens, kernel, BF16)),
        }
        for (shape, tokens, kernel), timing in measured.timings.items()
    ]
    figures = [
        {
            "figure": reached.figure.label,
            "goal": reached.figure.goal,
            "accept": reached.figure.accept,
            "measured": or_none(reached.value),
            "verdict": reached.verdict,
            "worst_shape": reached.shape,
            "shapes": reached.measured,
            "of_shapes": len(reached.figure.shapes),
        }
        for reached in (judge(figure, measured) for figure in FIGURES)
    ]
    return {"copy_bytes_per_second": measured.copy, "figures": figures, "rows": rows}


def in_unit(value: float, unit: str) -> str:
    """A dash for NaN."""
    if math.isnan(value):
        return "-"
    return f"{100 * value:.0f}%" if unit == "%" else f"{value:.2f}{unit}"


def or_none(value: float) -> float | None:
    """JSON has no NaN."""
    return None if math.isnan(value) else value
