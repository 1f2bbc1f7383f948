"""Compile every csrc/cuda/*.cu for three architectures, and hold each kernel to the registers it may have.

    python tests/kernels/nvcc.py            the table; exit status 1 for a kernel that spills, has a stack frame or
                                            more registers than registers.json says, and for a warning
    python tests/kernels/nvcc.py --write    registers.json from what the compiler says now

registers.json has a number per kernel: the most registers on any of the architectures, rounded up to the next eight,
in which hardware gives them out. So occupancy cannot be lost without a line in the diff, and a compiler that takes one
register more stops nobody. No GPU is needed, and no compiler but CUDA's: `pip install -e '.[cuda]'` brings nvcc 13.0.
"""

import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from quantool.errors import QuantoolError
from quantool.kernels import build

CUDA = build.SOURCES / "cuda"
BUDGETS = Path(__file__).parent / "registers.json"
ARCHITECTURES = ("75", "80", "90a")
ENTRY = re.compile(r"Compiling entry function '(\w+)' for 'sm_(\w+)'")
MEMORY = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
REGISTERS = re.compile(r"Used (\d+) registers")


class Use(NamedTuple):
    registers: int
    stack: int
    spills: int


Kernels = dict[str, dict[str, Use]]  # by name and architecture


def main(arguments: list[str]) -> int:
    try:
        home, version = build._toolkit()
    except QuantoolError as error:
        print(f"error: {error}\nhint: pip install -e '.[cuda]'", file=sys.stderr)
        return 1
    with ThreadPoolExecutor(2) as pool:
        done = list(pool.map(lambda source: compile_for_all(home, source), sorted(CUDA.glob("*.cu"))))
    if errors := [process.stderr for process in done if process.returncode]:
        print(*errors, sep="\n", file=sys.stderr)
        return 1
    kernels = parse("".join(process.stderr for process in done))
    if arguments == ["--write"]:
        BUDGETS.write_text(json.dumps(budgets_for(kernels), indent=2) + "\n", encoding="utf-8")
    budgets = json.loads(BUDGETS.read_text(encoding="utf-8"))
    print(f"nvcc {version}", *(f"sm_{a}" for a in ARCHITECTURES), "budget", "kernel", sep="\t")
    for name, uses in sorted(kernels.items()):
        print("\t", *(uses[a].registers for a in ARCHITECTURES), budgets.get(name, "none"), name, sep="\t")
    found = complaints(kernels, budgets)
    print(*found, f"{len(kernels)} kernels, {len(found)} complaints", sep="\n")
    return 1 if found else 0


def compile_for_all(home: Path, source: Path) -> subprocess.CompletedProcess[str]:
    targets = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in ARCHITECTURES]
    options = [*build.NVCC_FLAGS, f"-I{CUDA}", "-Werror", "all-warnings", "-Xptxas", "-v", "-fatbin", "-o", os.devnull]
    command = [home / "bin/nvcc", *options, *targets, source]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def parse(said: str) -> Kernels:
    """What the assembler says of kernels, by their C++ names without parameters."""
    _, *entries = ENTRY.split(said)
    mangled = "\n".join(entries[::3])
    names = subprocess.run(["c++filt", "-p"], input=mangled, capture_output=True, text=True, check=True).stdout
    kernels: Kernels = {}
    for name, architecture, text in zip(names.splitlines(), entries[1::3], entries[2::3], strict=True):
        memory = [[int(number) for number in found] for found in MEMORY.findall(text)]  # of what is not inlined too
        use = Use(int(REGISTERS.findall(text)[0]), sum(m[0] for m in memory), sum(m[1] + m[2] for m in memory))
        short = re.sub(r"quantool::|\(anonymous namespace\)::", "", name)
        kernels.setdefault(short, {})[architecture] = use
    return kernels


def budgets_for(kernels: Kernels) -> dict[str, int]:
    return {name: -(-max(use.registers for use in uses.values()) // 8) * 8 for name, uses in sorted(kernels.items())}


def complaints(kernels: Kernels, budgets: dict[str, int]) -> list[str]:
    found = []
    for name, uses in kernels.items():
        if name not in budgets:
            found.append(f"{name}: has no budget: python tests/kernels/nvcc.py --write, and look at the diff")
        for architecture, use in uses.items():
            if use.stack or use.spills:
                found.append(f"{name}: sm_{architecture} spills {use.spills} bytes, stack frame of {use.stack} bytes")
            if use.registers > budgets.get(name, use.registers):
                found.append(
                    f"{name}: sm_{architecture} takes {use.registers} registers, its budget is {budgets[name]}"
                )
    return found + [f"{name}: has a budget and is no kernel" for name in budgets if name not in kernels]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
