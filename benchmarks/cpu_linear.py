"""Linears of packed weights on the CPU beside dense ones and torch's own int4 product, in one run.

Usage: cpu_linear.py [--threads N] [--rows N] [--columns K] [--group G] [--json]

    dense        F.linear of the float weight
    quantool     linear_wna16 from 4-bit codes, compiled
    reference    linear_wna16 of torch alone, as with QUANTOOL_KERNELS=0: the weight is dequantized for each product
    int4pack     aten::_weight_int4pack_mm_for_cpu, bfloat16 only; its layout is a second one of the same weights

The ways take turns, and a time is the median of its turns; a ratio above 1 is faster than dense. Copies of the weights
take turns too, so that none is left in a cache by the turn before. With --json: results/cpu_linear.json.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from measure import machine, print_table, save
from quantool import kernels
from quantool.kernels import ops

TOKENS = (1, 2, 4, 8, 16, 32, 64, 256)
CACHE_BYTES = 128 << 20  # of packed copies of the weight: more than any cache
SECONDS = 1.5  # of all turns of one number of tokens

Way = Callable[[torch.Tensor], torch.Tensor]


def product(linear: Callable[..., torch.Tensor], weight: tuple[Any, ...], x: torch.Tensor) -> torch.Tensor:
    return linear(x, *weight)


def ways(rows: int, columns: int, group: int, dtype: torch.dtype) -> dict[str, list[Way]]:
    """name -> the same linear, from as many copies of its weight as fill the caches."""
    copies = max(2, CACHE_BYTES // (rows * columns // 2))
    out: dict[str, list[Way]] = {"dense": [], "quantool": [], "reference": []}
    if dtype == torch.bfloat16 and group in {32, 64, 128, 256} and rows % 16 == 0:
        out["int4pack"] = []
    for seed in range(copies):
        random = torch.Generator().manual_seed(seed)
        codes = torch.randint(0, 16, (rows, columns), generator=random, dtype=torch.uint8)
        scales = (torch.rand(rows, columns // group, generator=random) / 100 + 0.001).to(dtype)
        packed = ops.pack_bits(codes, 4)
        arguments = packed, scales, None, None, 4
        out["quantool"].append(partial(product, ops.linear_wna16, arguments))
        out["reference"].append(partial(product, ops.linear_wna16_reference, arguments))
        if seed < 2:  # a dense weight is larger
            weight = ops.dequantize(codes, scales, None, 4).to(dtype)
            out["dense"].append(partial(product, torch.nn.functional.linear, (weight,)))
        if "int4pack" in out:
            tiles = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.to(torch.int32), 1)
            grid = torch.stack((scales.T, torch.zeros_like(scales.T)), dim=-1).contiguous()
            out["int4pack"].append(partial(product, torch.ops.aten._weight_int4pack_mm_for_cpu, (tiles, group, grid)))
    return out


def milliseconds(found: dict[str, list[Way]], x: torch.Tensor) -> dict[str, float]:
    """The median of each way; their results are compared first."""
    expected = found["reference"][0](x).double()
    for name, copies in found.items():
        off = float((copies[0](x).double() - expected).norm() / expected.norm())
        if off > (1e-5 if x.dtype == torch.float32 else 1e-2):
            raise SystemExit(f"error: {name} with {len(x)} tokens is {off:.1e} off the reference")
    times: dict[str, list[float]] = {name: [] for name in found}
    end, turn = time.perf_counter() + SECONDS, 0
    while turn < 5 or time.perf_counter() < end:
        for name, copies in found.items():
            way = copies[turn % len(copies)]
            start = time.perf_counter()
            way(x)
            times[name].append(1e3 * (time.perf_counter() - start))
        turn += 1
    return {name: statistics.median(some) for name, some in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("threads", torch.get_num_threads()), ("rows", 4096), ("columns", 4096), ("group", 128)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if (reason := kernels.why_not()) is not None:
        raise SystemExit(f"error: no compiled kernels: {reason}")
    found: dict[str, Any] = {"machine": machine(), **vars(options), "milliseconds": {}}
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        linears = ways(options.rows, options.columns, options.group, dtype)
        table = {tokens: milliseconds(linears, torch.randn(tokens, options.columns).to(dtype)) for tokens in TOKENS}
        found["milliseconds"][name] = table
        others = [way for way in linears if way != "dense"]
        print(f"\n{name}, [{options.rows}, {options.columns}], groups of {options.group}, {options.threads} threads")
        print_table(
            ["tokens", "dense ms", *(f"{way} {unit}" for way in others for unit in ("ms", "ratio"))],
            [
                [
                    str(tokens),
                    f"{times['dense']:.2f}",
                    *(t for way in others for t in (f"{times[way]:.2f}", f"{times['dense'] / times[way]:.2f}")),
                ]
                for tokens, times in table.items()
            ],
        )
    if options.json:
        save("cpu_linear", found)


if __name__ == "__main__":
    main()
