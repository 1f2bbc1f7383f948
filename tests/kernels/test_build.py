"""Building the kernels: a clean cache, several processes, a killed build, no compiler, a broken one, a damaged file."""

import logging
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from kernel_builds import empty_cache, program, python

from quantool import console, kernels
from quantool.errors import QuantoolError
from quantool.kernels import build, gptq_ops


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    kernels._open.cache_clear()
    yield empty_cache(tmp_path, monkeypatch)
    kernels._open.cache_clear()


@pytest.fixture
def library() -> str:
    """The name of the library in a cache; asked for before `cache` empties the cache."""
    reason = kernels.why_not()
    if reason is not None:
        pytest.skip(reason)
    return Path(build.cpu()._name).name


def op_agrees() -> bool:
    weight = torch.linspace(-1, 1, 70 * 9).view(70, 9)
    arguments = (weight, torch.eye(9), torch.full((70, 1), 0.1), torch.full((70, 1), 8.0), torch.zeros(9).int(), 15)
    pairs = zip(gptq_ops.gptq_columns(*arguments), gptq_ops.gptq_columns_reference(*arguments), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def test_two_processes_build_at_once_and_a_third_compiles_nothing(
    library: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    both = [python("from quantool import kernels; print(kernels.why_not())") for _ in range(2)]
    assert [process.communicate(timeout=60)[0] for process in both] == ["None\n", "None\n"]
    assert [path.name for path in cache.iterdir()] == [library]
    monkeypatch.setenv("CXX", "/bin/false")
    assert kernels.is_available()
    assert op_agrees()


def test_a_killed_build_blocks_nobody(library: str, cache: Path, tmp_path: Path) -> None:
    slow = program(tmp_path / "slow", "sleep 60")
    process = python("build.cpu()", CXX=slow)
    deadline = time.monotonic() + 30
    while not list(cache.glob("build-*/lock")) and time.monotonic() < deadline:  # torch's lock file
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert list(cache.glob("build-*/lock"))
    assert Path(build.cpu()._name) == cache / library
    assert op_agrees()


def test_a_damaged_library_is_built_again(library: str, cache: Path) -> None:
    cache.mkdir(parents=True)
    (cache / library).write_bytes(b"\x7fELF, and then nothing")
    assert kernels.is_available()
    assert op_agrees()


def test_a_compiler_that_fails_is_named_once_and_torch_computes(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    error = "gptq.cpp:1:2: error: no such thing"
    path = program(tmp_path / "c++", f"echo here; echo '{error}'; echo 'x.cpp:1:1: error: another'; exit 1")
    monkeypatch.setenv("CXX", path)
    with caplog.at_level(logging.INFO, "quantool"):
        assert op_agrees()
        assert op_agrees()
    reason = kernels.why_not()
    assert reason == f"'{path}' does not compile the kernels: {error}"
    assert [record.message for record in caplog.records] == [
        "compiling the kernels for this processor, once (ten seconds)",
        f"no compiled kernels, torch computes in their place: {reason}",
    ]
    assert not kernels.is_available()
    assert not list(cache.iterdir())


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("CXX", "/bin/false", "'/bin/false' does not compile the kernels: "),
        ("CXX", "no-such-compiler", "no C++ compiler: 'no-such-compiler' is not on the PATH"),
        ("QUANTOOL_CACHE", __file__, "the kernels cannot be built: [Errno 20] Not a directory"),
        ("QUANTOOL_KERNELS", "0", "switched off by QUANTOOL_KERNELS=0"),
    ],
)
@pytest.mark.usefixtures("cache")
def test_why_there_are_none(
    name: str, value: str, reason: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(name, value)
    found = kernels.why_not()
    assert found is not None
    assert found.startswith(reason)
    assert "\n" not in found
    assert not kernels.is_available()
    assert op_agrees()
    assert capfd.readouterr() == ("", "")


def test_a_torch_that_is_too_old_is_named(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "2.9.1+cpu")
    with pytest.raises(QuantoolError, match=r"torch 2.9.1\+cpu lends no threads to extensions, 2.10 does"):
        build.cpu()


@pytest.mark.parametrize(
    ("verbosity", "shown"), [(-1, ""), (0, "note: compiling the kernels for this processor, once")]
)
@pytest.mark.usefixtures("cache")
def test_the_command_line_says_that_it_compiles(
    verbosity: int, shown: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CXX", "/bin/false")
    with console.log(verbosity):
        kernels.why_not()
    assert capsys.readouterr().err.partition(" (")[0] == shown


def test_the_environment_is_left_as_it_was(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "/bin/false")
    before = dict(os.environ)
    kernels.why_not()
    assert dict(os.environ) == before


def test_importing_it_does_nothing() -> None:
    code = "import sys, quantool.kernels; print(sorted({'torch', 'setuptools'} & set(sys.modules)))"
    assert python(code, CXX="/bin/false").communicate(timeout=30)[0] == "[]\n"
