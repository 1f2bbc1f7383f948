"""Compiling csrc/ into two libraries of plain C functions: *.cpp for the processor, cuda/*.cu for CUDA.

    kernels/prebuilt/                                       what `make kernels` made, and a wheel carries
    QUANTOOL_CACHE | TORCH_EXTENSIONS_DIR | ~/.cache/torch_extensions
        quantool/cpu-<hash>.so                              of sources, flags, torch and processor
        quantool/cuda13-9.0a-<hash>.so                      CUDA's major version, architectures; of sources and flags
        quantool/build-<random>/                            a build under way

Both go through torch.utils.cpp_extension. Every build has a directory of its own and renames its result into place, so
that concurrent builds are safe and one that was killed blocks nobody (torch's own lock file would, for ever).

The CUDA library holds CUDA's runtime and needs nothing of torch, so a torch without CUDA builds the very same: ahead of
time, or to see that it compiles. Such a torch does not know the toolkit and has none of the CUDA libraries that
cpp_extension links everything to; `_toolkit` and `_link_nothing_of_torch` are about that.
"""

import contextlib
import ctypes
import hashlib
import logging
import os
import platform
import re
import shutil
import subprocess
import sysconfig
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from quantool.errors import NOTE, QuantoolError

SOURCES = Path(__file__).parent / "csrc"
PREBUILT = Path(__file__).parent / "prebuilt"
MIN_TORCH = (2, 10)  # the first that lends its threads to extensions
HINT = "QUANTOOL_KERNELS=0 computes with torch alone"

# No fused multiply-add and no reordering: the results are those of the references, bit for bit.
FLAGS = ("-O3", "-ffp-contract=off", "-fno-trapping-math", "-fno-math-errno")
# By what torch found out about the processor, and part of the hash: a cache shared by several machines mixes nothing.
FLAGS_OF_CPU = {
    "AVX2": ("-mavx2",),
    "AVX512": ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"),
}
NVCC_FLAGS = ("-O3", "-std=c++17")
USUAL_CUDA_HOME = "/usr/local/cuda"
# Machine code for Ampere, which Ada runs too, and for Hopper; for what came later the driver compiles the PTX.
AHEAD_OF_TIME = "8.0+PTX;9.0a"


def cpu() -> ctypes.CDLL:
    """The library for the processor, compiled if it is nowhere.

    Raises QuantoolError: torch too old, no compiler, no place to write, or the compiler's first error.
    """
    name = _cpu_name()
    return _load(folder / name for folder in _folders()) or ctypes.CDLL(str(_compile_cpu(_cache() / name)))


def cuda(cards: Sequence[tuple[int, int]], version: str) -> ctypes.CDLL:
    """The library for cards of these compute capabilities, compiled if none that is there serves all of them.

    `version` is that of torch's CUDA. Raises QuantoolError: no nvcc or one of another major version, no compiler, no
    place to write, or the compiler's first error.
    """
    major = version.partition(".")[0]
    name = _cuda_name(major, _architectures(";".join("9.0a" if c == (9, 0) else f"{c[0]}.{c[1]}" for c in cards)))
    there = (path for folder in _folders() for path in sorted(folder.glob(_cuda_name(major, "*"))))
    if library := _load(path for path in there if path.name == name or _serves_all(path, cards)):
        return library
    home, version_of_nvcc = _toolkit()
    if version_of_nvcc.partition(".")[0] != major:
        raise QuantoolError(f"torch is built for CUDA {version} and nvcc is {version_of_nvcc}", hint=HINT)
    return ctypes.CDLL(str(_compile_cuda(_cache() / name, home)))


def ahead_of_time() -> list[Path]:
    """Compile both libraries into kernels/prebuilt/, and nothing else stays there. Needs no GPU."""
    shutil.rmtree(PREBUILT, ignore_errors=True)
    home, version = _toolkit()
    name = _cuda_name(version.partition(".")[0], _architectures(AHEAD_OF_TIME))
    return [_compile_cpu(PREBUILT / _cpu_name()), _compile_cuda(PREBUILT / name, home)]


