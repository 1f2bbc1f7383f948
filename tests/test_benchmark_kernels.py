"""benchmarks/kernels.py and tune_kernels.py but for the GPU: what they judge, print and write, and what is set when.

Products are computed on the CPU. A graph that computes its first product again stands in for CUDA's.
"""

import functools
import importlib
import importlib.util
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from itertools import combinations
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from quantool.kernels import cuda, int8, nf4, wna16

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("kernel_figures")


@pytest.fixture
def linears(figures: ModuleType, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module = importlib.import_module("kernel_linears")
    monkeypatch.setattr(module, "GPU", torch.device("cpu"))
    return module


@functools.cache
def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def benchmark(linears: ModuleType, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """By its path: transformers looks for a package `kernels` too, and has found tests/kernels by now."""
    module = load(ROOT / "benchmarks" / "kernels.py")
    monkeypatch.setitem(sys.modules, "kernels", module)
    return module


@pytest.fixture
def small(benchmark: ModuleType, figures: ModuleType, monkeypatch: pytest.MonkeyPatch) -> object:
    """The one shape that there is. What is recorded is computed at once, and takes a microsecond."""

    def capture(calls: Sequence[Callable[[], torch.Tensor]]) -> tuple[object, torch.Tensor]:
        first = calls[0]()
        return SimpleNamespace(replay=lambda: first.copy_(calls[0]())), first

    shape = figures.Shape("small", 128, 512)
    monkeypatch.setattr(benchmark, "capture", capture)
    monkeypatch.setattr(benchmark, "replay", lambda graph, times: 1e-6)
    monkeypatch.setattr(benchmark, "GRAPH_SECONDS", 1e-12)
    monkeypatch.setattr(benchmark, "ROTATED_BYTES", 1)
    monkeypatch.setattr(benchmark, "MIN_COPIES", 1)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    for module in (figures, benchmark):
        monkeypatch.setattr(module, "SHAPES", (shape,))
    return shape


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
    reached = figures.judge(figure(figures, "W4A16, M=1, at least 58M"), measured)
    assert (reached.value, reached.shape, reached.verdict) == (slower, last.name, verdict)
    assert reached.measured == len(figures.LARGE) == 7


@pytest.mark.parametrize(("growth", "verdict"), [(1.05, "goal"), (1.2, "accept"), (1.5, "below")])
def test_where_less_is_better_the_worst_is_the_largest(figures: ModuleType, growth: float, verdict: str) -> None:
    measured = run_of(figures, {(1, "w4a16"): 1.0, (8, "w4a16"): 1.0})
    measured.timings[figures.SHAPES[3], 8, "w4a16"] = figures.Timing(growth, 0.01, 1, 1e-3)
    reached = figures.judge(figure(figures, "W4A16, M=8 time"), measured)
    assert (reached.value, reached.shape, reached.verdict) == (growth, figures.SHAPES[3].name, verdict)


def test_a_figure_needs_no_shape_that_was_not_reached(figures: ModuleType) -> None:
    measured = run_of(figures, {(1, "w4a16"): 1.0, (1, "int4pack"): 2.0}, shapes=2)
    over = figures.judge(figure(figures, "W4A16, M=1, over aten"), measured)
    assert (over.value, over.verdict, over.measured) == (2.0, "goal", 2)
    nothing = figures.judge(figure(figures, "W4A16, M=32, over aten"), measured)
    assert (math.isnan(nothing.value), nothing.verdict, nothing.measured) == (True, "-", 0)


def test_the_share_counts_bytes_over_those_of_the_copy(figures: ModuleType) -> None:
    [square] = figures.SQUARE
    timings = {(square, 1, "w4a16"): figures.Timing(seconds=2e-6, noise=0, nbytes=6_000_000, error=0)}
    assert figures.Measured(4e12, timings).share(square, 1, "w4a16") == pytest.approx(0.75)


def test_the_table_of_times_has_a_line_per_measurement(figures: ModuleType) -> None:
    seconds = {(1, "w4a16"): 10e-6, (8, "w4a16"): 11e-6, (1, "bf16"): 35e-6, (1, "nf4"): 7e-6}
    measured = run_of(figures, seconds, shapes=2)
    header, lines = figures.timing_table(measured, {"w4a16": ["bf16", "marlin"], "nf4": ["w4a16"]})
    assert [line[1:5] for line in lines[:2]] == [
        ("8B down", "4096x14336", "1", "10.0"),
        ("8B down", "4096x14336", "8", "11.0"),
    ]
    assert len(lines) == 6
    assert [line[header.index("over bf16")] for line in lines] == ["3.50x", "-"] * 2 + ["-"] * 2
    assert [line[header.index("over w4a16")] for line in lines] == ["-"] * 4 + ["1.43x"] * 2
    assert "over marlin" not in header  # was not measured


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


@pytest.mark.parametrize("name", ["bf16", "w4a16", "w8a8", "int_mm", "llm-int8", "nf4", "bitsandbytes"])
def test_a_product_is_compared_with_float64(benchmark: ModuleType, linears: ModuleType, name: str) -> None:
    kernel = linears.KERNELS[name]
    linear, x = kernel.make(128, 1024), kernel.activations(32, 1024)
    y = linear.apply(x)
    assert benchmark.relative_error(y, x, linear) < kernel.tolerance
    assert benchmark.relative_error(y.roll(1, dims=1), x, linear) > 0.5  # every output belongs to another row
    assert linear.nbytes * 8 >= {"bf16": 16, "w8a8": 8, "int_mm": 8, "llm-int8": 8}.get(name, 4.12) * 128 * 1024
    if y.is_floating_point():
        y[2, 5] = math.nan  # not among those that are compared, and was not written
        assert math.isnan(benchmark.relative_error(y, x, linear))


def test_llm_int8_is_given_what_int8_alone_gets_wrong(benchmark: ModuleType, linears: ModuleType) -> None:
    linear, x = linears.w8a8(128, 1024), linears.with_outliers(32, 1024)
    assert int((x.abs() > linears.THRESHOLD).any(0).sum()) == 2
    assert benchmark.relative_error(linear.apply(x), x, linear) > linears.KERNELS["llm-int8"].tolerance


def test_peers_get_the_codes_in_the_layout_of_gptq(linears: ModuleType) -> None:
    codes = torch.zeros(2, 16, dtype=torch.uint8)
    codes[1, 8:] = torch.arange(8, dtype=torch.uint8)
    assert linears.words_by_columns(codes).tolist() == [[0, 0], [0, 0x76543210]]


def test_a_whole_run_fills_all_tables(linears: ModuleType, figures: ModuleType) -> None:
    everything = {(tokens, name): 1.0 for tokens in figures.TOKENS for name in linears.KERNELS}
    judged = [figures.judge(figure, run_of(figures, everything)) for figure in figures.FIGURES]
    assert [reached.measured for reached in judged] == [len(figure.shapes) for figure in figures.FIGURES]
    assert {other for kernel in linears.KERNELS.values() for other in kernel.beside} <= set(linears.KERNELS)


def test_what_is_missing_or_fails_stops_nobody(benchmark: ModuleType, linears: ModuleType, figures: ModuleType) -> None:
    run = benchmark.Run({}, figures.Measured(1.0), deadline=0)
    peer, ours = linears.Kernel("peer", linears.marlin), linears.Kernel("ours", linears.w4a16)
    with benchmark.failures(run, peer, "8B o"):
        peer.make(128, 256)  # neither vLLM nor GPTQModel is in our environment
    with benchmark.failures(run, ours, "8B o"):
        ours.make(100, 256)  # no multiple of 16
    assert list(run.missing) == ["peer"]
    [line] = run.failed
    assert line.startswith("ours, 8B o: ")
    assert "100" in line


def test_after_a_failure_larger_m_are_tried(
    benchmark: ModuleType, linears: ModuleType, figures: ModuleType, small: object
) -> None:
    def fails_at_8(rows: int, columns: int) -> object:
        linear = linears.bf16(rows, columns)

        def apply(x: torch.Tensor) -> torch.Tensor:
            if len(x) == 8:
                raise RuntimeError("no kernel for 8 tokens")
            return linear.apply(x)

        return linears.Linear(apply, linear.nbytes, linear.sample)

    run = benchmark.Run({}, figures.Measured(1.0), deadline=math.inf)
    kernels = (linears.Kernel("fails", fails_at_8), linears.Kernel("least", linears.bf16, least=9))
    benchmark.measure_shape(run, kernels, small, (1, 8, 16))
    assert [(tokens, name) for _, tokens, name in run.measured.timings] == [(1, "fails"), (16, "fails"), (16, "least")]
    assert run.failed == ["fails, small, 8 tokens: RuntimeError: no kernel for 8 tokens"]


def test_what_a_graph_does_not_write_is_not_measured(
    benchmark: ModuleType, linears: ModuleType, figures: ModuleType, small: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    def recorded_nothing(calls: Sequence[Callable[[], torch.Tensor]]) -> tuple[object, torch.Tensor]:
        return SimpleNamespace(replay=lambda: None), calls[0]()

    monkeypatch.setattr(benchmark, "capture", recorded_nothing)
    run = benchmark.Run({}, figures.Measured(1.0), deadline=math.inf)
    benchmark.measure_shape(run, (linears.KERNELS["bf16"], linears.KERNELS["int_mm"]), small, (32,))
    assert not run.measured.timings
    assert len(run.failed) == 2
    assert all("ArithmeticError: relative error" in line for line in run.failed)


@pytest.fixture
def machine_with_gpu(benchmark: ModuleType, small: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "card", lambda: {"name": "NVIDIA Test GPU", "before": {}})
    monkeypatch.setattr(benchmark, "clocks", dict)
    monkeypatch.setattr(benchmark, "copy_rate", lambda: 4e12)
    monkeypatch.setattr(benchmark, "matmul_rate", lambda: 6e14)
    monkeypatch.setattr(benchmark, "TOKENS", (1, 32))
    monkeypatch.setattr(benchmark.cuda, "why_not", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA Test GPU")


@pytest.mark.usefixtures("machine_with_gpu")
def test_a_run_measures_all_that_is_installed(
    benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["kernels.py", "--output", str(tmp_path)])
    benchmark.main()
    result = json.loads((tmp_path / "kernels-test-gpu.json").read_text())
    measured = {(row["kernel"], row["tokens"]) for row in result["rows"]}
    ours = {(kernel, tokens) for kernel in ("bf16", "w4a16", "w8a8", "llm-int8", "nf4") for tokens in (1, 32)}
    assert ours <= measured
    assert {pair for pair in measured if pair[0] == "int_mm"} == {("int_mm", 32)}
    assert {"marlin", "humming"} <= set(result["not_installed"])
    assert [line.partition(":")[0] for line in result["failed"]] == ["int4pack, small"]  # has no CPU kernel
    assert re.search(r"\| nf4 +\| small \| 128x512 \| +32 \| +1\.0 \|", capsys.readouterr().out)


@pytest.mark.usefixtures("machine_with_gpu")
def test_a_choice_is_printed_and_leaves_the_results_alone(
    benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--only", "nf4", "bf16", "--tokens", "12", "--output", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["kernels.py", *words])
    benchmark.main()
    assert not list(tmp_path.iterdir())
    [line] = [line for line in capsys.readouterr().out.splitlines() if " small " in line]
    assert [cell.strip() for cell in line.split("|")][1:6] == ["nf4", "small", "128x512", "12", "1.0"]


@pytest.mark.usefixtures("machine_with_gpu")
def test_tuning_sets_constants_while_products_are_recorded(
    benchmark: ModuleType,
    linears: ModuleType,
    figures: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    tune = importlib.import_module("tune_kernels")
    module = SimpleNamespace(BLOCKS=2, COLUMNS=1024)

    def capture(calls: Sequence[Callable[[], torch.Tensor]]) -> tuple[object, torch.Tensor]:
        y = calls[0]()
        seconds = 1e-6 * module.COLUMNS / 1024 / module.BLOCKS
        return SimpleNamespace(replay=lambda: y.copy_(calls[0]()), seconds=seconds), y

    monkeypatch.setattr(benchmark, "capture", capture)
    monkeypatch.setattr(benchmark, "replay", lambda graph, times: graph.seconds)
    values = {"BLOCKS": (1, 2, 4), "COLUMNS": (1024, 2048)}
    monkeypatch.setattr(tune, "GRIDS", (tune.Grid("grid", linears.KERNELS["bf16"], module, values, (1, 8)),))
    monkeypatch.setattr(tune, "SHAPES", benchmark.SHAPES)
    monkeypatch.setattr(sys, "argv", ["tune_kernels.py", "--tokens", "8"])
    tune.main()
    assert (module.BLOCKS, module.COLUMNS) == (2, 1024)
    each, of_all = (
        [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]
        for table in capsys.readouterr().out.split("\n\n")
    )
    assert each == [["grid", "8", "small", "0.5", "0.2", "0.0%", "BLOCKS=4 COLUMNS=1024"]]
    assert [line[3:] for line in of_all[:3]] == [
        ["0.500", "BLOCKS=4 COLUMNS=1024"],
        ["1.000", "BLOCKS=2 COLUMNS=1024"],
        ["1.000", "BLOCKS=4 COLUMNS=2048"],
    ]
    assert len(of_all) == 6


def test_every_tuned_constant_changes_what_is_launched(
    linears: ModuleType, figures: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    tune = importlib.import_module("tune_kernels")
    launched: list[object] = []

    def int_mm(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        launched.append("_int_mm")
        return a.new_empty(len(a), b.shape[1], dtype=torch.int32)

    monkeypatch.setattr(linears, "GPU", torch.device("meta"))
    monkeypatch.setattr(linears, "linear_tiles", wna16.linear_cuda)
    monkeypatch.setattr(linears, "linear_w8a8", int8.linear_w8a8_cuda)
    monkeypatch.setattr(linears, "linear_nf4", nf4.linear_nf4_cuda)
    monkeypatch.setattr(wna16, "card", lambda device: wna16.Card(132, (9, 0)))
    monkeypatch.setattr(cuda, "is_available", lambda: True)
    monkeypatch.setattr(cuda, "call", lambda *of: launched.append([v for v in of if isinstance(v, str | int)]))
    monkeypatch.setattr(torch, "_int_mm", int_mm)

    def launches(grid: object, shape: object, tokens: int, combination: tuple[int, ...]) -> str:
        linear, x = grid.kernel.make(shape.rows, shape.columns), linears.normal(tokens, shape.columns)
        launched.clear()
        with tune.constants(grid.module, dict(zip(grid.values, combination, strict=True))):
            linear.apply(x)
        return str(launched)

    for grid in tune.GRIDS:
        changed: set[str] = set()
        for tokens in grid.tokens:
            differs = False
            for shape in figures.SHAPES:
                found = {values: launches(grid, shape, tokens, values) for values in grid.combinations()}
                differs |= len(set(found.values())) > 1
                for one, other in combinations(found, 2):
                    apart = [name for name, a, b in zip(grid.values, one, other, strict=True) if a != b]
                    if len(apart) == 1 and found[one] != found[other]:
                        changed.update(apart)
            assert differs, f"{grid.name} makes no difference to {tokens} tokens"
        assert changed == set(grid.values), grid.name


def test_without_kernels_there_is_one_line_and_exit_code_1() -> None:
    environment = {**os.environ, "QUANTOOL_KERNELS": "0", "PYTHONPATH": str(ROOT)}
    command = (sys.executable, str(ROOT / "benchmarks" / "kernels.py"))
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "error: no kernels to measure: switched off by QUANTOOL_KERNELS=0\n"
