"""GPTQ of one linear on a GPU: the compiled column loops beside those of torch, on the same weight and Hessian.

Usage: gptq_loop.py [--rows N] [--columns K]

4 bits in groups of 128. Both sides are quantool.methods.gptq.round_columns and share all that is not a column loop: the
products between blocks of columns, and the factor of the Hessian, which is made beforehand and timed by itself. A time
is the median of several runs by the clock on the wall, what the processor does included. Asked for is 50 times the
speed of torch's loop, acceptable is 20. Prints a table, writes results/gptq_loop.json.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import TypeVar
from unittest.mock import patch

import torch

from measure import machine, print_table, save
from quantool.kernels import cuda, gptq_ops
from quantool.methods import descent, gptq
from quantool.methods.statistics import Inputs

GROUP, RUNS = 128, 3
Result = TypeVar("Result")


def timed(run: Callable[[], Result]) -> tuple[float, Result]:
    """Seconds of one call, the median of some after a first; and what the last returned."""
    times = []
    for _ in range(1 + RUNS):
        torch.cuda.synchronize()
        start = time.perf_counter()
        result = run()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:]), result


def inputs_of(columns: int) -> Inputs:
    """What reaches a linear: twice as many tokens as channels, which are of very different sizes."""
    x = torch.randn(2 * columns, columns, device="cuda").mul_(torch.randn(columns, device="cuda").exp_())
    return Inputs(x.T @ x / len(x), x.abs().amax(0), len(x))


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=4096, metavar="N")
    parser.add_argument("--columns", type=int, default=14336, metavar="K")
    args = parser.parse_args()
    if (reason := cuda.why_not()) is not None:
        raise SystemExit(f"error: no kernels to measure: {reason}")
    torch.manual_seed(0)
    weight, inputs = torch.randn(args.rows, args.columns, device="cuda"), inputs_of(args.columns)
    step = weight.unflatten(1, (-1, GROUP)).abs().amax(-1) / 7.5
    factor, inputs.factor = timed(lambda: gptq.factorise(inputs.moment, damp_percent=0.01, actorder="static"))

    def measured(sweeps: int) -> tuple[float, torch.Tensor | None]:
        grid = {"step": step, "offset": None, "zero": 8, "max_code": 15}
        return timed(lambda: gptq.round_columns(weight, inputs, **grid, damp_percent=0.01, sweeps=sweeps))

    result = {"machine": machine(), "gpu": torch.cuda.get_device_name(), "rows": args.rows, "columns": args.columns}
    result |= {"factor_seconds": factor}
    lines = []
    for name, sweeps in (("rounding", 0), ("rounding and one sweep of descent", 1)):
        ours, codes = measured(sweeps)
        with (
            patch.object(gptq, "gptq_columns", gptq_ops.gptq_columns_reference),
            patch.object(descent, "descend_columns", gptq_ops.descend_columns_reference),
        ):
            theirs, expected = measured(sweeps)
        same = float((codes == expected).float().mean())
        result[name] = {"kernel_seconds": ours, "torch_seconds": theirs, "speed": theirs / ours, "same_codes": same}
        lines.append((name, f"{1e3 * ours:.1f}", f"{1e3 * theirs:.1f}", f"{theirs / ours:.1f}", f"{100 * same:.4f}%"))
    print_table(("", "kernel, ms", "torch, ms", "speed", "same codes"), lines)
    print(f"the factor of the Hessian: {1e3 * factor:.0f} ms; wrote {save('gptq_loop', result)}")


if __name__ == "__main__":
    main()
