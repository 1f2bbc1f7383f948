"""What the emulator has to find, in kernels that have it: emulator/faults.cu, one fault per launcher.

A test whose kernels run in the emulator says something only as long as these pass.
"""

import ctypes
import re
import subprocess
import sys
from pathlib import Path

import emulated as emulation
import pytest
import torch
from emulated import Emulated

from quantool.kernels import cuda

SOURCES = [emulation.CUDA / "runtime.cu", emulation.EMULATOR / "faults.cu"]
LINES = SOURCES[1].read_text(encoding="utf-8").splitlines()


@pytest.fixture(scope="module", autouse=True)
def _compiler() -> None:
    if reason := emulation.why_not():
        pytest.skip(reason)


@pytest.fixture
def faults(monkeypatch: pytest.MonkeyPatch) -> Emulated:
    library = ctypes.CDLL(str(emulation.build(SOURCES, sanitize=False)))
    monkeypatch.setattr(cuda, "library", lambda: library)
    kernels = Emulated(library)
    kernels.seed(0)
    return kernels


def run(name: str, number: int = 0) -> list[float]:
    y = torch.zeros(128)
    cuda.call(name, y, torch.arange(256.0), number)
    return y[:64].tolist()


def line(message: str, number: int = 0) -> str:
    """The source of the n-th line of faults.cu that the message names."""
    return LINES[int(re.findall(r"\(faults\.cu:(\d+)\)", message)[number]) - 1]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("fine_barrier", [63 - i for i in range(64)]),
        ("fine_rounds", [1] * 64),
        ("fine_warp_barrier", [1 + (i ^ 1) for i in range(64)]),
        ("fine_wait", [4 * (i + 1) if i < 15 else 0 for i in range(64)]),
        ("fine_wait_for_its_own", [4 * i if i < 16 else 0 for i in range(64)]),
        ("fine_pipeline", [0] * 64),
        ("fine_returned", [3 + i // 32 * 32 if i % 32 < 16 else 0 for i in range(64)]),
    ],
)
def test_what_has_no_fault_runs(faults: Emulated, name: str, expected: list[float], seed: int) -> None:
    faults.seed(seed)
    assert run(name) == expected


RACES = [
    # the launcher, what happened, the line of the access, the line of the earlier write
    ("no_barrier", "with no barrier between", "y[threadIdx.x] = floats()[63", "floats()[threadIdx.x] ="),
    ("no_second_barrier", "with no barrier between", "sum +=", "= (float)round"),
    ("no_warp_barrier", "with no barrier between", "value + floats()", "floats()[threadIdx.x] ="),
    ("warp_barrier_for_a_block", "with no barrier between", "floats()[threadIdx.x ^ 32]", "floats()[threadIdx.x] ="),
    ("all_write_one_place", "with no barrier between", "y[0]", "y[0]"),
    ("reads_another_block", "in the same launch", "y[64 * blockIdx.x", "blockIdx.x == 1"),
    ("no_wait", "while a copy_async", "Shift", "copy_async"),
    ("no_wait_for_its_own", "while a copy_async", "Shift", "copy_async"),
    ("no_barrier_after_wait", "with no barrier between", "Shift", "copy_async"),
]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("name", "what", "access", "write"), RACES, ids=[race[0] for race in RACES])
def test_a_race_is_found_in_every_order(
    faults: Emulated, name: str, what: str, access: str, write: str, seed: int
) -> None:
    faults.seed(seed)
    with pytest.raises(RuntimeError, match=what) as caught:
        run(name)
    found = [line(str(caught.value)), line(str(caught.value), 1)]
    either = [access in found[0] and write in found[1], access in found[1] and write in found[0]]
    assert any(either), found


WAITS = [
    ("divergent_barrier", "thread 0 waits at __syncthreads .* and thread 40 at __syncthreads", 3),
    ("barrier_against_shuffle", "thread 0 waits at __syncthreads .* and thread 32 at __shfl_sync", 2),
    ("divergent_shuffle", "thread 0 waits at __shfl_xor_sync .* and thread 1 at __shfl_xor_sync", 2),
    ("partial_mask", "__shfl_xor_sync .* with the mask 0xffff", 0),
    ("shuffle_from_the_returned", "lane 0 shuffles from lane 20, which has returned", 0),
    ("mma_without_all_lanes", "lane 16 has returned before an mma", 0),
    ("returns_before_its_copy", "returns before it has waited for its copy_async", 0),
    ("too_much_shared_memory", "233472 bytes of shared memory", 0),
    ("too_deep_a_grid", "1 x 65536 x 1", 0),
]


