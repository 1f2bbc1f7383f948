"""nvcc.py complains of a kernel that spills, that has grown, and that nobody has given a budget."""

import json
import re
from pathlib import Path

import nvcc
import pytest

from quantool.errors import QuantoolError
from quantool.kernels import build

KERNELS = """
#include "device.cuh"

// Count values that live across a barrier; 1024 threads have 64 registers each
template <int Count>
__global__ void __launch_bounds__(1024) across(float* y) {
  float x[Count];
#pragma unroll
  for (int i = 0; i < Count; i++) x[i] = y[i * 1024 + threadIdx.x];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < Count; i++) y[i * 1024 + threadIdx.x] = x[Count - 1 - i];
}

// an array that no register can hold
__global__ void indexed(const int* index, float* y) {
  float x[16] = {};
  for (int i = 0; i < 99; i++) x[index[i]] += 1;
  for (int i = 0; i < 16; i++) y[i] = x[i];
}
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    try:
        build._toolkit()
    except QuantoolError as error:
        pytest.skip(str(error))
    (tmp_path / "device.cuh").symlink_to(nvcc.CUDA / "device.cuh")
    monkeypatch.setattr(nvcc, "CUDA", tmp_path)
    monkeypatch.setattr(nvcc, "BUDGETS", tmp_path / "registers.json")
    return tmp_path


def compile_and_check(folder: Path, source: str, *options: str) -> int:
    (folder / "a.cu").write_text(source)
    return nvcc.main(list(options))


FOUR = KERNELS[: KERNELS.index("// an array")] + "template __global__ void across<4>(float*);\n"


def test_a_kernel_may_not_grow(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert compile_and_check(folder, FOUR, "--write") == 0
    [[name, budget]] = json.loads((folder / "registers.json").read_text()).items()
    assert name == "across<4>"
    (folder / "registers.json").write_text(json.dumps({name: budget - 8, "gone<2>": 8}))
    capsys.readouterr()
    assert compile_and_check(folder, FOUR) == 1
    out = capsys.readouterr().out
    assert re.search(rf"across<4>: sm_80 takes \d+ registers, its budget is {budget - 8}\n", out)
    assert "gone<2>: has a budget and is no kernel" in out


def test_a_new_kernel_needs_a_budget(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "registers.json").write_text("{}")
    assert compile_and_check(folder, FOUR) == 1
    assert "across<4>: has no budget: python tests/kernels/nvcc.py --write" in capsys.readouterr().out


def test_no_budget_is_enough_for_a_spill_or_a_stack_frame(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert compile_and_check(folder, KERNELS + "template __global__ void across<128>(float*);\n", "--write") == 1
    out = capsys.readouterr().out
    assert re.search(r"across<128>: sm_90a spills [1-9]\d* bytes", out)
    assert re.search(r"indexed: sm_80 spills 0 bytes, stack frame of [1-9]\d* bytes", out)


def test_a_warning_is_an_error(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert compile_and_check(folder, '#include "device.cuh"\n__global__ void f() { int unused = 1; }\n') == 1
    assert "a.cu(2): error" in capfd.readouterr().err


def test_without_nvcc(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def missing() -> None:
        raise QuantoolError("no nvcc")

    monkeypatch.setattr(build, "_toolkit", missing)
    assert nvcc.main([]) == 1
    assert "pip install -e '.[cuda]'" in capsys.readouterr().err
