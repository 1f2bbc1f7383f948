"""The encoders on a GPU, beside ours on all cores of the same machine and ggml's on all of them.

Usage: encode.py [--only ENCODER ...] [--rows N] [--columns K] [--threads N]

A weight float32 [4096, 14336] of normal numbers into every block type of ggml, without and with an importance, and by
the methods rtn (4 bits, groups of 128) and nf4 (blocks of 64), which know no importance. On the GPU copies of the
weight take turns, so that none is in the cache; a time is the median of 20 runs between two events, the importance and
the result stay there, and `exact` are the same with ggml's own bytes for a goal. On the processor, torch shares rows of
ours out over its threads, and llamacpp_peer.py those of ggml, the median of 3. Rates are in GB of a bf16 weight per
second. Each result on the GPU is compared with that of the processor, and an exact one with ggml's, byte by byte.

ggml is the one in the wheel xllamacpp, and needs the package gguf; without them its columns are empty. Writes
results/encode-CARD.json after every encoder; with a choice of encoders it only prints.
"""

import argparse
import math
import os
import re
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from typing import Any, TypeVar

import numpy as np
import torch

from kernel_figures import Table, in_unit, or_none
from measure import machine, print_table, save
from quantool.formats.ggml import GGML_TYPES
from quantool.kernels import cuda
from quantool.methods import WEIGHT_METHODS
from quantool.scheme import MethodOptions, QuantScheme

GPU = torch.device("cuda")
COPIES, GPU_RUNS, CPU_RUNS = 3, 20, 3
JUDGED, GOAL, ACCEPT = "Q4_K", 100, 30  # times the speed of ggml on all cores
METHODS = {"rtn w4 g128": ("rtn", QuantScheme(4, 128)), "nf4": ("nf4", QuantScheme(4, 64, dtype="nf4"))}

Given = tuple[torch.Tensor, torch.Tensor | None]  # W float32 [N, K] and importance [K], on one device
Result = TypeVar("Result")
Peer = Callable[[str, np.ndarray, np.ndarray | None, int], np.ndarray]


def encode(name: str, given: Given, *, exact: bool = False) -> torch.Tensor:
    """Codes or blocks on the device of W; `exact` and importance are for block types."""
    weight, importance = given
    if name in GGML_TYPES:
        return GGML_TYPES[name].quantize(weight, importance, exact=exact)
    method, scheme = METHODS[name]
    return WEIGHT_METHODS[method](weight, scheme, lambda scales: scales, options=MethodOptions()).codes


def gpu_seconds(name: str, copies: Sequence[Given], *, exact: bool = False) -> float:
    """The median of some runs, after one with each copy."""
    for given in copies:
        encode(name, given, exact=exact)
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(GPU_RUNS)]
    for run, (start, end) in enumerate(events):
        start.record()
        encode(name, copies[run % len(copies)], exact=exact)
        end.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in events) / 1e3


def cpu_seconds(run: Callable[[], Result]) -> tuple[float, Result]:
    """The median of some runs, and what the last returned."""
    times = []
    for _ in range(CPU_RUNS):
        start = time.perf_counter()
        result = run()
        times.append(time.perf_counter() - start)
    return statistics.median(times), result


def ggml() -> tuple[Peer | None, str]:
    """ggml's quantizer of rows on several threads, or why there is none."""
    try:
        import gguf  # noqa: F401 - the peer needs it when it is called

        import llamacpp_peer
    except ImportError as error:
        return None, str(error)
    return llamacpp_peer.encode, ""


def measure_encoder(name: str, given: Given, copies: Sequence[Given], peer: Peer | None) -> dict[str, Any]:
    """Seconds everywhere, null for what was not measured, and whether the bytes are the same."""
    weight, importance = given
    encode(name, (weight[:256], importance))  # compiles what there is to compile
    seconds, expected = cpu_seconds(lambda: encode(name, given))
    row: dict[str, Any] = {"encoder": name, "importance": importance is not None}
    row |= {"gpu_seconds": gpu_seconds(name, copies), "cpu_seconds": seconds}
    row["same_as_cpu"] = torch.equal(encode(name, copies[0]).cpu(), expected)
    row |= dict.fromkeys(("exact_gpu_seconds", "ggml_seconds", "exact_same_as_ggml"))
    if name not in GGML_TYPES:
        return row
    row["exact_gpu_seconds"] = gpu_seconds(name, copies, exact=True)
    if peer is not None:
        arrays = weight.numpy(), None if importance is None else importance.numpy()
        row["ggml_seconds"], blocks = cpu_seconds(lambda: peer(name, *arrays, torch.get_num_threads()))
        row["exact_same_as_ggml"] = torch.equal(encode(name, copies[0], exact=True).cpu(), torch.from_numpy(blocks))
    return row


