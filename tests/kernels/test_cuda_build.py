"""The CUDA library: built by nvcc on a machine without a GPU, found again, refused for a reason; and calls into it."""

import ctypes
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from kernel_builds import ROOT, empty_cache, program, python
from torch.utils import cpp_extension

from quantool import kernels
from quantool.errors import QuantoolError
from quantool.kernels import build, cuda

FILL = """
#include "device.cuh"
namespace quantool {
__global__ void fill(float* y, float value) { y[threadIdx.x] = value; }
}  // namespace quantool
extern "C" int quantool_fill(void* y, int64_t count, double value, void* stream) {
  return quantool::launch(quantool::fill, dim3(1), dim3((unsigned)count), 0, stream, (float*)y, (float)value);
}
"""
# What arrived, in the order of the parameters.
ECHO = """
#include <cstdint>
extern "C" int quantool_echo(double* out, const void* nothing, int64_t a, int64_t b, double c, void* stream) {
  out[0] = (nothing == nullptr) + 2 * (stream == nullptr);
  out[1] = (double)a;
  out[2] = (double)b;
  out[3] = c;
  return a < 0 ? -1 : 0;
}
"""


def toolkit() -> tuple[Path, str]:
    try:
        return build._toolkit()
    except QuantoolError as error:
        pytest.skip(str(error))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache and a process that has not tried yet."""
    kernels._open.cache_clear()
    yield empty_cache(tmp_path, monkeypatch)
    kernels._open.cache_clear()


@pytest.fixture
def version(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The version of nvcc; and csrc/ is small, so that it compiles in seconds."""
    found = toolkit()[1]
    small(tmp_path / "csrc")
    monkeypatch.setattr(build, "SOURCES", tmp_path / "csrc")
    return found


def small(sources: Path) -> None:
    (sources / "cuda").mkdir(parents=True)
    for name in ("device.cuh", "runtime.cu"):
        shutil.copy(ROOT / "quantool/kernels/csrc/cuda" / name, sources / "cuda")
    (sources / "cuda/fill.cu").write_text(FILL)
    (sources / "one.cpp").write_text('extern "C" int quantool_one() { return 1; }\n')


def no_compilers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setenv("CXX", "/bin/false")
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.setattr(build, "USUAL_CUDA_HOME", "/nowhere")
    monkeypatch.setattr(build.sysconfig, "get_path", lambda name: "/nowhere")


def machine(monkeypatch: pytest.MonkeyPatch, version: str | None, *cards: tuple[int, int]) -> None:
    """A torch that is built for this CUDA and sees these cards."""
    monkeypatch.setattr(torch.version, "cuda", version)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(cards))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(cards))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: cards[index])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"card {index}")


without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


# The build


def test_a_process_without_torch_loads_it_and_nothing_of_the_build_stays(
    version: str, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    eager = f'exec {os.environ.get("CXX", "c++")} -Wl,--no-as-needed "$@"'  # as some compilers are by default
    monkeypatch.setenv("CXX", program(tmp_path / "eager", eager))
    home = cpp_extension.CUDA_HOME
    before = dict(os.environ)
    path = Path(build.cuda([(8, 0), (9, 0)], version)._name)
    assert path.name.startswith(f"cuda{version.partition('.')[0]}-8.0_9.0a-")
    assert list(cache.iterdir()) == [path]
    code = f"import ctypes; print(ctypes.CDLL({str(path)!r}).quantool_cuda_probe())"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={}, check=False)
    assert found.stderr == ""
    if not torch.cuda.is_available():
        assert int(found.stdout) == 35
    assert (dict(os.environ), cpp_extension.CUDA_HOME) == (before, home)


