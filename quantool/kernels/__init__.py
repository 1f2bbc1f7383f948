"""Operators with compiled kernels: schemas and torch references beside it, the C++ in csrc/; this file builds it.

    ops.py         what linears compute from packed weights       gptq_ops.py    the column loops of GPTQ
    ggml.py        blocks of ggml, whose references are in formats/ggml

The first use of a compiled operator compiles csrc/ through torch.utils.cpp_extension (ten seconds), once per machine:

    QUANTOOL_CACHE | TORCH_EXTENSIONS_DIR | ~/.cache/torch_extensions
        quantool/<hash of sources, flags, torch and processor>.so       loaded from here ever after
        quantool/build-<random>/                                        a build under way

Every build has a directory of its own and renames its result into place, so that concurrent builds are safe and one
that was killed blocks nobody (torch's own lock file would, for ever). What the library exports are plain C functions
over pointers, called through ctypes: they need no torch header but that of its thread pool, and launchers of CUDA
kernels can stand beside them. Without a compiler the torch references do the same work, slower; `why_not()` says why.
Nothing happens at import.
"""

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import sysconfig
import tempfile
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from quantool.errors import QuantoolError

__all__ = ["build", "compiled", "is_available", "why_not"]

SOURCES = Path(__file__).parent / "csrc"
MIN_TORCH = (2, 10)  # the first that lends its threads to extensions
HINT = "QUANTOOL_KERNELS=0 computes with torch alone"

# No fused multiply-add and no reordering: the results are those of the references, bit for bit.
FLAGS = ("-O3", "-ffp-contract=off", "-fno-trapping-math", "-fno-math-errno")
# By what torch found out about the processor, and part of the hash: a cache shared by several machines mixes nothing.
FLAGS_OF_CPU = {
    "AVX2": ("-mavx2",),
    "AVX512": ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"),
}

_one_at_a_time = threading.Lock()


def is_available() -> bool:
    """Whether the compiled kernels are used. Builds them if that was not done yet."""
    return compiled() is not None


def why_not() -> str | None:
    """Why the compiled kernels are not used, in one line; None when they are. Builds them if that was not done yet."""
    outcome = _outcome()
    return outcome if isinstance(outcome, str) else None


def compiled() -> ctypes.CDLL | None:
    """The library of compiled kernels, or None: torch does their work, and the log has said once why."""
    outcome = _outcome()
    return None if isinstance(outcome, str) else outcome


def _outcome() -> ctypes.CDLL | str:
    if os.environ.get("QUANTOOL_KERNELS") == "0":
        return "switched off by QUANTOOL_KERNELS=0"
    with _one_at_a_time:
        return _open()


@functools.cache
def _open() -> ctypes.CDLL | str:
    """The library, or why there is none. Tried once per process."""
    try:
        path = build()
        try:
            return ctypes.CDLL(str(path))
        except OSError:  # damaged, or of a system that shares nothing with this one but the cache
            path.unlink(missing_ok=True)
            return ctypes.CDLL(str(build()))
    except (QuantoolError, OSError) as error:
        reason = " ".join(str(error).split())
        logging.getLogger("quantool").info("no compiled kernels, torch computes in their place: %s", reason)
        return reason


def build() -> Path:
    """The compiled library in the cache, compiled now if it is not there.

    Raises QuantoolError: torch too old, no compiler, no place to write, or the compiler's first error.
    """
    import torch

    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < MIN_TORCH:
        raise QuantoolError(f"torch {torch.__version__} lends no threads to extensions, 2.10 does", hint=HINT)
    try:
        from torch.utils.cpp_extension import get_default_build_root

        flags = [*FLAGS, *FLAGS_OF_CPU.get(torch.backends.cpu.get_cpu_capability(), ())]
        root = os.environ.get("QUANTOOL_CACHE") or os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root()
        path = Path(root).absolute() / "quantool" / f"{_key(flags, torch.__version__)}.so"
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            _compile(path, flags)
        return path
    except (ImportError, OSError) as error:
        raise QuantoolError(f"the kernels cannot be built: {error}", hint=HINT) from error


def _key(flags: list[str], torch_version: str) -> str:
    """Whatever changes the compiled library changes its name."""
    key = hashlib.sha256(repr((flags, torch_version, platform.system(), platform.machine())).encode())
    for source in sorted(SOURCES.iterdir()):
        key.update(source.name.encode() + source.read_bytes())
    return key.hexdigest()[:20]


def _compile(path: Path, flags: list[str]) -> None:
    from torch.utils import cpp_extension

    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler.partition(" ")[0]) is None:
        raise QuantoolError(f"no C++ compiler: '{compiler}' is not on the PATH", hint="install g++, or set CXX")
    sources = [str(source) for source in sorted(SOURCES.glob("*.cpp"))]
    with (
        tempfile.TemporaryDirectory(prefix="build-", dir=path.parent, ignore_cleanup_errors=True) as directory,
        _build_environment(),
    ):
        try:
            cpp_extension.load(
                "quantool_kernels",
                sources,
                extra_cflags=flags,
                build_directory=directory,
                with_cuda=False,
                is_python_module=False,
            )
        except (RuntimeError, subprocess.SubprocessError) as error:
            message = f"'{compiler}' does not compile the kernels: {_first_error(str(error))}"
            raise QuantoolError(message, hint=HINT) from error
        [built] = Path(directory).glob(f"*{cpp_extension.LIB_EXT}")
        built.replace(path)


@contextmanager
def _build_environment() -> Iterator[None]:
    """What torch's build needs: ninja where pip put it, no warnings, no check of a C++ ABI that we do not use."""
    search = os.pathsep.join([os.environ.get("PATH", os.defpath), sysconfig.get_path("scripts")])
    changes = {"PATH": search, "TORCH_DONT_CHECK_COMPILER_ABI": "1"}
    before = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _first_error(output: str) -> str:
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    return next((line for line in lines if "error: " in line), lines[-1] if lines else "no output")