def speed(row: Mapping[str, Any], which: str, over: str) -> float:
    """How many encodings by `which` take as long as one by `over`; NaN where one of them was not measured."""
    times = row[f"{which}_seconds"], row[f"{over}_seconds"]
    return math.nan if None in times else times[1] / times[0]


def figure(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """That of Q4_K: the slower of without and with importance, relative to ggml."""
    speeds = [speed(row, "gpu", "ggml") for row in rows if row["encoder"] == JUDGED]
    worst = math.nan if not speeds or any(map(math.isnan, speeds)) else min(speeds)
    verdict = "goal" if worst >= GOAL else "accept" if worst >= ACCEPT else "-" if math.isnan(worst) else "below"
    label = f"{JUDGED} encode over ggml on all cores"
    return {"figure": label, "goal": GOAL, "accept": ACCEPT, "measured": or_none(worst), "verdict": verdict}


def table(rows: Sequence[Mapping[str, Any]], weights: int) -> Table:
    def rate(seconds: float | None) -> str:
        return "-" if seconds is None else f"{2 * weights / seconds / 1e9:.3g}"

    def same(equal: bool | None) -> str:
        return "-" if equal is None else "same" if equal else "DIFFER"

    header = ("GB of bf16/s", "GPU", "CPU", "ggml", "over CPU", "over ggml", "exact", "over ggml", "bytes", "exact's")
    lines = []
    for row in rows:
        name = row["encoder"] + (" importance" if row["importance"] else "")
        rates = [rate(row[f"{which}_seconds"]) for which in ("gpu", "cpu", "ggml")]
        ours = [in_unit(speed(row, "gpu", over), "x") for over in ("cpu", "ggml")]
        exact = rate(row["exact_gpu_seconds"]), in_unit(speed(row, "exact_gpu", "ggml"), "x")
        lines.append((name, *rates, *ours, *exact, same(row["same_as_cpu"]), same(row["exact_same_as_ggml"])))
    return header, lines


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [*GGML_TYPES, *METHODS]
    parser.add_argument("--only", nargs="+", choices=names, metavar="ENCODER", help=f"of {', '.join(names)}")
    parser.add_argument("--rows", type=int, default=4096, metavar="N")
    parser.add_argument("--columns", type=int, default=14336, metavar="K")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), metavar="N")
    args = parser.parse_args()
    if (reason := cuda.why_not()) is not None:
        raise SystemExit(f"error: no kernels to measure: {reason}")
    torch.set_num_threads(args.threads)
    generator, card = torch.Generator().manual_seed(0), torch.cuda.get_device_name(GPU)
    weight = torch.randn(args.rows, args.columns, generator=generator).mul_(0.02)
    importance = torch.randn(args.columns, generator=generator).square_().add_(0.01)
    weights, importance_there = [weight.to(GPU) for _ in range(COPIES)], importance.to(GPU)
    peer, missing = ggml()
    setting = {"machine": machine(), "gpu": card, "threads": args.threads, "rows": args.rows, "columns": args.columns}
    file = "encode-" + re.sub(r"[^a-z0-9]+", "-", card.lower().removeprefix("nvidia ")).strip("-")
    rows: list[dict[str, Any]] = []
    for name, weighted in product(args.only or names, (False, True)):
        if weighted and name not in GGML_TYPES:
            continue
        print(name, "with importance" if weighted else "", file=sys.stderr, flush=True)
        copies = [(copy, importance_there if weighted else None) for copy in weights]
        rows.append(measure_encoder(name, (weight, importance if weighted else None), copies, peer))
        if not args.only:
            path = save(file, {**setting, "ggml_missing": missing or None, "figures": [figure(rows)], "rows": rows})
    print_table(*table(rows, weight.numel()))
    if peer is None:
        print(f"ggml: not installed ({missing})")
    reached = figure(rows)
    measured = in_unit(math.nan if reached["measured"] is None else reached["measured"], "x")
    print(f"{reached['figure']}: {measured} (goal {GOAL}x, accept {ACCEPT}x): {reached['verdict']}")
    if not args.only:
        print(f"wrote {path}", file=sys.stderr)
    if any(False in (row["same_as_cpu"], row["exact_same_as_ggml"]) for row in rows):
        raise SystemExit("error: bytes of the GPU are not those of the processor")


if __name__ == "__main__":
    main()
