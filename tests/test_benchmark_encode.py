"""benchmarks/encode.py but for the GPU: every encoder against ggml itself, on the CPU in place of it."""

import importlib
import json
import math
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from quantool.formats.ggml import GGML_TYPES
from quantool.kernels import cuda

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    module = importlib.import_module("encode")
    monkeypatch.setattr(importlib.import_module("measure"), "RESULTS", tmp_path)
    return module


def test_every_encoder_is_measured_and_compared(
    benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(benchmark, "GPU", torch.device("cpu"))
    monkeypatch.setattr(benchmark, "gpu_seconds", lambda *_, exact=False: 1e-9 if exact else 2e-9)
    monkeypatch.setattr(cuda, "why_not", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA Slow 1")
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    monkeypatch.setattr(sys, "argv", ["encode.py", "--rows", "4", "--columns", "512", "--threads", "1"])
    benchmark.main()
    result = json.loads((tmp_path / "encode-slow-1.json").read_text())
    blocks = [(name, weighted) for name in GGML_TYPES for weighted in (False, True)]
    found = [(row["encoder"], row["importance"]) for row in result["rows"]]
    assert found == [*blocks, ("rtn w4 g128", False), ("nf4", False)]
    assert all(row["same_as_cpu"] for row in result["rows"])
    assert all(row["exact_same_as_ggml"] for row in result["rows"][: len(blocks)])  # ggml's own bytes
    [figure] = result["figures"]
    slower = min(row["ggml_seconds"] / 2e-9 for row in result["rows"] if row["encoder"] == "Q4_K")
    assert (figure["measured"], figure["verdict"]) == (slower, "goal")
    out = capsys.readouterr().out
    assert "DIFFER" not in out
    assert "Q4_K encode over ggml on all cores" in out


def times(encoder: str, gpu: float, ggml: float | None) -> dict[str, object]:
    return {"encoder": encoder, "gpu_seconds": gpu, "ggml_seconds": ggml}


@pytest.mark.parametrize(
    ("seconds", "verdict"), [((100.0, 150.0), "goal"), ((99.0, 150.0), "accept"), ((300.0, 29.0), "below")]
)
def test_the_figure_is_that_of_the_slower(benchmark: ModuleType, seconds: tuple[float, ...], verdict: str) -> None:
    rows = [times("Q4_K", 1.0, ggml) for ggml in seconds]
    figure = benchmark.figure([*rows, times("Q5_K", 1.0, 1.0)])
    assert (figure["measured"], figure["verdict"]) == (min(seconds), verdict)


def test_without_ggml_there_is_no_figure(benchmark: ModuleType) -> None:
    rows = [times("Q4_K", 1.0, None)]
    assert math.isnan(benchmark.speed(rows[0], "gpu", "ggml"))
    assert (benchmark.figure(rows)["measured"], benchmark.figure(rows)["verdict"]) == (None, "-")


def test_another_byte_is_an_error(benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "gpu_seconds", lambda *_, exact=False: 1.0)
    weight = torch.randn(2, 256, generator=torch.Generator().manual_seed(0))
    row = benchmark.measure_encoder("Q8_0", (weight, None), [(weight * 2, None)], None)
    assert row["same_as_cpu"] is False
    assert any("DIFFER" in line for line in benchmark.table([row], weight.numel())[1])
