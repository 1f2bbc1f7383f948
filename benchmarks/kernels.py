"""The CUDA kernels beside bf16, torch's own int4 product, Marlin and humming: linears of 8B and 70B models, one GPU.

Usage: kernels.py [--output DIR] [--minutes M]      (`make bench-gpu`; ends within 8 minutes, build included)

Every kernel gets as many random weights as fill 256 MB, and at least four: 4 bits of a layer fit into the L2 cache, and
a loop over one weight would measure that. Products with all of them in turn, over and over, are one CUDA graph; a time
is the median of its replays between two events, divided by the products. The kernels of a shape take turns, twice: what
is reported is the mean of both rounds, and as noise how far apart they lie. Before that, the graph's first output is
filled with NaN, the graph replayed, and 64 columns of that output compared with a float64 product.

The share of the copy bandwidth counts each byte of weight, scales, x and y once, over a copy within the device (bytes
read and written) of the same run. Marlin comes from vLLM or GPTQModel, humming from humming-kernels, where they are
installed; these are measured last. The clocks are read and never set.

Writes results/kernels-CARD.json after every shape, so that a run that is stopped leaves what it had. A new kernel is a
function that makes a Linear, a line in KERNELS, and what is asked of it in kernel_figures.py.
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
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from kernel_figures import (
    BF16,
    FIGURES,
    INT4PACK,
    SHAPES,
    TOKENS,
    W4A16,
    Measured,
    Shape,
    Timing,
    as_json,
    figure_table,
    judge,
    timing_table,
)
from measure import RESULTS, machine, print_table
from quantool.kernels import cuda, ops
from quantool.kernels.tiles import pack_tiles, tile_rows
from quantool.kernels.wna16 import linear_tiles

STARTED = time.monotonic()
ROTATED_BYTES, MIN_COPIES = 256 * 2**20, 4
GRAPH_SECONDS, ROUND_SECONDS, ROUNDS = 1e-3, 0.06, 2
GROUP = 128
SAMPLED = 64  # outputs that are compared with float64
GPU = torch.device("cuda")


@dataclass(frozen=True, slots=True)
class Linear:
    """One random weight of a kernel: its product, the bytes it keeps, and SAMPLED of its rows as float64."""

    apply: Callable[[torch.Tensor], torch.Tensor]
    nbytes: int
    sample: torch.Tensor


@dataclass(frozen=True, slots=True)
class Kernel:
    """A name, and what makes a random weight of [rows, columns] for it."""

    name: str
    make: Callable[[int, int], Linear]
    tolerance: float = 1e-2  # of the relative error
    ours: bool = False


@dataclass(slots=True)
class Run:
    """What is measured so far, and why some of it is not."""

    setting: dict[str, Any]
    measured: Measured
    deadline: float
    missing: dict[str, str] = field(default_factory=dict)
    failed: list[str] = field(default_factory=list)

    def is_over(self) -> bool:
        return time.monotonic() > self.deadline

    def save(self, path: Path) -> None:
        self.setting["seconds"] = round(time.monotonic() - STARTED, 1)
        notes = {"not_installed": self.missing, "failed": self.failed}
        result = {**self.setting, **notes, **as_json(self.measured)}
        path.write_text(json.dumps(result, indent=2, allow_nan=False) + "\n")


@dataclass(frozen=True, slots=True)
class Captured:
    """Many products of one kernel as a graph, checked."""

    graph: torch.cuda.CUDAGraph
    products: int
    replays: int
    nbytes: int
    error: float


# --- the kernels


def bf16(rows: int, columns: int) -> Linear:
    weight = torch.randn(rows, columns, dtype=torch.bfloat16, device=GPU)
    sample = weight[sampled(rows)].double()
    return Linear(lambda x: torch.nn.functional.linear(x, weight), weight.nbytes, sample)


def w4a16(rows: int, columns: int) -> Linear:
    codes, scales, sample = four_bits(rows, columns)
    tiles, spread = pack_tiles(codes, "codes", 4, rows, columns), tile_rows(scales)
    return Linear(lambda x: linear_tiles(x, tiles, spread, None, None, 4), tiles.nbytes + spread.nbytes, sample)


def int4pack(rows: int, columns: int) -> Linear:
    """torch's own (tinygemm): W = scale * (code - 8) + zero, two codes to a byte, the first in the high half."""
    codes, scales, sample = four_bits(rows, columns)
    nibbles = ops.pack_nibbles(codes).view(rows, columns // 2)
    packed = torch.ops.aten._convert_weight_to_int4pack(nibbles, 8)
    pairs = torch.stack((scales.T, torch.zeros_like(scales.T)), dim=-1).contiguous()
    product = torch.ops.aten._weight_int4pack_mm
    return Linear(lambda x: product(x, packed, GROUP, pairs), packed.nbytes + pairs.nbytes, sample)


def marlin(rows: int, columns: int) -> Linear:
    """vLLM's, or GPTQModel's copy of it (compiled at its first use)."""
    try:
        utils = import_module("vllm.model_executor.layers.quantization.utils.marlin_utils")
        repack, types = import_module("vllm._custom_ops").gptq_marlin_repack, import_module("vllm.scalar_type")
    except ImportError:
        utils, types = import_module("gptqmodel.utils.marlin"), import_module("gptqmodel.utils.marlin_scalar_type")
        repack = utils.gptq_marlin_repack
    codes, scales, sample = four_bits(rows, columns)
    nothing, workspace = utils.marlin_make_empty_g_idx(GPU), utils.marlin_make_workspace_new(GPU)
    weight = repack(words_by_columns(codes), nothing, size_k=columns, size_n=rows, num_bits=4)
    permuted = utils.marlin_permute_scales(scales.T.contiguous(), size_k=columns, size_n=rows, group_size=GROUP)

    def apply(x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = utils.apply_gptq_marlin_linear(
            input=x,
            weight=weight,
            weight_scale=permuted,
            weight_zp=nothing,
            g_idx=nothing,
            g_idx_sort_indices=nothing,
            workspace=workspace,
            wtype=types.scalar_types.uint4b8,
            output_size_per_partition=rows,
            input_size_per_partition=columns,
            is_k_full=True,
        )
        return result

    return Linear(apply, weight.nbytes + permuted.nbytes, sample)


def humming(rows: int, columns: int) -> Linear:
    """humming-kernels: compiles a kernel for every shape and band of tokens."""
    layer_class = import_module("humming.layer").HummingLayer
    codes, scales, sample = four_bits(rows, columns)
    config = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "sym": True}
    layer = layer_class(shape_n=rows, shape_k=columns, weight_config=config, torch_dtype=torch.bfloat16).to(GPU)
    layer.load_from_tensors({"qweight": words_by_columns(codes), "scales": scales.T.contiguous()})
    layer.transform()
    return Linear(layer, sum(parameter.nbytes for parameter in layer.parameters()), sample)


KERNELS = (
    Kernel(BF16, bf16),
    Kernel(W4A16, w4a16, tolerance=4e-3, ours=True),
    Kernel(INT4PACK, int4pack),
)
PEERS = (Kernel("marlin", marlin), Kernel("humming", humming))


def four_bits(rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes uint8 [N, K], scales bf16 [N, G] for W = scale * (code - 8), and the sample of W."""
    codes = torch.randint(0, 16, (rows, columns), dtype=torch.uint8, device=GPU)
    scales = torch.empty(rows, columns // GROUP, dtype=torch.bfloat16, device=GPU).uniform_(0.005, 0.02)
    chosen = sampled(rows)
    return codes, scales, ops.dequantize(codes[chosen], scales[chosen], None, 4).double()


def words_by_columns(codes: torch.Tensor) -> torch.Tensor:
    """GPTQ's layout: int32 [K / 8, N], eight codes of a row in a word."""
    return ops.pack_bits(codes, 4).T.contiguous()


def sampled(rows: int) -> torch.Tensor:
    return torch.linspace(0, rows - 1, SAMPLED, device=GPU).long()


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


def prepare(shape: Shape, copies: Sequence[Linear], x: torch.Tensor, tolerance: float) -> Captured:
    """A graph of products of x with all weights in turn, of about GRAPH_SECONDS; ArithmeticError when it is wrong."""
    nbytes = copies[0].nbytes + x.nbytes + 2 * len(x) * shape.rows
    guess = len(copies) * max(nbytes / 4e12, 2 * len(x) * shape.weights / 6e14)  # only to choose how many
    passes = math.ceil(GRAPH_SECONDS / guess)
    calls = [lambda linear=linear: linear.apply(x) for linear in copies]
    for call in calls:  # compiles, loads and chooses what is still to be
        call()
    torch.cuda.synchronize()
    graph, y = capture(calls * passes)
    y.fill_(math.nan)
    graph.replay()
    error = relative_error(y, x, copies[0])
    if not error < tolerance:
        raise ArithmeticError(f"relative error {error:.2e}, at most {tolerance:.0e} expected")
    replays = max(10, min(100, round(ROUND_SECONDS / (guess * passes))))
    return Captured(graph, len(calls) * passes, replays, nbytes, error)


def side_by_side(captured: dict[str, Captured]) -> dict[str, Timing]:
    """The kernels take turns, twice: mean and distance of the two."""
    rounds: dict[str, list[float]] = {name: [] for name in captured}
    for _ in range(ROUNDS):
        for name, c in captured.items():
            rounds[name].append(replay(c.graph, c.replays) / c.products)
    timings = {}
    for name, c in captured.items():
        mean = statistics.mean(rounds[name])
        timings[name] = Timing(mean, (max(rounds[name]) - min(rounds[name])) / mean, c.nbytes, c.error)
    return timings


def measure_shape(run: Run, shape: Shape, kernels: Sequence[Kernel]) -> None:
    """All numbers of tokens, on weights that are made once. A kernel that fails is left out of what follows."""
    weights: dict[Kernel, list[Linear]] = {}
    for kernel in kernels:
        with failures(run, kernel, shape.name):
            first = kernel.make(shape.rows, shape.columns)
            count = max(MIN_COPIES, math.ceil(ROTATED_BYTES / first.nbytes))
            weights[kernel] = [first, *(kernel.make(shape.rows, shape.columns) for _ in range(count - 1))]
    for tokens in TOKENS:
        x = torch.randn(tokens, shape.columns, dtype=torch.bfloat16, device=GPU)
        captured: dict[str, Captured] = {}
        for kernel, copies in weights.items():
            if run.is_over():
                return
            with failures(run, kernel, f"{shape.name}, {tokens} tokens"):
                captured[kernel.name] = prepare(shape, copies, x, kernel.tolerance)
        weights = {kernel: copies for kernel, copies in weights.items() if kernel.name in captured}
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
    names = [(kernel.name, kernel.ours) for kernel in (*KERNELS, *PEERS) if kernel.name in seen]
    ours, others = ([name for name, is_ours in names if is_ours is own] for own in (True, False))
    print_table(*timing_table(run.measured, ours, others))
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=RESULTS, metavar="DIR", help="default: benchmarks/results")
    parser.add_argument("--minutes", type=float, default=7, help="begin nothing after so many (default: 7)")
    args = parser.parse_args()
    if (reason := cuda.why_not()) is not None:
        raise SystemExit(f"error: no kernels to measure: {reason}")
    built = time.monotonic() - STARTED
    name = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name(GPU).lower().removeprefix("nvidia ")).strip("-")
    args.output.mkdir(parents=True, exist_ok=True)
    path = args.output / f"kernels-{name}.json"
    gpu = card()
    setting = {"machine": machine(), "gpu": gpu, "build_seconds": round(built, 1)}
    with torch.no_grad():
        setting["bf16_operations_per_second"] = matmul_rate()
        run = Run(setting, Measured(copy_rate()), STARTED + 60 * args.minutes)
        for kernels in (KERNELS, PEERS):
            for shape in SHAPES:
                wanted = [kernel for kernel in kernels if kernel.name not in run.missing]
                if run.is_over() or not wanted:
                    break
                print(f"{time.monotonic() - STARTED:4.0f} s  {shape.name}", file=sys.stderr, flush=True)
                measure_shape(run, shape, wanted)
                run.save(path)
    gpu["after"] = clocks()
    run.save(path)
    report(run)
    print(f"wrote {path}", file=sys.stderr)
    if any(line.startswith(kernel.name + ",") for kernel in KERNELS if kernel.ours for line in run.failed):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