def test_what_is_there_serves_all_cards_that_it_has_code_for(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = build.cuda([(8, 0)], version)._name
    no_compilers(monkeypatch)
    assert build.cuda([(8, 0)], version)._name == path
    assert build.cuda([(8, 9), (8, 6)], version)._name == path
    for cards in ([(9, 0)], [(8, 0), (9, 0)], [(7, 5)]):
        with pytest.raises(QuantoolError, match="no nvcc"):
            build.cuda(cards, version)


@pytest.mark.parametrize(
    ("architecture", "cards"),
    [
        ("8.0", {(8, 0), (8, 6), (8, 9)}),
        ("8.6", {(8, 6), (8, 9)}),
        ("8.0+PTX", {(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)}),
        ("9.0a", {(9, 0)}),
        ("9.0", {(9, 0)}),
        ("9.0a+PTX", {(9, 0)}),
        ("Hopper", set()),
    ],
)
def test_which_cards_an_architecture_serves(architecture: str, cards: set[tuple[int, int]]) -> None:
    every = [(7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)]
    assert {card for card in every if build._serves(architecture, card)} == cards


def test_the_architectures_are_torchs_variable_when_it_is_set(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0a 8.6")
    path = build.cuda([(9, 0)], version)._name
    assert "-8.6_9.0a-" in path
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0z")
    with pytest.raises(QuantoolError, match=r"does not compile the kernels: Unknown CUDA arch \(9.0z\)"):
        build.cuda([(7, 5)], version)


def test_every_source_and_header_of_cuda_changes_its_name(version: str, tmp_path: Path) -> None:
    names = {build._cuda_name("13", "9.0a")}
    for changed in ("cuda/device.cuh", "cuda/fill.cu", "shared.h"):
        (tmp_path / "csrc" / changed).write_text("// other\n")
        names.add(build._cuda_name("13", "9.0a"))
    assert len(names) == 4
    (tmp_path / "csrc/one.cpp").write_text("// other\n")
    assert build._cuda_name("13", "9.0a") in names
    before = build._cpu_name()
    (tmp_path / "csrc/cuda/fill.cu").write_text(FILL)
    assert build._cpu_name() == before


def test_a_damaged_library_is_built_again(version: str, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    cache.mkdir(parents=True)
    path = cache / build._cuda_name(version.partition(".")[0], "9.0a")
    path.write_bytes(b"\x7fELF, and then nothing")
    assert build.cuda([(9, 0)], version)["quantool_fill"]
    no_compilers(monkeypatch)
    assert Path(build.cuda([(9, 0)], version)._name) == path


def test_two_processes_build_at_once(version: str, cache: Path, tmp_path: Path) -> None:
    code = f"build.SOURCES = build.Path({str(tmp_path / 'csrc')!r}); print(build.cuda([(9, 0)], {version!r})._name)"
    both = [python(code) for _ in range(2)]
    printed = {process.communicate(timeout=120)[0].strip() for process in both}
    assert printed == {str(path) for path in cache.iterdir()}
    assert len(printed) == 1


def test_a_killed_build_blocks_nobody(version: str, cache: Path, tmp_path: Path) -> None:
    slow = program(tmp_path / "nvcc", "sleep 60")
    code = f"build.SOURCES = build.Path({str(tmp_path / 'csrc')!r}); build.cuda([(9, 0)], {version!r})"
    process = python(code, PYTORCH_NVCC=slow)
    deadline = time.monotonic() + 60
    while not list(cache.glob("build-*/lock")) and time.monotonic() < deadline:  # torch's lock file
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert list(cache.glob("build-*/lock"))
    assert build.cuda([(9, 0)], version)["quantool_fill"]


def test_nvcc_is_found_behind_a_script_and_among_the_packages_of_pypi(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home, version = toolkit()
    packaged = tmp_path / "site-packages/nvidia/cu99/bin"
    packaged.mkdir(parents=True)
    script = program(packaged / "nvcc", f'PATH="{os.environ["PATH"]}" exec "{home}/bin/nvcc" "$@"')
    no_compilers(monkeypatch)
    monkeypatch.setattr(build.sysconfig, "get_path", lambda name: str(tmp_path / "site-packages"))
    assert build._toolkit() == (home, version)
    program(Path(script), "echo nvcc fatal : no licence >&2; exit 1")
    with pytest.raises(QuantoolError, match=r"'.*/nvcc' does not work: nvcc fatal : no licence"):
        build._toolkit()


# Why there is none


def reason() -> str:
    found = cuda.why_not()
    assert found is not None
    assert "\n" not in found
    assert not cuda.is_available()
    assert cuda.library() is None
    with pytest.raises(RuntimeError, match=r"^quantool_fill: "):
        cuda.call("quantool_fill", torch.empty(4), 4, 1.0)
    return found


@pytest.mark.parametrize(
    ("version", "cards", "expected"),
    [
        (None, [], f"torch {torch.__version__} is built without CUDA"),
        ("13.0", [], f"no GPU that torch {torch.__version__} can use"),
        ("13.0", [(7, 0), (6, 1)], "card 0 has compute capability 7.0, the kernels need 7.5"),
    ],
)
@pytest.mark.usefixtures("cache")
def test_what_the_machine_lacks(
    version: str | None, cards: list[tuple[int, int]], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(monkeypatch, version, *cards)
    assert reason() == expected


def test_another_cuda_no_nvcc_a_failing_one_and_the_switch(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def why(changes: Callable[[pytest.MonkeyPatch], None], torchs: str = version) -> str:
        kernels._open.cache_clear()
        with monkeypatch.context() as patch:
            machine(patch, torchs, (9, 0))
            changes(patch)
            return reason()

    assert why(lambda patch: None, "99.1") == f"torch is built for CUDA 99.1 and nvcc is {version}"
    assert why(no_compilers) == "no nvcc on the PATH, in CUDA_HOME or /nowhere"
    assert why(lambda patch: patch.setenv("CXX", "no-such")) == "no C++ compiler: 'no-such' is not on the PATH"
    assert why(lambda patch: patch.setenv("QUANTOOL_KERNELS", "0")) == "switched off by QUANTOOL_KERNELS=0"
    broken = build.SOURCES / "cuda/broken.cu"
    broken.write_text('extern "C" int quantool_broken() { return missing; }\n')
    home = toolkit()[0]
    found = why(lambda patch: None)
    assert found.startswith(f"nvcc in {home} does not compile the kernels: {broken}(1): error: identifier")


@without_gpu
def test_no_driver(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, version, (9, 0))
    assert reason() == "CUDA error 35: CUDA driver version is insufficient for CUDA runtime version"


# Calls


@without_gpu
def test_a_launch_without_a_driver_is_an_error_by_name(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    library = build.cuda([(9, 0)], version)
    monkeypatch.setattr(cuda, "library", lambda: library)
    with pytest.raises(RuntimeError, match=r"^quantool_fill: CUDA error 35: CUDA driver version is insufficient"):
        cuda.call("quantool_fill", torch.empty(4), 4, 1.0)


@pytest.fixture
def echo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        pytest.skip("no C++ compiler")
    (tmp_path / "echo.cpp").write_text(ECHO)
    path = tmp_path / "echo.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", path, tmp_path / "echo.cpp"], check=True)
    library = ctypes.CDLL(str(path))
    monkeypatch.setattr(cuda, "library", lambda: library)


@pytest.mark.usefixtures("echo")
def test_arguments_arrive() -> None:
    out = torch.zeros(4, dtype=torch.float64)
    cuda.call("quantool_echo", out, None, 3 << 40, -7, 0.1)
    assert out.tolist() == [3, 3 << 40, -7, 0.1]
    cuda.call("quantool_echo", out, torch.ones(4), True, 0, -1e300)
    assert out.tolist() == [2, 1, 0, -1e300]
    cuda.call("quantool_echo", torch.nn.Parameter(out), None, 0, 0, 2.5)
    assert out.tolist() == [3, 0, 0, 2.5]


@pytest.mark.usefixtures("echo")
def test_what_no_kernel_may_be_given_is_refused_before_the_launch() -> None:
    out = torch.zeros(4, dtype=torch.float64)
    wrong = {
        torch.ones(4, 6).T: r"argument 2, float32 \[6, 4\], is not contiguous: its strides are \[1, 6\]",
        torch.ones(8)[1:]: r"argument 2, float32 \[7\], starts 4 bytes after a multiple of 16",
        torch.ones(8, device="meta"): "argument 2 is on meta and an earlier one on cpu",
    }
    for tensor, message in wrong.items():
        with pytest.raises(ValueError, match=f"^quantool_echo: {message}$"):
            cuda.call("quantool_echo", out, tensor, 1, 2, 3.0)
    assert out.tolist() == [0, 0, 0, 0]
    with pytest.raises(RuntimeError, match=r"^quantool_echo: no kernel is compiled for these numbers$"):
        cuda.call("quantool_echo", out, None, -1, 2, 3.0)


# Ahead of time


def test_a_library_of_make_kernels_needs_no_compiler(
    version: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build.PREBUILT.mkdir()
    (build.PREBUILT / "cuda12-8.0-of-before.so").touch()
    paths = build.ahead_of_time()
    assert sorted(paths) == sorted(build.PREBUILT.iterdir())
    no_compilers(monkeypatch)
    assert [build.cpu()._name, build.cuda([(8, 6), (9, 0), (12, 0)], version)._name] == [str(path) for path in paths]
    assert build.cpu().quantool_one() == 1
    with pytest.raises(QuantoolError, match="no nvcc"):
        build.cuda([(7, 5)], version)
    assert not cache.exists()


@pytest.mark.slow
def test_a_wheel_carries_both_libraries(tmp_path: Path) -> None:
    version = toolkit()[1]
    project, package = tmp_path / "project", tmp_path / "project/quantool"
    shutil.copytree(ROOT / "quantool", package, ignore=shutil.ignore_patterns("__pycache__", "prebuilt", "csrc"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, project)
    small(package / "kernels/csrc")

    def run(*command: str, **environment: str) -> str:
        return subprocess.run(
            [sys.executable, *command],
            cwd=project,
            env={**os.environ, "QUANTOOL_CACHE": str(tmp_path / "cache"), **environment},
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        ).stdout

    run("-c", "from quantool.kernels import build; build.ahead_of_time()")
    run("-m", "pip", "wheel", "-q", "--no-build-isolation", "--no-deps", "-w", str(tmp_path), ".")
    shutil.rmtree(project)
    project.mkdir()
    [wheel] = tmp_path.glob("*.whl")
    code = f"from quantool.kernels import build; print(build.cpu()._name, build.cuda([(9, 0)], {version!r})._name)"
    shutil.unpack_archive(wheel, tmp_path / "installed", "zip")
    installed = run("-c", code, PYTHONPATH=str(tmp_path / "installed"), PATH="", CXX="/bin/false", CUDA_HOME="").split()
    assert [str(Path(path).parent) for path in installed] == [f"{tmp_path}/installed/quantool/kernels/prebuilt"] * 2
