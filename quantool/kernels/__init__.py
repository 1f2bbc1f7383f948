"""Operators with compiled kernels: schemas and torch references beside it, C++ and CUDA in csrc/.

    ops.py      what linears compute from packed weights        tiles.py    the layout of packed weights on CUDA
    rows.py     those of integer codes on the CPU               wna16.py    linears from tiles
    int8.py     linears with int8 activations on CUDA           nf4.py      linears of nf4 and fp4 on CUDA
    rtn.py      ranges and codes of groups                      gptq_ops.py the column loops of GPTQ
    ggml.py     blocks of ggml; references in formats/ggml

    build.py    compiles csrc/ into two libraries               cuda.py     the one for CUDA, and calls into it

The first use of a compiled operator compiles its library, ten seconds for the processor and minutes for CUDA, once per
machine. They export plain C functions over pointers, called through ctypes. Without a compiler, nvcc or a GPU the
torch references do the same work, slower; `why_not()` and `cuda.why_not()` say why. Nothing happens at import.
"""

import ctypes
import functools
import logging
import os
import threading
from collections.abc import Callable

from quantool.errors import QuantoolError
from quantool.kernels import build

__all__ = ["compiled", "is_available", "outcome_of", "status", "why_not"]

_one_at_a_time = threading.Lock()  # a build changes the environment of the process


def is_available() -> bool:
    """Whether the kernels for the processor are used. Builds them if that was not done yet."""
    return compiled() is not None


def why_not() -> str | None:
    """Why they are not used, in one line; None when they are. Builds them if that was not done yet."""
    outcome = outcome_of(build.cpu)
    return outcome if isinstance(outcome, str) else None


def compiled() -> ctypes.CDLL | None:
    """The library of them, or None: torch does their work, and the log has said once why."""
    outcome = outcome_of(build.cpu)
    return None if isinstance(outcome, str) else outcome


def status() -> dict[str, str]:
    """Where each library is, or why there is none: what `quantool --version -v` prints. Builds what was not yet."""
    from quantool.kernels import cuda

    outcomes = {"kernels": outcome_of(build.cpu), "kernels on CUDA": cuda.outcome()}
    return {name: f"none: {found}" if isinstance(found, str) else found._name for name, found in outcomes.items()}


def outcome_of(load: Callable[[], ctypes.CDLL]) -> ctypes.CDLL | str:
    """The library that `load` finds or builds, or why there is none, in one line. It is called once per process."""
    if os.environ.get("QUANTOOL_KERNELS") == "0":
        return "switched off by QUANTOOL_KERNELS=0"
    with _one_at_a_time:
        return _open(load)


@functools.cache
def _open(load: Callable[[], ctypes.CDLL]) -> ctypes.CDLL | str:
    try:
        return load()
    except (QuantoolError, OSError, ImportError) as error:
        reason = " ".join(str(error).split())
        logging.getLogger("quantool").info("no compiled kernels, torch computes in their place: %s", reason)
        return reason
