"""The CUDA kernels beside bf16, what torch has itself, Marlin, humming and bitsandbytes, on one GPU.

Usage: kernels.py [--only KERNEL ...] [--shapes SHAPE ...] [--tokens M ...] [--output DIR] [--minutes T]

`make bench-gpu` measures everything: the linears of 8B and 70B models (kernel_figures.py) by every kernel and its peers
(kernel_linears.py), within 8 minutes, build included. While tuning, --only w4a16 bf16 --shapes "8B o" --tokens 1 8 is
enough.

Every kernel gets as many random weights as fill 256 MB, and at least four: 4 bits of a layer fit into the L2 cache, and
a loop over one weight would measure that. Products with all of them in turn, over and over, are one CUDA graph; a time
is the median of its replays between two events, divided by the products. The kernels of a pass take turns at a shape,
twice: what is reported is the mean of both rounds, and as noise how far apart they lie. Before that, all bits of the
graph's first output are set, NaN in every float, the graph is replayed, and 64 columns of that output are compared
with a float64 product.

The share of the copy bandwidth counts each byte of weight, scales, x and y once, over a copy within the device (bytes
read and written) of the same run. What is not installed is left out, and what fails is said: for this shape and M, and
the next are tried. The clocks are read and never set.

Writes results/kernels-CARD.json after every shape, so that a run that is stopped leaves what it had; with a choice of
kernels, shapes or tokens it only prints. A new kernel is a function that makes a Linear and a line in PASSES
(kernel_linears.py), and what is asked of it in kernel_figures.py.
"""

import argparse
import json
import math
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from kernel_figures import (
    FIGURES,
    SHAPES,
    TOKENS,
    Measured,
    Shape,
    Timing,
    as_json,
    figure_table,
    judge,
    timing_table,
)
from kernel_linears import GPU, KERNELS, PASSES, Kernel, Linear, sampled
from measure import RESULTS, machine, print_table
from quantool.kernels import cuda

STARTED = time.monotonic()
ROTATED_BYTES, MIN_COPIES = 256 * 2**20, 4
GRAPH_SECONDS, ROUND_SECONDS, ROUNDS = 1e-3, 0.06, 2


@dataclass(slots=True)
class Run:
    """What is measured so far, and why some of it is not."""

    setting: dict[str, Any]
    measured: Measured
    deadline: float
    path: Path | None = None  # of its JSON
    missing: dict[str, str] = field(default_factory=dict)
    failed: list[str] = field(default_factory=list)

    def is_over(self) -> bool:
        return time.monotonic() > self.deadline

    def save(self) -> None:
        if self.path is None:
            return
        self.setting["seconds"] = round(time.monotonic() - STARTED, 1)
        notes = {"not_installed": self.missing, "failed": self.failed}
        result = {**self.setting, **notes, **as_json(self.measured)}
        self.path.write_text(json.dumps(result, indent=2, allow_nan=False) + "\n")


@dataclass(frozen=True, slots=True)
class Captured:
    """Many products of one kernel as a graph, checked."""

    graph: torch.cuda.CUDAGraph
    x: torch.Tensor  # the graph reads it
    products: int
    replays: int
    nbytes: int
    error: float


# --- time