def _cpu_flags() -> list[str]:
    import torch

    return [*FLAGS, *FLAGS_OF_CPU.get(torch.backends.cpu.get_cpu_capability(), ())]


def _cpu_name() -> str:
    import torch

    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < MIN_TORCH:
        raise QuantoolError(f"torch {torch.__version__} lends no threads to extensions, 2.10 does", hint=HINT)
    return f"cpu-{_hash(SOURCES.glob('*.*'), _cpu_flags(), torch.__version__)}.so"


def _cuda_name(major: str, architectures: str) -> str:
    sources = [*SOURCES.glob("*.h"), *SOURCES.glob("cuda/*")]  # kernels of both share headers
    return f"cuda{major}-{architectures.replace(';', '_')}-{_hash(sources, NVCC_FLAGS)}.so"


def _hash(sources: Iterable[Path], *parts: object) -> str:
    """Whatever changes the compiled library changes its name."""
    key = hashlib.sha256(repr((parts, platform.system(), platform.machine())).encode())
    for source in sorted(sources):
        key.update(source.name.encode() + source.read_bytes())
    return key.hexdigest()[:20]


def _architectures(otherwise: str) -> str:
    """What to compile for, in torch's words: "8.0+PTX;9.0a"."""
    return ";".join(sorted(set((os.environ.get("TORCH_CUDA_ARCH_LIST") or otherwise).replace(" ", ";").split(";"))))


def _serves_all(library: Path, cards: Sequence[tuple[int, int]]) -> bool:
    """Whether the architectures in the library's name serve all cards."""
    architectures = library.name.split("-")[1].split("_")
    return all(any(_serves(architecture, card) for architecture in architectures) for card in cards)


def _serves(architecture: str, card: tuple[int, int]) -> bool:
    """Machine code serves later cards of its major version, PTX all later ones, that of "9.0a" its own alone."""
    found = re.fullmatch(r"(\d+)\.(\d)(a?)(\+PTX)?", architecture)
    if found is None:  # "Hopper": torch knows more names
        return False
    first = int(found[1]), int(found[2])
    return card == first or (not found[3] and card > first and (card[0] == first[0] or found[4] is not None))


def _folders() -> Iterator[Path]:
    yield PREBUILT
    yield _cache()


def _cache() -> Path:
    from torch.utils.cpp_extension import get_default_build_root

    root = os.environ.get("QUANTOOL_CACHE") or os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root()
    return Path(root).absolute() / "quantool"


def _load(paths: Iterable[Path]) -> ctypes.CDLL | None:
    """The first that is there and loads: a file may be damaged, or of a system that shares only the folder with us."""
    for path in paths:
        with contextlib.suppress(OSError):
            return ctypes.CDLL(str(path))
    return None


def _compile_cpu(path: Path) -> Path:
    _announce("compiling the kernels for this processor, once (ten seconds)")
    return _compile(path, sorted(SOURCES.glob("*.cpp")), extra_cflags=_cpu_flags(), with_cuda=False)


def _compile_cuda(path: Path, home: Path) -> Path:
    architectures = path.name.split("-")[1].replace("_", ";")
    _announce(f"compiling the CUDA kernels for {architectures.replace(';', ' and ')}, once (a minute or two)")
    return _compile(
        path,
        sorted((SOURCES / "cuda").glob("*.cu")),
        home=home,
        architectures=architectures,
        extra_cuda_cflags=[*NVCC_FLAGS],
        with_cuda=True,
    )


def _announce(what: str) -> None:
    logging.getLogger("quantool").log(NOTE, what)


