"""CUDA kernels without a GPU: the fixture `emulated`, in which launchers get CPU tensors and run in the emulator.

g++ compiles every csrc/cuda/*.cu against kernels/emulator/emulator.h into one library:

    build/emulated/<name>-<hash>.o     one object per .cu; the hash is of all headers, its source and the flags
    build/emulated/<hash>.so           what ctypes loads: the same C functions that nvcc's library has

Nothing that is there is compiled again. Two compilers run at a time.

    python tests/emulated.py [arguments of pytest]

runs the tests with that fixture, and no others, where g++ has compiled the kernels for AddressSanitizer and UBSan: they
end the process at the first access outside of a tensor or of shared memory, and at what C++ leaves undefined.
"""

import ctypes
import hashlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from shutil import which

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
CUDA = ROOT / "quantool/kernels/csrc/cuda"
EMULATOR = ROOT / "tests/kernels/emulator"
CACHE = ROOT / "build/emulated"
SANITIZE = os.environ.get("EMULATED_SANITIZE") == "1"
WARNINGS = ("-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-Wno-unused-parameter")
# No fused multiply-add. _FORTIFY_SOURCE takes a jump between fibers for an error.
FLAGS = (
    "-std=c++17",
    "-g1",
    "-fPIC",
    "-ffp-contract=off",
    "-U_FORTIFY_SOURCE",
    f"-I{EMULATOR}",
    f"-I{CUDA}",
    *WARNINGS,
)
WATCHED = ("-O1", "-fsanitize=thread", "--param", "tsan-instrument-func-entry-exit=0")  # by races.cpp
SANITIZED = ("-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")


@dataclass(frozen=True)
class Emulated:
    library: ctypes.CDLL

    def seed(self, number: int) -> None:
        """Another order of threads and blocks from here on; what failed before is forgotten."""
        self.library.emulator_seed(ctypes.c_uint64(number))


@pytest.fixture(scope="session")
def emulator_library() -> ctypes.CDLL:
    if reason := why_not():
        pytest.skip(reason)
    return ctypes.CDLL(str(build()))


@pytest.fixture
def emulated(emulator_library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> Iterator[Emulated]:
    """Every kernel runs in the emulator, and what torch.empty makes is NaN."""
    from quantool.kernels import cuda

    monkeypatch.setattr(cuda, "library", lambda: emulator_library)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True)
    kernels = Emulated(emulator_library)
    kernels.seed(0)
    yield kernels
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if SANITIZE:
        others = [item for item in items if "emulated" not in getattr(item, "fixturenames", ())]
        config.hook.pytest_deselected(items=others)
        items[:] = [item for item in items if item not in set(others)]


def why_not() -> str | None:
    """Why kernels cannot be emulated here, in one line."""
    if sys.platform != "linux":
        return f"the emulator needs Linux, this is {sys.platform}"
    return None if which(_compiler()) else f"needs a C++ compiler: '{_compiler()}' is not on the PATH"


def build(sources: Sequence[Path] | None = None, *, sanitize: bool = SANITIZE) -> Path:
    """The library of these .cu files (all of the project), compiled as far as it is not in the cache.

    Raises RuntimeError with the first error of every file that does not compile.
    """
    sources = sorted(CUDA.glob(os.environ.get("EMULATED_FILES", "*.cu"))) if sources is None else list(sources)
    commands = [(source, _flags(source, sanitize=sanitize)) for source in [*sources, *sorted(EMULATOR.glob("*.cpp"))]]
    included = [*CUDA.glob("*.cuh"), *CUDA.parent.glob("*.h"), *EMULATOR.glob("*.h")]
    headers = [path.read_bytes() for path in sorted(included)]
    objects = [CACHE / f"{source.stem}-{_hash(headers, source.read_bytes(), flags)}.o" for source, flags in commands]
    library = CACHE / f"{_hash(objects)}.so"
    if library.is_file():
        return library
    CACHE.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(2) as pool:
        errors = list(pool.map(_make, objects, ([*flags, "-c", str(source)] for source, flags in commands)))
    if not any(errors):
        errors = [_make(library, ["-shared", *(SANITIZED if sanitize else ()), *map(str, objects)])]
    if found := [error for error in errors if error]:
        raise RuntimeError("\n".join(found))
    return library


def sanitized_environment() -> dict[str, str]:
    """For a process in which sanitized libraries are loaded: their runtime has to be there before all others."""
    runtimes = [
        subprocess.check_output([_compiler(), f"-print-file-name={name}"], text=True).strip()
        for name in ("libasan.so", "libstdc++.so")  # the latter, or it does not see torch throw
    ]
    changes = {"LD_PRELOAD": " ".join(runtimes), "ASAN_OPTIONS": "detect_leaks=0", "EMULATED_SANITIZE": "1"}
    return {**os.environ, **changes}


def _flags(source: Path, *, sanitize: bool) -> tuple[str, ...]:
    """Kernels are watched; the emulator itself is compiled as it is."""
    kernel = SANITIZED if sanitize else WATCHED
    return (*FLAGS, *(kernel if source.suffix == ".cu" else ("-O2",)), "-x", "c++")


def _hash(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def _compiler() -> str:
    return os.environ.get("CXX", "g++")


def _make(made: Path, arguments: Sequence[str]) -> str | None:
    """Run the compiler unless its result is there, and rename that into place; its first error, or None."""
    if made.is_file():
        return None
    with tempfile.TemporaryDirectory(dir=CACHE) as directory:
        new = Path(directory) / made.name
        command = [_compiler(), *arguments, "-o", str(new)]
        done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=ROOT)
        if not done.returncode:
            new.replace(made)
            return None
    lines = done.stderr.splitlines()
    first = next((i for i, line in enumerate(lines) if "error: " in line or "undefined reference" in line), 0)
    return "\n".join(lines[first : first + 4])


if __name__ == "__main__":
    if reason := why_not():
        sys.exit(f"nothing sanitized: {reason}")
    command = [sys.executable, "-m", "pytest", "-q", "-s", *sys.argv[1:]]  # -s: the report is no output of a test
    os.execve(sys.executable, command, sanitized_environment())