def capture(calls: Sequence[Callable[[], torch.Tensor]]) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
    """A graph of all calls, and the output of the first, which no later call writes over."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        first = calls[0]()
        for call in calls[1:]:
            call()
    return graph, first


def replay(graph: torch.cuda.CUDAGraph, times: int) -> float:
    """Seconds of one replay, the median of many."""
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(times)]
    for _ in range(3):
        graph.replay()
    for start, end in events:
        start.record()
        graph.replay()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in events) / 1e3


def relative_error(y: torch.Tensor, x: torch.Tensor, linear: Linear) -> float:
    """Of the sampled outputs against float64; NaN when anything was not written."""
    if not bool(y.isfinite().all()):
        return math.nan
    expected = x.double() @ linear.sample.T
    found = y[:, sampled(y.shape[1])].double()
    return float((found - expected).norm() / expected.norm())


def copy_rate() -> float:
    """Bytes read and written per second by a copy of 2 GiB within the device."""
    source = torch.randint(0, 256, (2 * 2**30,), dtype=torch.uint8, device=GPU)
    target = torch.empty_like(source)
    graph, _ = capture([lambda: target.copy_(source)])
    return float(2 * source.nbytes / replay(graph, 50))


def matmul_rate() -> float:
    """bf16 operations per second of a product of 8192 x 8192 matrices."""
    a, b = (torch.randn(8192, 8192, dtype=torch.bfloat16, device=GPU) for _ in range(2))
    torch.mm(a, b)
    graph, _ = capture([lambda: torch.mm(a, b)])
    return float(2 * 8192**3 / replay(graph, 50))


def rotation(kernel: Kernel, shape: Shape) -> list[Linear]:
    """So many weights that none is in the cache when its turn comes."""
    first = kernel.make(shape.rows, shape.columns)
    count = max(MIN_COPIES, math.ceil(ROTATED_BYTES / first.nbytes))
    return [first, *(kernel.make(shape.rows, shape.columns) for _ in range(count - 1))]


def prepare(kernel: Kernel, shape: Shape, tokens: int, weights: Sequence[Linear]) -> Captured:
    """A graph of products of some x with all weights in turn, of about GRAPH_SECONDS; ArithmeticError when it is wrong.

    Every launch is recorded here: what chooses between kernels has chosen.
    """
    x = kernel.activations(tokens, shape.columns)
    nbytes = weights[0].nbytes + x.nbytes
    guess = len(weights) * max(nbytes / 4e12, 2 * tokens * shape.weights / 6e14)  # only to choose how many
    passes = math.ceil(GRAPH_SECONDS / guess)
    calls = [lambda linear=linear: linear.apply(x) for linear in weights]
    for call in calls:  # compiles, loads and chooses what is still to be
        call()
    torch.cuda.synchronize()
    graph, y = capture(calls * passes)
    y.view(torch.uint8).fill_(0xFF)
    graph.replay()
    error = relative_error(y, x, weights[0])
    if not error < kernel.tolerance:
        raise ArithmeticError(f"relative error {error:.2e}, at most {kernel.tolerance:.0e} expected")
    replays = max(10, min(100, round(ROUND_SECONDS / (guess * passes))))
    return Captured(graph, x, len(calls) * passes, replays, nbytes + y.nbytes, error)


def side_by_side(captured: dict[str, Captured]) -> dict[str, Timing]:
    """The graphs take turns, twice: mean and distance of the two."""
    rounds: dict[str, list[float]] = {name: [] for name in captured}
    for _ in range(ROUNDS):
        for name, c in captured.items():
            rounds[name].append(replay(c.graph, c.replays) / c.products)
    timings = {}
    for name, c in captured.items():
        mean = statistics.mean(rounds[name])
        timings[name] = Timing(mean, (max(rounds[name]) - min(rounds[name])) / mean, c.nbytes, c.error)
    return timings


def measure_shape(run: Run, kernels: Sequence[Kernel], shape: Shape, counts: Sequence[int]) -> None:
    """All numbers of tokens, on weights that are made once."""
    weights: dict[Kernel, list[Linear]] = {}
    for kernel in kernels:
        with failures(run, kernel, shape.name):
            weights[kernel] = rotation(kernel, shape)
    for tokens in counts:
        captured: dict[str, Captured] = {}
        for kernel, copies in weights.items():
            if run.is_over():
                return
            if tokens >= kernel.least:
                with failures(run, kernel, f"{shape.name}, {tokens} tokens"):
                    captured[kernel.name] = prepare(kernel, shape, tokens, copies)
        for name, timing in side_by_side(captured).items():
            run.measured.timings[shape, tokens, name] = timing


@contextmanager
def failures(run: Run, kernel: Kernel, where: str) -> Iterator[None]:
    """What is not installed, or fails, is noted; the others go on."""
    try:
        yield
    except ImportError as error:
        run.missing[kernel.name] = str(error)
    except Exception as error:  # noqa: BLE001 - whatever another project's kernel raises
        message = " ".join(str(error).split())[:200]
        run.failed.append(f"{kernel.name}, {where}: {type(error).__name__}: {message}")
        print(run.failed[-1], file=sys.stderr, flush=True)


# --- the run


def card() -> dict[str, Any]:
    """The GPU, its driver, and what it runs on."""
    properties = torch.cuda.get_device_properties(GPU)
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "l2_bytes": properties.L2_cache_size,
        "memory_bytes": properties.total_memory,
        "cuda_of_torch": torch.version.cuda,
        "before": clocks(),
    }


def clocks() -> dict[str, str]:
    """Driver, clocks, power and temperature as nvidia-smi reads them; empty where it does not run."""
    names = (
        "uuid,driver_version,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,power.draw,power.limit,temperature.gpu"
    )
    query = ("nvidia-smi", f"--query-gpu={names}", "--format=csv,noheader")
    try:
        done = subprocess.run(query, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return {}
    cards = [dict(zip(names.split(","), line.split(", "), strict=True)) for line in done.stdout.splitlines()]
    uuid = str(torch.cuda.get_device_properties(GPU).uuid)
    found = next((card for card in cards if uuid in card["uuid"]), cards[0])
    return {name: value for name, value in found.items() if name != "uuid"}


def report(run: Run) -> None:
    """The table of times, what is missing in it, and last the table of goals."""
    seen = {name for _, _, name in run.measured.timings}
    ours = {name for name in seen if KERNELS[name].beside}
    rows = {name: kernel.beside for name, kernel in KERNELS.items() if name in (ours or seen)}
    print_table(*timing_table(run.measured, rows))
    noise = statistics.median([timing.noise for timing in run.measured.timings.values()] or [math.nan])
    print(f"\n+- is how far two rounds lie apart; the median of all is {100 * noise:.1f}%")
    for name, reason in run.missing.items():
        print(f"{name}: not installed ({reason})")
    for line in run.failed:
        print(f"failed: {line}")
    gpu, rate = run.setting["gpu"], run.setting["bf16_operations_per_second"]
    versions = f"driver {gpu['before'].get('driver_version', 'unknown')}, torch {torch.__version__}"
    print(f"{gpu['name']}, {versions}: copy {run.measured.copy / 1e12:.2f} TB/s, bf16 {rate / 1e12:.0f} TFLOP/s\n")
    print_table(*figure_table([judge(figure, run.measured) for figure in FIGURES]))


def result_file(directory: Path) -> Path:
    """Named after the GPU."""
    name = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name(GPU).lower().removeprefix("nvidia ")).strip("-")
    directory.mkdir(parents=True, exist_ok=True)
    return directory / f"kernels-{name}.json"


def choices(description: str | None, kernels: Sequence[str], minutes: float) -> argparse.ArgumentParser:
    """The options of what is measured and how long."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    names, shapes = ", ".join(kernels), ", ".join(shape.name for shape in SHAPES)
    parser.add_argument("--only", nargs="+", choices=kernels, metavar="NAME", help=f"of {names}")
    parser.add_argument("--shapes", nargs="+", choices=[s.name for s in SHAPES], metavar="SHAPE", help=f"of {shapes}")
    parser.add_argument("--tokens", nargs="+", type=int, metavar="M", help="numbers of tokens")
    minutes_help = f"begin nothing after so many (default: {minutes:g})"
    parser.add_argument("--minutes", type=float, default=minutes, metavar="T", help=minutes_help)
    return parser