def _compile(
    path: Path, sources: list[Path], *, home: Path | None = None, architectures: str = "", **options: Any
) -> Path:
    """Compile `sources` into the file `path`: with the compiler of C++, and nvcc where its `home` is given."""
    from torch.utils import cpp_extension

    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler.partition(" ")[0]) is None:
        raise QuantoolError(f"no C++ compiler: '{compiler}' is not on the PATH", hint="install g++, or set CXX")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with (
            tempfile.TemporaryDirectory(prefix="build-", dir=path.parent, ignore_cleanup_errors=True) as directory,
            _build_environment(home, architectures),
        ):
            cpp_extension.load(
                "quantool_kernels",
                [str(source) for source in sources],
                extra_ldflags=_link_nothing_of_torch(Path(directory), compiler) if home else [],
                build_directory=directory,
                is_python_module=False,
                **options,
            )
            [built] = Path(directory).glob(f"*{cpp_extension.LIB_EXT}")
            return built.replace(path)
    except OSError as error:
        raise QuantoolError(f"the kernels cannot be built: {error}", hint=HINT) from error
    except (RuntimeError, ValueError, subprocess.SubprocessError) as error:
        tool = f"nvcc in {home}" if home else f"'{compiler}'"
        raise QuantoolError(f"{tool} does not compile the kernels: {_first_error(str(error))}", hint=HINT) from error


def _toolkit() -> tuple[Path, str]:
    """CUDA's toolkit and its version, from the first nvcc: of CUDA_HOME, the PATH, the usual place, PyPI's packages.

    nvcc itself is asked, for it may be a link or a script that calls the real one.
    """
    places = [os.environ.get("PATH", os.defpath), f"{USUAL_CUDA_HOME}/bin"]
    places += [str(path) for path in Path(sysconfig.get_path("purelib")).glob("nvidia/cu*/bin")]
    if home := os.environ.get("CUDA_HOME"):
        places.insert(0, f"{home}/bin")
    nvcc = shutil.which("nvcc", path=os.pathsep.join(places))
    if nvcc is None:
        raise QuantoolError(f"no nvcc on the PATH, in CUDA_HOME or {USUAL_CUDA_HOME}", hint="install CUDA's toolkit")
    command = [nvcc, "--dryrun", "-x", "cu", "-c", os.devnull]
    said = subprocess.run(command, capture_output=True, text=True, check=False).stderr
    top = re.search(r"TOP=(.*)", said)
    version = re.search(r"__CUDACC_VER_MAJOR__=(\d+) .*__CUDACC_VER_MINOR__=(\d+)", said)
    if top is None or version is None:
        raise QuantoolError(f"'{nvcc}' does not work: {_first_error(said)}", hint=HINT)
    return Path(top[1]).resolve(), f"{version[1]}.{version[2]}"


def _link_nothing_of_torch(directory: Path, compiler: str) -> list[str]:
    """Linker flags: CUDA's runtime as an archive, and empty libraries in the place of those that torch may not have.

    cpp_extension appends its own: what nothing refers to by then is dropped, which is all of it.
    """
    (directory / "empty").mkdir()
    for name in ("c10_cuda", "torch_cuda", "cudart"):
        command = [*compiler.split(), "-shared", "-o", f"{directory}/empty/lib{name}.so", "-x", "c++", os.devnull]
        subprocess.run(command, check=True, capture_output=True)
    return ["-Wl,--as-needed", "-Lempty", "-lcudart_static", "-ldl", "-lrt", "-lpthread"]


@contextlib.contextmanager
def _build_environment(home: Path | None, architectures: str) -> Iterator[None]:
    """What torch's build needs: ninja where pip put it, no warnings, no check of a C++ ABI that we do not use."""
    from torch.utils import cpp_extension

    search = os.pathsep.join([os.environ.get("PATH", os.defpath), sysconfig.get_path("scripts")])
    changes = {"PATH": search, "TORCH_DONT_CHECK_COMPILER_ABI": "1", "TORCH_CUDA_ARCH_LIST": architectures}
    before = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
    home_before, cpp_extension.CUDA_HOME = cpp_extension.CUDA_HOME, str(home) if home else None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        cpp_extension.CUDA_HOME = home_before
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _first_error(output: str) -> str:
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    telling = [line for line in lines if re.search("error: |fatal |not found|cannot find ", line)]
    return (telling or lines[-1:] or ["no output"])[0]