@pytest.mark.parametrize(("name", "message", "lines_apart"), WAITS, ids=[wait[0] for wait in WAITS])
def test_threads_that_wait_for_what_never_comes(faults: Emulated, name: str, message: str, lines_apart: int) -> None:
    with pytest.raises(RuntimeError, match=message) as caught:
        run(name)
    if lines_apart:
        first, second = (int(number) for number in re.findall(r"faults\.cu:(\d+)", str(caught.value)))
        assert abs(first - second) in {2, 3}


@pytest.mark.parametrize(
    ("name", "access"),
    [
        ("streaming_load", "load_streaming("),
        ("async_copy", "copy_async("),
        ("plain_load", "reinterpret_cast<const float*>"),
    ],
)
def test_misaligned(faults: Emulated, name: str, access: str) -> None:
    run(name)
    with pytest.raises(RuntimeError, match=r"multiple of (16|it)") as caught:
        run(name, 2)
    assert access in line(str(caught.value))


def test_shared_memory_is_nan_until_it_is_written(faults: Emulated) -> None:
    assert all(y != y for y in run("unwritten_shared_memory"))  # noqa: PLR0124


def test_the_order_of_threads_is_that_of_the_seed(faults: Emulated) -> None:
    """Which of the threads finds the race depends on who comes first."""

    def message(seed: int) -> str:
        faults.seed(seed)
        with pytest.raises(RuntimeError) as caught:
            run("all_write_one_place")
        return re.sub("0x[0-9a-f]+", "", str(caught.value))

    messages = [message(seed) for seed in range(8)]
    assert len(set(messages)) > 4
    assert messages == [message(seed) for seed in range(8)]


def test_a_failure_stays_until_the_next_seed(faults: Emulated) -> None:
    """As in CUDA: no launcher can lose it by queueing something else."""
    for _ in range(2):
        with pytest.raises(RuntimeError, match="no barrier"):
            run("no_barrier")
    with pytest.raises(RuntimeError, match="no barrier"):
        run("fine_barrier")
    faults.seed(0)
    run("fine_barrier")


SANITIZED = """
import ctypes, sys
library, name, number, tensors = sys.argv[1:]
library = ctypes.CDLL(library)
if tensors == "torch":
    import torch
    y, x = torch.zeros(128), torch.zeros(256)
    addresses = y.data_ptr(), x.data_ptr()
else:
    y, x = (ctypes.c_float * 128)(), (ctypes.c_float * 256)()
    addresses = ctypes.addressof(y), ctypes.addressof(x)
sys.exit(library[name](*map(ctypes.c_void_p, addresses), ctypes.c_int64(int(number))))
"""


@pytest.mark.parametrize(
    ("name", "fine", "number", "message", "tensors"),
    [
        ("plain_load", 1020, 1024, "heap-buffer-overflow", "torch"),
        ("plain_load", 1020, 1024, "heap-buffer-overflow", "ctypes"),
        ("plain_load", 4, 2, "misaligned address", "ctypes"),
        ("shared_load", 63, 64, "heap-buffer-overflow", "ctypes"),
        ("async_copy", 1024, 1040, "heap-buffer-overflow", "ctypes"),
        ("async_copy_from", 1008, 1024, "heap-buffer-overflow", "ctypes"),
        ("array_element", 3, 4, "index 4 out of bounds", "ctypes"),
        ("addition", 2**31 - 64, 2**31 - 1, "signed integer overflow", "ctypes"),
        ("shift", 31, 32, "shift exponent", "ctypes"),
    ],
)
def test_sanitizers(name: str, fine: int, number: int, message: str, tensors: str) -> None:
    library = emulation.build(SOURCES, sanitize=True)

    def process(number: int) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", SANITIZED, str(library), name, str(number), tensors]
        environment = emulation.sanitized_environment()
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

    found = process(number)
    assert found.returncode
    assert message in found.stderr
    assert "faults.cu" in found.stderr
    ends = process(fine)
    assert ends.returncode == 0, ends.stderr


def test_a_file_that_does_not_compile_is_named(tmp_path: Path) -> None:
    (tmp_path / "fine.cu").write_text('#include "device.cuh"\n')
    for name in ("first", "second"):
        (tmp_path / f"{name}.cu").write_text("#include <stdint.h>\nint x = undeclared;\n")
    with pytest.raises(RuntimeError, match=r"first\.cu:2:9: error(.|\n)*second\.cu:2:9: error"):
        emulation.build(sorted(tmp_path.glob("*.cu")))