def main() -> None:
    parser = choices(__doc__, list(KERNELS), minutes=7)
    parser.add_argument("--output", type=Path, default=RESULTS, metavar="DIR", help="default: benchmarks/results")
    args = parser.parse_args()
    if (reason := cuda.why_not()) is not None:
        raise SystemExit(f"error: no kernels to measure: {reason}")
    built = round(time.monotonic() - STARTED, 1)
    setting: dict[str, Any] = {"machine": machine(), "gpu": card(), "build_seconds": built}
    everything = not (args.only or args.shapes or args.tokens)
    shapes = [shape for shape in SHAPES if shape.name in (args.shapes or (shape.name,))]
    with torch.no_grad():
        setting["bf16_operations_per_second"] = matmul_rate()
        run = Run(setting, Measured(copy_rate()), STARTED + 60 * args.minutes)
        run.path = result_file(args.output) if everything else None
        for kernels in PASSES:
            for shape in shapes:
                wanted = [k for k in kernels if k.name in (args.only or KERNELS) and k.name not in run.missing]
                if run.is_over() or not wanted:
                    break
                print(f"{time.monotonic() - STARTED:4.0f} s  {shape.name}", file=sys.stderr, flush=True)
                measure_shape(run, wanted, shape, args.tokens or TOKENS)
                run.save()
    setting["gpu"]["after"] = clocks()
    run.save()
    report(run)
    if run.path is not None:
        print(f"wrote {run.path}", file=sys.stderr)
    if any(line.startswith(name + ",") for name, kernel in KERNELS.items() if kernel.beside for line in run.failed):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
