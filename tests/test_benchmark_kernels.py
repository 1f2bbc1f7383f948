"""benchmarks/kernels.py but for the GPU: what it judges, prints and writes; its products beside float64 on a CPU."""

import importlib
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("kernel_figures")


@pytest.fixture
def benchmark(figures: ModuleType, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module = importlib.import_module("kernels")
    monkeypatch.setattr(module, "GPU", torch.device("cpu"))
    return module


def run_of(figures: ModuleType, seconds: dict[tuple[int, str], float], shapes: int | None = None) -> object:
    """A run in which every shape (or the first few) took the same seconds."""
    timings = {
        (shape, tokens, kernel): figures.Timing(time, noise=0.01, nbytes=shape.weights // 2, error=1e-3)
        for shape in figures.SHAPES[:shapes]
        for (tokens, kernel), time in seconds.items()
    }
    return figures.Measured(copy=4e12, timings=timings)


def figure(figures: ModuleType, start: str) -> object:
    [found] = [figure for figure in figures.FIGURES if figure.label.startswith(start)]
    return found


@pytest.mark.parametrize(("slower", "verdict"), [(3.3, "goal"), (3.2, "goal"), (3.1, "accept"), (2.5, "below")])
def test_a_figure_is_that_of_the_worst_shape(figures: ModuleType, slower: float, verdict: str) -> None:
    measured = run_of(figures, {(1, "bf16"): 4.0, (1, "w4a16"): 1.0})
    last = figures.LARGE[-1]
    measured.timings[last, 1, "bf16"] = figures.Timing(slower, 0.01, 1, 1e-3)
    reached = figures.judge(figure(figures, "M=1, at least 58M"), measured)
    assert (reached.value, reached.shape, reached.verdict) == (slower, last.name, verdict)
    assert reached.measured == len(figures.LARGE) == 7


@pytest.mark.parametrize(("growth", "verdict"), [(1.05, "goal"), (1.2, "accept"), (1.5, "below")])
def test_where_less_is_better_the_worst_is_the_largest(figures: ModuleType, growth: float, verdict: str) -> None:
    measured = run_of(figures, {(1, "w4a16"): 1.0, (8, "w4a16"): 1.0})
    measured.timings[figures.SHAPES[3], 8, "w4a16"] = figures.Timing(growth, 0.01, 1, 1e-3)
    reached = figures.judge(figure(figures, "M=8 time"), measured)
    assert (reached.value, reached.shape, reached.verdict) == (growth, figures.SHAPES[3].name, verdict)


def test_a_figure_needs_no_shape_that_was_not_reached(figures: ModuleType) -> None:
    measured = run_of(figures, {(1, "w4a16"): 1.0, (1, "int4pack"): 2.0}, shapes=2)
    over = figures.judge(figure(figures, "M=1 over aten"), measured)
    assert (over.value, over.verdict, over.measured) == (2.0, "goal", 2)
    nothing = figures.judge(figure(figures, "M=32 over aten"), measured)
    assert (math.isnan(nothing.value), nothing.verdict, nothing.measured) == (True, "-", 0)


def test_the_share_counts_bytes_over_those_of_the_copy(figures: ModuleType) -> None:
    [square] = figures.SQUARE
    timings = {(square, 1, "w4a16"): figures.Timing(seconds=2e-6, noise=0, nbytes=6_000_000, error=0)}
    assert figures.Measured(4e12, timings).share(square, 1, "w4a16") == pytest.approx(0.75)


def test_the_table_of_times_has_a_line_per_measurement(figures: ModuleType) -> None:
    measured = run_of(figures, {(1, "w4a16"): 10e-6, (8, "w4a16"): 11e-6, (1, "bf16"): 35e-6}, shapes=2)
    header, lines = figures.timing_table(measured, ["w4a16"], ["bf16"])
    assert [line[1:5] for line in lines[:2]] == [
        ("8B down", "4096x14336", "1", "10.0"),
        ("8B down", "4096x14336", "8", "11.0"),
    ]
    assert len(lines) == 4
    assert [line[header.index("over bf16")] for line in lines[:2]] == ["3.50x", "-"]


def test_a_run_that_was_stopped_is_json_too(figures: ModuleType) -> None:
    measured = run_of(figures, {(1, "w4a16"): 1e-5}, shapes=1)
    read = json.loads(json.dumps(figures.as_json(measured), allow_nan=False))
    assert read["rows"][0]["over_bf16"] is None
    assert [entry["verdict"] for entry in read["figures"]].count("-") == len(figures.FIGURES) - 1


def test_the_readme_asks_for_the_same_figures(figures: ModuleType) -> None:
    readme = (ROOT / "README.md").read_text()
    [table] = re.findall(r"<!-- kernel table.*?-->\n(.*?)\n\n", readme, re.DOTALL)
    shown = [tuple(cell.strip() for cell in line.strip("|").split("|"))[:3] for line in table.splitlines()[2:]]
    _, lines = figures.figure_table([figures.judge(figure, figures.Measured(1.0)) for figure in figures.FIGURES])
    assert shown == [tuple(line[:3]) for line in lines]


@pytest.mark.parametrize("name", ["bf16", "w4a16"])
def test_a_product_is_compared_with_float64(benchmark: ModuleType, name: str) -> None:
    linear = getattr(benchmark, name)(128, 256)
    x = torch.randn(3, 256, dtype=torch.bfloat16)
    y = linear.apply(x)
    assert benchmark.relative_error(y, x, linear) < 4e-3
    assert benchmark.relative_error(y.roll(1, dims=1), x, linear) > 0.5  # every output belongs to another row
    y[2, 5] = math.nan  # not among those that are compared, and was not written
    assert math.isnan(benchmark.relative_error(y, x, linear))


def test_peers_get_the_codes_in_the_layout_of_gptq(benchmark: ModuleType) -> None:
    codes = torch.zeros(2, 16, dtype=torch.uint8)
    codes[1, 8:] = torch.arange(8, dtype=torch.uint8)
    assert benchmark.words_by_columns(codes).tolist() == [[0, 0], [0, 0x76543210]]


def test_what_is_missing_or_fails_stops_nobody(benchmark: ModuleType, figures: ModuleType) -> None:
    run = benchmark.Run({}, figures.Measured(1.0), deadline=0)
    peer, ours = benchmark.Kernel("peer", benchmark.marlin), benchmark.Kernel("ours", benchmark.w4a16, ours=True)
    with benchmark.failures(run, peer, "8B o"):
        peer.make(128, 256)  # neither vLLM nor GPTQModel is in our environment
    with benchmark.failures(run, ours, "8B o"):
        ours.make(100, 256)  # no multiple of 16
    assert list(run.missing) == ["peer"]
    [line] = run.failed
    assert line.startswith("ours, 8B o: ")
    assert "100" in line


def test_without_kernels_there_is_one_line_and_exit_code_1() -> None:
    environment = {**os.environ, "QUANTOOL_KERNELS": "0", "PYTHONPATH": str(ROOT)}
    command = (sys.executable, str(ROOT / "benchmarks" / "kernels.py"))
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "error: no kernels to measure: switched off by QUANTOOL_KERNELS=0\n"
