"""Which values of the constants in quantool/kernels are fastest on this GPU, at every shape and number of tokens.

Usage: tune_kernels.py [--only GRID ...] [--shapes SHAPE ...] [--tokens M ...] [--minutes T]

A Grid has a few values for some constants of a module. Every combination is set while the products of a kernel are
recorded as a graph (kernels.py: rotated weights, outputs checked), and the graphs of all combinations take turns. The
first table says what is fastest where, beside the time of the values that the module has; the second, fastest first,
what every combination makes of all shapes: the geometric mean of its times over those of the module's values.

Combinations that come to the same launches differ by noise alone: what is less than +- better is not better. Nothing is
written; a better value goes into its module by hand.
"""

import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from types import ModuleType

import torch

from kernel_figures import NF4, SHAPES, W4A16, W8A8, Measured, Shape, Timing
from kernel_linears import KERNELS, Kernel, Linear
from kernels import STARTED, Captured, Run, choices, failures, prepare, rotation, side_by_side
from measure import print_table
from quantool.kernels import cuda, int8, nf4, wna16

ALL = 1 << 20  # tokens: no limit


@dataclass(frozen=True, slots=True)
class Grid:
    """Values of constants of a module, and the tokens at which they matter to a kernel."""

    name: str
    kernel: Kernel
    module: ModuleType
    values: Mapping[str, Sequence[int]]
    tokens: Sequence[int]

    def combinations(self) -> list[tuple[int, ...]]:
        """The module's own first."""
        own = tuple(getattr(self.module, name) for name in self.values)
        return list(dict.fromkeys((own, *product(*self.values.values()))))

    def label(self, combination: tuple[int, ...]) -> str:
        return " ".join(f"{name}={value}" for name, value in zip(self.values, combination, strict=True))


W4A16_GEMV = {"GEMV_BLOCKS": (1, 2, 3, 4), "GEMV_COLUMNS": (1024, 2048, 4096)}
W4A16_GEMM = {"GEMM_BLOCKS": (1, 2, 4), "GEMM_COLUMNS": (512, 1024)}
W4A16_WIDE = {"WIDE_GEMM_BLOCKS": (1, 2), "GEMM_COLUMNS": (512, 1024)}
W8A8_SPLIT = {"BLOCKS": (1, 2, 4), "SPLIT_COLUMNS": (512, 1024, 2048)}
GRIDS = (
    Grid("gemv", KERNELS[W4A16], wna16, W4A16_GEMV, (1, 8)),
    Grid("gemm", KERNELS[W4A16], wna16, W4A16_GEMM, (16, 32, 64)),
    Grid("wide", KERNELS[W4A16], wna16, W4A16_WIDE, (128,)),
    Grid("int8", KERNELS[W8A8], int8, W8A8_SPLIT, (1, 16, 32, 64, 128)),
    # torch._int_mm takes 17 tokens and more; all the others are ours, or none
    Grid("int8-own", KERNELS[W8A8], int8, {"OWN_TOKENS": (16, ALL)}, (32, 64, 128, 256, 1024)),
    Grid("nf4", KERNELS[NF4], nf4, {"GEMV_TOKENS": (1, 8)}, (2, 4, 8)),  # the gemv takes up to 8
)


@contextmanager
def constants(module: ModuleType, values: Mapping[str, int]) -> Iterator[None]:
    """The module's constants have these values, for a while."""
    own = {name: getattr(module, name) for name in values}
    try:
        for name, value in values.items():
            setattr(module, name, value)
        yield
    finally:
        for name, value in own.items():
            setattr(module, name, value)


def measure(run: Run, grid: Grid, shape: Shape, tokens: int, weights: Sequence[Linear]) -> dict[str, Timing]:
    """Every combination that does not fail, by its label; the module's own first, and nothing without that."""
    captured: dict[str, Captured] = {}
    for combination in grid.combinations():
        label = grid.label(combination)
        with (
            failures(run, grid.kernel, f"{shape.name}, {tokens} tokens, {label}"),
            constants(grid.module, dict(zip(grid.values, combination, strict=True))),
        ):
            captured[label] = prepare(grid.kernel, shape, tokens, weights)
    own = grid.label(grid.combinations()[0])
    return side_by_side(captured) if own in captured else {}


Found = dict[tuple[str, int, str], dict[str, Timing]]  # of a grid, tokens and a shape: by label


def of_each_shape(found: Found) -> Iterator[tuple[str, ...]]:
    for (grid, tokens, shape), timings in found.items():
        own, best = next(iter(timings)), min(timings, key=lambda label: timings[label].seconds)
        us = (f"{1e6 * timings[label].seconds:.1f}" for label in (own, best))
        noise = f"{100 * max(timings[label].noise for label in (own, best)):.1f}%"
        yield (grid, str(tokens), shape, *us, noise, best)


def of_all_shapes(found: Found) -> Iterator[tuple[str, ...]]:
    for grid, tokens in dict.fromkeys((grid, tokens) for grid, tokens, _ in found):
        ratios: dict[str, list[float]] = {}
        for (of_grid, of_tokens, _), timings in found.items():
            if (of_grid, of_tokens) == (grid, tokens):
                own = next(iter(timings.values())).seconds
                for label, timing in timings.items():
                    ratios.setdefault(label, []).append(timing.seconds / own)
        means = {label: statistics.geometric_mean(of_label) for label, of_label in ratios.items()}
        for label in sorted(means, key=means.__getitem__):
            yield grid, str(tokens), str(len(ratios[label])), f"{means[label]:.3f}", label


def main() -> None:
    parser = choices(__doc__, [grid.name for grid in GRIDS], minutes=9)
    args = parser.parse_args()
    if (reason := cuda.why_not()) is not None:
        raise SystemExit(f"error: no kernels to tune: {reason}")
    shapes = [shape for shape in SHAPES if shape.name in (args.shapes or (shape.name,))]
    grids = [grid for grid in GRIDS if grid.name in (args.only or (grid.name,))]
    run = Run({}, Measured(copy=1), STARTED + 60 * args.minutes)
    found: Found = {}
    with torch.no_grad():
        for shape, grid in product(shapes, grids):
            if run.is_over():
                break
            print(f"{time.monotonic() - STARTED:4.0f} s  {shape.name}, {grid.name}", file=sys.stderr, flush=True)
            weights = rotation(grid.kernel, shape)
            for tokens in args.tokens or grid.tokens:
                if timings := measure(run, grid, shape, tokens, weights):
                    found[grid.name, tokens, shape.name] = timings
    print_table(("grid", "M", "shape", "own us", "best us", "+-", "best"), list(of_each_shape(found)))
    print()
    print_table(("grid", "M", "shapes", "over own", "for all shapes"), list(of_all_shapes(found)))


if __name__ == "__main__":
    main()
