"""Weights that are read ahead, computed on and written behind: the same bytes, bounded, and nothing left of a failure.

The threads are those of a run on a GPU; here they are switched on where the device is a CPU.
"""

import errno
import filecmp
import itertools
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Command, same_files

from quantool.data import TextOptions
from quantool.errors import QuantoolError
from quantool.io.safetensors import SafetensorsCheckpoint
from quantool.recipe import METHOD_DEFAULTS, Recipe
from quantool.scheme import GgufOptions
from quantool.stages import convert_gguf, quantize, streaming
from quantool.stages.streaming import AHEAD, Flow

CPU = torch.device("cpu")
RECIPES = [
    *(Recipe(method=method, **METHOD_DEFAULTS.get(method, {})) for method in ("rtn", "nf4", "fp4", "llm-int8")),
    Recipe(method="rtn", format="awq", group_size=64, sym=False),
    Recipe(method="rtn", format="gptq", group_size=32),
]


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Switches the threads on, and sees that none outlives the test."""
    monkeypatch.setattr(streaming, "overlaps", lambda _device: True)
    before = threading.active_count()
    yield
    assert threading.active_count() == before


def convert(model: Path, output: Path, outtype: str, **options: Any) -> convert_gguf.ConvertResult:
    return convert_gguf.run(str(model), output, GgufOptions(outtype), device="cpu", **options)


def rtn(model: Path, output: Path, recipe: Recipe = RECIPES[0], **options: Any) -> quantize.QuantizeResult:
    return quantize.run(str(model), output, recipe, text=TextOptions(), device="cpu", **options)


# --- the same bytes


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: f"{recipe.method}-{recipe.format}")
def test_every_method_writes_the_same_bytes(
    recipe: Recipe, tiny_sharded: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    plain = rtn(tiny_sharded, tmp_path / "plain", recipe)
    request.getfixturevalue("threads")
    streamed = rtn(tiny_sharded, tmp_path / "streamed", recipe)
    assert same_files(tmp_path / "plain", tmp_path / "streamed")
    assert (plain.bound, plain.busy_seconds) == (None, {})
    assert streamed.bound in {"disk", "PCIe", "compute"}
    assert set(streamed.busy_seconds) == {"reading", "copying", "computing", "writing"}
    assert all(seconds >= 0 for seconds in streamed.busy_seconds.values())


@pytest.mark.parametrize("outtype", ["q4_k_m", "q8_0", "iq4_xs", "bf16"])
@pytest.mark.parametrize("source", ["float", "packed", "gguf"])
def test_every_type_writes_the_same_bytes(
    outtype: str, source: str, tiny_llama: Path, tiny_gguf: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    model = {"float": tiny_llama, "packed": tmp_path / "packed", "gguf": tiny_gguf}[source]
    if source == "packed":
        rtn(tiny_llama, model, Recipe(method="rtn", group_size=32))
    options = GgufOptions(outtype, allow_requantize=True)
    convert_gguf.run(str(model), tmp_path / "plain.gguf", options, device="cpu")
    request.getfixturevalue("threads")
    streamed = convert_gguf.run(str(model), tmp_path / "streamed.gguf", options, device="cpu")
    assert filecmp.cmp(tmp_path / "plain.gguf", tmp_path / "streamed.gguf", shallow=False)
    assert streamed.bound is not None


@pytest.mark.usefixtures("threads")
def test_the_bound_is_printed(tiny_llama: Path, tmp_path: Path, command: Command) -> None:
    done = command("quantize", tiny_llama, "-o", tmp_path / "out", "--device", "cpu")
    assert done.code == 0
    assert ", bound by " in done.out


def test_a_device_that_is_not_there_is_an_error(tiny_llama: Path, tmp_path: Path, command: Command) -> None:
    for name in ("quantize", "convert-gguf"):
        done = command(name, tiny_llama, "-o", tmp_path / "out", "--device", "cuda:99")
        assert (done.code, done.err.splitlines()[-1]) == (2, "hint: use --device cpu")
    assert not list(tmp_path.iterdir())


# --- bounded


@pytest.mark.usefixtures("threads")
def test_it_reads_no_further_ahead_and_writes_no_further_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    behind = 8
    monkeypatch.setattr(streaming, "BEHIND", behind * torch.zeros(4, dtype=torch.int64).nbytes)
    read: list[int] = []
    dropped: list[int] = []
    written: list[int] = []
    gate = threading.Semaphore(0)  # lets one result be written

    def fetch(i: int) -> torch.Tensor:
        read.append(i)
        return torch.full((4,), i)

    def write(_name: str, tensor: torch.Tensor) -> None:
        assert gate.acquire(timeout=60)
        written.append(int(tensor[0]))

    with Flow(CPU) as flow:
        for i, tensor in flow.read(range(40), fetch, dropped.append):
            assert tensor is not None
            assert tensor.tolist() == [i] * 4
            assert len(read) <= i + 1 + AHEAD
            if i >= behind:
                gate.release()
            flow.write(write, "x", tensor)
            assert i + 1 - len(written) <= behind
        for _ in range(behind):
            gate.release()
    assert read == dropped == written == list(range(40))


@pytest.mark.usefixtures("threads")
def test_it_reads_and_writes_while_it_computes() -> None:
    """Each part waits for what only the others can do meanwhile."""
    ahead, behind = threading.Event(), threading.Event()

    def fetch(i: int) -> torch.Tensor:
        if i == 1:
            ahead.set()
        return torch.zeros(1)

    with Flow(CPU) as flow:
        for i, tensor in flow.read(range(2), fetch, lambda _: None):
            assert tensor is not None
            if i == 0:
                assert ahead.wait(60)
                flow.write(lambda *_: behind.set(), "x", tensor)
                assert behind.wait(60)


def test_a_cpu_computes_on_the_mapped_weight_itself() -> None:
    tensors = {name: torch.zeros(2) for name in "ab"}
    order: list[str] = []
    with Flow(CPU) as flow:
        for name, tensor in flow.read(tensors, tensors.__getitem__, lambda name: order.append(f"drop {name}")):
            assert tensor is tensors[name]
            flow.write(lambda name, _: order.append(f"write {name}"), name, tensor)
            flow.copy(order.append, f"copy {name}")
    assert order == ["write a", "copy a", "drop a", "write b", "copy b", "drop b"]
    assert flow.cost() == {}


@pytest.mark.usefixtures("threads")
def test_what_took_longest_is_the_bound() -> None:
    def slow(*_: object) -> torch.Tensor:
        time.sleep(0.05)
        return torch.zeros(1)

    def quick(*_: object) -> torch.Tensor:
        return torch.zeros(1)

    for part, read, write, compute in (("reading", slow, quick, quick), ("writing", quick, slow, quick)):
        with Flow(CPU) as flow:
            for _, tensor in flow.read(range(4), read, lambda _: None):
                assert tensor is not None
                compute()
                flow.write(write, "x", tensor)
        seconds = flow.cost()["busy_seconds"]
        assert max(seconds, key=lambda key: seconds[key]) == part
        assert flow.cost()["bound"] == "disk"
    with Flow(CPU) as flow:
        for _ in flow.read(range(4), quick, lambda _: None):
            slow()
    assert flow.cost()["bound"] == "compute"


# --- failures


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("stage", [rtn, lambda model, output: convert(model, output, "q8_0")], ids=["quantize", "gguf"])
def test_an_error_of_reading_is_the_same_error(
    stage: Any, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = SafetensorsCheckpoint.read

    def failing(self: SafetensorsCheckpoint, name: str) -> torch.Tensor:
        if name == "model.layers.1.mlp.up_proj.weight":
            raise QuantoolError("the disk is gone", hint="plug it in")
        return read(self, name)

    monkeypatch.setattr(SafetensorsCheckpoint, "read", failing)
    with pytest.raises(QuantoolError) as caught:
        stage(tiny_llama, tmp_path / "out")
    assert (caught.value.message, caught.value.hint) == ("the disk is gone", "plug it in")
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("stage", [rtn, lambda model, output: convert(model, output, "q8_0")], ids=["quantize", "gguf"])
def test_a_disk_that_fills_up_is_the_same_error(
    stage: Any, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pwrite, calls = os.pwrite, itertools.count()

    def full(descriptor: int, data: Any, offset: int) -> int:
        if next(calls) == 9:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return pwrite(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(QuantoolError, match="cannot be written: No space left on device"):
        stage(tiny_llama, tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("kind", [KeyboardInterrupt, QuantoolError])
@pytest.mark.parametrize("stage", [rtn, lambda *args, **options: convert(*args, "q8_0", **options)], ids=["q", "gguf"])
def test_stopping_in_the_middle_leaves_nothing(stage: Any, kind: Any, tiny_llama: Path, tmp_path: Path) -> None:
    def stop(done: int, total: int, _label: str) -> None:
        if done > total // 2:
            raise kind("stop")

    with pytest.raises(kind, match="stop"):
        stage(tiny_llama, tmp_path / "out", progress=stop)
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("threads")
def test_a_failure_does_not_write_what_is_waiting() -> None:
    started, gate, written = threading.Event(), threading.Event(), []

    def write(name: str, _tensor: torch.Tensor) -> None:
        started.set()
        assert gate.wait(60)
        written.append(name)

    def fail(flow: Flow) -> None:
        for name in "abc":
            flow.write(write, name, torch.zeros(1))
        assert started.wait(60)
        threading.Timer(0.1, gate.set).start()  # once the end of the flow is waiting
        raise ValueError("stop")

    with pytest.raises(ValueError, match="stop"), Flow(CPU) as flow:
        fail(flow)
    assert written == ["a"]
